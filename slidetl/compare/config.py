"""The configuration of ``slidetl compare``, read from YAML and checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from slidetl.errors import UsageError
from slidetl.evaluation.classical import POOLS, ClassicalModel, Pool
from slidetl.evaluation.protocol import Protocol

MetricName = Literal["qwk", "accuracy", "mae", "rps", "log_loss"]
METRICS: tuple[MetricName, ...] = ("qwk", "accuracy", "mae", "rps", "log_loss")
Baseline = Literal["prior", "colour_area", "site", "collagen"]
BASELINES: tuple[Baseline, ...] = ("prior", "colour_area", "site", "collagen")

# Epochs where ``trainer.max_epochs`` says nothing, as ``slidetl fit``.
EPOCHS = 30

# The parts of a configuration of ``slidetl fit`` that an arm may have.
FIT_PARTS = ("model", "data", "trainer")
# What the comparison decides itself.
_DECIDED = ("data.manifest", "data.cache", "data.grades", "data.seed", "model.grades")


@dataclass(frozen=True)
class Classical:
    """A classical model on stored features.

    Attributes:
        features: names under which ``slidetl embed`` stored them; several are joined.
        model: as ``slidetl fit-features --model``.
        pool: how the tiles of a slide become one vector.
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
        fit: what differs from the comparison's ``base``, as a configuration of ``slidetl fit``.
        classical: a classical model on stored features.
        baseline: what anything must beat: ``prior`` (how common each grade is), ``site`` (how common at that
            site), ``colour_area`` (mean colour and tissue area), ``collagen`` (area of what is stained as
            collagen, by colour deconvolution).
        choices: of ``fit``: dotted names, such as ``model.lr``, and the values that the inner folds choose
            from. The number of epochs is always chosen there, up to ``trainer.max_epochs``.
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
    """The one comparison that was declared before anything ran: is ``arm`` better than ``against``?"""

    arm: str
    against: str
    metric: MetricName = "qwk"


@dataclass(frozen=True)
class Sizes:
    """Smaller training parts, for the curve of accuracy against their number.

    Attributes:
        slides: numbers of slides to train on.
        arms: which arms are trained so, at fixed hyper-parameters, and for as many more epochs as the part is
            smaller: in as many steps as on the whole.
    """

    slides: list[int] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Permutations:
    """Whole cross-validations on labels permuted over patients, for the test against chance.

    Attributes:
        n: how many; 19 are the fewest that can reach p = 0.05.
        arms: which arms are tested so. It costs ``n`` times the arm.
    """

    n: int = 0
    arms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Groups:
    """Two groups of slides, as before and after a treatment: is the score of the second higher, or lower?

    Attributes:
        column: of the manifest.
        first, second: what stands there for each group. All other slides take no part.
    """

    column: Literal["site", "scanner", "stain", "block"]
    first: str
    second: str

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise UsageError(f"groups: {self.first!r} is compared with itself; name another group")


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        manifest: the manifest of the study, or labelled images as ``slidetl tile`` takes them.
        cache: the folder that ``slidetl tile`` wrote.
        arms: by name.
        primary: declared before running, and printed first.
        protocol: splits, and what counts as a result.
        grades: names, lowest first.
        base: what the arms with ``fit`` have in common: ``model``, ``data`` and ``trainer`` of a
            configuration of ``slidetl fit``.
        validate_every: epochs between two points of a learning curve, and between two candidates for the
            number of epochs.
        sizes: smaller training parts, too.
        permutations: of the labels, too.
        tile_draws: times that each test slide is graded by as many tiles as it has, drawn from them with
            replacement, for the repeatability of its score; 0: not at all.
        bootstrap_draws: resamples of the patients for each interval.
        near_duplicates: correlation of two thumbnails from which on they count as one slide; 0 does not look.
        duplicates: what is done about slides that are the same, or look alike: ``stop``; or ``join``, which
            takes them for slides of one patient. Of such that a given split has in several parts, those of
            the test are kept, or else of the validation part; the others are left out.
        groups: two groups of slides whose scores are compared; None for no such comparison.
        referral_risks: shares of patients with a wrong grade, between 0 and 1, that one may choose to bear
            where the least sure slides are left to a human.
    """

    manifest: str
    cache: str
    arms: dict[str, Arm]
    primary: Primary
    protocol: Protocol = field(default_factory=Protocol)
    grades: list[str] = field(default_factory=lambda: ["0", "1", "2", "3", "4"])
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

    def __post_init__(self) -> None:
        if len(self.grades) < 2 or len(set(self.grades)) < len(self.grades):
            raise UsageError(f"grades must be at least two different names, lowest first, not {self.grades}")
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
        for name, arm in self.arms.items():
            if arm.choices and not self.protocol.is_nested:
                raise UsageError(
                    f"arm {name!r} has choices, but protocol.inner_folds is 0; ask for inner folds"
                )
            if arm.fit is not None:
                self.fit_config(name)

    def fit_config(self, arm: str) -> dict[str, Any]:
        """The configuration of an arm's training: the base, and what differs from it.

        Raises:
            UsageError: it has parts that ``slidetl fit`` has not, or that the comparison decides.
        """
        config: dict[str, Any] = {part: {} for part in FIT_PARTS}
        for source, what in ((self.base, "base"), (self.arms[arm].fit or {}, f"arm {arm!r}")):
            strange = [part for part in source if part not in FIT_PARTS]
            if strange:
                raise UsageError(f"{what}: expected {', '.join(FIT_PARTS)}, found {', '.join(strange)}")
            _merge(config, source)
        if self.protocol.leave_one_site_out:  # the protocol warns of a grade that only one site has
            config["data"].setdefault("every_grade", False)
        for name in _DECIDED:
            part, _, key = name.partition(".")
            if key in config[part]:
                raise UsageError(f"arm {arm!r}: {name} is set by the comparison itself; leave it out")
        return config

    def trials(self, arm: str) -> list[dict[str, Any]]:
        """Lists the combinations of the arm's choices for the inner folds, by dotted name."""
        choices = self.arms[arm].choices
        return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def read_comparison(path: Path) -> Comparison:
    """Reads the YAML of a comparison.

    Raises:
        UsageError: it cannot be read, or says what cannot be meant; one line says where.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path}: expected the YAML of a comparison: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected manifest, cache, arms, primary and more; see configs/compare/")
    # Whatever has a class_path is made into an object by the parser; here it must stay what was written.
    base, fits = values.pop("base", {}), {}
    arms = values.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if isinstance(arm, dict) and isinstance(arm.get("fit"), dict):
            fits[name], arm["fit"] = arm["fit"], {}
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
        raise UsageError(f"{path}: {_first_lines(str(_own(error)))}") from error


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some values changed, by their dotted names."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for name, value in values.items():
        _merge(changed, _nested(name, value))
    return changed


def _own(error: BaseException) -> BaseException:
    """Our own error, where the parser met one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _first_lines(message: str) -> str:
    """Shortens a parser's message by the input that it quotes, which may be pages."""
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    lines = [line for line in lines if not line.startswith(("Given value", "Expected a <class 'NoneType'"))]
    return " ".join(lines[:6])


def _nested(name: str, value: object) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Merges configurations, key by key. Another class brings arguments of its own."""
    for key, value in new.items():
        here = into.get(key)
        if not (isinstance(here, dict) and isinstance(value, Mapping)):
            into[key] = copy.deepcopy(value)
        elif value.get("class_path", here.get("class_path")) != here.get("class_path"):
            into[key] = copy.deepcopy(dict(value))
        else:
            _merge(here, value)
