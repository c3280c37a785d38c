"""A local web page over the commands of slidetl: ``slidetl studio``. See docs/design/studio.md.

In reading order: ``paths`` confines every path to the root, ``project`` is a study on disk, ``presets`` turns
a choice into commands, ``jobs`` runs them one after the other, ``results`` reads their output, ``guard``
decides who may ask, ``app`` answers, ``texts`` has every word of the pages.
"""
