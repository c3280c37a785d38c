from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slidetl.errors import ModelFileError
from slidetl.export import export_model, load_model
from slidetl.models.aggregators import GatedAttention, MeanPooling, Pooling
from slidetl.tasks.checkpoint import load_grader
from slidetl.tasks.slide import SlideGrader


@pytest.fixture(scope="module")
def grader(trained: Path) -> SlideGrader:
    return load_grader(trained / "logs" / "version_0" / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def model_path(grader: SlideGrader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pt"
    assert export_model(grader, path) < 1e-5
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]
    return path


def test_file_computes_what_the_network_computes(grader: SlideGrader, model_path: Path) -> None:
    model = load_model(model_path)
    tiles = torch.randint(0, 256, (70, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        logits, attention = grader.network(tiles[None], torch.ones(1, 70, dtype=torch.bool))
        expected = grader.network.head.probabilities(logits)[0]
        embeddings = model.network.embed(tiles)
        probabilities, grade, weights = model.network.grade(embeddings)
        alone = [model.network.grade(embeddings[i : i + 1])[1] for i in range(5)]
        torch.testing.assert_close(model.network(tiles), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.network.grade_tiles(embeddings)[:5], torch.stack(alone))
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, attention[0, 0], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(grade, (expected * torch.arange(5)).sum(), atol=1e-4, rtol=0)
    assert grader.tile_spec == model.card.tile_spec
    assert model.card.grades == ("0", "1", "2", "3", "4")


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


@pytest.mark.parametrize("aggregator", [MeanPooling, GatedAttention])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_other_networks_export_too(
    grader: SlideGrader, tmp_path: Path, name: str, aggregator: type[Pooling]
) -> None:
    from slidetl.models.backbones import BackboneSpec

    other = SlideGrader(BackboneSpec(name), aggregator).eval()
    other.tile_spec = grader.tile_spec
    assert export_model(other, tmp_path / "m.pt") < 1e-5


def test_damaged_and_foreign_files_are_refused(model_path: Path, tmp_path: Path, grader: SlideGrader) -> None:
    content = bytearray(model_path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.pt").write_bytes(content)
    (tmp_path / "torn.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("flipped.pt", "torn.pt", "text.pt"):
        with pytest.raises(ModelFileError) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="no such model file"):
        load_model(tmp_path / "none.pt")
    with pytest.warns(match="deprecated"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "foreign.pt"))
    with pytest.raises(ModelFileError, match="not one of slidetl's files"):
        load_model(tmp_path / "foreign.pt")
    with pytest.raises(ModelFileError, match="does not say what tiles"):
        export_model(SlideGrader(), tmp_path / "untrained.pt")
    assert not (tmp_path / "untrained.pt").exists()
