"""slidetl: transfer learning that grades gigapixel histology slides.

The package reads downwards as one story::

    slides/        something readable at a physical spacing
    tissue.py      where on the slide there is something to read
    grid.py        which tiles that makes
    cache/         tiles on disk, and what became of every slide
    data/          from caches and grades to batches
    models/        tile -> embedding -> slide -> grade, as plain modules
    tasks/         how a model is trained and tested
    evaluation/    how good it is, and how sure we are
    export.py      what leaves: one TorchScript file
    inference.py   that file and a new slide -> a grade and a map
    cli/           the same from the command line

Importing the package imports nothing heavy; each part is imported where it is used.
"""

__version__ = "0.1.0"
