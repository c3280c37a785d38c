"""What people look at: one self-contained page per graded slide, an index of them, and a map for QuPath."""
