"""What people look at: self-contained pages, of a graded slide, of a folder of them, and of an experiment."""
