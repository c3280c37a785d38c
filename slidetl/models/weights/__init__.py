"""Weights that come with slidetl, so that nothing need be downloaded; their ``.md`` say what they are."""

from pathlib import Path

BUNDLED = Path(__file__).parent


def bundled_weights(backbone: str) -> Path:
    """Returns the path of a backbone's bundled weights; they exist for few."""
    return BUNDLED / f"procedural_{backbone}.safetensors"
