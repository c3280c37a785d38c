"""The version of slidetl, apart from the public API, so that every part may name it."""

VERSION = "0.1.0"
