"""Reads model cards, the record of trusted models, and pulled models. See docs/design/zoo.md."""
