"""Tiles of a cache -> stored embeddings, one pass of a frozen backbone."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slidetl.data.study import find_slides, open_cache
from slidetl.errors import CacheError, CacheMismatchError, UsageError
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.runner import Runner
from slidetl.models.spec import BackboneSpec
from slidetl.tiles.features import FeatureSource, feature_name, read_source, write_features
from slidetl.tiles.store import SlideCache
from slidetl.training.options import EmbedOptions

# Each holds a batch in memory: 19 MB at 128 tiles of 224 px. A core decodes a few thousand tiles a second,
# a GPU embeds tens of thousands.
_MOST_READERS = 16


@dataclass(frozen=True)
class EmbeddedSlide:
    """The outcome of one slide.

    Attributes:
        slide_id: its identifier.
        tiles: how many it has.
        is_new: False where all that was wanted was there already.
        reason: why it could not be embedded; empty if it was.
    """

    slide_id: str
    tiles: int = 0
    is_new: bool = False
    reason: str = ""


class BlockEmbedder:
    """A backbone that also gives the output of some of its inner blocks, averaged over space.

    A context manager: its hooks leave the network when it ends.

    Args:
        backbone: the network, in evaluation mode.
        blocks: names of modules within it, e.g. ``blocks.3`` or ``layer3``.

    Raises:
        UsageError: there is no such block; the message lists those that are there.
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
        self._is_channels_last = getattr(backbone.net, "output_fmt", "NCHW") == "NHWC"
        self._prefix_tokens = int(getattr(backbone.net, "num_prefix_tokens", 0))
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
        """Embeds tiles ``[n, 3, H, W] uint8``.

        Returns:
            ``[n, D] float32`` by block; the network's own embedding under the empty name.
        """
        self._outputs = {}
        last: Tensor = self._backbone(tiles)
        return {"": last.float(), **{block: self._outputs[block] for block in self._blocks}}

    def _keep(self, block: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Averaged at once: what follows may change the output in place.
            self._outputs[block] = self._average(output, block)

        return hook

    def _average(self, output: Any, block: str) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            raise UsageError(
                f"the output of block {block!r} is no map, no tokens and no vector; choose another"
            )
        if output.ndim == 4:
            return output.float().mean((1, 2) if self._is_channels_last else (2, 3))
        return output.float() if output.ndim == 2 else output[:, self._prefix_tokens :].float().mean(1)


def block_names(backbone: Backbone) -> tuple[str, ...]:
    """The blocks of a network that are worth naming: its parts, and the members of its sequences."""
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
    *,
    on_plan: Callable[[int], None] = lambda tiles: None,
    on_batch: Callable[[int], None] = lambda tiles: None,
    on_slide: Callable[[EmbeddedSlide], None] = lambda slide: None,
) -> list[EmbeddedSlide]:
    """Stores the embeddings of every tile of a cache, slide by slide.

    What is there already from the same weights is kept, so that a run which ends early loses the slide it
    was at. A damaged slide costs itself, not the run.

    Args:
        cache_dir: the folder that ``slidetl tile`` wrote.
        spec: the network and its weights.
        options: what is computed and stored.
        on_plan: called once, with the number of tiles that are to be embedded.
        on_batch: called with the number of tiles just embedded.
        on_slide: called with each slide as it is done.

    Returns:
        The result of each slide, in the order of their identifiers.

    Raises:
        CacheMissingError: there is no cache.
        CacheMismatchError: features of these names are there from other weights; nothing was done then.
        UsageError: an unknown slide or block, or a device that is not there.
        WeightsError: the weights cannot be found or do not fit.
    """
    blocks = tuple(options.blocks.split(",")) if options.blocks else ()
    place = _device(options.device)
    dtype = _dtype(options.precision, place)
    found = find_slides(cache_dir, options.slides)
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
    )
    sources = {
        feature_name(options.name or spec.name, block): FeatureSource(**{**vars(source), "block": block})
        for block in ("", *blocks)
    }
    backbone.to(place)

    results: dict[str, EmbeddedSlide] = {}

    def done(slide: EmbeddedSlide) -> None:
        results[slide.slide_id] = slide
        on_slide(slide)

    todo: list[SlideCache] = []
    for slide_id, entry in found.items():
        try:
            cache = open_cache(cache_dir, slide_id, entry)
        except CacheError as error:
            done(EmbeddedSlide(slide_id, reason=str(error)))
            continue
        if not options.overwrite and _is_stored(cache, sources):
            done(EmbeddedSlide(cache.path.stem, len(cache)))
        else:
            todo.append(cache)

    on_plan(sum(len(cache) for cache in todo))
    widths: list[int] = []  # of the blocks' embeddings, which stand side by side

    def embed(tiles: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            parts = embedder(tiles)
        widths[:] = [parts[source.block].shape[1] for source in sources.values()]
        return torch.cat([parts[source.block].to(torch.float16) for source in sources.values()], dim=1)

    side_px = todo[0].spec.tile_size_px if todo else 0
    with (
        BlockEmbedder(backbone, blocks) as embedder,
        Runner(embed, place, options.batch_size, side_px) as runner,
        ThreadPoolExecutor(1, "store") as store,
        contextlib.closing(_embedded(runner, todo, options.batch_size)) as parts,
    ):
        rows: list[Tensor] = []
        storing: deque[Future[EmbeddedSlide]] = deque()
        for cache, is_last, part in parts:
            if cache.path.stem in results:
                continue  # damaged before this batch
            if isinstance(part, CacheError):
                rows = []
                done(EmbeddedSlide(cache.path.stem, len(cache), reason=str(part)))
            else:
                rows.append(part)
                on_batch(len(part))
                if is_last:
                    slide = runner.call(functools.partial(_on_host, rows))
                    arrays = dict(zip(sources, np.split(slide, np.cumsum(widths)[:-1], axis=1), strict=True))
                    storing.append(store.submit(_store, cache, arrays, sources))
                    rows = []
            while storing and (storing[0].done() or len(storing) > 2):
                done(storing.popleft().result())
        for waiting in storing:
            done(waiting.result())
    return [results[slide_id] for slide_id in found]


def _is_stored(cache: SlideCache, sources: Mapping[str, FeatureSource]) -> bool:
    """Tells if all features are there; refuses to mix two networks under one name."""
    is_stored = True
    for name, source in sources.items():
        try:
            stored = read_source(cache, name)
        except CacheError:
            is_stored = False
            continue
        if not stored.same_network(source):
            raise CacheMismatchError(
                f"{cache.path}: features {name!r} are there from other weights "
                f"({stored.weights_sha256[:12]}..., now {source.weights_sha256[:12]}...); "
                "store these under another --name, or replace them with --overwrite"
            )
    return is_stored


def _read(
    caches: Sequence[SlideCache], batch_size: int
) -> Generator[tuple[SlideCache, bool, Future[NDArray[np.uint8]]], None, None]:
    """Batches in order, each of one slide, whether it is the slide's last, read ahead in threads.

    Threads do: reading and decoding release the interpreter's lock.
    """
    threads = min(len(os.sched_getaffinity(0)), _MOST_READERS)
    pending: deque[tuple[SlideCache, bool, Future[NDArray[np.uint8]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
    try:
        for cache in caches:
            for start in range(0, len(cache), batch_size):
                stop = min(start + batch_size, len(cache))
                reading = pool.submit(cache.read, np.arange(start, stop))
                pending.append((cache, stop == len(cache), reading))
                if len(pending) > threads:
                    yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _embedded(
    runner: Runner, caches: Sequence[SlideCache], batch_size: int
) -> Generator[tuple[SlideCache, bool, Tensor | CacheError], None, None]:
    """Yields batches in order: the cache, whether it is its last, and the embeddings or the damage."""
    pending: deque[tuple[SlideCache, bool, Future[Tensor] | CacheError]] = deque()

    def first() -> tuple[SlideCache, bool, Tensor | CacheError]:
        cache, is_last, part = pending.popleft()
        return cache, is_last, part if isinstance(part, CacheError) else part.result()

    with contextlib.closing(_read(caches, batch_size)) as batches:
        for cache, is_last, reading in batches:
            try:
                pending.append((cache, is_last, runner.submit(reading.result())))
            except CacheError as error:
                pending.append((cache, is_last, error))
            if len(pending) > runner.depth:
                yield first()
        while pending:
            yield first()


def _on_host(rows: Sequence[Tensor]) -> NDArray[np.float16]:
    """Copies a slide's embeddings ``[N, D]`` into the memory of the processor."""
    slide: NDArray[np.float16] = torch.cat(list(rows)).cpu().numpy()
    return slide


def _store(
    cache: SlideCache, arrays: Mapping[str, NDArray[np.float16]], sources: Mapping[str, FeatureSource]
) -> EmbeddedSlide:
    try:
        write_features(cache, {name: (sources[name], array) for name, array in arrays.items()})
    except (CacheError, UsageError) as error:
        return EmbeddedSlide(cache.path.stem, len(cache), reason=str(error))
    return EmbeddedSlide(cache.path.stem, len(cache), is_new=True)


def _by_channel(values: Tensor) -> tuple[Any, ...]:
    return tuple(values.flatten().tolist())


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(precision: str, place: torch.device) -> torch.dtype:
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--precision must be auto, float32 or bfloat16, not {precision!r}")
    if precision == "auto":
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
