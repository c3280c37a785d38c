"""Plans the jobs of a comparison: one for each arm and fold, named by everything its result depends on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.config import EPOCHS, Comparison, with_values
from slidetl.data.manifest import ManifestRow, stain_kind
from slidetl.data.record import StudyRecord, ancestors
from slidetl.data.study import CachedSlide, Study, check_duplicates, check_identity, read_study
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.evaluation.leakage import near_duplicates
from slidetl.evaluation.protocol import (
    Case,
    Fold,
    Protocol,
    audit_folds,
    canonical_sha256,
    check_permutations,
    permute_grades,
    plan_folds,
    subsample,
)
from slidetl.files import file_sha256
from slidetl.library.local import SCHEME, pulled_card
from slidetl.models.packaged import packaged_weights
from slidetl.models.spec import INFLATED, PUBLISHED, BackboneSpec
from slidetl.text import listed
from slidetl.tiles.features import common_source, feature_checksum, read_features
from slidetl.tiles.store import SlideCache, cache_path

# Raised with every change of the computation or of the files of a job.
FORMAT_VERSION = 6


@dataclass(frozen=True)
class Job:
    """One arm on one fold, with everything that a process needs to compute it.

    Attributes:
        arm: its name in the configuration.
        fold: slides to train and to test on.
        n_slides: of a smaller training part; None for the whole one.
        permutation: number of the permutation of the labels; None for the labels themselves.
        recipe: the computation, as JSON values.
        key: SHA-256, shortened, of the recipe, the fold, the data and the format; it names the job's folder.
            The arm's name is no part of it: a renamed arm finds its results.
        rows: of the manifest, of the fold's slides; their grades are permuted where the labels are.
        fingerprints: SHA-256 of the content of these slides when the study was read, by slide.
        places: SHA-256 of the places of their tiles, likewise.
        features: checksums of the stored features that the arm reads, likewise, by their name.
        cache: the folder of the tile caches.
        grades: names, lowest first.
    """

    arm: str
    fold: Fold
    n_slides: int | None
    permutation: int | None
    recipe: dict[str, Any]
    key: str
    rows: tuple[ManifestRow, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cache: Path = Path()
    grades: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of the job in messages."""
        size = "" if self.n_slides is None else f" on {self.n_slides} slides"
        size += "" if self.permutation is None else f", labels permuted ({self.permutation})"
        return f"{self.arm}{size}, repeat {self.fold.repeat}, fold {self.fold.name}"

    @property
    def tiles(self) -> str:
        """SHA-256 of the places of the tiles of its slides.

        It is kept beside a result and compared, so that slides that were tiled again elsewhere, as many tiles
        each, are computed again.
        """
        return canonical_sha256([self.places[row.slide_id] for row in self.rows])

    def part(self, slides: Iterable[str]) -> list[ManifestRow]:
        """Returns the rows of some slides, in the order of :attr:`rows`."""
        wanted = set(slides)
        return [row for row in self.rows if row.slide_id in wanted]

    def open(self, slides: Iterable[str]) -> tuple[CachedSlide, ...]:
        """Opens some slides, in the order of the rows.

        Raises:
            CacheError: a cache is gone or was replaced since the study was read, or features of the arm.
        """
        opened = []
        for row in self.part(slides):
            name = row.slide_id
            cache = SlideCache.open(cache_path(self.cache, name))
            check_identity(cache, name, self.fingerprints[name], "the study that was read")
            changed = ["tiles"] if cache.places_sha256 != self.places[name] else []
            changed += [
                f"features {stored!r}"
                for stored, checksums in self.features.items()
                if feature_checksum(cache, stored) != checksums[name]
            ]
            if changed:
                raise CacheMismatchError(
                    f"slide {name!r}: the cache has other {listed(changed)} than when the study was read; "
                    "run again, and leave the cache alone meanwhile"
                )
            opened.append(CachedSlide(row, cache))
        return tuple(opened)

    def check(self) -> None:
        """Checks that all that the key names is still there: slides, features and weights.

        Raises:
            CacheError: as :meth:`open`.
            UsageError: the weights of the arm have changed.
        """
        self.open(row.slide_id for row in self.rows)
        for (name, source), sha256 in _weights_of(self.recipe).items():
            if _weights_sha256(name, source) != sha256:
                raise UsageError(
                    f"the weights {source!r} of {name} are not those that the comparison was planned with; "
                    "run again, with the same files on all machines, and leave them alone meanwhile"
                )


