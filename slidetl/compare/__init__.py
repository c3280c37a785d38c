"""Compares arms on the same splits: ``slidetl compare``. See docs/design/compare.md.

In reading order: ``config`` describes a comparison, ``plan`` turns it into jobs (one arm on one fold),
``pool`` computes them, ``records`` keeps their results, ``aggregate`` combines these, ``report`` shows them.
"""
