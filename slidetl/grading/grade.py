"""Grades a slide or CT series with a model file, and explains the grade. Streams tiles without a cache."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import queue
import tempfile
import textwrap
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slidetl.errors import ProcessEnded, SlideError, UnfitSlideError, UsageError, is_gpu_full
from slidetl.evaluation.conformal import GradeSets
from slidetl.files import replaced
from slidetl.grading.explain import (
    DIVERGING,
    Explanation,
    explain_by_occlusion,
    find_voxels,
    relative_attention,
)
from slidetl.grading.series import SeriesGrade, shown_patches
from slidetl.library.model_card import ModelCard
from slidetl.models.precision import exact_float32, has_bfloat16
from slidetl.models.runner import Rates, Runner
from slidetl.processor import hand_back_memory
from slidetl.publish.model_file import ModelFile
from slidetl.text import one_line, plot_label
from slidetl.tiles.cut import TileBatch, read_slide
from slidetl.tiles.patches import PatchPlan, plan_patches
from slidetl.tiles.plan import TilePlan
from slidetl.tiles.readers import Readers
from slidetl.version import VERSION
from slidetl.volumes import open_series

_T = TypeVar("_T")
_IN_MEMORY = 64 << 20  # bytes of a slide's embeddings, also on a GPU; larger ones lie in a file
_BATCH_SIZE = {"cpu": 16, "cuda": 256}  # on a CPU more cost memory and gain nothing
_OF_MODEL = "slidetl-model"  # in the text of a map
Precision = Literal["auto", "float32", "bfloat16"]
_MUCH_LEFT_OUT = 0.25  # a note is due if more of the tiles with tissue are
_PLACE_MM = 6.0  # width of a place in a patch, about that of a small nodule


@dataclass(frozen=True, eq=False)
class SlideGrade:
    """The grade of a slide, and its explanation as a map.

    Attributes:
        slide: the file, as given.
        fingerprint: of its content.
        grade: the most probable grade, 0..K-1.
        grade_name: its name.
        probabilities: of the grades 0..K-1; they sum to one.
        expected_grade: their mean, 0..K-1: the continuous score.
        grade_set: lowest and highest grade not ruled out; None if the model has no evidence for such a set.
        tissue_mm2: area of the graded tissue, square millimetres.
        novelty: distance from the training slides, with 1 as the limit; None if the model has no limit.
        model_sha256: hash of the model file.
        precision: number format of the backbone's forward pass, ``float32`` or ``bfloat16``.
        plan: the tiles to read, with thumbnail and tissue.
        origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)`` of the tiles read.
        attention: ``[N] float32``, weight of each tile; they sum to one.
        explanation: each tile's contribution to the score.
        rates: throughput, if measured.
        doubts: from :meth:`slidetl.library.model_card.ModelCard.doubts_about`.
    """

    slide: Path
    fingerprint: str
    grade: int
    grade_name: str
    probabilities: tuple[float, ...]
    expected_grade: float
    grade_set: tuple[int, int] | None
    tissue_mm2: float
    novelty: float | None
    model_sha256: str
    precision: str
    plan: TilePlan
    origins_level0: NDArray[np.int32]
    attention: NDArray[np.float32]
    explanation: Explanation
    rates: Rates | None = None
    doubts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain JSON values, without the map."""
        return {
            "slide": str(self.slide),
            "fingerprint": self.fingerprint,
            "grade": self.grade,
            "grade_name": self.grade_name,
            "grade_set": list(self.grade_set) if self.grade_set else None,
            "probabilities": [round(probability, 7) for probability in self.probabilities],
            "expected_grade": round(self.expected_grade, 5),
            "tiles": len(self.attention),
            "tiles_unreadable": len(self.plan) - len(self.attention),
            "areas_unreadable": self.plan.areas_unreadable,
            **self.plan.left_out,
            "tissue_mm2": round(self.tissue_mm2, 4),
            "novelty": None if self.novelty is None else float(ModelCard.format_novelty(self.novelty, ".4f")),
            "explanation": self.explanation.to_dict(),
            "model_sha256": self.model_sha256,
            "precision": self.precision,
            "mpp_level0": max(self.plan.info.mpp_level0),
            "mpp_tolerance": self.plan.spec.mpp_tolerance,
            "channels": self.plan.spec.channels,
            "notes": list(self.notes),
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Doubts about the slide, changes to its pixels, and tiles with tissue that were not graded."""
        plan, notes = self.plan, []
        if lost := len(plan) - len(self.attention):
            notes.append(f"{lost} of {len(plan)} tiles cannot be read, and are not part of the grade")
        spoilt = sum(map(len, plan.left_out_level0.values()))
        if spoilt > _MUCH_LEFT_OUT * (spoilt + len(plan)):
            notes.append(
                f"{spoilt} of {spoilt + len(plan)} tiles with tissue are left out for their quality "
                f"({plan.spoilt})"
            )
        return (*plan.notes, *notes, *self.doubts)


def grade_slide(
    model: ModelFile,
    path: str | Path,
    mpp_override: float | None = None,
    batch_size: int | None = None,
    *,
    threads: int = 1,
    force: bool = False,
    profile: bool = False,
    runner: Runner | None = None,
    readers: Readers | None = None,
    mpp_replace: float | None = None,
    mpp_tolerance: float | None = None,
    channels: str = "",
) -> SlideGrade:
    """Grades one slide from its file, with the same pixels as from a cache.

    Threads read tiles ahead while the network embeds others, so memory grows by the embeddings alone; those
    of a large slide lie in a temporary file without a name (in ``TMPDIR``).

    Args:
        model: from :func:`slidetl.publish.model_file.load_model`, best frozen.
        path: the slide.
        mpp_override: micrometres per level-0 pixel, for a slide without a spacing in its metadata.
        batch_size: tiles per pass through the backbone; by default 16 on a CPU and 256 on a GPU.
        threads: number of reading threads and, on a CPU, as many for the network.
        force: also grade a slide with too little tissue, or unlike the training slides.
        profile: measure the rates; costs a few seconds.
        runner: of :func:`start_runner` for this model; several slides may share one, also from several
            threads. By default one is made for this slide.
        readers: of :func:`slidetl.tiles.cut.slide_parts`; one reads the slide. By default threads of this
            process do.
        mpp_replace: micrometres per level-0 pixel, instead of the metadata's.
        mpp_tolerance: instead of the training's :attr:`slidetl.tiles.grid.TileSpec.mpp_tolerance`.
        channels: instead of the training's :attr:`slidetl.tiles.grid.TileSpec.channels`.

    Raises:
        SlideError: the slide cannot be opened or read, has no spacing, or is too coarse.
        UnfitSlideError: it has no tissue; or, unless forced, less than half as much as any training slide,
            or is unlike them.
    """
    path = Path(path)
    card = model.card
    if card.tile_spec.is_volume:
        raise UsageError(f"{model.path} grades CT series; use grade_series")
    spec = replace(card.tile_spec, channels=channels or card.tile_spec.channels)
    if mpp_tolerance is not None:
        spec = replace(spec, mpp_tolerance=mpp_tolerance)
    kept: NDArray[np.uint8] | None = None
    origins: list[NDArray[np.int32]] = []
    tissue = 0.0
    of = (path, mpp_override, mpp_replace, spec)
    with contextlib.ExitStack() as own:
        if runner is None:
            runner = own.enter_context(start_runner(model, batch_size, threads))
        # Closed in any case: a thread or process uses the slide to read ahead.
        source = (
            contextlib.closing(_ahead(read_slide(*of, runner.batch_size, threads)))
            if readers is None
            else _in_reader(readers, *of, readers.tiles, threads)
        )
        with source as parts, torch.inference_mode():
            plan = next(parts)
            assert isinstance(plan, TilePlan)  # it comes first
            _check_tissue(model, path, plan, force)
            started = _Clocks.now(runner)
            embedded = _Embeddings(len(plan))
            depth = readers.held if readers is not None else 0
            for batch, part in runner.stream(_with_pixels(parts), depth):
                embedded.add(part)
                tissue += float(batch.tissue_fraction.sum())
                origins.append(batch.origins_level0)
                kept = batch.pixels if kept is None and readers is None else kept
        if not origins:
            raise UnfitSlideError(f"{path}: none of its {len(plan)} tiles with tissue can be read")
        with torch.inference_mode():
            embeddings = embedded.of_all()
            places = _places(plan, np.concatenate(origins))
            graded = _graded(model, runner, path, embeddings, places, force)
            rates = _rates(runner, kept, len(embeddings), started.since(runner)) if profile else None
    tissue_mm2 = tissue * plan.spec.tile_mm2(plan.mpp_read)
    return SlideGrade(
        slide=path,
        fingerprint=plan.info.fingerprint,
        tissue_mm2=tissue_mm2,
        plan=plan,
        origins_level0=np.concatenate(origins),
        rates=rates,
        doubts=card.doubts_about(graded["novelty"], tissue_mm2),
        **graded,
    )


def grade_series(
    model: ModelFile, path: str | Path, *, threads: int = 1, force: bool = False, runner: Runner | None = None
) -> SeriesGrade:
    """Grades one CT series from its files, with the same patches as from a cache.

    Args:
        model: from :func:`slidetl.publish.model_file.load_model`, best frozen.
        path: the series, as :func:`slidetl.volumes.open_series` takes it.
        threads: as for :func:`grade_slide`.
        force: also grade a series unlike those of the training.
        runner: as for :func:`grade_slide`.

    Raises:
        VolumeError: it is no CT series that makes one volume, or damaged.
        UnfitSlideError: no patch has enough of the mask; or, unless forced, it is unlike the training series.
    """
    path = Path(path)
    spec = model.card.tile_spec
    series = open_series(path)
    plan = plan_patches(series, spec)
    if not len(plan):
        raise UnfitSlideError(
            f"{path}: {plan.describe_empty()} (patches of {spec.tile_size_px} voxels at {spec.spacing_mm:g} "
            "mm); there is nothing to grade"
        )
    with contextlib.ExitStack() as own:
        if runner is None:
            runner = own.enter_context(start_runner(model, threads=threads))
        size = runner.batch_size
        starts = range(0, len(plan), size)
        parts = ((n, np.stack([plan.patch(i) for i in range(n, min(n + size, len(plan)))])) for n in starts)
        embedded = _Embeddings(len(plan))
        with torch.inference_mode():
            for _, rows in runner.stream(parts):
                embedded.add(rows)
            places = plan.origins_voxel.astype(np.int64) // spec.stride_px
            graded = _graded(model, runner, path, embedded.of_all(), places, force)
        points = np.full((len(plan), 3), np.nan)
        kinds = shown_patches(graded["explanation"].contributions, graded["attention"])
        shown = [patch for kind in kinds.values() for patch in kind]
        for patch, place in _places_of(model, runner, embedded.of_all(), plan, shown).items():
            points[patch] = plan.origins_voxel[patch] + place
    return SeriesGrade(
        slide=path,
        fingerprint=series.fingerprint,
        plan=plan,
        points_voxel=points,
        doubts=model.card.doubts_about(graded["novelty"]),
        **graded,
    )


def _places_of(
    model: ModelFile, runner: Runner, embeddings: Tensor, plan: PatchPlan, shown: Sequence[int]
) -> dict[int, NDArray[np.int64]]:
    """Finds the place in each of some patches to which the grade reacts most."""
    network, spec = model.network, plan.spec
    width = min(spec.tile_size_px, max(1, round(_PLACE_MM / spec.spacing_mm)))
    patches = {patch: plan.patch(patch) for patch in shown}
    return runner.call(
        lambda: find_voxels(
            lambda rows: network.grade(rows)[1],
            network.embed,
            embeddings.to(runner.device),
            patches,
            width,
        )
    )


def _graded(
    model: ModelFile,
    runner: Runner,
    path: Path,
    embeddings: Tensor,
    places: NDArray[np.int64],
    force: bool,
) -> dict[str, Any]:
    """Grades embeddings ``[N, D]``: the fields that slides and series have in common."""
    card, has_limit = model.card, model.card.novelty_limit is not None
    # Copied in this thread, for the thread owning a GPU not to wait for it.
    novelty, probabilities, expected, attention, *explained = (
        value.cpu() if isinstance(value, Tensor) else value
        for value in runner.call(lambda: _pool(model.network, embeddings.to(runner.device), has_limit))
    )
    relative_novelty = _check_novelty(model, path, float(novelty), force)
    _check_finite(path, "probabilities", probabilities.numpy())  # the argmax of NaN would be grade 0
    _check_finite(path, "attention", attention.numpy())
    explanation = _explanation(model, runner, explained, embeddings, places)
    _check_finite(path, "contributions", explanation.contributions)
    grade = int(probabilities.argmax())
    return {
        "grade": grade,
        "grade_name": card.grades[grade],
        "probabilities": tuple(probabilities.tolist()),
        "expected_grade": float(expected),
        "grade_set": _grade_set(model, probabilities),
        "novelty": relative_novelty,
        "model_sha256": model.sha256,
        "precision": runner.precision,
        "attention": attention.numpy(),
        "explanation": explanation,
    }


def _pool(network: Any, rows: Tensor, has_limit: bool) -> tuple[Any, ...]:
    """Grades embeddings ``[N, D]`` on the network's device: the novelty, then the results of its ``grade``.

    On a GPU the operations run as they are. TorchScript would compile them for several N, one slide after the
    other, while the thread owning the GPU waits.
    """
    with torch.jit.optimized_execution(rows.device.type != "cuda"):  # type: ignore[attr-defined] # torch does not list it
        novelty = network.novelty(rows) if has_limit else rows.new_zeros(())
        return novelty, *network.grade(rows)


def start_runner(
    model: ModelFile,
    batch_size: int | None = None,
    threads: int = 1,
    precision: Precision = "float32",
    profile: bool = False,
) -> Runner:
    """Makes a runner to embed tiles with a model; use it as a context manager.

    Args:
        model: from :func:`slidetl.publish.model_file.load_model`, best frozen.
        batch_size: tiles in a pass; by default 16 on a CPU and 256 on a GPU.
        threads: passes at a time on a CPU.
        precision: of the backbone; see :class:`slidetl.grading.options.GradeOptions`.
        profile: measure the network alone on a GPU, before the first slide.
    """
    device, precision = model.device, chosen_precision(model, precision)
    is_half = precision == "bfloat16"

    def embed(tiles: Tensor) -> Tensor:
        with exact_float32(device), torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            rows: Tensor = model.network.embed(tiles)
        return rows

    size = batch_size or _BATCH_SIZE.get(device.type, _BATCH_SIZE["cuda"])
    has_limit = model.card.novelty_limit is not None
    pool = partial(_pool, model.network, has_limit=has_limit)
    spec = model.card.tile_spec
    return Runner(embed, device, size, spec, threads, then=pool, profile=profile, precision=precision)


def chosen_precision(model: ModelFile, precision: Precision, device: str = "") -> Precision:
    """Resolves ``auto`` on a device, by default the model's.

    It is float32 on a CPU. On a GPU it is bfloat16 if the GPU computes in it, and the export compared the
    file with its networks in it on a GPU; older files do not say on which device: float32.
    """
    if precision != "auto":
        return precision
    place = torch.device(device or model.device)
    is_covered = "cuda bfloat16" in model.card.precisions and place.type == "cuda"
    return "bfloat16" if is_covered and has_bfloat16(place) else "float32"


class _Embeddings:
    """The embeddings of a slide, collected batch by batch in limited memory.

    They lie in one piece from the start, for ``most`` tiles, since joining would hold them twice. Large ones
    lie in a file, not on a GPU, where many slides are open at a time; its pages are dropped from memory by us
    once full, and by the kernel as it needs room.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._filled = 0
        self._rows: Tensor | None = None
        self._file: mmap.mmap | None = None
        self._written = 0  # bytes dropped from memory

    def add(self, rows: Tensor) -> None:
        """Adds a batch ``[n, D]``."""
        if self._rows is None:
            self._rows = self._room(rows)
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)
        if self._file is not None:
            end = self._filled * rows[0].nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            if end - self._written >= _IN_MEMORY // 4:
                self._file.madvise(mmap.MADV_DONTNEED, self._written, end - self._written)
                self._written = end

    def of_all(self) -> Tensor:
        """Returns all embeddings so far, ``[N, D]``."""
        assert self._rows is not None
        if self._file is not None:
            hand_back_memory()  # of the activations
        return self._rows[: self._filled]

    def _room(self, rows: Tensor) -> Tensor:
        size = self._most * rows[0].nbytes
        if size > _IN_MEMORY:
            try:
                with tempfile.TemporaryFile() as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process
                    self._file = mmap.mmap(file.fileno(), size)
            except (AttributeError, OSError):  # no room there, or not on this system: in memory then
                pass
            else:
                hand_back_memory()  # of the search for tissue
                return torch.frombuffer(self._file, dtype=rows.dtype).view(self._most, -1)
        if size <= _IN_MEMORY:
            try:
                return rows.new_empty(self._most, rows.shape[1])
            except Exception as error:
                if not is_gpu_full(error):
                    raise
        return torch.empty(self._most, rows.shape[1], dtype=rows.dtype)