def read_slides(comparison: Comparison) -> Study:
    """Reads the graded slides of a comparison, in the order of their identifiers.

    Raises:
        CacheMissingError: no graded slide is in the cache.
        SlidetlError: as :func:`~slidetl.data.study.read_study`.
    """
    study = read_study(comparison.manifest, comparison.cache, comparison.grades)
    if not study.graded:
        raise CacheMissingError(
            f"{comparison.cache}: none of the graded slides of {comparison.manifest} is here; "
            "run 'slidetl tile' first"
        )
    return replace(study, slides=tuple(sorted(study.graded, key=lambda slide: slide.row.slide_id)))


def cases_of(study: Study) -> tuple[Case, ...]:
    """Describes graded slides to the protocol."""
    return tuple(
        Case(row.slide_id, row.patient_id, row.grade, row.site, row.split)
        for row in study.rows
        if row.grade is not None
    )


def permuted(study: Study, protocol: Protocol, number: int) -> Study:
    """Permutes the grades over patients; the grades of readers are left out."""
    grades = permute_grades(cases_of(study), protocol, number)
    slides = [
        replace(slide, row=replace(slide.row, grade=grades[slide.row.slide_id], reader_grades=()))
        for slide in study.slides
    ]
    return replace(study, slides=tuple(slides))


def plan_and_audit(comparison: Comparison, study: Study) -> tuple[Study, tuple[Fold, ...]]:
    """Plans the folds, and refuses folds that leak from one side to the other.

    Returns:
        The study, with its duplicates joined if configured, and the folds.

    Raises:
        UsageError: as :func:`~slidetl.evaluation.protocol.plan_folds` and
            :func:`~slidetl.evaluation.protocol.audit_folds`; or the results of such patients could not be
            aggregated.
    """
    alike = []
    if comparison.near_duplicates:
        names = [row.slide_id for row in study.rows]
        blind = [c.slide_id for c in study.caches if c.header.imported or c.spec.is_volume]
        if blind:
            raise UsageError(
                f"{len(blind)} slides have imported features, or are CT series, and have no thumbnail "
                f"({listed(blind)}), so that "
                "near-duplicates among them would go unnoticed; set near_duplicates: 0 if there are none"
            )
        found = near_duplicates(
            _Thumbnails(study.caches),
            [cache.thumbnail_mpp for cache in study.caches],
            comparison.near_duplicates,
        )
        alike = [(names[one], names[two], likeness) for one, two, likeness in found]
    if comparison.duplicates == "join":
        study = join_duplicates(study, [(one, two) for one, two, _ in alike], comparison.protocol.given_split)
    else:
        check_duplicates(study.slides)
    cases = cases_of(study)
    folds = plan_folds(cases, comparison.protocol, len(comparison.grades))
    fingerprints = {tiles.slide_id: tiles.fingerprint for tiles in study.caches}
    audit_folds(folds, cases, fingerprints, alike)
    _check_patients(folds, cases, comparison.protocol)
    return study, folds


@dataclass(frozen=True)
class _Thumbnails:
    """The thumbnails of slides, read one at a time, each time anew."""

    caches: Sequence[SlideCache]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (cache.thumbnail for cache in self.caches)


def _check_patients(folds: Sequence[Fold], cases: Sequence[Case], protocol: Protocol) -> None:
    sites: dict[str, set[str]] = {}
    for case in cases:
        sites.setdefault(case.patient_id, set()).add(case.site)
    torn = [patient for patient, own in sorted(sites.items()) if len(own) > 1]
    if torn and protocol.leave_one_site_out:
        raise UsageError(
            f"protocol.leave_one_site_out: patient {torn[0]!r} has slides at "
            f"{', '.join(sorted(sites[torn[0]]))}, so it would be in several test parts; "
            "leave out its slides of all sites but one, or take folds of patients"
        )
    patient = {case.slide_id: case.patient_id for case in cases}
    for part in ("test", "external"):
        found = {patient[slide] for fold in folds for slide in getattr(fold, part)}
        if len(found) == 1:
            raise UsageError(
                f"all {part} slides are of patient {found.pop()!r}; an interval over patients takes two at "
                "least: add slides of others, or choose another protocol"
            )


