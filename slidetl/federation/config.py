"""The configuration of ``slidetl federate``, read from YAML and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slidetl.compare.config import FIT_PARTS, usage_error_in
from slidetl.data.manifest import FIVE_GRADES, check_scale
from slidetl.errors import UsageError
from slidetl.evaluation.protocol import canonical_sha256
from slidetl.federation.combine import Rule, WeightedMean, check_sites
from slidetl.federation.mixing import Floats, check_matrix, full_graph, ring
from slidetl.federation.privacy import Privacy
from slidetl.federation.weights import Travel
from slidetl.files import read_yaml
from slidetl.models.spec import with_preset
from slidetl.text import first_lines

Scheme = Literal["cyclic", "averaged", "peer_to_peer", "local", "pooled"]
BASELINES = ("local", "pooled")

_PLACES = ("data.manifest", "data.cache", "data.seed", "data.split_from")
_LABELS = ("data.grades", "data.tasks", "model.grades")
_LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.default_root_dir")
_SITE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")


@dataclass(frozen=True)
class Site:
    """A site with its slides.

    Attributes:
        examples: training slides that the site declares: the cap of what it claims for its updates.
        manifest: CSV of its slides; empty if the site itself has it (``SLIDETL_SITE``).
        cache: folder of ``slidetl tile``, likewise.
        split_from: ``external`` where patients have the names of others in the checkpoint that the training
            starts from: only the content of slides is compared with it, as by ``data.split_from``; likewise.
        local_epochs: passes over its slides in each round, instead of the federation's.
    """

    examples: int
    manifest: str = ""
    cache: str = ""
    local_epochs: int | None = None
    split_from: Literal["checkpoint", "external"] = "checkpoint"

    def __post_init__(self) -> None:
        if self.examples < 1 or (self.local_epochs is not None and self.local_epochs < 1):
            raise UsageError(f"a site needs examples and local_epochs of at least 1, not {self}")
        if bool(self.manifest) != bool(self.cache):
            raise UsageError(f"a site has a manifest and a cache, or neither, not {self}")
        if self.split_from not in ("checkpoint", "external"):
            raise UsageError(f"split_from of a site must be checkpoint or external, not {self.split_from!r}")


@dataclass(frozen=True)
class Cyclic:
    """The network travels from site to site (Chang et al., JAMIA 2018).

    At each visit a site makes ``local_epochs`` passes over its slides: its work is in proportion to them.

    Attributes:
        order: names of the sites in the order of the journey; empty for that of ``sites``.
    """

    order: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Averaged:
    """The sites train at the same time, and the server combines their updates.

    Attributes:
        rule: of :mod:`slidetl.federation.combine`: the weighted mean (FedAvg), or one that tolerates
            malicious sites.
        momentum: of the server (FedAvgM), at least 0 and below 1.
        fewest: usable updates with which a round counts.
        encrypted: sites encrypt their updates, and the server adds what it cannot read; the sites decrypt the
            mean. At least two updates must be in it.
    """

    rule: Rule = WeightedMean()  # noqa: RUF009 (frozen)
    momentum: float = 0.0
    fewest: int = 1
    encrypted: bool = False

    def __post_init__(self) -> None:
        if self.encrypted and not isinstance(self.rule, WeightedMean):
            raise UsageError(
                "averaged.encrypted: averaged.rule must be WeightedMean, since the server cannot compare "
                f"updates that it cannot read, not {type(self.rule).__name__}"
            )
        if not 0 <= self.momentum < 1 or self.fewest < 1:
            raise UsageError(f"averaged: expected a momentum from 0 to below 1 and fewest >= 1, not {self}")


@dataclass(frozen=True)
class PeerToPeer:
    """The sites exchange their networks with each other; no server averages.

    Attributes:
        mixing: ``swarm``: in each round another site combines the updates by the weighted mean, and all take
            its result. Otherwise neighbours mix: over a ``ring``, a ``full`` graph, or by a doubly stochastic
            matrix in the order of ``sites``.
        secure: encrypt the exchange from site to site, so that the server relays what it cannot read. The
            simulator has no certificates and never encrypts.
    """

    mixing: Literal["swarm", "ring", "full"] | list[list[float]] = "ring"
    secure: bool = True

    def matrix(self, sites: int) -> Floats | None:
        """Returns the mixing matrix of so many sites, None for a swarm.

        Raises:
            UsageError: the matrix does not mix, or not so many sites.
        """
        if self.mixing == "swarm":
            return None
        if isinstance(self.mixing, str):
            return (ring if self.mixing == "ring" else full_graph)(sites)
        return check_matrix(self.mixing, sites)


@dataclass(frozen=True)
class Federation:
    """A training over several sites.

    Attributes:
        sites: by name.
        scheme: ``cyclic``, ``averaged`` or ``peer_to_peer``; or a baseline without the engine: ``local``
            trains each site alone, ``pooled`` all slides in one place.
        model, data, trainer: as for ``slidetl fit``; manifests, caches, grades and lengths are set here.
        rounds: of the training; the schedule of the learning rate runs over all of them.
        local_epochs: passes of a site over its slides in each round.
        grades: names, lowest first.
        seed: of initial weights, splits, draws and order of the slides.
        travel: entries that leave a site: ``all``, or ``all-but-normalisation`` (FedBN). Weights that no
            training changes never travel.
        proximal: pull of each site towards the network that arrived, ``proximal/2 ||w - w_arrived||^2`` on
            every trained weight, decoupled from Adam as in L2-SP. With ``averaged`` this is FedProx.
        privacy: differential privacy of what leaves a site; see :class:`~slidetl.federation.privacy.Privacy`.
            ``level: site`` clips and noises each update. ``level: patient`` trains aggregator and head on
            stored features by DP-SGD, with AdamW at the constant ``model.lr``. The baselines send nothing
            and have none.
        answer_seconds: longest wait for a site's answer. A later one is left out of its round.
        cyclic, averaged, peer_to_peer: options of the scheme.
    """

    sites: dict[str, Site]
    scheme: Scheme = "averaged"
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    rounds: int = 10
    local_epochs: int = 1
    grades: list[str] = field(default_factory=lambda: list(FIVE_GRADES))
    seed: int = 0
    travel: Travel = "all"
    proximal: float = 0.0
    privacy: Privacy | None = None
    answer_seconds: float = 24 * 3600.0
    cyclic: Cyclic = field(default_factory=Cyclic)
    averaged: Averaged = field(default_factory=Averaged)
    peer_to_peer: PeerToPeer = field(default_factory=PeerToPeer)

    def __post_init__(self) -> None:
        for name in self.sites:
            if not _SITE.fullmatch(name) or name == "server":
                raise UsageError(
                    "the name of a site has letters, digits, _ and -, begins with a letter and is not "
                    f"'server'; found {name!r}"
                )
        if len(self.sites) < (1 if self.scheme in BASELINES else 2):
            raise UsageError(f"sites: {self.scheme} needs at least two sites, not {len(self.sites)}")
        for name, least in (("rounds", 1), ("local_epochs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        check_scale(self.grades, "grades")
        if not 0 <= self.proximal < float("inf") or not 0 < self.answer_seconds < float("inf"):
            raise UsageError(
                f"expected proximal >= 0 and answer_seconds > 0, not {self.proximal}, {self.answer_seconds}"
            )
        if self.cyclic.order and sorted(self.cyclic.order) != sorted(self.sites):
            raise UsageError(
                f"cyclic.order must name each of {', '.join(self.sites)} once, "
                f"not {', '.join(self.cyclic.order)}"
            )
        if self.scheme == "averaged":
            check_sites(self.averaged.rule, len(self.sites))
        for scheme, unset in (("cyclic", Cyclic()), ("averaged", Averaged()), ("peer_to_peer", PeerToPeer())):
            if self.scheme != scheme and getattr(self, scheme) != unset:
                raise UsageError(
                    f"{scheme}: scheme must be {scheme}, not {self.scheme}, for these options to have an "
                    "effect; leave them out, or change the scheme"
                )
        if self.scheme == "peer_to_peer":
            self.peer_to_peer.matrix(len(self.sites))
        if self.privacy is not None and self.proximal and self.privacy.level == "patient":
            raise UsageError("privacy.level patient trains without the pull of proximal; set proximal: 0")
        given = {"model": self.model, "data": self.data, "trainer": self.trainer}
        for name in (*_PLACES, *_LABELS, *_LENGTH):
            part, _, key = name.partition(".")
            if key in given[part]:
                raise UsageError(f"{name} is set by the federation itself or each of its sites; leave it out")

    @property
    def declared(self) -> dict[str, int]:
        """The examples of each site, in the order of a journey."""
        order = self.cyclic.order if self.scheme == "cyclic" and self.cyclic.order else self.sites
        return {name: self.sites[name].examples for name in order}

    def epochs_of(self, site: str) -> int:
        """Returns the passes of a site over its slides in each round."""
        return self.sites[site].local_epochs or self.local_epochs if site in self.sites else self.local_epochs

    @property
    def fit_config(self) -> dict[str, Any]:
        """The configuration of a site's training, ``model``, ``data`` and ``trainer``."""
        model = dict(self.model)
        if isinstance(backbone := model.get("backbone"), dict):
            model["backbone"] = with_preset(backbone)
        # A site may lack a grade that others have.
        return {"model": model, "data": {"every_grade": False, **self.data}, "trainer": dict(self.trainer)}

    @property
    def sha256(self) -> str:
        """SHA-256 of all values but the places of the slides and the waiting time."""
        return canonical_sha256({**self.to_dict(), "answer_seconds": None})

    def to_dict(self) -> dict[str, Any]:
        """Converts to plain values for :func:`federation_from`, without the places of the slides."""
        sites = {
            name: {"examples": site.examples, "local_epochs": site.local_epochs}
            for name, site in self.sites.items()
        }
        rule = self.averaged.rule
        named = {"class_path": f"{type(rule).__module__}.{type(rule).__qualname__}", "init_args": vars(rule)}
        averaged = {"rule": named, "momentum": self.averaged.momentum, "fewest": self.averaged.fewest}
        if self.averaged.encrypted:  # else the hash is that of before there was encryption
            averaged["encrypted"] = True
        scalars = ("scheme", "model", "data", "trainer", "rounds", "local_epochs", "grades", "seed", "travel")
        return {
            "sites": sites,
            **{name: getattr(self, name) for name in (*scalars, "proximal", "answer_seconds")},
            "privacy": vars(self.privacy) if self.privacy is not None else None,
            "cyclic": {"order": list(self.cyclic.order)},
            "averaged": averaged,
            "peer_to_peer": vars(self.peer_to_peer),
        }


def read_federation(path: Path) -> Federation:
    """Reads the YAML of a federation.

    Raises:
        UsageError: it cannot be read, or a value is wrong; one line says where.
    """
    values = read_yaml(path, "a federation", "sites, scheme, model and more; see configs/federated/")
    try:
        return federation_from(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def federation_from(values: Mapping[str, Any]) -> Federation:
    """Builds a federation of plain values.

    Raises:
        UsageError: a value is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    # The parser makes objects of all with a class_path; the parts of 'slidetl fit' must stay as written.
    parts = {part: values.get(part) or {} for part in FIT_PARTS}
    rest = {name: value for name, value in values.items() if name not in FIT_PARTS}
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[__name__, "slidetl.federation.combine", "slidetl.federation.privacy.Privacy"],
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Federation, "federation")
    try:
        for part, value in parts.items():
            if not isinstance(value, dict):
                raise UsageError(f"{part}: expected options as of 'slidetl fit', found {value!r}")
        parsed = parser.instantiate_classes(parser.parse_object({"federation": rest})).federation
        federation: Federation = replace(parsed, **parts)
        return federation
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(first_lines(str(usage_error_in(error)))) from error
