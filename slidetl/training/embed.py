"""Embeds the tiles of a cache by a frozen backbone, and stores the embeddings."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slidetl.data.record import StudyRecord, store_record
from slidetl.data.study import common_spec, find_slides, open_listed
from slidetl.errors import (
    CacheError,
    CacheMismatchError,
    ProcessEnded,
    SlidetlError,
    UsageError,
    describe_failure,
    is_gpu_full,
)
from slidetl.files import full_disk
from slidetl.models.backbones import Backbone, architecture_sha256, weights_sha256
from slidetl.models.blocks import channel_axis, leading_tokens
from slidetl.models.penalties import recorded
from slidetl.models.precision import chosen_device, has_bfloat16
from slidetl.models.runner import Rates, Runner
from slidetl.models.spec import BackboneSpec
from slidetl.models.volumes import unit_window
from slidetl.processes import Child, see_one_card, start_child
from slidetl.processor import postpone_collection, usable_cores
from slidetl.tiles.features import (
    FeatureSource,
    check_writable,
    feature_name,
    read_source,
    write_features,
)
from slidetl.tiles.readers import Readers
from slidetl.tiles.store import SlideCache, cache_parts
from slidetl.training.options import EmbedOptions

_MOST_READERS = 4  # threads on a CPU: a core decodes ten times as many tiles as it embeds
_THREADS_OF_A_GPU = 2  # to feed it and gather features; each other core reads a slide
_ON_DEVICE = 64 << 20  # bytes of a slide's features kept on a GPU; those of larger ones are copied at once
_PIECE = 32  # tiles handed over by a reader at once
_BATCH, _BATCH_OF_VOLUMES = 128, 16  # a patch of 64 voxels has five times the values of a tile


@dataclass(frozen=True)
class EmbeddedSlide:
    """The outcome of one slide.

    Attributes:
        slide_id: its identifier.
        tiles: number of its tiles.
        is_new: False if all features were stored before.
        reason: why embedding failed; empty on success.
    """

    slide_id: str
    tiles: int = 0
    is_new: bool = False
    reason: str = ""


class OtherTilesWarning(UserWarning):
    """The weights were trained on other tiles than those of the cache."""


class BlockEmbedder:
    """A backbone with outputs of inner blocks, averaged over space: of maps and of patch tokens.

    A context manager: on exit it removes its hooks from the network.

    Args:
        backbone: the network, in evaluation mode.
        blocks: names of modules within it, e.g. ``blocks.3`` or ``layer3``.

    Raises:
        UsageError: there is no such block; the message lists the available ones. When called, that an output
            has no axes of space, or that they cannot be told.
    """

    def __init__(self, backbone: Backbone, blocks: Sequence[str] = ()) -> None:
        modules = dict(backbone.net.named_modules())
        for block in blocks:
            if not block or block not in modules:
                raise UsageError(
                    f"{backbone.spec.name} has no block {block!r}; it has: {', '.join(block_names(backbone))}"
                )
        self._backbone = backbone
        self._outputs: dict[str, Tensor] = {}
        self._means: dict[str, Callable[[Tensor], Tensor]] = {}
        self._blocks = tuple(blocks)
        self._hooks = [modules[block].register_forward_hook(self._keep(block)) for block in blocks]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, tiles: Tensor) -> dict[str, Tensor]:
        """Embeds square tiles of a backbone: ``[n, D] float32`` by block, the final ones under ``""``."""
        if self._blocks and not self._means:
            self._means = self._find_means(tiles[:1])
        self._outputs = {}
        last: Tensor = self._backbone(tiles)
        return {"": last.float(), **{block: self._outputs[block] for block in self._blocks}}

    def _keep(self, block: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._means:
                # Averaged at once: later layers may change the output in place.
                self._outputs[block] = self._means[block](output.float())

        return hook

    def _find_means(self, tile: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """Finds the axes of space of each block's output for one tile."""
        outputs: dict[str, Any]
        with recorded(self._backbone, self._blocks) as outputs:
            self._backbone(tile)
        return {block: self._find_mean(block, outputs[block], tile) for block in self._blocks}

    def _find_mean(self, block: str, output: Any, tile: Tensor) -> Callable[[Tensor], Tensor]:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4, 5) or len(output) != 1:
            raise UsageError(
                f"the output of block {block!r} is no map, no tokens and no vector of a tile; choose another"
            )
        if output.ndim == 2:
            return lambda vectors: vectors
        if output.ndim == 3:
            prefix = int(getattr(self._backbone.net, "num_prefix_tokens", 0))
            first = leading_tokens(output.shape[1], prefix)
            if first is not None:
                return lambda tokens: tokens[:, first:].mean(1)
        else:
            axis = channel_axis(output.shape) or self._axis_at_twice_the_size(block, tile)
            if axis is not None:
                axes = [other for other in range(1, output.ndim) if other != axis]
                return lambda maps: maps.mean(axes)
        raise UsageError(
            f"the output of block {block!r} of {self._backbone.spec.name} is {list(output.shape)} for a tile "
            f"{list(tile.shape)}: its axes of space cannot be told; choose another block"
        )

    def _axis_at_twice_the_size(self, block: str, tile: Tensor) -> int | None:
        """Finds the axis of channels by a larger tile, as of maps that have as many channels as rows."""
        try:
            with recorded(self._backbone, [block]) as outputs:
                self._backbone(tile.new_zeros((*tile.shape[:2], *(2 * side for side in tile.shape[2:]))))
        except (AssertionError, RuntimeError, UsageError):  # a network of one size
            return None
        return channel_axis(outputs[block].shape)


