from typing import Any

import numpy as np
import pytest

from slidetl.errors import FederationError
from slidetl.federation.message import outgoing, read_hello
from slidetl.federation.weights import METRIC_BOUNDS
from slidetl.tiles.grid import TileSpec

NETWORK = {"head.score.weight": np.zeros((1, 4), np.float32), "norm.num_batches_tracked": np.array(2)}
TRAINED = {"head.score.weight": np.ones((1, 4), np.float32), "norm.num_batches_tracked": np.array(9)}
TILE = np.zeros((8, 8, 3), np.uint8)
SPEC = TileSpec(mpp=4.0, tile_size_px=64).to_dict()
SITES = ("here", "there")


def send(**answer: Any) -> dict[str, Any]:
    return outgoing(answer, NETWORK, SITES)


def test_allowed_fields_leave_as_plain_values() -> None:
    sent = send(weights=TRAINED, examples=np.int64(40), metrics={"train_loss": np.float64(0.5), "slides": 12})
    for name, value in sent["weights"].items():
        assert type(value) is np.ndarray and value.base is None
        assert value.dtype == NETWORK[name].dtype and value.shape == NETWORK[name].shape
    assert sent["weights"].keys() == NETWORK.keys() and sent["metrics"].keys() <= METRIC_BOUNDS.keys()
    assert type(sent["examples"]) is int and all(type(value) is float for value in sent["metrics"].values())
    assert send(counters={"norm.num_batches_tracked": np.array(9)}) == {
        "counters": {"norm.num_batches_tracked": np.array(9)}
    }
    hello = {"tile_spec": SPEC, "examples": 3, "frozen_sha256": "a" * 64}
    assert send(**hello) == hello
    assert send(frozen_sha256="") == {"frozen_sha256": ""} and send(failed="KeyError") == {
        "failed": "KeyError"
    }
    assert send(left_out={"there": "no such file: P0012.svs"}) == {"left_out": {"there": ""}}


class _Labelled(np.ndarray):
    slide_id = "patient-7"


def test_arrays_carry_nothing_beside_their_values() -> None:
    labelled = {**TRAINED, "head.score.weight": TRAINED["head.score.weight"].view(_Labelled)}
    assert not hasattr(send(weights=labelled)["weights"]["head.score.weight"], "slide_id")
    view = {**TRAINED, "head.score.weight": np.arange(100, dtype=np.float32)[:4].reshape(1, 4)}
    assert send(weights=view)["weights"]["head.score.weight"].base is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"weights": {**TRAINED, "tiles": TILE}}, "1 foreign entries, such as tiles"),
        ({"weights": {**TRAINED, "/data/slides/P0012.svs": np.zeros(1, np.float32)}}, "1 foreign entries"),
        ({"weights": {**TRAINED, "head.score.weight": np.array([["P0012", "b", "c", "d"]])}}, "float32"),
        ({"weights": {**TRAINED, "head.score.weight": np.array([[{}, 1, 2, 3]], object)}}, "is object"),
        ({"weights": {**TRAINED, "head.score.weight": TILE}}, r"is uint8 \[8, 8, 3\]"),
        ({"weights": {**TRAINED, "head.score.weight": "P0012"}}, "is no array"),
        ({"weights": {"head.score.weight": TRAINED["head.score.weight"]}}, "1 missing entries"),
        ({"weights": "P0012"}, "no weights"),
        ({"counters": TRAINED}, "1 foreign entries, such as head.score.weight"),
        ({"counters": {"norm.num_batches_tracked": TILE}}, r"is uint8 \[8, 8, 3\]"),
        ({"counters": [1]}, "no weights"),
        ({"ciphertexts": [b"P0012"]}, "the ciphertexts of an update"),
        ({"ciphertexts": TRAINED}, "the ciphertexts of an update"),
        ({"examples": "P0012"}, "examples is no count"),
        ({"examples": [1, 2]}, "examples is no count"),
        ({"metrics": {"P0012": 0.5}}, "metric 'P0012' is not one of accuracy, epsilon, loss"),
        ({"metrics": {"accuracy": "P0012"}}, "metric accuracy is no finite number"),
        ({"metrics": {"accuracy": [0.1, 0.2]}}, "metric accuracy is no finite number"),
        ({"metrics": {"accuracy": float("nan")}}, "metric accuracy is no finite number"),
        ({"metrics": {"accuracy": True}}, "metric accuracy is no finite number"),
        ({"metrics": ["P0012"]}, "metrics has another form"),
        ({"tile_spec": {**SPEC, "slide": "P0012"}}, "tile_spec has another form"),
        ({"tile_spec": {**SPEC, "foreign": "/data/slides/P0012"}}, "tile_spec names a path"),
        ({"frozen_sha256": "P0012"}, "frozen_sha256 has another form"),
        ({"failed": "KeyError: 'P0012'"}, "failed has another form"),
        ({"left_out": {"P0012": "gone"}}, "left_out names no site"),
        ({"slides": ["P0012"]}, "the field 'slides' is not on the list"),
        ({"thumbnail": TILE}, "the field 'thumbnail' is not on the list"),
    ],
)
def test_pixels_paths_and_identifiers_stop_a_message(answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(FederationError, match=f"this site sends nothing: .*{reason}"):
        outgoing(answer, NETWORK, SITES)


@pytest.mark.parametrize(
    "changes",
    [
        {"tile_spec": None},
        {"tile_spec": {**SPEC, "mpp": np.ones(2)}},
        {"tile_spec": {**SPEC, "mpp": float("inf")}},
        {"tile_spec": {**SPEC, "channels": 3}},
        {"tile_spec": {**SPEC, "icc": ["P0012"]}},
        {"tile_spec": {**SPEC, "tile_size_px": 10**5000}},
        {"tile_spec": {**SPEC, "foreign": "x" * 10**5}},
        {"tile_spec": {**SPEC, "window_hu": [10**400, 0]}},
        {"tile_spec": {**SPEC, b"mpp": 1.0}},
        {"frozen_sha256": np.zeros(2)},
        {"frozen_sha256": "f" * 63},
    ],
)
def test_a_hello_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    hello = {"tile_spec": SPEC, "frozen_sha256": "a" * 64}
    assert read_hello({**hello, "examples": 4}) == hello
    with pytest.raises(FederationError, match=f"^{next(iter(changes))} has another form"):
        read_hello({**hello, **changes})
