"""Tiles on disk: how they are made, stored, read, and what became of every slide."""
