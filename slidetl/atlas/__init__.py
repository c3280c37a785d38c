"""Recurring patterns and similar tiles in stored features, without labels."""
