"""Metrics, intervals, tests, folds and calibration of ordinal grades: NumPy in, frozen results out.

Conventions of all modules, unless a docstring differs:

- K grades; N results (slides, or patients with their slides made one result); R repeats; P patients.
- ``true [N]`` and ``predicted [N]`` or ``[R, N]`` are whole numbers 0..K-1; ``probabilities [N, K]`` or
  ``[R, N, K]`` have rows that sum to one; ``patients [N]`` are identifiers of any type.
- Intervals resample patients, given the fitted models. ``**how`` are the options of
  :class:`~slidetl.evaluation.bootstrap.Resampling`.
- :class:`~slidetl.errors.UsageError`, a ValueError, refuses other shapes, grades off the scale, rows
  that are no distributions, and values that are not finite. "Raises" lists further causes.
"""
