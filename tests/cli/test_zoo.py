from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from slidetl.cli import main
from slidetl.library.model_card import Evidence
from slidetl.models.aggregators import MeanPooling
from slidetl.publish.export import build_network, export_model
from slidetl.publish.model_file import load_model
from slidetl.tiles.grid import TileSpec
from slidetl.training.checkpoint import load_grader
from slidetl.training.grader import SlideGrader
from tests.conftest import Study
from tests.small import small_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lung-1.pt"
    torch.manual_seed(0)
    grader = SlideGrader(small_spec(), MeanPooling).eval()
    grader.network.backbone.load_pretrained()
    grader.tile_spec = TileSpec(mpp=4, tile_size_px=64)
    evidence = Evidence(60, 50, {"QWK": (0.712, 0.6, 0.8)}, 1.2, 0.9, 0.8, "01" * 32)
    export_model(*build_network([grader], evidence=evidence), path)
    return path


@pytest.fixture
def library(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """With one model in it, for a user who has pulled nothing; `capsys` holds what was said at its making."""
    folder = tmp_path / "library"
    about = ["--description", "Grades\n lungs", "--intended-use", "Tests", "--contact", "nobody"]
    assert main(["zoo", "publish", str(model), "--to", str(folder), *about]) == 0
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))
    return folder


def test_the_way_of_a_model(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = capsys.readouterr()
    assert f"slidetl zoo pull lung-1 --from {library}" in said.out and said.err == ""
    sha256 = said.out.splitlines()[1].split()[-1]

    assert main(["zoo", "list", "--from", str(library)]) == 0
    listed = capsys.readouterr().out
    assert "lung-1  mobilenetv3_small_050" in listed and "Grades lungs" in listed and "0.71" in listed

    assert main(["zoo", "show", "lung-1", "--from", str(library)]) == 0
    shown = capsys.readouterr().out
    *card, last = shown.splitlines()
    assert yaml.safe_load("\n".join(card)) == json.loads((library / "lung-1" / "card.json").read_text())
    assert last == f"sha256 of the card {sha256}"

    assert main(["zoo", "pull", "lung-1", "--from", str(library), "--sha256", "0" * 64]) == 2
    assert "not the model that you were told of" in capsys.readouterr().err
    assert main(["zoo", "pull", "lung-1", "--from", str(library), "--sha256", sha256]) == 0
    pulled = capsys.readouterr().out
    assert main(["zoo", "use", "lung-1"]) == 0
    used = capsys.readouterr().out
    assert pulled.endswith(used)
    file = tmp_path / "home" / "zoo" / "lung-1" / "model.pt"
    assert f"slidetl grade {file} " in used and load_model(file).card.members == 1
    values = yaml.safe_load(used[used.index("model:") :])
    source = {"name": "mobilenetv3_small_050", "pretrained": "zoo://lung-1"}
    assert values == {"model": {"backbone": source}}

    assert main(["zoo", "list"]) == 0  # of what was pulled
    assert f"1 models in {file.parents[1]}" in capsys.readouterr().out


def test_the_environment_names_the_library(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["zoo", "pull", "lung-1"]) == 2
    assert "give --from DIR_OR_URL, or set SLIDETL_ZOO" in capsys.readouterr().err
    monkeypatch.setenv("SLIDETL_ZOO", str(library))
    assert main(["zoo", "pull", "lung-1"]) == 0


def test_one_damaged_entry_does_not_hide_the_others(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (library / "bad-1").mkdir()
    (library / "bad-1" / "card.json").write_text("")
    assert main(["zoo", "list", "--from", str(library)]) == 1
    listed = capsys.readouterr().out
    assert "lung-1" in listed and "not the card of a slidetl model" in listed and "2 models" in listed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["use", "lung-1"], "no model 'lung-1' was pulled"),
        (["use", "../lung-1"], "named by small letters"),
        (["show", "lung-2"], "no model 'lung-2' here; there are: lung-1"),
        (["publish", "none.pt"], "none.pt: no such model file"),
        (["publish", "Model File.pt"], "named by small letters"),
    ],
)
def test_mistakes_are_one_clear_line(
    words: list[str],
    said: str,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLIDETL_ZOO", str(library))
    capsys.readouterr()
    assert main(["zoo", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_looking_into_a_library_does_not_start_torch(library: Path) -> None:
    program = f"""
import sys
from slidetl.cli import main
assert main(["zoo", "list", "--from", {str(library)!r}]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", ["WarmRestart", "MeanVarInit", "Scratch"])
@pytest.mark.slow
def test_a_training_names_its_ancestors(strategy: str, library: Path, study: Study, tmp_path: Path) -> None:
    assert main(["zoo", "pull", "lung-1", "--from", str(library)]) == 0
    parent = load_model(tmp_path / "home" / "zoo" / "lung-1" / "model.pt").card
    assert len(parent.lineage) == 1
    options = [*study.options(tmp_path / "run"), f"--model.transfer={strategy}", "--trainer.max_epochs=1"]
    begun = ["--model.backbone.pretrained=zoo://lung-1", "--trainer.limit_train_batches=1"]
    assert main(["fit", *options, *begun]) == 0
    checkpoint = tmp_path / "run" / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    child = tmp_path / "lung-2.pt"
    assert main(["export", str(checkpoint), "--output", str(child), "--no-training-data"]) == 0
    expected = () if strategy == "Scratch" else (parent.weights_sha256, *parent.lineage)
    assert load_model(child).card.lineage == expected
    assert load_grader(checkpoint).network.backbone.lineage == expected
