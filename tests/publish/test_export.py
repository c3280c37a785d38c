from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import slidetl
from slidetl.analysis.novelty import fit_familiar
from slidetl.errors import ModelFileError
from slidetl.library.model_card import Evidence
from slidetl.models.aggregators import GatedAttention, MeanPooling, Pooling
from slidetl.models.spec import BackboneSpec
from slidetl.publish.export import _covered, build_network, export_model
from slidetl.publish.model_file import load_model
from slidetl.tiles.grid import TileSpec
from slidetl.training.checkpoint import load_grader
from slidetl.training.grader import SlideGrader


@pytest.fixture(scope="module")
def grader(trained: Path) -> SlideGrader:
    return load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def model_path(grader: SlideGrader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pt"
    worst = export_model(*build_network([grader]), path)
    assert worst["cpu float32"] < 1e-5 and worst["cpu bfloat16"] < 2e-2
    assert load_model(path).card.precisions == tuple(worst)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]
    return path


def test_the_comparison_covers_what_a_gpu_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    of_cpu, on_gpu = ["cpu float32", "cpu bfloat16"], ["cuda float32"]
    assert torch.cuda.is_available() or list(_covered()) == of_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_it, more in ((False, []), (True, ["cuda bfloat16"])):
        monkeypatch.setattr("slidetl.publish.export.has_bfloat16", lambda _, found=has_it: found)
        assert list(_covered()) == [*of_cpu, *on_gpu, *more]


