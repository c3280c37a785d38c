"""From caches and grades to batches. Import the module that is needed; this one imports nothing."""