def join_duplicates(study: Study, alike: Sequence[tuple[str, str]], given_split: bool) -> Study:
    """Assigns slides that are the same, or look alike, to one patient.

    ``alike`` are pairs of slides. With the manifest's split, duplicates stay in one part of it only.
    """
    group = {row.slide_id: row.patient_id for row in study.rows}
    first_of: dict[str, str] = {}
    same = [
        (first_of.setdefault(cache.fingerprint, cache.slide_id), cache.slide_id) for cache in study.caches
    ]
    for one, two in (*same, *alike):
        old, new = sorted((group[one], group[two]), reverse=True)
        if old != new:
            group = {slide: new if patient == old else patient for slide, patient in group.items()}
    part_of: dict[str, str] = {}
    for split in ("train", "val", "test") if given_split else ():
        part_of |= {group[row.slide_id]: split for row in study.rows if row.split == split}
    kept = [
        replace(slide, row=replace(slide.row, patient_id=group[slide.row.slide_id]))
        for slide in study.slides
        if part_of.get(group[slide.row.slide_id], slide.row.split) == slide.row.split
    ]
    joined = sum(row.patient_id != group[row.slide_id] for row in study.rows)
    left_out = len(study.slides) - len(kept)
    if joined or left_out:
        warnings.warn(
            f"duplicates: {joined} slides count as slides of another patient, {left_out} are left out",
            stacklevel=3,
        )
    return replace(study, slides=tuple(kept))


def plan_jobs(
    comparison: Comparison, study: Study, folds: Sequence[Fold], only: Sequence[str] = ()
) -> tuple[Job, ...]:
    """Plans the jobs of all arms, or ``only`` some, fold by fold, so that early results are comparable.

    Raises:
        UsageError: no such arm, a size that does not fit, or too few patients to permute labels over.
        CacheMissingError: features of a classical arm are not stored; the message says how.
    """
    strange = [name for name in only if name not in comparison.arms]
    if strange:
        raise UsageError(f"--only: there is no arm {strange[0]!r}; there are {', '.join(comparison.arms)}")
    first = (comparison.primary.against, comparison.primary.arm)
    names = [*first, *(name for name in comparison.arms if name not in first)]
    names = [name for name in names if not only or name in only]
    spec, cases = study.caches[0].spec.to_dict(), cases_of(study)
    tested = [name for name in names if name in comparison.permutations.arms]
    if tested:
        check_permutations(cases, comparison.protocol, comparison.permutations.n)
    recipes = {name: _recipe(comparison, study, name) for name in names}
    n_grades = len(comparison.grades)
    studies: dict[int | None, Study] = {None: study}
    studies |= {
        number: permuted(study, comparison.protocol, number) for number in range(comparison.permutations.n)
    }
    data_of = {number: _data_of(labelled) for number, labelled in studies.items()}
    places = {tiles.slide_id: tiles.places_sha256 for tiles in study.caches}
    checksums = {
        features: {tiles.slide_id: feature_checksum(tiles, features) for tiles in study.caches}
        for features in {features for recipe in recipes.values() for features in _features_of(recipe)}
    }

    def job(
        name: str,
        fold: Fold,
        n_slides: int | None = None,
        permutation: int | None = None,
        longer: float = 1.0,
    ) -> Job:
        recipe = recipes[name] if n_slides is None else _longer(recipes[name], longer)
        data = {slide: data_of[permutation][slide] for slide in (*fold.train, *fold.test, *fold.external)}
        about = {
            "format": FORMAT_VERSION,
            "recipe": recipe,
            "grades": comparison.grades,
            "seed": fold.seed,
            "train": fold.train,
            "test": fold.test,
            "inner": [asdict(inner) for inner in fold.inner],
            "data": data,
            "spec": spec,
        }
        if fold.external:
            about["external"] = fold.external
        slides = [slide for slide in studies[permutation].slides if slide.row.slide_id in data]
        return Job(
            *(name, fold, n_slides, permutation, recipe, canonical_sha256(about)[:20]),
            rows=tuple(slide.row for slide in slides),
            fingerprints={slide.row.slide_id: slide.cache.fingerprint for slide in slides},
            places={slide.row.slide_id: places[slide.row.slide_id] for slide in slides},
            features={
                features: {slide.row.slide_id: checksums[features][slide.row.slide_id] for slide in slides}
                for features in _features_of(recipe)
            },
            cache=study.folder,
            grades=tuple(comparison.grades),
        )

    jobs = [job(name, fold) for fold in folds for name in names]
    subsets = comparison.sizes.subsets
    sized = [name for name in names if name in comparison.sizes.arms]
    for n_slides, fold, subset in product(comparison.sizes.slides, folds, range(subsets)):
        smaller = subsample(fold, cases, n_slides, n_grades, subset, subsets)
        longer = len(fold.train) / len(smaller.train)
        jobs += [job(name, smaller, n_slides, longer=longer) for name in sized]
    for number in range(comparison.permutations.n if tested else 0):
        try:  # as those of the labels: stratified by the true grades, they would favour them
            own = plan_folds(cases_of(studies[number]), comparison.protocol, n_grades)
        except UsageError as error:
            raise UsageError(f"permutation {number} of the labels: {error}") from error
        jobs += [job(name, fold, permutation=number) for fold in own for name in tested]
    return tuple(jobs)


