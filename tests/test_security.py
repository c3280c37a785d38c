"""What a stranger's file must not be able to do.

Guards that belong to one module alone are tested with it: pickles in checkpoints and bundles
(`tests/training/test_checkpoint.py`, `tests/models/test_backbones.py`), model files
(`tests/publish/test_export.py`, `tests/library/test_trust.py`), entries of a library
(`tests/publish/test_library.py`), the ledger (`tests/tiles/test_ledger.py`).
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import struct
import tracemalloc
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import slidetl
from slidetl.analysis.similarity import Similarity
from slidetl.data.manifest import read_manifest
from slidetl.errors import CacheCorruptError, SlideError, SlideOpenError, SlideReadError, WeightsError
from slidetl.grading.batch import FAILED, GradeRow, output_names, write_results
from slidetl.slides.npz import NpzItem, read_labels
from slidetl.slides.raster import RasterSlide
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.grid import Codec, TileSpec
from slidetl.tiles.store import INDEX_BYTES, MISSING, Shard, building_path, cache_path, read_array
from slidetl.tiles.writer import pack_shard
from slidetl.training.drift import draw_drift, write_drift
from slidetl.training.predictions import SlidePrediction, write_predictions
from slidetl.training.range_test import RangeResult, write_range
from slidetl.training.similarity import MEASURES, LayerSimilarity, draw_curves, write_curves
from tests.small import SMALL

LITTLE_BYTES = 64 * 2**20
HUGE_PX = 60_000  # a side; in RGB 10.8 GB


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails a block that asks for more than a little memory, whether it uses it or not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LITTLE_BYTES, f"{peak / 2**20:.0f} MiB"


def read_corner(path: Path) -> None:
    with RasterSlide(path, 1.0) as slide:
        slide.read((0, 0), (256, 256), 1.0)


# ---- code in files


def calls_of_the_package() -> dict[str, list[tuple[str, ast.Call]]]:
    """Every call, by the dotted name of the function, with where it stands."""
    found = defaultdict(list)
    for path in sorted(Path(slidetl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                found[ast.unparse(node.func)].append((f"{path.name}:{node.lineno}", node))
    return found


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


@pytest.mark.slow
def test_nothing_is_read_in_a_way_that_runs_it() -> None:
    calls = calls_of_the_package()
    for name in (
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ):
        assert not calls[name]
    assert calls["torch.load"] and calls["yaml.safe_load"]
    for where, call in calls["torch.load"]:
        assert keywords(call).get("weights_only") == "True", where
    for where, call in [*calls["np.load"], *calls["np.lib.format.read_array"]]:
        assert keywords(call).get("allow_pickle") == "False", where
    # TorchScript is a program: one place runs it, behind the check of its hash.
    assert {where.partition(":")[0] for where, _ in calls["torch.jit.load"]} == {"model_file.py"}


# ---- names that become paths


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/../../b", "~/x", "a\\..\\b", ".hidden"])
def test_a_slide_identifier_leaves_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "slide.svs").write_bytes(b"")
    table = tmp_path / "manifest.csv"
    table.write_text(f"slide_id,path,patient_id,grade\n{name},slide.svs,P1,0\n")
    try:
        (row,) = read_manifest(table).rows
    except slidetl.errors.ManifestError as error:
        assert "slide_id" in str(error)
        return
    cache = tmp_path / "cache"
    for path in (cache_path(cache, row.slide_id), building_path(cache, row.slide_id)):
        assert path.resolve().is_relative_to(cache.resolve()) and path.name.startswith(row.slide_id)
        assert path.parent in (cache, cache / ".building")


def test_what_grade_writes_stays_in_its_folder(tmp_path: Path) -> None:
    for name in output_names([Path("/a/../../x.svs"), Path("../.svs"), Path("..")]).values():
        assert (tmp_path / f"{name}.json").resolve().parent == tmp_path


# ---- sizes that are claimed


def huge_jpeg(data: bytes) -> bytes:
    """The same JPEG, calling itself 60,000 pixels wide and high."""
    content = bytearray(data)
    place = -1
    while (place := content.find(b"\xff\xc0\x00\x11\x08", place + 1)) >= 0:
        struct.pack_into(">HH", content, place + 5, HUGE_PX, HUGE_PX)
    assert content != data
    return bytes(content)


def noise(side_px: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def tiff(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, noise(512), photometric="rgb", **options)
    return path


def test_a_jpeg_in_a_tiff_is_no_larger_than_its_tile(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", tile=(256, 256), compression="jpeg")
    read_corner(path)
    path.write_bytes(huge_jpeg(path.read_bytes()))
    with (
        little_memory(),
        pytest.raises(SlideReadError, match=r"says \(60000, 60000\) pixels, more than the 65536"),
    ):
        read_corner(path)


@pytest.mark.parametrize(
    ("compression", "header", "claim"),
    [
        ("jpeg2000", b"\xff\x4f\xff\x51", lambda at: (at + 8, struct.pack(">II", HUGE_PX, HUGE_PX))),
        ("png", b"IHDR", lambda at: (at + 4, struct.pack(">II", HUGE_PX, HUGE_PX))),
        ("webp", b"VP8L", lambda at: (at + 9, b"\xff\xff\xff\x0f")),
    ],
)
def test_nor_is_another_picture_in_a_tiff(
    compression: str, header: bytes, claim: Callable[[int], tuple[int, bytes]], tmp_path: Path
) -> None:
    lossless = {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    path = tiff(tmp_path / "a.tif", tile=(256, 256), compression=compression, **lossless)
    read_corner(path)
    content = bytearray(path.read_bytes())
    assert header in content
    place = -1
    while (place := content.find(header, place + 1)) >= 0:
        at, claimed = claim(place)
        content[at : at + len(claimed)] = claimed
    path.write_bytes(content)
    with little_memory(), pytest.raises(SlideReadError, match="more than the 65536 of the directory"):
        read_corner(path)


def test_a_compression_whose_claims_are_not_known_is_not_read(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", tile=(256, 256), compression="jpegxl")
    with pytest.raises(SlideOpenError, match=r"compressed by .*JPEGXL.* convert it to JPEG"):
        RasterSlide(path, 1.0)


@pytest.mark.slow
def test_a_packed_tile_does_not_grow_beyond_its_size(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", tile=(256, 256), compression="deflate")
    with tifffile.TiffFile(path) as file:
        tags = file.pages.first.tags
        offsets, counts = tags[324].valueoffset, tags[325].valueoffset
    content, bomb = bytearray(path.read_bytes()), zlib.compress(bytes(300_000_000), 9)
    struct.pack_into("<4I", content, offsets, *[len(content)] * 4)
    struct.pack_into("<4I", content, counts, *[len(bomb)] * 4)
    path.write_bytes(content + bomb)
    with little_memory(), pytest.raises(SlideReadError):
        read_corner(path)


@pytest.mark.filterwarnings("ignore")  # tifffile says what it finds
@pytest.mark.parametrize("tag", [256, 257, 270, 273, 279])
def test_tags_that_claim_gigabytes_take_none(tag: int, tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", rowsperstrip=8, description="a description")
    with tifffile.TiffFile(path) as file:
        entry = file.pages.first.tags[tag].offset
    content = bytearray(path.read_bytes())
    if tag in (256, 257):
        struct.pack_into("<HII", content, entry + 2, 4, 1, 2**31 - 1)
    else:
        struct.pack_into("<I", content, entry + 4, 2**32 - 16)
    path.write_bytes(content)
    with little_memory():
        try:
            read_corner(path)
        except SlideError as error:
            assert str(path) in str(error)


def test_entities_of_ome_xml_do_not_grow(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    xml = (
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{entities}]>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Pixels PhysicalSizeX="&a9;"/></OME>'
    )
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, noise(64), photometric="rgb", description=xml, metadata=None)
    with little_memory(), pytest.raises(SlideError):
        RasterSlide(path)


def packed_npy(path: Path, head: bytes, zeros: int = 0, fill: bytes = b" ") -> Path:
    """An ``.npz`` whose arrays begin with ``head`` and go on with as much as is wanted, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train_images.npy", "train_labels.npy"):
            with archive.open(name, "w") as member:
                member.write(head)
                for _ in range(zeros // 1_000_000):
                    member.write(fill * 1_000_000)
    return path


@pytest.mark.slow
def test_an_array_in_an_archive_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (10**6, 1000, 1000)
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 200_000_000)
    for path in (
        packed_npy(tmp_path / "shape.npz", header.getvalue()),
        packed_npy(tmp_path / "header.npz", long, 200_000_000),
    ):
        item = NpzItem.of(Path(f"{path}#train/0"))
        assert item is not None
        with little_memory(), pytest.raises(SlideOpenError, match="more than"):
            item.read()
        with little_memory(), pytest.raises(SlideOpenError, match="more than"):
            read_labels(path)


