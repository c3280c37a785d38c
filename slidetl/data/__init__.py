"""Batches from caches and grades. Import its modules directly; this file imports nothing."""
