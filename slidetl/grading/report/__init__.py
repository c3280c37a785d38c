"""Self-contained pages of graded slides: one per slide, one over a folder, and a map for QuPath."""
