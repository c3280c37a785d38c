"""Metrics, intervals and tests of predictions: NumPy in, frozen results out."""
