"""Tiles: which ones a slide has, how they are cut, stored and read, and the ledger of all slides."""
