from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from slidetl.errors import ModelFileError, SlidetlError, UsageError, WeightsError
from slidetl.library.local import pulled_file, pulled_folder
from slidetl.library.trust import is_trusted
from slidetl.models.aggregators import MeanPooling
from slidetl.models.backbones import Backbone, read_pretrained, state_sha256
from slidetl.models.spec import BackboneSpec
from slidetl.publish.export import build_network, export_model
from slidetl.publish.library import Library
from slidetl.publish.model_file import load_model
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader
from tests.small import SMALL, small_spec

FILES = ["card.json", "model.pt", "weights.safetensors"]


def exported(path: Path, *specs: BackboneSpec) -> Path:
    graders = []
    for seed, spec in enumerate(specs):
        torch.manual_seed(seed)
        grader = SlideGrader(spec, MeanPooling).eval()
        grader.tile_spec = TileSpec(mpp=4, tile_size_px=64)
        graders.append(grader)
    export_model(*build_network(graders, licence="CC0-1.0"), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("model") / "model.pt", small_spec())


@pytest.fixture(scope="module")
def published(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    Library(str(folder)).publish(model, "lung-2", "Grades lungs", "Tests", "nobody")
    return folder


@pytest.fixture
def library(published: Path, tmp_path: Path) -> Library:
    """A library of one model, for a test of its own, on a machine that has pulled nothing."""
    shutil.copytree(published, tmp_path / "library")
    return Library(str(tmp_path / "library"))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entry_of(library: Library) -> Path:
    return Path(library.url) / "lung-2"


def rewrite(library: Library, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the card of the entry, as whoever may write to the library can."""
    path = entry_of(library) / "card.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_what_is_published_is_pulled_and_runs(
    scheme: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}" if scheme == "memory://" else f"{scheme}{tmp_path}/new/library"
    published = Library(url).publish(model, "lung-2", "Grades lungs", trusted=True)
    assert Library(url).names() == ["lung-2"]
    assert Library(url).read("lung-2") == published
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "another"))  # of somebody else
    folder = Library(url).pull("lung-2", published.sha256)
    assert folder == pulled_folder() / "lung-2"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["lung-2"]
    assert load_model(folder / "model.pt").card == published.model  # trusted from now on
    assert Library(str(pulled_folder())).read("lung-2") == published  # what was pulled is a library too


def test_the_hash_of_a_card_is_that_of_its_file(library: Library) -> None:
    content = (entry_of(library) / "card.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == library.read("lung-2").sha256


def test_pulling_twice_is_harmless_and_finds_damage(library: Library) -> None:
    folder = library.pull("lung-2")
    assert library.pull("lung-2") == folder
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"not what was pulled.*pull lung-2 again"):
        library.pull("lung-2")


def test_another_model_of_that_name_is_not_mixed_up_with_the_first(library: Library, tmp_path: Path) -> None:
    library.pull("lung-2")
    other = Library(str(tmp_path / "other"))
    other.publish(pulled_file("lung-2", "model.pt"), "lung-2", "Of other people")
    with pytest.raises(ModelFileError, match="another model was pulled under this name"):
        other.pull("lung-2")


def test_a_name_that_is_taken_is_refused(library: Library, model: Path) -> None:
    before = {path: path.read_bytes() for path in entry_of(library).iterdir()}
    with pytest.raises(UsageError, match="lung-2 is there already"):
        library.publish(model, "lung-2", trusted=True)
    assert {path: path.read_bytes() for path in entry_of(library).iterdir()} == before
    (entry_of(library) / "card.json").unlink()
    assert library.names() == []  # without it the entry is not finished
    with pytest.raises(UsageError, match="left unfinished"):
        library.publish(model, "lung-2", trusted=True)


def test_of_two_publishers_at_a_time_the_first_succeeds(
    library: Library, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one looked before the first had begun."""
    files = fsspec.filesystem("file")
    before = {path: path.read_bytes() for path in entry_of(library).iterdir()}
    exists = files.exists
    monkeypatch.setattr(files, "exists", lambda path: path.endswith("card.json") and exists(path))
    with pytest.raises(UsageError, match="lung-2 is there already"):
        library.publish(model, "lung-2", "Of the second", trusted=True)
    assert {path: path.read_bytes() for path in entry_of(library).iterdir()} == before


def test_a_publish_that_fails_leaves_the_name_free(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(OSError):
        """What a full disk raises."""

    def put_file(*_: object, **__: object) -> None:
        raise Full("no space left")

    library = Library(str(tmp_path / "library"))
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.filesystem("file"), "put_file", put_file)
        with pytest.raises(UsageError, match="cannot be written to: no space left"):
            library.publish(model, "lung-2", trusted=True)
    assert library.publish(model, "lung-2", trusted=True).name == "lung-2"


@pytest.mark.parametrize("file", ["model.pt", "weights.safetensors"])
@pytest.mark.parametrize("change", ["flipped", "longer", "shorter", "missing"])
def test_a_file_that_is_not_what_the_card_says_is_not_pulled(
    file: str, change: str, library: Library, home: Path
) -> None:
    path = entry_of(library) / file
    content = bytearray(path.read_bytes())
    if change == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"longer": content + b"x", "shorter": content[:-1]}.get(change, content))
    if change == "missing":
        path.unlink()
    with pytest.raises(ModelFileError, match=f"{file}: .*nothing was pulled"):
        library.pull("lung-2")
    assert list((home / "zoo").iterdir()) == []
    assert not (home / "trusted_models.txt").exists()


