"""Synthetic lung sections, cohorts and pyramids whose grade is known."""