def test_file_computes_what_the_network_computes(grader: SlideGrader, model_path: Path) -> None:
    model = load_model(model_path)
    tiles = torch.randint(0, 256, (70, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        logits, attention = grader.network(tiles[None], torch.ones(1, 70, dtype=torch.bool))
        expected = grader.network.head.probabilities(logits)[0]
        embeddings = model.network.embed(tiles)
        probabilities, grade, weights, (score, contributions) = model.network.grade(embeddings)
        own = grader.network.explain(embeddings[None], torch.ones(1, 70, dtype=torch.bool))[2]
        alone = [model.network.grade(embeddings[i : i + 1])[3][0] for i in range(70)]
        torch.testing.assert_close(model.network(tiles), expected, atol=1e-5, rtol=0)
    assert own is not None and model.card.score_unit == "log-odds"
    torch.testing.assert_close((score, contributions), (own[0][0], own[1][0]), atol=1e-5, rtol=0)
    baseline = torch.stack(alone).mean()
    torch.testing.assert_close(contributions.sum(), score - baseline, atol=1e-5, rtol=0)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, attention[0, 0], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(grade, (expected * torch.arange(5)).sum(), atol=1e-4, rtol=0)
    assert grader.tile_spec == model.card.tile_spec
    assert model.card.grades == ("0", "1", "2", "3", "4")


@pytest.mark.slow
def test_file_runs_where_only_torch_is(model_path: Path) -> None:
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("slidetl", "timm", "pytorch_lightning", "torchvision", "zarr"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import warnings
import torch
warnings.simplefilter("ignore")
extra = {{"slidetl.json": ""}}
model = torch.jit.load({str(model_path)!r}, _extra_files=extra)
tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
assert abs(model(tiles).sum().item() - 1) < 1e-5
import json
print(json.loads(extra["slidetl.json"])["tile_spec"]["mpp"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4.0\n"), done.stderr


@pytest.mark.slow
def test_an_ensemble_votes_with_its_temperature(grader: SlideGrader, tmp_path: Path) -> None:
    other = SlideGrader(BackboneSpec("mobilenetv2_100"), MeanPooling).eval()
    other.tile_spec = grader.tile_spec
    evidence = Evidence(12, 10, {}, temperature=2.0, coverage=0.9, quantile=0.5, predictions_sha256="")
    export_model(*build_network([grader, other], evidence=evidence), tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt")
    assert model.card.members == 2
    tiles = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    votes = []
    with torch.inference_mode():
        for member in (grader, other):
            logits, _ = member.network(tiles[None], torch.ones(1, 6, dtype=torch.bool))
            softer = member.network.head.probabilities(logits)[0].sqrt()  # the temperature is 2
            votes.append(softer / softer.sum())
        embeddings = model.network.embed(tiles)
        torch.testing.assert_close(model.network(tiles), sum(votes) / 2, atol=1e-5, rtol=0)
        score, contributions = model.network.grade(embeddings)[3]
        alone = [model.network.grade(tile[None])[3][0] for tile in embeddings]
    baseline = torch.stack(alone).mean()  # each is the mean over the members
    torch.testing.assert_close(contributions.sum(), score - baseline, atol=1e-5, rtol=0)
    assert embeddings.shape == (6, 1280 + grader.network.backbone.num_features)
    assert model.network.novelty(embeddings).isnan()


def test_networks_of_other_grades_make_no_ensemble(grader: SlideGrader) -> None:
    other = SlideGrader(grades=["no", "yes"])
    other.tile_spec = grader.tile_spec
    with pytest.raises(ModelFileError, match="same grades and tiles"):
        build_network([grader, other])


@pytest.mark.slow
def test_the_file_knows_what_is_familiar(grader: SlideGrader, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    width = grader.network.backbone.num_features
    familiar = fit_familiar(rng.normal(size=(30, width)), [str(i) for i in range(30)])
    export_model(*build_network([grader], familiar=familiar), tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt")
    assert model.card.novelty_limit == familiar.limit
    embeddings = rng.normal(size=(5, width)).astype(np.float32)
    found = float(model.network.novelty(torch.from_numpy(embeddings)))
    assert found == pytest.approx(familiar.novelty(embeddings.mean(0, keepdims=True)).item(), rel=1e-4)


def test_a_stranger_is_not_run(model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path))
    with pytest.raises(ModelFileError, match="a model file is a program"):
        load_model(model_path)
    assert load_model(model_path, trusted=True).card.grades


def test_a_packed_file_is_refused_before_it_is_unpacked(model_path: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(model_path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
        packed.writestr("m/data/99", bytes(50_000_000))
    with pytest.raises(ModelFileError, match="its parts are packed"):
        load_model(bomb, trusted=True)


# Named here, since TorchScript takes a comment on types inside a function for a type comment.
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined] # torch does not list it


class Unlike(torch.nn.Module):
    """Computes something else once it is scripted."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y.flip(1) if _is_scripting() else y


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    other = SlideGrader(BackboneSpec("resnet18"), MeanPooling).eval()
    other.tile_spec = TileSpec(mpp=4, tile_size_px=64)
    other.network.backbone.net = Unlike(other.network.backbone.net)
    with pytest.raises(ModelFileError, match=r"differs from the network by .*cpu float32.*was not written"):
        export_model(*build_network([other]), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_does_not_say_where_the_sources_lay(model_path: Path) -> None:
    assert str(Path(slidetl.__file__).parents[1]).encode() not in model_path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", [MeanPooling, GatedAttention])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_other_networks_export_too(
    grader: SlideGrader, tmp_path: Path, name: str, aggregator: type[Pooling]
) -> None:
    other = SlideGrader(BackboneSpec(name), aggregator).eval()
    other.tile_spec = grader.tile_spec
    assert export_model(*build_network([other]), tmp_path / "m.pt")["cpu float32"] < 1e-5


def test_damaged_and_foreign_files_are_refused(model_path: Path, tmp_path: Path, grader: SlideGrader) -> None:
    content = bytearray(model_path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.pt").write_bytes(content)
    (tmp_path / "torn.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("flipped.pt", "torn.pt", "text.pt"):
        with pytest.raises(ModelFileError) as caught:
            load_model(tmp_path / name, trusted=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="no such model file"):
        load_model(tmp_path / "none.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit; torch 2.6 had none
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "foreign.pt"))
    with pytest.raises(ModelFileError, match="not a model file of slidetl"):
        load_model(tmp_path / "foreign.pt", trusted=True)
    with pytest.raises(ModelFileError, match="does not say what tiles"):
        build_network([SlideGrader()])
