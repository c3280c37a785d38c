from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from slidetl.cli import main
from slidetl.cli.progress import Progress
from slidetl.errors import CacheError, CacheMismatchError, CacheMissingError, SlidetlError, UsageError
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.penalties import recorded
from slidetl.models.runner import Runner
from slidetl.models.spec import BackboneSpec
from slidetl.tiles.features import list_features, read_features, read_source, write_features
from slidetl.tiles.store import SlideCache, cache_parts, shard_path
from slidetl.training import embed
from slidetl.training.embed import (
    BlockEmbedder,
    EmbeddedSlide,
    _dtype,
    _embed_share,
    block_names,
    embed_cache,
)
from slidetl.training.options import EmbedOptions
from tests.conftest import Study
from tests.small import small_embed, small_spec

SPEC = small_spec()
NAME = SPEC.name


@pytest.fixture
def cache_dir(study: Study, tmp_path: Path) -> Path:
    """Three slides of the study."""
    for path in sorted(study.cache.glob("*.zarr"))[:3]:
        shutil.copytree(path, tmp_path / "cache" / path.name)
    return tmp_path / "cache"


def opened(cache_dir: Path) -> list[SlideCache]:
    return [SlideCache.open(path) for path in sorted(cache_dir.glob("*.zarr"))]


def test_stored_features_are_what_the_network_gives(cache_dir: Path) -> None:
    # A batch smaller than a slide, which it does not divide.
    slides = embed_cache(cache_dir, SPEC, EmbedOptions("blocks.2", batch_size=7, device="cpu"))
    backbone = Backbone(SPEC).eval()
    backbone.load_pretrained()
    for slide, cache in zip(slides, opened(cache_dir), strict=True):
        assert slide.is_new and slide.tiles == len(cache) and not slide.reason
        tiles = torch.from_numpy(cache.read(range(len(cache)))).permute(0, 3, 1, 2)
        with torch.inference_mode():
            last = backbone(tiles)
            scaled = (tiles / 255 - backbone.mean) / backbone.std
            net = backbone.net
            stem = net.get_submodule("bn1")(net.get_submodule("conv_stem")(scaled))
            blocks = [net.get_submodule(f"blocks.{number}") for number in range(3)]
            inner = torch.nn.Sequential(*blocks)(stem).mean((2, 3))
        np.testing.assert_allclose(read_features(cache, NAME), last, atol=2e-2, rtol=2e-2)
        np.testing.assert_allclose(read_features(cache, f"{NAME}.blocks.2"), inner, atol=2e-2, rtol=2e-2)
        source = read_source(cache, f"{NAME}.blocks.2")
        assert (source.backbone, source.block, source.precision) == (NAME, "blocks.2", "float32")
        assert source.weights_sha256 == weights_sha256(backbone)


def test_bfloat16_agrees_to_about_two_digits(cache_dir: Path) -> None:
    words = ["embed", str(cache_dir), *small_embed(), "--device", "cpu", "--blocks", "blocks.2"]
    assert main([*words, "--name", "whole"]) == 0
    assert main([*words, "--name", "half", "--precision", "bfloat16"]) == 0
    for cache in opened(cache_dir):
        for block in ("", ".blocks.2"):
            whole = read_features(cache, f"whole{block}").astype(np.float64)
            half = read_features(cache, f"half{block}").astype(np.float64)
            assert 0 < np.abs(half - whole).mean() < 0.06 * np.abs(whole).mean()  # random weights: .040
        assert [read_source(cache, name).precision for name in ("whole", "half")] == ["float32", "bfloat16"]
    with pytest.raises(UsageError, match="--precision must be auto, float32 or bfloat16, not 'half'"):
        embed_cache(cache_dir, SPEC, EmbedOptions(precision="half"))  # type: ignore[arg-type]


def test_a_gpu_computes_in_bfloat16_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(embed, "has_bfloat16", lambda _: False)  # an older one emulates it
    assert _dtype("auto", gpu) == torch.float32
    monkeypatch.setattr(embed, "has_bfloat16", lambda place: place == gpu)
    assert (_dtype("auto", gpu), _dtype("auto", cpu)) == (torch.bfloat16, torch.float32)
    assert (_dtype("float32", gpu), _dtype("bfloat16", cpu)) == (torch.float32, torch.bfloat16)