def _check_tissue(model: ModelFile, path: Path, plan: TilePlan, force: bool) -> None:
    spec = plan.spec
    if not len(plan):
        raise UnfitSlideError(
            f"{path}: {plan.describe_empty()}, of {spec.tile_size_px} px at {spec.mpp:g} um/px; there is "
            "nothing to grade"
        )
    training = model.card.training
    found = float(plan.tissue_fraction.sum()) * spec.tile_mm2(plan.mpp_read)
    if training and not force and found < training.least_tissue_mm2 / 2:
        raise UnfitSlideError(
            f"{path}: {found:.3g} mm2 of tissue is too little to grade; every slide that the model was "
            f"trained on has {training.least_tissue_mm2:.3g} mm2 or more; --force grades it all the same"
        )


def _check_novelty(model: ModelFile, path: Path, distance: float, force: bool) -> float | None:
    limit = model.card.novelty_limit
    if limit is None:
        return None
    novelty = distance / limit
    if not math.isfinite(novelty):
        raise UnfitSlideError(f"{path}: not graded: its novelty is {novelty}; check the model file")
    if novelty > 1 and not force:
        raise UnfitSlideError(
            f"{path}: {model.card.describe_novelty(novelty)}; --force grades it all the same"
        )
    return novelty


def _check_finite(path: Path, name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise UnfitSlideError(
            f"{path}: not graded: expected finite {name}, the network gives {values[:10].tolist()}; "
            "check the model file and --precision"
        )


def _explanation(
    model: ModelFile, runner: Runner, explained: list[Any], embeddings: Tensor, places: NDArray[np.int64]
) -> Explanation:
    """Takes the network's own explanation; older model files have none, and need occlusion."""
    if explained and explained[0] is not None:
        score, contributions = (value.cpu() for value in explained[0])
        baseline = float(score) - float(contributions.double().sum())
        return Explanation(contributions.numpy(), model.card.score_unit, float(score), baseline)

    def expected_grades(selections: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        kept = [torch.from_numpy(numbers).to(runner.device) for numbers in selections]
        grades = runner.call(lambda: _expected_grades(model.network, embeddings.to(runner.device), kept))
        return grades.cpu().double().numpy()  # copied in this thread, as in `_graded`

    return explain_by_occlusion(expected_grades, places)


def _expected_grades(network: Any, rows: Tensor, selections: Sequence[Tensor]) -> Tensor:
    """Grades all embeddings ``[N, D]``, and each selection of their numbers, as :func:`_pool` does."""
    with torch.jit.optimized_execution(rows.device.type != "cuda"):  # type: ignore[attr-defined] # torch does not list it
        others = (network.grade(rows.index_select(0, numbers))[1] for numbers in selections)
        return torch.stack([network.grade(rows)[1], *others])


def _grade_set(model: ModelFile, probabilities: Tensor) -> tuple[int, int] | None:
    evidence = model.card.evidence
    if evidence is None:
        return None
    rule = GradeSets(evidence.quantile, 1 - evidence.coverage, evidence.patients)
    # In double precision: the sum over the grades has to be one.
    exact = probabilities.double().cpu()
    lowest, highest = rule.sets((exact / exact.sum()).unsqueeze(0).numpy())[0].tolist()
    return lowest, highest


@dataclass(frozen=True)
class _Clocks:
    """Seconds of wall time, of CPU time in all threads of this process, and of passes."""

    wall: float
    processor: float
    busy: float

    @classmethod
    def now(cls, runner: Runner) -> Self:
        return cls(time.perf_counter(), time.process_time(), runner.busy_s)

    def since(self, runner: Runner) -> _Clocks:
        now = _Clocks.now(runner)
        return _Clocks(now.wall - self.wall, now.processor - self.processor, now.busy - self.busy)


def _rates(runner: Runner, tiles: NDArray[np.uint8] | None, graded: int, taken: _Clocks) -> Rates:
    """Measures the network alone, after ``graded`` tiles in the time taken; on a GPU, for all slides."""
    if runner.alone is not None:
        return Rates(runner.rate_so_far, runner.alone, None, runner.waited_so_far, runner.first_pass_s)
    assert tiles is not None  # kept if threads of this process read
    started = _Clocks.now(runner)
    alone = runner.rate(tiles)
    spent = started.since(runner)
    share = None
    if runner.device.type == "cpu":
        share = (spent.processor / (alone * spent.wall)) / (taken.processor / graded)
    return Rates(
        graded / taken.wall, alone, share, max(0.0, 1 - taken.busy / taken.wall), runner.first_pass_s
    )


@contextlib.contextmanager
def _in_reader(
    readers: Readers, path: Path, *arguments: Any
) -> Generator[Iterator[TilePlan | TileBatch], None, None]:
    """Opens the parts of :func:`slidetl.tiles.cut.read_slide`, from a reader."""
    try:
        with readers.stream(path, *arguments) as parts:
            yield (
                about if pixels is None else TileBatch(about[0], about[1], pixels) for about, pixels in parts
            )
    except ProcessEnded as error:
        raise SlideError(f"{path}: {error}") from error


def _with_pixels(
    parts: Iterable[TilePlan | TileBatch],
) -> Iterator[tuple[TileBatch, NDArray[np.uint8]]]:
    for batch in parts:
        assert isinstance(batch, TileBatch)  # the plan was taken before
        yield batch, batch.pixels


def _ahead(items: Generator[_T, None, None], depth: int = 4) -> Generator[_T, None, None]:
    """Yields the items, made ahead in another thread; at most ``depth`` wait."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def give(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    give((True, item))
                    if stopped.is_set():
                        return
            give((False, None))
        except BaseException as error:  # raised in the thread asking for items
            give((False, error))

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            there, item = waiting.get()
            if there:
                yield item
            elif item is not None:
                raise item
            else:
                return
    finally:
        stopped.set()
        thread.join()


def draw_map(result: SlideGrade, card: ModelCard, path: Path, title: str = "") -> None:
    """Draws contributions, and the relative attention if it varies, over the thumbnail, as a PNG.

    ``title`` names the slide; by default it is the name of its file.
    """
    from matplotlib.figure import Figure

    plan = result.plan
    height, width = plan.thumbnail.shape[:2]
    explanation = result.explanation
    reach = explanation.reach
    part = f"contribution to the {explanation.score_name}"
    panels = [(part, f"{explanation.unit} × tiles", explanation.relative, DIVERGING, (-reach, reach), "both")]
    if (relative := relative_attention(result.attention)) is not None:
        limits = (0.0, float(relative.max()))
        panels.append(("attention", "× the average tile", relative, "inferno", limits, "neither"))
    panel_width = 5.0
    probabilities = ", ".join(f"{probability:.2f}" for probability in result.probabilities)
    score = card.describe_score(result.expected_grade)
    about = (
        title or result.slide.name,
        f"grade {result.grade_name}",
        score,
        f"probabilities {probabilities}",
    )
    letters = 28 * (1 + len(panels))  # of W, the widest
    lines = [plot_label(line) for text in about for line in textwrap.wrap(one_line(text), letters)]
    figure = Figure(
        figsize=(
            (1 + len(panels)) * panel_width,
            0.9 * panel_width * min(2.0, max(0.5, height / width)) + 0.7 + 0.2 * len(lines),
        ),
        layout="constrained",
    )
    axes = figure.subplots(1, 1 + len(panels))
    axes[0].imshow(plan.thumbnail)
    axes[0].set_title(f"{len(result.attention)} tiles")
    for panel, (part, unit, values, colours, (low, high), beyond) in zip(axes[1:], panels, strict=True):
        panel.imshow(plan.thumbnail)
        grid = _on_grid(result, values)
        left, top = _thumbnail_px(result, 0, 0)
        right, bottom = _thumbnail_px(result, grid.shape[1], grid.shape[0])
        shown = panel.imshow(
            grid, cmap=colours, vmin=low, vmax=high, alpha=0.6, extent=(left, right, bottom, top)
        )
        panel.set(title=part, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        figure.colorbar(shown, ax=panel, fraction=0.046, pad=0.02, extend=beyond, label=unit)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle("\n".join(lines))
    if result.notes:
        figure.supxlabel(f"see the notes in {plot_label(path.stem)}.json", color="#9a3412")
    origin = {"Software": f"slidetl {VERSION}", _OF_MODEL: result.model_sha256}
    with replaced(path) as file:
        figure.savefig(file, dpi=100, format="png", metadata=origin)


def is_map(path: Path) -> bool:
    """Tells if a file is of :func:`draw_map`; those of version 0.1.0 do not say so."""
    try:
        with path.open("rb") as file:
            return f"tEXt{_OF_MODEL}\0".encode() in file.read(4096)  # it stands before the pixels
    except OSError:
        return False


def _stride_level0(plan: TilePlan) -> tuple[float, float]:
    share = plan.spec.stride_px / plan.spec.tile_size_px
    return plan.extent_level0[0] * share, plan.extent_level0[1] * share


def _places(plan: TilePlan, origins_level0: NDArray[np.int32]) -> NDArray[np.int64]:
    """Returns column and row ``[N, 2]`` of tiles on the grid."""
    return np.round(origins_level0 / _stride_level0(plan)).astype(np.int64)


def _on_grid(result: SlideGrade, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Puts values of the tiles on their grid ``[rows, columns]``, NaN for cells without a tile."""
    column, row = _places(result.plan, result.origins_level0).T
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row, column] = values
    return grid


def _thumbnail_px(result: SlideGrade, columns: int, rows: int) -> tuple[float, float]:
    """Converts corners of the grid's cells to thumbnail pixels, with centres at whole numbers.

    If tiles overlap or leave gaps, a cell covers the points nearest to the centre of its tile, as in
    :meth:`slidetl.tiles.pyramid.Pyramid.to_viewer`.
    """
    height, width = result.plan.thumbnail.shape[:2]
    size_x, size_y = result.plan.info.size_level0
    stride_x, stride_y = _stride_level0(result.plan)
    extent_x, extent_y = result.plan.extent_level0
    x = columns * stride_x + (extent_x - stride_x) / 2
    y = rows * stride_y + (extent_y - stride_y) / 2
    # The pixel centres of a picture lie at whole numbers, its border at -0.5.
    return x / size_x * width - 0.5, y / size_y * height - 0.5
