"""Tiles: selection, cutting, storage and reading, and the ledger of all slides."""