def test_a_card_that_was_changed_is_found_by_its_hash(library: Library, home: Path) -> None:
    told = library.read("lung-2").sha256
    rewrite(library, lambda card: card.update(description="Grades livers"))
    with pytest.raises(ModelFileError, match="not the model that you were told of"):
        library.pull("lung-2", told)
    assert not (home / "zoo").exists()
    assert library.pull("lung-2").is_dir()  # nobody said which card it has to be


def test_a_card_that_praises_the_model_more_than_the_file_does_is_refused(
    library: Library, home: Path
) -> None:
    rewrite(library, lambda card: card["model"].update(licence="public domain"))
    with pytest.raises(ModelFileError, match=r"differs from the one inside model\.pt"):
        library.pull("lung-2")
    assert list((home / "zoo").iterdir()) == []


def test_weights_of_another_network_than_the_model_are_refused(library: Library, home: Path) -> None:
    """The file agrees with itself, and a changed card with the file: the card of the model tells."""
    pulled = library.pull("lung-2")
    own = read_pretrained(BackboneSpec(SMALL, "zoo://lung-2"))
    assert own.lineage[0] == library.read("lung-2").model.weights_sha256
    path = entry_of(library) / "weights.safetensors"
    state = {key: value + 1 if "net." in key else value for key, value in load_file(path).items()}
    save_file(state, path, {"lineage": json.dumps([state_sha256(state)])})
    record = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite(library, lambda card: card["files"].update({"weights.safetensors": record}))
    for name in ("card.json", "weights.safetensors"):  # pulled by an earlier version
        shutil.copy(entry_of(library) / name, pulled / name)
    with pytest.raises(WeightsError, match=r"its card says .* of another network: remove"):
        read_pretrained(BackboneSpec(SMALL, "zoo://lung-2"))
    shutil.rmtree(pulled)
    with pytest.raises(
        ModelFileError, match=r"weights\.safetensors: weights with SHA-256 .*nothing was pulled"
    ):
        library.pull("lung-2")
    assert not list((home / "zoo").iterdir())


def test_a_pulled_model_tells_of_other_tiles(library: Library) -> None:
    library.pull("lung-2")
    backbone = Backbone(BackboneSpec(SMALL, "zoo://lung-2"))
    backbone.load_pretrained()
    (line,) = backbone.describe_other_tiles(TileSpec(mpp=2, tile_size_px=64))
    assert line == "zoo://lung-2 was trained on tiles of mpp 4, these have 2"
    assert not backbone.describe_other_tiles(TileSpec(mpp=4, tile_size_px=64))


def test_a_card_names_no_file_elsewhere(library: Library, home: Path) -> None:
    rewrite(library, lambda card: card["files"].update({"../../evil": card["files"]["model.pt"]}))
    with pytest.raises(ModelFileError, match="evil"):
        library.pull("lung-2")
    assert not home.exists()


def test_a_folder_that_no_model_can_be_named_by_is_not_listed(library: Library) -> None:
    for name in ("a\x1b[2J", ".lung-2.partial"):
        shutil.copytree(entry_of(library), Path(library.url) / name)
    assert library.names() == ["lung-2"]


def test_a_folder_without_card_is_told_from_a_pulled_model(library: Library, home: Path) -> None:
    (home / "zoo" / "lung-2").mkdir(parents=True)
    with pytest.raises(ModelFileError, match=r"remove .*lung-2, which has no card.json"):
        library.pull("lung-2")


def test_an_entry_under_another_name_is_refused(library: Library, home: Path) -> None:
    entry_of(library).rename(entry_of(library).with_name("lung-3"))
    with pytest.raises(ModelFileError, match="expected the card of lung-3, found that of lung-2"):
        library.pull("lung-3")
    assert not home.exists()


@pytest.mark.parametrize("name", ["../lung-2", "lung-2/../lung-2", "", "..", "/etc/passwd"])
def test_a_name_that_leaves_the_library_is_refused(name: str, library: Library, model: Path) -> None:
    with pytest.raises(UsageError, match="named by small letters"):
        library.read(name)
    with pytest.raises(UsageError, match="named by small letters"):
        library.pull(name)
    with pytest.raises(UsageError, match="named by small letters"):
        library.publish(model, name, trusted=True)
    with pytest.raises(WeightsError, match="named by small letters"):
        read_pretrained(BackboneSpec(SMALL, f"zoo://{name}"))


