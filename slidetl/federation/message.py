"""All that may leave a site, by an allow-list of fields and their types, where messages are built."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FederationError
from slidetl.federation.encryption import serialised
from slidetl.federation.weights import (
    SiteUpdate,
    Weights,
    counters,
    find_fault,
    find_metric_fault,
)
from slidetl.text import one_line
from slidetl.tiles.grid import TileSpec

_LONGEST_SPEC = 4000  # letters, as JSON


class _Known(NamedTuple):
    """All that a site knows to be public.

    Attributes:
        network: the entries that travel.
        sites: names of all sites.
    """

    network: Weights
    sites: Collection[str]


def outgoing(answer: Mapping[str, Any], network: Weights, sites: Collection[str] = ()) -> dict[str, Any]:
    """Builds what leaves a site of an answer, and refuses all that is not on the list.

    The list: ``weights`` of the names, shapes and types of the network; of an encrypted update instead
    ``ciphertexts``, which are serialised here, and ``counters``, the entries of integers; ``examples``, a
    count; ``metrics`` of :data:`~slidetl.federation.weights.METRIC_BOUNDS`; ``tile_spec``, the options of
    tiling; ``frozen_sha256``, a hash; ``left_out``, names of sites; ``failed``, the class of an error.

    Args:
        answer: of the site.
        network: the entries that travel.
        sites: names of all sites.

    Returns:
        The answer, of new plain values.

    Raises:
        FederationError: a field is not on the list, or not of its form.
    """
    known = _Known(network, sites)
    built = {}
    for field, value in answer.items():
        if field not in _FIELDS:
            raise FederationError(f"this site sends nothing: the field {_name(field)} is not on the list")
        try:
            built[str(field)] = _FIELDS[field](value, known)
        except FederationError as error:
            raise FederationError(f"this site sends nothing: {error}") from error
    return built


def read_hello(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what must be the same at all sites in an answer, ``tile_spec`` and ``frozen_sha256``.

    Args:
        answer: came from a site; nothing in it is trusted.

    Raises:
        FederationError: a field has another form.
    """
    fields = ("tile_spec", "frozen_sha256")
    return {field: _FIELDS[field](answer.get(field), _Known({}, ())) for field in fields}


def _weights(value: Any, known: _Known) -> dict[str, NDArray[Any]]:
    fault = (
        find_fault(SiteUpdate("", value, 1), known.network) if isinstance(value, Mapping) else "no weights"
    )
    if fault:
        raise FederationError(fault)
    # New arrays: a view or a subclass could carry more than its values.
    return {str(name): np.array(array, copy=True, subok=False) for name, array in value.items()}


def _counters(value: Any, known: _Known) -> dict[str, NDArray[Any]]:
    return _weights(value, known._replace(network=counters(known.network)))


def _ciphertexts(value: Any, known: _Known) -> list[bytes]:
    return serialised(value, known.network)


def _count(value: Any, known: _Known) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise FederationError("examples is no count")
    return int(value)


def _metrics(value: Any, known: _Known) -> dict[str, float]:
    if fault := find_metric_fault(value):
        raise FederationError(fault)
    return {str(name): float(number) for name, number in value.items()}


def _tile_spec(value: Any, known: _Known) -> dict[str, Any]:
    try:
        spec = TileSpec.from_dict(dict(_mapping(value, "tile_spec"))).to_dict()
        is_plain = all(isinstance(v, (int, float, str)) for name, v in spec.items() if name != "window_hu")
        if not is_plain or len(json.dumps(spec, allow_nan=False)) > _LONGEST_SPEC:
            raise ValueError("expected few plain values")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FederationError("tile_spec has another form") from error
    if any(isinstance(text, str) and re.search(r"[/\\]", text) for text in spec.values()):
        raise FederationError("tile_spec names a path")
    return spec


def _site_names(value: Any, known: _Known) -> dict[str, str]:
    """Keeps names of sites; the reasons stay here, since their texts could hold anything."""
    if any(name not in known.sites for name in _mapping(value, "left_out")):
        raise FederationError("left_out names no site")
    return {str(name): "" for name in value}


def _text(field: str, pattern: str) -> Callable[[Any, _Known], str]:
    def check(value: Any, known: _Known) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise FederationError(f"{field} has another form")
        return str(value)

    return check


def _mapping(value: Any, field: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise FederationError(f"{field} has another form")
    return value


def _name(value: object) -> str:
    return repr(one_line(str(value))[:80])


_FIELDS: dict[str, Callable[[Any, _Known], Any]] = {
    "weights": _weights,
    "counters": _counters,
    "ciphertexts": _ciphertexts,
    "examples": _count,
    "metrics": _metrics,
    "tile_spec": _tile_spec,
    "frozen_sha256": _text("frozen_sha256", r"([0-9a-f]{64})?"),
    "left_out": _site_names,
    "failed": _text("failed", r"[A-Za-z_]\w{0,60}"),
}