@pytest.mark.parametrize("shape", [(), (1_000_001, 1, 1), (-3, 1, 1), (60_000_000, 0, 0)])
def test_an_archive_of_a_wrong_number_of_images_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", content)
        archive.writestr("train_labels.npy", content)
    with little_memory(), pytest.raises(SlideOpenError):
        read_labels(path)


def small_array(node: Path, shape: list[int], content: bytes) -> Path:
    """A small array of a cache as a stranger would write it: every checksum is right."""
    chunk = node.joinpath("c", *("0" for _ in shape))
    chunk.parent.mkdir(parents=True)
    packed = bytes(imagecodecs.zstd_encode(content))
    chunk.write_bytes(packed + int(google_crc32c.value(packed)).to_bytes(4, "little"))
    (node / "zarr.json").write_text(json.dumps({"shape": shape, "data_type": "uint8", "attributes": {}}))
    return node


def test_an_array_of_a_cache_is_no_larger_than_it_says_nor_says_too_much(tmp_path: Path) -> None:
    assert read_array(small_array(tmp_path / "good", [2, 3], bytes(range(6)))).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    bomb = bytes(300_000_000)
    for name, shape in {
        "claims": [2**40, 2**20],
        "grows": [10, 10],
        "less": [0],
        "negative": [-1, 5],
    }.items():
        node = small_array(tmp_path / name, shape, bomb)
        with little_memory(), pytest.raises(CacheCorruptError, match="the array is damaged"):
            read_array(node)


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_a_tile_of_a_cache_is_no_larger_than_its_size(codec: Codec) -> None:
    decoder = tile_codec(TileSpec(mpp=1, tile_size_px=64, codec=codec))
    good = decoder.encode(noise(64))
    assert decoder.decode(good).shape == (64, 64, 3)
    bomb = huge_jpeg(good) if codec == "jpeg" else bytes(imagecodecs.zstd_encode(bytes(300_000_000)))
    with little_memory(), pytest.raises(CacheCorruptError):
        decoder.decode(bomb)


