"""Bundled weights, for work without downloads; their ``.md`` describe them."""

from pathlib import Path

BUNDLED = Path(__file__).parent


def bundled_weights(backbone: str) -> Path:
    """Returns the path of a backbone's bundled weights, present for few."""
    return BUNDLED / f"procedural_{backbone}.safetensors"