def test_a_network_of_one_channel_embeds_the_luma(cache_dir: Path) -> None:
    grey, cache = small_spec(in_channels=1), opened(cache_dir)[0]
    (slide,) = embed_cache(
        cache_dir, grey, EmbedOptions(name="grey", slides=(cache.path.stem,), device="cpu")
    )
    backbone = Backbone(grey).eval()
    backbone.load_pretrained()
    luma = (cache.read(range(len(cache))) @ np.array([0.299, 0.587, 0.114])).astype(np.float32)
    with torch.inference_mode():
        scaled = (torch.from_numpy(luma)[:, None] / 255 - backbone.mean) / backbone.std
        expected = backbone.net(scaled)
    assert slide.is_new
    np.testing.assert_allclose(read_features(cache, "grey"), expected, atol=2e-2, rtol=2e-2)
    source = read_source(cache, "grey")
    assert (len(source.mean), len(source.std)) == (1, 1)
    with pytest.raises(UsageError, match="takes 4 channels, the tiles have 3; set"):
        embed_cache(cache_dir, small_spec(in_channels=4), EmbedOptions(name="four", device="cpu"))


@pytest.mark.slow
def test_what_is_there_is_kept_and_other_weights_are_refused(cache_dir: Path, tmp_path: Path) -> None:
    assert all(slide.is_new for slide in embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu")))
    first = read_features(opened(cache_dir)[0], NAME)
    assert not any(slide.is_new for slide in embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu")))
    # Another block: the slides are looked at again.
    assert all(slide.is_new for slide in embed_cache(cache_dir, SPEC, EmbedOptions("blocks.1", device="cpu")))

    torch.manual_seed(1)
    torch.save(Backbone(SPEC).net.state_dict(), tmp_path / "other.pth")
    other = BackboneSpec(NAME, str(tmp_path / "other.pth"))
    with pytest.raises(CacheMismatchError, match=r"from other weights.*under another --name"):
        embed_cache(cache_dir, other, EmbedOptions(device="cpu"))
    np.testing.assert_array_equal(read_features(opened(cache_dir)[0], NAME), first)
    assert all(
        slide.is_new for slide in embed_cache(cache_dir, other, EmbedOptions(name="other", device="cpu"))
    )
    assert list_features(opened(cache_dir)[0]) == (NAME, f"{NAME}.blocks.1", "other")
    embed_cache(cache_dir, other, EmbedOptions(device="cpu", overwrite=True))
    np.testing.assert_array_equal(
        read_features(opened(cache_dir)[0], NAME), read_features(opened(cache_dir)[0], "other")
    )
    assert (read_features(opened(cache_dir)[0], NAME) != first).any()


def test_another_pooling_is_another_network_and_is_recorded(cache_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "w.pth"
    torch.save(Backbone(BackboneSpec("test_vit")).net.state_dict(), path)
    options = EmbedOptions(device="cpu", slides=(opened(cache_dir)[0].slide_id,))
    embed_cache(cache_dir, BackboneSpec("test_vit", str(path)), options)
    both = BackboneSpec("test_vit", str(path), pooling="token+mean")
    with pytest.raises(CacheMismatchError, match="from other weights"):
        embed_cache(cache_dir, both, options)
    embed_cache(cache_dir, both, replace(options, name="both"))
    cache = opened(cache_dir)[0]
    token, found = (read_features(cache, name) for name in ("test_vit", "both"))
    assert (token.shape[1], found.shape[1]) == (64, 128)
    np.testing.assert_array_equal(found[:, :64], token)
    assert [read_source(cache, name).pooling for name in ("test_vit", "both")] == ["default", "token+mean"]


def test_equal_weights_with_other_activations_are_another_network(cache_dir: Path, tmp_path: Path) -> None:
    path, specs = tmp_path / "w.pth", []
    for arguments in ({}, {"act_layer": "quick_gelu"}):  # written as on the hub
        folder = tmp_path / f"model{len(arguments)}"
        folder.mkdir()
        known = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160]}
        about = {"architecture": "test_vit", "model_args": arguments, "pretrained_cfg": known}
        (folder / "config.json").write_text(json.dumps(about))
        specs.append(BackboneSpec(f"local-dir:{folder}", str(path)))
    torch.save(Backbone(specs[0]).net.state_dict(), path)
    options = EmbedOptions(name="vit", device="cpu", slides=(opened(cache_dir)[0].slide_id,))
    assert embed_cache(cache_dir, specs[0], options)[0].is_new
    assert not embed_cache(cache_dir, specs[0], options)[0].is_new
    with pytest.raises(CacheMismatchError, match=r"or another network \(local-dir:.*model0.*model1"):
        embed_cache(cache_dir, specs[1], options)


def test_a_damaged_slide_costs_itself(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, unreadable = opened(cache_dir)
    data = bytearray(shard_path(bad.path, 0).read_bytes())
    data[100] ^= 1
    shard_path(bad.path, 0).write_bytes(data)
    (unreadable.path / "zarr.json").write_text("{")
    assert main(["embed", str(cache_dir), *small_embed(), "--device", "cpu", "--batch-size", "8"]) == 1
    out, err = capsys.readouterr()
    assert "3 slides: 1 embedded, 0 there already, 2 failed" in out
    assert f"failed: {bad.slide_id}: " in err and f"failed: {unreadable.slide_id}: " in err
    assert list_features(good) == (NAME,)
    assert list_features(bad) == ()


def test_slides_read_in_processes_for_one_thread_are_embedded_alike(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs before a GPU, with a processor in its place; and a damaged slide costs itself there too."""
    caches = opened(cache_dir)
    embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu", name="plain"))
    shard_path(caches[0].path, 0).unlink()
    monkeypatch.setattr(embed, "Runner", partial(Runner, packs=True))
    monkeypatch.setattr(embed, "_PIECE", 7)
    counted: list[int] = []
    options = EmbedOptions(device="cpu", name="packed", batch_size=16)
    first, *others = embed_cache(cache_dir, SPEC, options, on_batch=counted.append)
    assert "the shard is missing" in first.reason and all(slide.is_new for slide in others)
    assert sum(counted) == sum(slide.tiles for slide in others)
    for cache in caches[1:]:
        np.testing.assert_allclose(read_features(cache, "packed"), read_features(cache, "plain"), atol=1e-2)


def slow_parts(*arguments: Any) -> Iterator[tuple[Any, Any]]:
    """Reads in a reader as :func:`cache_parts`, with pauses."""
    with contextlib.closing(cache_parts(*arguments)) as parts:
        for part in parts:
            time.sleep(0.3)
            yield part


@pytest.mark.slow
@pytest.mark.parametrize("packs", [False, True])
def test_the_profile_says_that_reading_is_the_limit_and_at_what_rate(
    cache_dir: Path, packs: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "cache_parts", slow_parts)  # also in the processes of readers
    monkeypatch.setattr(embed, "Runner", partial(Runner, packs=packs))
    words = ["--device", "cpu", "--batch-size", "8", "--profile"]
    assert main(["embed", str(cache_dir), *small_embed(), *words]) == 0
    said = capsys.readouterr().err
    found = re.search(
        r"([\d.]+) tiles/s with everything on, ([\d.]+) by the network alone: (\d+)% "
        r"\(reading is the limit\); the network waited for tiles (\d+)% of the time",
        said,
    )
    assert found is not None, said
    everything, alone, share, waited = map(float, found.groups())
    assert share == pytest.approx(100 * everything / alone, abs=1) and 50 <= waited <= 100


@pytest.mark.slow
def test_a_card_embeds_from_one_thread_in_one_shape_for_each_size_of_tiles(
    study: Study, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a processor in the place of the card; slides of tiles of two sizes, the larger not first."""
    name = opened(cache_dir)[1].path.name
    shutil.rmtree(cache_dir / name)
    head, *rows = study.manifest.read_text().splitlines()
    large, manifest = cache_dir.parent / "large", study.manifest.with_name("one.csv")
    manifest.write_text("\n".join([head, *(row for row in rows if name.removesuffix(".zarr") in row)]))
    words = ["tile", str(manifest), "--cache", str(large), "--workers", "1"]
    assert main([*words, "--mpp", "4", "--tile-size", "96"]) == 0
    manifest.unlink()
    shutil.move(large / name, cache_dir / name)
    assert [cache.spec.tile_size_px for cache in opened(cache_dir)] == [64, 96, 64]
    expected = embed_cache(cache_dir, SPEC, EmbedOptions(name="pieces", device="cpu"))
    assert all(slide.is_new for slide in expected)

    threads: set[int] = set()
    shapes: set[tuple[int, ...]] = set()
    forward = BlockEmbedder.__call__

    def noted(embedder: BlockEmbedder, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        threads.add(threading.get_ident())
        shapes.add(tuple(tiles.shape))
        return forward(embedder, tiles)

    monkeypatch.setattr(BlockEmbedder, "__call__", noted)
    monkeypatch.setattr(embed, "Runner", partial(Runner, packs=True))
    packed = embed_cache(cache_dir, SPEC, EmbedOptions(name="packed", device="cpu", batch_size=24))
    assert packed == expected
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert shapes == {(24, 3, 64, 64), (24, 3, 96, 96)}
    for cache in opened(cache_dir):
        np.testing.assert_allclose(
            read_features(cache, "packed"), read_features(cache, "pieces"), atol=1e-2, rtol=1e-2
        )


@pytest.mark.parametrize("kept", [True, False])
def test_features_of_a_large_slide_leave_the_device_piece_by_piece(
    cache_dir: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, copy = [], torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float16:
            events.append("copy")
        return copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    monkeypatch.setattr(embed, "_ON_DEVICE", 64 << 20 if kept else 1000)
    first = opened(cache_dir)[0].path.stem
    options = EmbedOptions(device="cpu", batch_size=32, slides=(first,))
    embed_cache(cache_dir, SPEC, options, on_batch=lambda tiles: events.append("batch"))
    batches = events.count("batch")
    assert batches > 1
    assert events == (["batch"] * batches if kept else ["copy", "batch"] * batches) + ["copy"]


def test_features_are_copied_in_parts_where_a_gpu_cannot_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, join, events = [torch.ones(2, 3), torch.zeros(1, 3)], torch.cat, ["full"]

    def full_once(parts: list[torch.Tensor]) -> torch.Tensor:
        if events:
            raise RuntimeError(f"CUDA out of memory ({events.pop()})")
        return join(parts)

    monkeypatch.setattr(torch, "cat", full_once)
    assert embed._joined(rows).tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3] and not events


def test_a_profile_is_of_one_process() -> None:
    with pytest.raises(UsageError, match="leave out --devices 2"):
        EmbedOptions(profile=True, devices=2)


@pytest.mark.slow
def test_devices_share_out_the_slides(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(cache_dir)[0]
    shard_path(first.path, 0).unlink()
    tiles: list[int] = []
    told: list[EmbeddedSlide] = []
    options = EmbedOptions(device="cpu", devices=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # fewer than the processes on a CPU
    slides = embed_cache(cache_dir, SPEC, options, on_batch=tiles.append, on_slide=told.append)
    assert slides == sorted(told, key=lambda slide: slide.slide_id) and len(slides) == 3
    assert "the shard is missing" in slides[0].reason and all(slide.is_new for slide in slides[1:])
    assert sum(tiles) == sum(len(read_features(cache, NAME)) for cache in opened(cache_dir)[1:])
    monkeypatch.setattr(embed, "_embed_share", killed)
    shutil.rmtree(opened(cache_dir)[1].path / "features")
    lost = embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu", devices=2))
    assert all("was ended by SIGKILL" in slide.reason for slide in lost[:2]) and not lost[2].reason


def test_a_process_of_a_device_reports_warnings_and_errors(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Backbone, tiles: torch.Tensor) -> torch.Tensor:
        warnings.warn("cuda:0 has no room for 8 tiles at once", stacklevel=2)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\n")

    monkeypatch.setattr(Backbone, "forward", forward)
    monkeypatch.setattr(Backbone, "describe_other_tiles", lambda *_: ["trained on other tiles"])
    ours, theirs = multiprocessing.Pipe()
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")  # as in a process of its own
            _embed_share(theirs, 0, 1, cache_dir, SPEC, EmbedOptions(device="cpu"))
    finally:
        torch.set_num_threads(threads)
    error = ours.recv()
    assert type(error) is SlidetlError
    assert str(error).strip() == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert {str(warning.message) for warning in told} == {"cuda:0 has no room for 8 tiles at once"}


def killed(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_only_the_slides_that_are_named(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = opened(cache_dir)
    words = ["embed", str(cache_dir), *small_embed(), "--device", "cpu", "--name", "mine"]
    words += ["--blocks", "blocks.0,blocks.1"]
    assert main([*words, "--slides", second.slide_id]) == 0
    assert "1 slides: 1 embedded" in capsys.readouterr().out
    assert list_features(first) == () and list_features(second) == ("mine", "mine.blocks.0", "mine.blocks.1")
    assert main([*words, "--slides", "nobody"]) == 2
    assert "--slides: not in" in capsys.readouterr().err


def test_mistakes_end_with_one_line(
    cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in [
        (
            [str(cache_dir), *small_embed(), "--blocks", "blocks.9"],
            "has no block 'blocks.9'; it has: conv_stem, bn1, blocks.0",
        ),
        ([str(cache_dir), "--batch-size", "0"], "--batch-size must be at least 1"),
        ([str(tmp_path / "nothing")], "no tile cache here"),
        ([str(cache_dir), "--backbone", "resnet999"], "timm knows no backbone"),
        ([str(cache_dir), "--name", "a/b"], "features are named by"),
        ([str(cache_dir), "--preset", "uni3"], "backbone.preset: expected one of uni, uni2-h"),
        ([str(cache_dir), "--pooling", "mean"], "backbone.pooling 'mean' is for vision transformers"),
    ]:
        assert main(["embed", *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="PyTorch finds no GPU"):
            embed_cache(cache_dir, SPEC, EmbedOptions(device="cuda"))
    with pytest.raises(CacheMissingError):
        embed_cache(tmp_path, SPEC, EmbedOptions(device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block", "features"),
    [("vit_tiny_patch16_224", "blocks.3", 192), ("swin_tiny_patch4_window7_224", "layers.1", 192)],
)
def test_tokens_and_channels_last_maps_are_averaged_over_space(name: str, block: str, features: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name)).eval()
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    assert block in block_names(backbone)
    with torch.inference_mode(), BlockEmbedder(backbone, [block]) as embedder:
        outputs = embedder(tiles)
        maps = backbone.net.forward_intermediates(  # type: ignore[operator] # timm is untyped
            (tiles / 255 - backbone.mean) / backbone.std,
            indices=[int(block[-1])],
            intermediates_only=True,
            norm=False,
        )
    assert outputs[block].shape == (2, features)
    torch.testing.assert_close(outputs[block], maps[0].mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert not dict(backbone.net.named_modules())[block]._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "block", "channels_last"),
    [
        ("resnet18", 256, "layer1", False),  # 64 channels at 64 x 64
        ("swin_tiny_patch4_window7_224", 64, "patch_embed.proj", False),
        ("swin_tiny_patch4_window7_224", 64, "layers.0", True),
        ("vit_tiny_patch16_224", 64, "patch_embed", True),
        ("volo_d1_224", 224, "network.0", True),
    ],
)
def test_the_layout_of_each_block_is_found(name: str, side: int, block: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name)).eval()
    tiles = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.inference_mode(), recorded(backbone, [block]) as maps:
        with BlockEmbedder(backbone, [block]) as embedder:
            found = embedder(tiles)[block]
        backbone(tiles)
    expected = maps[block].mean((1, 2) if channels_last else (2, 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Named(nn.Module):
    """Stands for a network of square tiles with outputs of several forms."""

    pretrained_cfg: ClassVar = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.one_size, self.windows, self.unused = nn.Identity(), nn.Identity(), nn.Identity()
        self.patches, self.with_class, self.crowd = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 8:
            raise RuntimeError("one size alone")
        self.one_size(x.repeat(1, 3, 1, 1)[:, :8])
        self.windows(torch.cat([x, x]))
        tokens = x.flatten(2).transpose(1, 2)
        self.patches(tokens)
        self.with_class(torch.cat([1000 + tokens[:, :1], tokens], 1))
        self.crowd(tokens[:, :12])
        return x.mean((2, 3))


def test_patches_are_no_class_tokens_and_what_cannot_be_told_is_refused() -> None:
    backbone = Backbone(small_spec()).eval()
    backbone.net = Named()
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode(), BlockEmbedder(backbone, ["patches", "with_class"]) as embedder:
        found = embedder(tiles)
    torch.testing.assert_close(found["patches"], found[""])
    torch.testing.assert_close(found["with_class"], found[""])
    for block, says in {
        "one_size": r"is \[1, 8, 8, 8\] for a tile \[1, 3, 8, 8\]: its axes of space cannot be told",
        "crowd": r"is \[1, 12, 3\] for a tile",
        "windows": "no vector of a tile",
        "unused": "never called as a whole",
    }.items():
        with BlockEmbedder(backbone, [block]) as embedder, pytest.raises(UsageError, match=says):
            embedder(tiles)


@pytest.mark.slow
def test_a_run_that_is_interrupted_loses_the_slides_it_was_at(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir = tmp_path / "cache"
    shutil.copytree(study.cache, cache_dir)

    def interrupt(progress: Progress, text: str) -> None:  # a signal would do, but pytest-xdist ignores those
        raise KeyboardInterrupt

    # Control-C while the first slide is reported, which is stored by then.
    monkeypatch.setattr(Progress, "show", interrupt)
    assert main(["embed", str(cache_dir), *small_embed(), "--device", "cpu", "--batch-size", "1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    stored = [cache for cache in opened(cache_dir) if list_features(cache)]
    assert 1 <= len(stored) <= 3 and len(stored) < len(opened(cache_dir))
    slides = embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"))
    assert sum(slide.is_new for slide in slides) == len(slides) - len(stored)
    assert all(list_features(cache) == (NAME,) for cache in opened(cache_dir))


def test_a_cache_that_cannot_be_written_is_refused_before_a_tile_is_embedded(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def may_write(path: Path, mode: int) -> bool:
        return path != cache_dir

    def embedded(tiles: int) -> None:
        raise AssertionError("embedded before")

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", may_write)
        with pytest.raises(CacheError, match="this user may not write there"):
            embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"), on_batch=embedded)
    embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"))
    monkeypatch.setattr(os, "access", may_write)
    slides = embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"))  # nothing is left to write
    assert [(slide.is_new, slide.reason) for slide in slides] == [(False, "")] * 3


def test_a_full_disk_ends_the_run(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "rename", refuse)  # the features' into their place
    assert main(["embed", str(cache_dir), *small_embed(), "--device", "cpu"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert all(slide.is_new for slide in embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu")))


def test_features_beyond_half_precision_fail_the_slide(cache_dir: Path, tmp_path: Path) -> None:
    backbone = Backbone(SPEC)
    backbone.load_pretrained()
    with torch.no_grad():
        for parameter in backbone.net.get_submodule("conv_head").parameters():
            parameter.mul_(1e8)
    torch.save(backbone.net.state_dict(), tmp_path / "loud.pth")
    slides = embed_cache(
        cache_dir, BackboneSpec(NAME, str(tmp_path / "loud.pth")), EmbedOptions(device="cpu")
    )
    assert all("not finite in float16" in slide.reason for slide in slides)
    assert all(list_features(cache) == () for cache in opened(cache_dir))


def test_features_of_other_tiles_are_made_again(cache_dir: Path) -> None:
    embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"))
    cache = opened(cache_dir)[0]
    wanted = read_features(cache, NAME)
    chunk = cache.path / "features" / NAME / "zarr.json"
    chunk.write_text(chunk.read_text().replace(f'"tiles": {len(cache)}', '"tiles": 1'))
    assert [slide.is_new for slide in embed_cache(cache_dir, SPEC, EmbedOptions(device="cpu"))] == [
        True,
        False,
        False,
    ]
    np.testing.assert_array_equal(read_features(cache, NAME), wanted)
    # Who stores them again for the same tiles may.
    write_features(cache, {NAME: (read_source(cache, NAME), wanted)})
