"""Comparison of representations: arrays in, frozen results out."""
