"""Reports a comparison as a page of text, tables and plots."""