def block_names(backbone: Backbone) -> tuple[str, ...]:
    """Lists the blocks of a network: its parts, and the members of its sequences."""
    names = []
    for name, part in backbone.net.named_children():
        members = [
            f"{name}.{child}"
            for child, _ in part.named_children()
            if isinstance(part, nn.Sequential | nn.ModuleList)
        ]
        names += members or [name]
    return tuple(names)


def embed_cache(
    cache_dir: Path,
    spec: BackboneSpec,
    options: EmbedOptions = EmbedOptions(),  # noqa: B008  # frozen
    cores: int | None = None,
    *,
    on_plan: Callable[[int], None] = lambda tiles: None,
    on_batch: Callable[[int], None] = lambda tiles: None,
    on_slide: Callable[[EmbeddedSlide], None] = lambda slide: None,
    on_rates: Callable[[Rates], None] = lambda rates: None,
) -> list[EmbeddedSlide]:
    """Embeds every tile of a cache, and stores the embeddings slide by slide.

    Stored features of the same weights are kept, and a damaged slide does not end the run.

    Args:
        cache_dir: the folder written by ``slidetl tile``.
        spec: the network and its weights.
        options: blocks, names, devices and precision.
        cores: to use; by default all.
        on_plan: called once, with the number of tiles to embed.
        on_batch: called with the number of tiles just embedded.
        on_slide: called with each finished slide.
        on_rates: called at the end, if ``options.profile`` and tiles were embedded.

    Returns:
        The outcome of each slide, ordered by identifier.

    Raises:
        CacheMissingError: there is no cache.
        CacheError: this user may not write to it; nothing is computed then. Or the disk is full.
        CacheMismatchError: these names hold features of other weights; nothing is computed then.
        UsageError: a slide or block is unknown, or a device missing.
        WeightsError: the weights cannot be found or do not fit.
    """
    blocks = tuple(options.blocks.split(",")) if options.blocks else ()
    place = chosen_device(options.device, options.devices)
    dtype = _dtype(options.precision, place)
    found = find_slides(cache_dir, options.slides)
    with postpone_collection():
        backbone = Backbone(spec)
        backbone.load_pretrained()
    backbone.eval()
    source = FeatureSource(
        backbone=spec.name,
        block="",
        weights_sha256=weights_sha256(backbone),
        mean=_by_channel(backbone.mean),
        std=_by_channel(backbone.std),
        precision=str(dtype).removeprefix("torch."),
        pooling=spec.pooling,
        record=store_record(cache_dir, StudyRecord.from_dict(backbone.record)) if backbone.record else "",
        architecture=architecture_sha256(backbone),
    )
    sources = {
        feature_name(options.name or _short_name(spec.name), block): FeatureSource(
            **{**vars(source), "block": block}
        )
        for block in ("", *blocks)
    }

    results: dict[str, EmbeddedSlide] = {}

    def done(slide: EmbeddedSlide) -> None:
        results[slide.slide_id] = slide
        on_slide(slide)

    todo: list[SlideCache] = []
    for slide_id, entry in found.items():
        try:
            cache = open_listed(cache_dir, slide_id, entry)
        except CacheError as error:
            done(EmbeddedSlide(slide_id, reason=str(error)))
            continue
        if not options.overwrite and _is_stored(cache, sources):
            done(EmbeddedSlide(cache.path.stem, len(cache)))
        else:
            todo.append(cache)

    for cache in todo:
        check_writable(cache)
    for tile_spec in dict.fromkeys(cache.spec for cache in todo):
        backbone.check_tiles(tile_spec)
        for line in backbone.describe_other_tiles(tile_spec):
            warnings.warn(line, OtherTilesWarning, stacklevel=2)
    on_plan(sum(len(cache) for cache in todo))
    if options.devices > 1:
        mine = replace(options, device="cuda" if place.type == "cuda" else "cpu")
        _share_out(todo, cache_dir, spec, mine, on_batch, done)
        return [results[slide_id] for slide_id in found]
    backbone.to(place)
    widths: list[int] = []  # of the blocks' embeddings, joined along D

    # Slides may differ in their tiles; volumes share a window.
    volumes = common_spec(todo) if todo and todo[0].spec.is_volume else None

    def embed(tiles: Tensor) -> Tensor:
        if volumes is not None:
            tiles = unit_window(tiles, *volumes.window_hu)
        with torch.autocast(place.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            parts = embedder(tiles)
        widths[:] = [parts[source.block].shape[1] for source in sources.values()]
        return torch.cat([parts[source.block].to(torch.float16) for source in sources.values()], dim=1)

    size, cores = (
        options.batch_size or (_BATCH if volumes is None else _BATCH_OF_VOLUMES),
        cores or usable_cores(),
    )
    first = todo[0].spec if todo else None
    counted, stopped = threading.Lock(), threading.Event()

    def embed_slide(cache: SlideCache) -> EmbeddedSlide:
        rows = []
        source: contextlib.AbstractContextManager[Iterable[tuple[Any, Any]]] = (
            contextlib.closing(cache_parts(cache, size, threads))
            if readers is None
            else readers.stream(cache, _PIECE, threads)
        )
        try:
            with source as parts:
                for _, part in runner.stream(parts, readers.held if readers is not None else 0):
                    if stopped.is_set():
                        raise CacheError("interrupted")  # nobody reads it
                    is_large = len(cache) * part[0].nbytes > _ON_DEVICE
                    rows.append(part.cpu() if is_large else part)
                    with counted:
                        on_batch(len(part))
            slide: NDArray[np.float16] = _joined(rows).numpy()
            arrays = dict(zip(sources, np.split(slide, np.cumsum(widths)[:-1], axis=1), strict=True))
            try:
                write_features(cache, {name: (sources[name], array) for name, array in arrays.items()})
            except UsageError as error:  # it concerns this slide alone; errors of a forward pass concern all
                return EmbeddedSlide(cache.path.stem, len(cache), reason=str(error))
        except (CacheError, ProcessEnded) as error:
            if full_disk(error):
                raise  # no other slide could be stored either
            return EmbeddedSlide(cache.path.stem, len(cache), reason=str(error))
        return EmbeddedSlide(cache.path.stem, len(cache), is_new=True)

    with contextlib.ExitStack() as stack:
        embedder = stack.enter_context(BlockEmbedder(backbone, blocks))
        runner = stack.enter_context(Runner(embed, place, size, first, profile=options.profile))
        # On a GPU, a process for each slide; on a CPU, one slide is stored while another is read.
        free = max(1, cores - _THREADS_OF_A_GPU)
        count = min(len(todo), free if runner.packs else 2)
        threads = free // count if runner.packs and todo else min(cores, _MOST_READERS)
        most_px = max((cache.spec.tile_size_px for cache in todo), default=0)
        readers = (
            stack.enter_context(Readers(cache_parts, count, _PIECE, most_px, runner.depth_of(_PIECE, count)))
            if runner.packs and first is not None and volumes is None
            else None
        )
        started = time.perf_counter()
        pool = stack.enter_context(ThreadPoolExecutor(max(1, count), "slide"))
        running = [pool.submit(embed_slide, cache) for cache in todo]
        stack.callback(lambda: [future.cancel() for future in running])
        stack.callback(stopped.set)
        for future in as_completed(running):
            done(future.result())
        tiles = sum(slide.tiles for slide in results.values() if slide.is_new)
        if options.profile and tiles:
            on_rates(_rates(runner, tiles, time.perf_counter() - started, todo))
    return [results[slide_id] for slide_id in found]


def _rates(runner: Runner, tiles: int, seconds: float, caches: Sequence[SlideCache]) -> Rates:
    """Returns the rates of ``tiles`` in so many seconds; measures the network alone unless it was before."""
    if runner.alone is not None:
        return Rates(runner.rate_so_far, runner.alone, None, runner.waited_so_far, runner.first_pass_s)
    waited = max(0.0, 1 - runner.busy_s / seconds)
    for cache in caches:
        with contextlib.suppress(CacheError):  # a damaged one
            some = cache.read(range(min(runner.batch_size, len(cache))))
            return Rates(tiles / seconds, runner.rate(some), None, waited)
    raise AssertionError("tiles were embedded before")


def _short_name(backbone: str) -> str:
    """Returns a backbone's name without its owner at the hub, to name features."""
    return backbone.removeprefix("hf-hub:").rpartition("/")[2] if backbone.startswith("hf-hub:") else backbone


def _share_out(
    caches: Sequence[SlideCache],
    cache_dir: Path,
    spec: BackboneSpec,
    options: EmbedOptions,
    on_batch: Callable[[int], None],
    done: Callable[[EmbeddedSlide], None],
) -> None:
    """Embeds slides in one process per device, with about equal numbers of tiles."""
    shares: list[list[SlideCache]] = [[] for _ in range(min(options.devices, len(caches)))]
    for cache in sorted(caches, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(cache)
    busy: dict[Connection, tuple[Child, dict[str, int]]] = {}
    try:
        for number, share in enumerate(shares):
            left = {cache.path.stem: len(cache) for cache in share}
            mine = replace(options, slides=tuple(left), devices=1)
            given = (number, max(1, usable_cores() // len(shares)), cache_dir, spec, mine)
            child = start_child(_embed_share, *given, has_children=True)
            busy[child.connection] = child, left
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)  # as given to `wait`
                child, left = busy[ready]
                try:
                    found = ready.recv()
                except (EOFError, ConnectionError):
                    del busy[ready]
                    reason = child.cause_of_death("embedded") if left else ""
                    child.process.join()
                    for slide_id, tiles in left.items():
                        done(EmbeddedSlide(slide_id, tiles, reason=f"{reason}; run again to go on"))
                    continue
                if isinstance(found, Exception):
                    raise found
                if isinstance(found, int):
                    on_batch(found)
                elif left.pop(found.slide_id, None) is not None:
                    done(found)
    finally:
        for child, _ in busy.values():
            child.end()


def _embed_share(
    connection: Connection,
    number: int,
    cores: int,
    cache_dir: Path,
    spec: BackboneSpec,
    options: EmbedOptions,
) -> None:
    """Embeds the slides of one device, and sends the arguments of the callbacks."""
    if options.device == "cuda":
        see_one_card(number)
    torch.set_num_threads(cores)
    warnings.simplefilter("ignore", OtherTilesWarning)  # the first process has said it
    try:
        embed_cache(cache_dir, spec, options, cores, on_batch=connection.send, on_slide=connection.send)
    except Exception as error:
        is_ours = isinstance(error, SlidetlError)
        connection.send(error if is_ours else SlidetlError(describe_failure(error, "lower --batch-size")))


def _is_stored(cache: SlideCache, sources: Mapping[str, FeatureSource]) -> bool:
    """Tells if all features are there; refuses to mix two networks under one name."""
    is_stored = True
    for name, source in sources.items():
        try:
            stored = read_source(cache, name)
        except CacheError:
            is_stored = False
            continue
        if source.record not in ("", stored.record):
            is_stored = False  # of a version that kept no record
        if not stored.same_network(source):
            raise CacheMismatchError(
                f"{cache.path}: features {name!r} are there from other weights or another network "
                f"({stored.backbone}, {stored.short_identity}, now {source.backbone}, "
                f"{source.short_identity}); "
                "store these under another --name, or replace them with --overwrite"
            )
    return is_stored


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Joins the parts of a slide in host memory, by one copy: each would wait for the passes in the queue."""
    try:
        return torch.cat(list(rows)).cpu()
    except Exception as error:
        if not is_gpu_full(error):
            raise
        return torch.cat([part.cpu() for part in rows])


def _by_channel(values: Tensor) -> tuple[Any, ...]:
    return tuple(values.flatten().tolist())


def _dtype(precision: str, place: torch.device) -> torch.dtype:
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--precision must be auto, float32 or bfloat16, not {precision!r}")
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(place) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