def refuse_seen(comparison: Comparison, jobs: Iterable[Job], study: Study, allow: Sequence[str] = ()) -> None:
    """Refuses arms with weights or features of a checkpoint that has seen the slides to be graded.

    Args:
        comparison: its ``base`` tells how classical arms compare patients.
        jobs: of the arms.
        study: with the slides.
        allow: names outside slidetl that the arms may import.

    Raises:
        UsageError: there is such an arm; the message names slides.
    """
    graded: dict[str, dict[str, set[str]]] = {}
    recipes = {}
    for job in jobs:
        recipes[job.arm] = job.recipe
        parts = graded.setdefault(job.arm, {"val": set(), "test": set()})
        parts["test"] |= {*job.fold.test, *job.fold.external}
        parts["val"] |= {slide for inner in job.fold.inner for slide in inner.validation}
    for arm, recipe in recipes.items():
        by_content = recipe.get("fit", comparison.base).get("data", {}).get("split_from") == "external"
        parts_of = {
            part: [slide for slide in study.slides if slide.row.slide_id in names]
            for part, names in graded[arm].items()
        }
        _past(recipe, study, allow, by_content).refuse_seen(
            {**parts_of, "predict": study.slides},
            f"arm {arm!r}: its weights or features were",
            "start from weights of other patients (if these only have the same names, set "
            "data.split_from external in base)",
        )


def _past(recipe: Mapping[str, Any], study: Study, allow: Sequence[str], by_content: bool) -> StudyRecord:
    """Reads the records of the checkpoints that an arm starts from."""
    origins: list[StudyRecord | None] = []
    for config in _configurations(recipe):
        if _backbone_of(config)[1].endswith(".ckpt"):
            # imported here: torch takes seconds
            from slidetl.training.configured import build_grader, parse_training

            origins.append(build_grader(parse_training(config, ("0", "1"), 0, allow))[0].origin)
    sources = [common_source(name, study.caches) for name in _features_of(recipe)]
    return ancestors(study.folder, origins, sources, by_content=by_content)