def test_a_card_without_end_is_not_read_to_the_end(library: Library) -> None:
    card = entry_of(library) / "card.json"
    with card.open("ab") as file:
        file.truncate(3_000_000_000)  # a sparse file: it takes no space
    with pytest.raises(ModelFileError, match="more than 262144 bytes"):
        library.read("lung-2")


def test_places_and_models_that_are_not_there(tmp_path: Path, library: Library, model: Path) -> None:
    with pytest.raises(UsageError, match="no such library"):
        Library(str(tmp_path / "none")).names()
    with pytest.raises(ModelFileError, match="no model 'lung-3' here; there are: lung-2"):
        library.read("lung-3")
    with pytest.raises(UsageError, match="folder or a URL"):
        Library("nosuchscheme://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        Library(str(tmp_path / "file")).publish(model, "lung-2", trusted=True)
    with pytest.raises(ModelFileError, match="none with SHA-256"):
        Library(str(tmp_path / "new")).publish(model, "lung-2")  # not exported by this user
    assert not (tmp_path / "new").exists()


def test_a_pulled_model_begins_the_next_training(library: Library, model: Path) -> None:
    with pytest.raises(WeightsError, match=r"zoo://lung-2: no model 'lung-2' was pulled.*zoo pull lung-2"):
        read_pretrained(BackboneSpec(SMALL, "zoo://lung-2"))
    folder = library.pull("lung-2")
    shutil.rmtree(library.url)  # only the local copy is used
    backbone = Backbone(BackboneSpec(SMALL, "zoo://lung-2"))
    backbone.load_pretrained()
    parent = load_model(model, trusted=True)
    expected = {
        key.removeprefix("networks.0.backbone."): value
        for key, value in parent.network.state_dict().items()
        if key.startswith("networks.0.backbone.")
    }
    found = backbone.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert backbone.lineage == (parent.card.weights_sha256,)
    with pytest.raises(WeightsError, match="not weights of resnet18"):
        Backbone(BackboneSpec("resnet18", "zoo://lung-2")).load_pretrained()
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not what was pulled"):
        read_pretrained(BackboneSpec(SMALL, "zoo://lung-2"))
    # The file alone, named by its path, is checked by the hash that it holds.
    with pytest.raises(WeightsError, match="it was changed"):
        read_pretrained(BackboneSpec(SMALL, str(folder / "weights.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        small_spec(in_channels=1),
        BackboneSpec(
            "vit_tiny_patch16_224",
            gated_mlp=True,
            layer_scale=True,
            channels_last=False,
            pooling="token+mean",
        ),
    ],
)
def test_the_fields_that_a_model_is_used_by_build_a_network_that_its_weights_fit(
    spec: BackboneSpec, tmp_path: Path
) -> None:
    library = Library(str(tmp_path / "library"))
    library.publish(exported(tmp_path / "m.pt", spec), "odd")
    library.pull("odd")
    child = Backbone(BackboneSpec(**library.read("odd").backbone()))  # type: ignore[arg-type]
    child.load_pretrained()
    parent = load_model(tmp_path / "m.pt").network.state_dict()
    prefix = "networks.0.backbone."
    expected = {key[len(prefix) :]: value for key, value in parent.items() if key.startswith(prefix)}
    found = child.state_dict()
    assert child.spec.pooling == spec.pooling
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_an_ensemble_is_published_whole_and_its_first_network_begins_the_next(tmp_path: Path) -> None:
    pair = exported(tmp_path / "pair.pt", small_spec(), small_spec())
    library = Library(str(tmp_path / "library"))
    assert library.publish(pair, "pair").model.members == 2
    library.pull("pair")
    state = load_model(pair).network.state_dict()
    found = read_pretrained(BackboneSpec(SMALL, "zoo://pair")).weights
    key = "conv_stem.weight"
    assert torch.equal(found[key], state[f"networks.0.backbone.net.{key}"])
    assert not torch.equal(found[key], state[f"networks.1.backbone.net.{key}"])


@pytest.mark.slow
def test_what_is_pulled_is_trusted_and_nothing_else(library: Library, tmp_path: Path) -> None:
    folder = library.pull("lung-2")
    other = exported(tmp_path / "other.pt", small_spec(in_channels=1))
    (tmp_path / "home" / "trusted_models.txt").unlink()
    library.pull("lung-2")
    assert load_model(folder / "model.pt").card.grades
    with pytest.raises(SlidetlError, match="a model file is a program"):
        load_model(other)
    assert not is_trusted("0" * 64)
