"""Turns caches and grades into batches. Import the module that is needed; this one imports nothing."""