def _configurations(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists the configurations that a job may train: the arm's own, and those of its trials."""
    if "fit" not in recipe:
        return []
    return [with_values(recipe["fit"], values) for values in ({}, *filter(None, recipe["trials"]))]


def _backbone_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the name of a configuration's backbone, and the source of its weights."""
    backbone, usual = config["model"].get("backbone", {}), BackboneSpec()
    return str(backbone.get("name", usual.name)), str(backbone.get("pretrained", usual.pretrained))


def _weights_of(recipe: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Returns the hash of weights that an arm was planned with, by name and source of the backbone."""
    if "fit" not in recipe:
        return {}
    first, *others = _configurations(recipe)
    # Without choices of weights or features the trials have those of the arm.
    origins = recipe.get("of_trials", [recipe] * len(others))
    planned = zip((first, *others), (recipe, *origins), strict=True)
    return {_backbone_of(configuration): origin["weights"] for configuration, origin in planned}


def _features_of(recipe: Mapping[str, Any]) -> list[str]:
    """Lists the names of the stored features that an arm reads."""
    if "classical" in recipe:
        return list(recipe["features"])
    named = (config["data"].get("features") for config in _configurations(recipe))
    return list(dict.fromkeys(filter(None, named)))


def _data_of(study: Study) -> dict[str, list[Any]]:
    """Lists the data of each slide that a result depends on."""
    return {
        row.slide_id: [
            *(tiles.fingerprint, len(tiles), row.patient_id, row.grade, row.site, row.stain),
            list(row.reader_grades),
        ]
        for row, tiles in zip(study.rows, study.caches, strict=True)
    }


def _recipe(comparison: Comparison, study: Study, name: str) -> dict[str, Any]:
    @cache
    def source(features: str) -> str:
        found = common_source(features, study.caches)
        if found.weights_sha256:
            return found.weights_sha256
        digest = hashlib.sha256()  # imported: nothing but their values tells them apart
        for tiles in study.caches:
            digest.update(read_features(tiles, features).tobytes())
        return digest.hexdigest()

    arm = comparison.arms[name]
    if arm.baseline is not None:
        strange = sorted({row.stain for row in study.rows if row.stain and not stain_kind(row.stain)})
        if arm.baseline == "collagen" and strange:
            warnings.warn(
                f"arm {name!r}: the stain {listed(strange)} is none of H&E, trichrome and Sirius red; it "
                "counts as H&E",
                stacklevel=3,
            )
        return {"baseline": arm.baseline}
    if arm.classical is not None:
        sources = {features: source(features) for features in arm.classical.features}
        return {"classical": asdict(arm.classical), "features": sources}

    def origins(config: dict[str, Any]) -> dict[str, str]:
        stored = config["data"].get("features")
        return {
            "weights": weights_sha256(*_backbone_of(config)),
            "features": source(stored) if stored else "",
        }

    weights_sha256 = cache(_weights_sha256)
    config, trials = comparison.fit_config(name), comparison.trials(name)
    recipe = {
        "fit": config,
        "trials": trials,
        "validate_every": comparison.validate_every,
        "tile_draws": comparison.tile_draws,
        "unit": comparison.protocol.unit,
        **origins(config),
    }
    of_trials = [origins(with_values(config, trial)) for trial in trials]
    # Left out where no choice names weights or features, so that such jobs keep their keys.
    return recipe | ({"of_trials": of_trials} if any(each != origins(config) for each in of_trials) else {})


def _longer(recipe: dict[str, Any], factor: float) -> dict[str, Any]:
    """Multiplies the epochs of a recipe, to train a smaller training part for as many steps."""
    if "fit" not in recipe:
        return recipe
    epochs = round(recipe["fit"]["trainer"].get("max_epochs", EPOCHS) * factor)
    fit = with_values(recipe["fit"], {"trainer.max_epochs": epochs})
    return {**recipe, "fit": fit, "validate_every": max(1, round(recipe["validate_every"] * factor))}


def _weights_sha256(name: str, source: str) -> str:
    """Hashes the file of a backbone's weights; empty if they are in a cache or are downloaded.

    The hash of a network in a folder covers its configuration, which decides on the network.
    """
    in_folder = name.removeprefix(INFLATED).startswith("local-dir:")
    if source.startswith(SCHEME):
        weights = pulled_card(source.removeprefix(SCHEME)).model.weights_sha256
    elif source not in PUBLISHED:
        weights = _sha256_of(Path(source))
    elif in_folder:
        from slidetl.models.backbones import local_weights  # imported here: torch takes seconds

        weights = _sha256_of(local_weights(name.removeprefix(INFLATED)))
    else:
        weights = _sha256_of(packaged_weights(name))
    if not in_folder:
        return weights
    folder = Path(name.removeprefix(INFLATED).removeprefix("local-dir:"))
    return canonical_sha256([weights, _sha256_of(folder / "config.json")])


def _sha256_of(path: Path | None) -> str:
    return file_sha256(path) if path is not None and path.is_file() else ""
