"""From the rounds of a federation to an entry of a model library, by the commands of a user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from slidetl.cli import main
from slidetl.federation.config import Federation
from slidetl.federation.coordinator import SitesHere, run_rounds
from slidetl.federation.records import read_arrays
from slidetl.files import file_sha256
from slidetl.library.card import LibraryCard
from slidetl.publish.model_file import load_model
from slidetl.training.predictions import read_predictions


@pytest.mark.slow
def test_a_result_is_published_with_the_hashes_of_its_rounds(
    three: Federation,
    sites_here: Callable[[Federation], SitesHere],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = run_rounds(three, sites_here(three), tmp_path, lambda account: None)["best"]
    rounds = [tmp_path / "rounds" / f"{number:04}.safetensors" for number in range(best, 0, -1)]
    north, model = tmp_path / "sites" / "north", tmp_path / "model.pt"
    checkpoint = north / "checkpoints" / "best.ckpt"
    place = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    assert main(["test", f"--config={north / 'config.yaml'}", f"--ckpt_path={checkpoint}", *place]) == 0
    assert len(read_predictions(tmp_path / "test" / "predictions.csv")) == 1
    assert main(["export", str(checkpoint), "--output", str(model)]) == 0
    library, about = str(tmp_path / "library"), ["--description", "Of three sites"]
    assert main(["zoo", "publish", str(model), "--to", library, "--name", "three-sites", *about]) == 0

    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))  # another user
    assert main(["zoo", "pull", "three-sites", "--from", library]) == 0
    assert main(["zoo", "use", "three-sites"]) == 0
    entry = tmp_path / "home" / "zoo" / "three-sites"
    card = LibraryCard.from_bytes((entry / "card.json").read_bytes(), "three-sites", library)
    of_rounds = [file_sha256(path) for path in rounds]
    assert list(card.model.lineage[: len(rounds)]) == of_rounds
    assert len(card.model.lineage) == len(rounds) + 1  # the pretrained weights come last
    assert of_rounds[0] == json.loads(rounds[0].with_suffix(".json").read_text())["sha256"]
    assert card.model.training is not None and card.model.training.slides == 4  # of this site alone
    published = load_file(entry / "weights.safetensors")
    for name, value in read_arrays(rounds[0]).items():
        np.testing.assert_array_equal(published[name.replace("network.", "networks.0.", 1)], value)
    assert load_model(entry / "model.pt").card == card.model

    server, of_server = tmp_path / "checkpoints" / "best.ckpt", tmp_path / "server.pt"
    assert main(["export", str(server), "--output", str(of_server), "--no-training-data"]) == 0
    assert load_model(of_server).card.weights_sha256 == card.model.weights_sha256
    assert load_model(of_server).card.lineage == card.model.lineage
