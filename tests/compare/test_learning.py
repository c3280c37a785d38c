from __future__ import annotations

import numpy as np

from slidetl.compare.learning import Learning


def test_a_metric_that_is_undefined_at_every_epoch_has_no_plateau() -> None:
    undefined, known = np.full((2, 2), np.nan), np.array([[0.5, 0.8], [0.5, 0.8]])
    curve = Learning(
        "a", "inner", np.array([5, 10]), np.array([1.0, 2.0]), {"qwk": undefined, "accuracy": known}, 4
    )
    assert curve.plateau("qwk") is None and curve.plateau("accuracy") == 10
    assert np.isnan([curve.mean("qwk", None), curve.seconds_until(None)]).all()
    assert (curve.mean("accuracy", 10), curve.seconds_until(10)) == (0.8, 2)
