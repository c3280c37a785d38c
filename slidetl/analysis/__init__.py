"""What representations have in common: arrays in, frozen results out."""
