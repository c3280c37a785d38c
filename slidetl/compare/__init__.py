"""Arms against each other on the same splits: ``slidetl compare``. See docs/design/compare.md.

It reads downwards: ``config`` says what is compared, ``plan`` makes of it units (one arm on one fold),
``unit`` computes one, ``pool`` many at a time, and ``result`` takes them together.
"""