@pytest.mark.parametrize(("offset", "length"), [(0, 2**40), (2**63, 100), (2**64 - 2, 2**63), (50, 10**4)])
def test_a_shard_names_no_tiles_beyond_its_end(offset: int, length: int, tmp_path: Path) -> None:
    content = b"".join(pack_shard([b"tile" * 20])[0])
    path = tmp_path / "shard"
    path.write_bytes(content)
    assert Shard(path).chunk(0)
    index = np.full((INDEX_BYTES // 16, 2), MISSING, "<u8")
    index[0] = offset, length
    packed = index.tobytes()
    path.write_bytes(content[:-INDEX_BYTES] + packed + int(google_crc32c.value(packed)).to_bytes(4, "little"))
    with little_memory(), pytest.raises(CacheCorruptError, match="beyond the"):
        Shard(path)


@pytest.mark.parametrize("header", ["length", "shape"])
def test_weights_claim_no_more_than_the_file_holds(header: str, tmp_path: Path) -> None:
    from slidetl.models.backbones import read_pretrained
    from slidetl.models.spec import BackboneSpec

    side = 10**12
    tensors = {"a": {"dtype": "F32", "shape": [side], "data_offsets": [0, 4 * side]}}
    text = json.dumps(tensors).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if header == "shape" else 2**40) + text)
    with little_memory(), pytest.raises(WeightsError, match="not a readable safetensors file"):
        read_pretrained(BackboneSpec(SMALL, str(path)))


