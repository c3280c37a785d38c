"""Scriptable modules from tiles to a grade, independent of trainers and slide files."""
