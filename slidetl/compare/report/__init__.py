"""A comparison for people: the page, its parts, tables and plots."""
