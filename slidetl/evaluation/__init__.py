"""How good predictions are, and how sure of it one may be: NumPy in, frozen results out."""
