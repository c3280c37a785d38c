"""Runners that bring the parts together to answer a question."""
