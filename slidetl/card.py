"""What a model says of itself: what it was trained on, and what it has to be given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from slidetl.errors import ModelFileError, UsageError
from slidetl.grid import TileSpec

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelCard:
    """What the file says of itself.

    Attributes:
        grades: names, lowest first.
        tile_spec: the tiles that the network was trained on and has to be given.
        backbone: timm's name for it.
        normalisation: ``mean`` and ``std`` of pixel values in 0..1 that the network applies itself.
        versions: of the software that made the file.
        weights_sha256: hash of the network's state, checked when the file is loaded.
    """

    grades: tuple[str, ...]
    tile_spec: TileSpec
    backbone: str
    normalisation: dict[str, list[float]]
    versions: dict[str, str]
    weights_sha256: str

    def to_json(self) -> str:
        """The card as it stands in the file."""
        values = {**self.__dict__, "tile_spec": self.tile_spec.to_dict(), "format_version": FORMAT_VERSION}
        return json.dumps(values, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            ModelFileError: it says something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ModelFileError(f"expected a model file of format {FORMAT_VERSION}, found {version}")
            values["tile_spec"] = TileSpec.from_dict(values["tile_spec"])
            values["grades"] = tuple(values["grades"])
            return cls(**values)
        except (AttributeError, KeyError, TypeError, UsageError, json.JSONDecodeError) as error:
            raise ModelFileError(f"not the metadata of a slidetl model: {error!r}") from error