# ---- tables that a spreadsheet opens

FORMULAS = [
    "=1+1",
    "+A1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    " =1",
    "a\r=1",
    "a\n=1",
    '=HYPERLINK("http://example.org")',
]


def cells_of(path: Path) -> list[str]:
    # Without newline="", as most programs open it: a carriage return then ends a row.
    with path.open(encoding="utf-8") as file:
        return [cell for row in list(csv.reader(file))[1:] for cell in row]


def is_harmless(cell: str) -> bool:
    """Whether a spreadsheet would show a cell as it is."""
    if not cell.strip().startswith(("=", "+", "-", "@")):
        return True
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_table_holds_a_formula(formula: str, tmp_path: Path) -> None:
    write_results(
        tmp_path / "results.csv",
        [GradeRow(Path(formula), FAILED, {"grade_name": formula, "fingerprint": formula}, formula)],
        n_grades=2,
    )
    write_predictions(
        tmp_path / "predictions.csv",
        [SlidePrediction("S1", formula, 0, (0.5, 0.5), 3, site=formula, fold=formula)],
    )
    for name in ("results.csv", "predictions.csv"):
        cells = cells_of(tmp_path / name)
        assert all(is_harmless(cell) for cell in cells)
        assert sum(formula.split()[-1] in cell for cell in cells) >= 3  # it is shown


def test_tables_and_plots_of_trainings_replace_what_was_there(tmp_path: Path) -> None:
    rows = [(0, "stem", 0.1), (1, "stem", 0.2)]
    points = [
        LayerSimilarity("a", "b", "stem", 0, measure, Similarity(0.9, 0.1, 0.2, 2), 8, (4, 4))
        for measure in MEASURES
    ]
    writers: dict[str, Callable[[Path], None]] = {
        "drift.csv": lambda path: write_drift(path, rows),
        "drift.png": lambda path: draw_drift(path, rows),
        "similarity.csv": lambda path: write_curves(points, path),
        "similarity.png": lambda path: draw_curves(points, path),
        "loss.csv": lambda path: write_range(path.parent, RangeResult((1e-3, 1e-2), (1.0, 0.5), None)),
        "loss.png": lambda path: write_range(path.parent, RangeResult((1e-3, 1e-2), (1.0, 0.5), 1e-2)),
    }
    other = tmp_path / "other"
    other.write_text("of somebody else")
    for name, write in writers.items():
        path = tmp_path / name.replace(".", "-") / name
        path.parent.mkdir()
        path.symlink_to(other)  # a file that is written in its place is written through a link, too
        write(path)
        assert other.read_text() == "of somebody else" and path.is_file() and not path.is_symlink()
        assert path.read_bytes()[:4] == b"\x89PNG" or path.suffix == ".csv"
        assert not list(path.parent.glob(".*"))
    assert (tmp_path / "loss-csv/loss.csv").read_text() == "lr,loss\n0.001,1\n0.01,0.5\n"
    table = (tmp_path / "drift-csv/drift.csv").read_text()
    assert table == "epochs,layer,relative_distance\n0,stem,0.1\n1,stem,0.2\n"
