"""Reads model cards, the record of trusted models, and pulled models. See docs/design/zoo.md."""

from .local import pulled_folder
from .model_card import ModelCard

__all__ = ["ModelCard", "pulled_folder"]
