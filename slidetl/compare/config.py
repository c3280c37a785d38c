"""The configuration of ``slidetl compare``, read from YAML and checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from slidetl.data.manifest import FIVE_GRADES, check_scale
from slidetl.errors import UsageError
from slidetl.evaluation.classical import POOLS, ClassicalModel, Pool
from slidetl.evaluation.protocol import Protocol, canonical_sha256
from slidetl.files import read_yaml
from slidetl.models.spec import with_preset
from slidetl.text import first_lines

MetricName = Literal["qwk", "accuracy", "mae", "rps", "log_loss"]
METRICS: tuple[MetricName, ...] = ("qwk", "accuracy", "mae", "rps", "log_loss")
LOWER_IS_BETTER: tuple[MetricName, ...] = ("mae", "rps", "log_loss")
ALPHA = 0.05  # of the test that decides
PLATEAU = 0.02  # as good as the best, relative for RPS: on twenty slides a smaller difference says nothing
Baseline = Literal["prior", "colour_area", "site", "collagen"]

EPOCHS = 30  # the default of ``trainer.max_epochs``, as in ``slidetl fit``
LENGTH = "trainer.max_epochs"
FIT_PARTS = ("model", "data", "trainer")  # of a configuration of ``slidetl fit``
OF_TILES = ("augmentation", "sampling")  # options of ``data`` without an effect where no tile is read
_EVERY = "trainer.check_val_every_n_epoch"
_RESERVED = ("data.manifest", "data.cache", "data.grades", "data.seed", "model.grades", _EVERY)
_TASKS = ("data.tasks", "model.tasks")


@dataclass(frozen=True)
class Classical:
    """A classical model on stored features.

    Attributes:
        features: names of stored features (``slidetl embed``); several are joined.
        model: as ``slidetl fit-features --model``.
        pool: of the tiles of a slide into one vector.
        k: of the pool ``top-k``.
    """

    features: list[str]
    model: ClassicalModel = "ridge"
    pool: Pool = "mean"
    k: int = 10

    def __post_init__(self) -> None:
        if not self.features or self.pool not in POOLS or self.k < 1:
            raise UsageError(
                f"classical: expected stored features, a pool of {', '.join(POOLS)} and k >= 1, not {self}"
            )


@dataclass(frozen=True)
class Arm:
    """One way of grading. Exactly one of ``fit``, ``classical`` and ``baseline`` is given.

    Attributes:
        fit: changes to the comparison's ``base``, as a configuration of ``slidetl fit``.
        classical: a classical model on stored features.
        baseline: a trivial arm, to be beaten by all others: ``prior`` (share of each grade), ``site`` (its
            share at that site), ``colour_area`` (mean colour and tissue area), ``collagen`` (area stained as
            collagen, by colour deconvolution).
        choices: of ``fit``: dotted names, such as ``model.lr`` or ``trainer.max_epochs``, and candidate
            values for the inner folds. Each number of epochs is trained on a schedule of its own: 15, 30 and
            60 cost as much as 105.
    """

    fit: dict[str, Any] | None = None
    classical: Classical | None = None
    baseline: Baseline | None = None
    choices: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("fit", "classical", "baseline") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"an arm is one of fit, classical and baseline; found {given or 'none of them'}")
        if self.choices and self.fit is None:
            raise UsageError("only an arm with 'fit' has choices; classical models choose their own penalty")
        for name, values in self.choices.items():
            if not name.startswith(("model.", "data.", "trainer.")) or not values:
                raise UsageError(
                    f"choices: expected a name such as model.lr and at least one value, not {name}: {values}"
                )


@dataclass(frozen=True)
class Primary:
    """The one comparison that decides: is ``arm`` better than ``against`` by ``metric``?

    Attributes:
        arm, against: names of two arms.
        metric: of the difference, ``arm`` minus ``against``.
        margin: largest difference that means nothing in practice, above 0: the report says if the arms are
            equivalent, the difference being within it. None for no such test.
    """

    arm: str
    against: str
    metric: MetricName = "qwk"
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 < self.margin < float("inf"):
            raise UsageError(f"primary.margin must be a number above 0, not {self.margin}")


@dataclass(frozen=True)
class Sizes:
    """Smaller training parts, for the curve of accuracy against their number.

    Attributes:
        slides: numbers of slides to train on.
        subsets: of so many slides drawn from each training part; their spread is part of the intervals.
        arms: arms to train on them, at fixed hyper-parameters and in as many steps as on the whole part:
            with more epochs.
    """

    slides: list[int] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    subsets: int = 1

    def __post_init__(self) -> None:
        if self.subsets < 1:
            raise UsageError(f"sizes.subsets must be at least 1, not {self.subsets}")


@dataclass(frozen=True)
class Permutations:
    """Whole cross-validations on labels permuted over patients, for the test against chance.

    Sites that are left out in turn, and the parts of a given split, keep their grades, and patients exchange
    theirs with others of as many slides: a comparison with too few such patients is refused.

    Attributes:
        n: their number; p = 0.05 takes at least 19.
        arms: arms to test. It costs ``n`` times the arm.
    """

    n: int = 0
    arms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Groups:
    """Two groups of slides, as before and after a treatment: is the score of the second higher, or lower?

    Attributes:
        column: of the manifest.
        first, second: its values for the two groups. Other slides are in neither.
    """

    column: Literal["site", "scanner", "stain", "block"]
    first: str
    second: str

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise UsageError(f"groups: {self.first!r} is compared with itself; name another group")


@dataclass(frozen=True)
class Comparison:
    """The configuration of a comparison.

    Attributes:
        manifest: the manifest of the study, or labelled images as for ``slidetl tile``.
        cache: folder written by ``slidetl tile``.
        arms: by name.
        primary: printed first.
        protocol: splits, and the unit of a result.
        grades: names, lowest first.
        base: common part of the arms with ``fit``: ``model``, ``data`` and ``trainer`` of a configuration of
            ``slidetl fit``.
        validate_every: epochs between two points of a learning curve; the last epoch always is one.
        sizes: arms on smaller training parts.
        permutations: arms on permuted labels.
        tile_draws: gradings of each test slide by as many tiles as it has, drawn from them with replacement,
            for the repeatability of its score; 0: none.
        bootstrap_draws: resamples of the patients for each interval.
        near_duplicates: least correlation of the thumbnails of near-duplicates; 0: do not look for them.
        duplicates: reaction to slides that are the same, or look alike: ``stop``; or ``join``, which
            assigns them to one patient. Of duplicates in several parts of a given split, those of the test
            part are kept, or else of the validation part; the others are left out.
        groups: two groups of slides, to compare their scores; None for no such comparison.
        referral_risks: acceptable shares of patients with a wrong grade, between 0 and 1, when the least sure
            slides are left to a human.
        registered: a text file. Its authors commit :attr:`sha256` to it before the run; the report calls the
            primary comparison declared only if it was there before the first result.
    """

    manifest: str
    cache: str
    arms: dict[str, Arm]
    primary: Primary
    protocol: Protocol = field(default_factory=Protocol)
    grades: list[str] = field(default_factory=lambda: list(FIVE_GRADES))
    base: dict[str, Any] = field(default_factory=dict)
    validate_every: int = 1
    sizes: Sizes = field(default_factory=Sizes)
    permutations: Permutations = field(default_factory=Permutations)
    tile_draws: int = 8
    bootstrap_draws: int = 5000
    near_duplicates: float = 0.95
    duplicates: Literal["stop", "join"] = "stop"
    groups: Groups | None = None
    referral_risks: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    registered: str | None = None

    def __post_init__(self) -> None:
        check_scale(self.grades, "grades")
        for name, least in (("validate_every", 1), ("bootstrap_draws", 100), ("tile_draws", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.near_duplicates <= 1:
            raise UsageError(f"near_duplicates must be from 0 to 1, not {self.near_duplicates}")
        for risk in self.referral_risks:
            if not 0 < risk < 1:
                raise UsageError(f"referral_risks must lie between 0 and 1, not {risk}")
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
                raise UsageError(f"the name of an arm has letters, digits and _ . + - only, not {name!r}")
        named = (self.primary.arm, self.primary.against, *self.sizes.arms, *self.permutations.arms)
        for name in named:
            if name not in self.arms:
                raise UsageError(f"there is no arm {name!r}; there are {', '.join(self.arms)}")
        if self.primary.arm == self.primary.against:
            raise UsageError(f"primary: {self.primary.arm!r} is compared with itself; name another arm")
        if self.permutations.n and self.protocol.external_site:
            raise UsageError("permutations exchange grades between sites; leave out protocol.external_site")
        for name, arm in self.arms.items():
            if arm.choices and not self.protocol.is_nested:
                raise UsageError(
                    f"arm {name!r} has choices, but protocol.inner_folds is 0; ask for inner folds"
                )
            if arm.fit is not None:
                self.fit_config(name)

    def fit_config(self, arm: str) -> dict[str, Any]:
        """Returns the configuration of an arm's training: the base with the arm's changes.

        Raises:
            UsageError: a part is unknown to ``slidetl fit``, or reserved to the comparison.
        """
        config: dict[str, Any] = {part: {} for part in FIT_PARTS}
        for source, what in ((self.base, "base"), (self.arms[arm].fit or {}, f"arm {arm!r}")):
            strange = [part for part in source if part not in FIT_PARTS]
            if strange:
                raise UsageError(f"{what}: expected {', '.join(FIT_PARTS)}, found {', '.join(strange)}")
            _merge(config, source)
        if self.protocol.leave_one_site_out:  # the protocol warns of a grade that only one site has
            config["data"].setdefault("every_grade", False)
        chosen = with_values(config, self.trials(arm)[0])  # all trials have the same names
        for name in (*_RESERVED, *_TASKS):
            part, _, key = name.partition(".")
            if key in chosen[part]:
                why = "would not be learned" if name in _TASKS else "is set by the comparison itself"
                raise UsageError(f"arm {arm!r}: {name} {why}; leave it out")
        own = with_values(self.arms[arm].fit or {}, self.trials(arm)[0]).get("data", {})
        unused = [f"data.{name}" for name in OF_TILES if own.get(name) is not None]
        sizes = [with_values(config, trial)["data"].get("bag_size") for trial in self.trials(arm)]
        if unused and all(size == 0 for size in sizes):
            raise UsageError(
                f"arm {arm!r}: {', '.join(unused)} would have no effect with data.bag_size 0, which reads no "
                "tile; leave it out, or change bag_size"
            )
        for trial in self.trials(arm):
            epochs = with_values(config, trial)["trainer"].get("max_epochs", EPOCHS)
            if epochs in (None, -1, 0):  # to Lightning: as many as it likes, endless, none
                raise UsageError(
                    f"arm {arm!r}: {LENGTH} must be at least 1, not {epochs}; the default is {EPOCHS}"
                )
        if isinstance(backbone := config["model"].get("backbone"), dict):
            config["model"]["backbone"] = with_preset(backbone)
        return config

    @property
    def sha256(self) -> str:
        """SHA-256 of the configuration without its paths (manifest, cache, registered).

        Values at their defaults are left out: an option that slidetl gets later changes no hash.
        """
        return canonical_sha256(_without_defaults(replace(self, manifest="", cache="", registered=None)))

    @property
    def is_declared(self) -> bool:
        """True if the registered file has :attr:`sha256` now.

        Raises:
            UsageError: the file is there, but cannot be read.
        """
        if self.registered is None or not Path(self.registered).exists():
            return False
        try:
            return self.sha256 in Path(self.registered).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"registered: {self.registered} is no readable text file: {error}") from error

    def trials(self, arm: str) -> list[dict[str, Any]]:
        """Lists the combinations of the arm's choices for the inner folds, by dotted name."""
        choices = self.arms[arm].choices
        return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def read_comparison(path: Path) -> Comparison:
    """Reads the YAML of a comparison.

    Raises:
        UsageError: it cannot be read, or a value is wrong; one line says where.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    values = read_yaml(path, "a comparison", "manifest, cache, arms, primary and more; see configs/compare/")
    # The parser makes objects of all with a class_path; base and fit must stay as written.
    base, fits = values.pop("base", {}), {}
    arms = values.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if isinstance(arm, dict) and isinstance(arm.get("fit"), dict):
            fits[name], arm["fit"] = arm["fit"], {}
    # A class_path elsewhere in the file could import anything.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[__name__])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison, "comparison")
    try:
        if not isinstance(base, dict):
            raise UsageError(f"base: expected {', '.join(FIT_PARTS)}, found {base!r}")
        parsed: Comparison = parser.instantiate_classes(
            parser.parse_object({"comparison": values})
        ).comparison
        arms = {name: replace(arm, fit=fits.get(name, arm.fit)) for name, arm in parsed.arms.items()}
        return replace(parsed, base=base, arms=arms)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {first_lines(str(usage_error_in(error)))}") from error


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a configuration with some values changed, by their dotted names."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for name, value in values.items():
        _merge(changed, _nested(name, value))
    return changed


def _without_defaults(value: Any) -> Any:
    """Converts a configuration to JSON values, without the fields at their defaults."""
    if is_dataclass(value):
        kept = {}
        for item in fields(value):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if getattr(value, item.name) != default:
                kept[item.name] = _without_defaults(getattr(value, item.name))
        return kept
    if isinstance(value, Mapping):
        return {name: _without_defaults(each) for name, each in value.items()}
    return [_without_defaults(each) for each in value] if isinstance(value, list | tuple) else value


def usage_error_in(error: BaseException) -> BaseException:
    """Finds our own error in the causes of a parser's, or returns the latter."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _nested(name: str, value: object) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merges configurations, key by key; another class replaces all arguments."""
    for key, value in new.items():
        here = into.get(key)
        if not (isinstance(here, dict) and isinstance(value, Mapping)):
            into[key] = copy.deepcopy(value)
        elif value.get("class_path", here.get("class_path")) != here.get("class_path"):
            into[key] = copy.deepcopy(dict(value))
        else:
            _merge(here, value)
