"""Draws synthetic lung sections, cohorts and pyramids of known grade."""
