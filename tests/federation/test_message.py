from typing import Any

import numpy as np
import pytest

from slidetl.errors import FederationError
from slidetl.federation.message import METRICS, outgoing, outgoing_metrics
from slidetl.federation.weights import SiteUpdate

NETWORK = {"head.score.weight": np.zeros((1, 4), np.float32), "norm.num_batches_tracked": np.array(2)}
TRAINED = {"head.score.weight": np.ones((1, 4), np.float32), "norm.num_batches_tracked": np.array(9)}
TILE = np.zeros((8, 8, 3), np.uint8)


def test_message_has_weights_a_count_and_chosen_metrics_alone() -> None:
    message = outgoing(SiteUpdate("hospital_a", TRAINED, 40, {"train_loss": 0.5, "slides": 12.0}), NETWORK)
    assert message._fields == ("weights", "examples", "metrics")
    assert "hospital_a" not in repr(message)
    assert message.weights.keys() == NETWORK.keys() and message.metrics.keys() <= METRICS
    for name, value in message.weights.items():
        assert type(value) is np.ndarray and value.base is None
        assert value.dtype == NETWORK[name].dtype and value.shape == NETWORK[name].shape
    assert type(message.examples) is int and all(type(value) is float for value in message.metrics.values())


class _Labelled(np.ndarray):
    slide_id = "patient-7"


def test_arrays_carry_nothing_beside_their_values() -> None:
    labelled = TRAINED["head.score.weight"].view(_Labelled)
    bigger = np.arange(100, dtype=np.float32)
    weights = {"head.score.weight": labelled, "norm.num_batches_tracked": np.array(1)}
    message = outgoing(SiteUpdate("a", weights, 1), NETWORK)
    assert not hasattr(message.weights["head.score.weight"], "slide_id")
    weights["head.score.weight"] = bigger[:4].reshape(1, 4)
    assert outgoing(SiteUpdate("a", weights, 1), NETWORK).weights["head.score.weight"].base is None


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({**TRAINED, "tiles": TILE}, "1 foreign entries, such as tiles"),
        ({**TRAINED, "/data/slides/P0012.svs": np.zeros(1, np.float32)}, "1 foreign entries"),
        ({**TRAINED, "head.score.weight": np.array([["P0012", "b", "c", "d"]])}, "expected float32"),
        ({**TRAINED, "head.score.weight": np.array([[{}, 1, 2, 3]], object)}, "is object"),
        ({**TRAINED, "head.score.weight": TILE}, r"is uint8 \[8, 8, 3\]"),
        ({**TRAINED, "head.score.weight": "P0012"}, "is no array"),
        ({"head.score.weight": TRAINED["head.score.weight"]}, "1 missing entries"),
    ],
)
def test_pixels_paths_and_identifiers_among_the_weights_stop_the_message(
    weights: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FederationError, match=f"this site sends nothing: .*{reason}"):
        outgoing(SiteUpdate("a", weights, 1), NETWORK)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (
            {"P0012": 0.5},
            "metric 'P0012' is not one of accuracy, epsilon, loss, mae, rps, slides, train_loss",
        ),
        ({"accuracy": "P0012"}, "metric accuracy is no finite number"),
        ({"accuracy": [0.1, 0.2]}, "metric accuracy is no finite number"),
        ({"accuracy": float("nan")}, "metric accuracy is no finite number"),
        ({"accuracy": True}, "metric accuracy is no finite number"),
    ],
)
def test_metrics_beyond_the_list_stop_the_message(metrics: dict[str, Any], reason: str) -> None:
    with pytest.raises(FederationError, match=reason):
        outgoing(SiteUpdate("a", TRAINED, 1, metrics), NETWORK)
    with pytest.raises(FederationError, match=reason):
        outgoing_metrics(metrics)
