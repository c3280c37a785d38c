"""One site of a federation: rounds of training and validation with the ordinary LightningModule.

Nothing here knows an engine: arrays come in, arrays and counts go out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.manifest import SPLITS
from slidetl.data.record import StudyRecord, config_sha256, recorded_parts
from slidetl.data.study import CachedSlide, Study
from slidetl.errors import CheckpointError, FederationError, UsageError, WeightsError
from slidetl.federation.config import BASELINES, Federation, Site
from slidetl.federation.privacy import (
    Account,
    PatientSlides,
    Privacy,
    check_unmixed,
    check_variances,
    privatise_update,
    train_private,
)
from slidetl.federation.records import Rounds
from slidetl.federation.weights import SiteUpdate, Weights, find_fault, travelling
from slidetl.files import write_whole
from slidetl.models.backbones import state_sha256
from slidetl.models.penalties import pull
from slidetl.models.targets import Targets
from slidetl.tiles.features import read_features
from slidetl.tiles.grid import TileSpec
from slidetl.training.checkpoint import write_grader
from slidetl.training.configured import build_grader, build_trainer, parse_training, quiet
from slidetl.training.evaluation import Evaluation
from slidetl.training.grader import SlideGrader

Parts = Mapping[str, Sequence[CachedSlide]]  # train, val and test; predict, all slides, ungraded ones too

METRICS = ("rps", "accuracy", "mae", "loss")
"""Metrics of a validation that leave a site: means over slides, so the sites' pooled score is exact."""


def site_slides(federation: Federation, site: Site) -> Parts:
    """Reads the slides of a site, and divides its patients.

    Raises:
        UsageError: the site names no slides, a part has none, or the initial weights have seen some of them.
        SlidetlError: the manifest or the cache has faults.
    """
    if not site.manifest:
        raise UsageError("the site has no manifest and cache; name them in its file SLIDETL_SITE")
    parsed = _parse(federation, federation.seed)
    grader, options = build_grader(parsed)
    data = SlideDataModule(site.manifest, site.cache, **{**options, "split_from": site.split_from})
    data.origin = grader.origin
    with quiet():
        data.setup("fit")
    data.start_from()  # with the names of patients, before slides of sites are joined
    return data.slides


def pooled_slides(parts_of: Mapping[str, Parts]) -> Parts:
    """Joins the slides of sites, for the baseline of all data in one place.

    Identifiers get the name of their site, since two sites may use the same ones.
    """
    return {
        part: tuple(
            replace(
                slide,
                row=replace(
                    slide.row,
                    slide_id=f"{site}/{slide.row.slide_id}",
                    patient_id=f"{site}/{slide.row.patient_id}",
                ),
            )
            for site, parts in parts_of.items()
            for slide in parts[part]
        )
        for part in (*SPLITS, "predict")
    }


def initial_weights(federation: Federation) -> dict[str, NDArray[Any]]:
    """Builds the network before its first round, as the sites' strategy starts it; the same for one seed."""
    grader, _ = _initial(federation)
    return travelling({name: _array(value) for name, value in _shared(grader).items()}, federation.travel)


def write_shared_checkpoint(
    federation: Federation, weights: Weights, tile_spec: TileSpec, lineage: Sequence[str], path: Path
) -> None:
    """Writes a network as a checkpoint of no site: without a record of slides.

    Args:
        federation: the configuration.
        weights: all travelling entries.
        tile_spec: of the sites' tiles.
        lineage: as for :meth:`SiteTrainer.write_checkpoint`.
        path: of the checkpoint.
    """
    grader, model = _initial(federation)
    _put(grader, _shared(grader), weights)
    grader.tile_spec = tile_spec
    _write(path, grader, model, lineage)


def _initial(federation: Federation) -> tuple[SlideGrader, dict[str, Any]]:
    """Builds the grader as its strategy starts it, and returns its arguments too."""
    parsed = _parse(federation, federation.seed)
    pl.seed_everything(federation.seed, workers=True, verbose=False)
    grader, _ = build_grader(parsed)
    grader.transfer.start(grader.network.backbone)
    return grader, parsed.model.as_dict()


def _parse(federation: Federation, seed: int) -> Any:
    """Parses the configuration of a site's training.

    Raises:
        UsageError: it is not valid, or learns a number.
    """
    parsed = parse_training(federation.fit_config, federation.grades, seed)
    for task in parsed.model.tasks:
        if task.numeric:
            raise UsageError(
                f"model.tasks: {task.name} is a number, standardised by the mean and standard deviation of "
                "the training slides, which stay at their sites; leave it out, or give it grades"
            )
    return parsed


class SiteTrainer:
    """Trains and validates at one site, round by round.

    Args:
        federation: the configuration.
        name: of the site.
        parts: its slides, of :func:`site_slides`.
        folder: for files of this site; the parts of its slides, and what stays here after each round (FedBN),
            survive a restart in it.

    Attributes:
        examples: training slides, the number that the site claims.

    Raises:
        CheckpointError: the slides are not those with which an earlier round of this federation was trained.
    """

    def __init__(self, federation: Federation, name: str, parts: Parts, folder: Path) -> None:
        self.federation, self.name, self.folder = federation, name, folder
        self._study = folder / "study" / f"{federation.sha256[:16]}.json"
        parts = self._as_recorded(parts)
        self.examples = len(parts["train"])
        place = list(federation.sites).index(name) if name in federation.sites else 0
        self._seed = federation.seed + place  # sites draw differently; one site draws as 'slidetl fit'
        parsed = _parse(federation, self._seed)
        pl.seed_everything(self._seed, workers=True, verbose=False)
        self.grader, options = build_grader(parsed)
        self._model: dict[str, Any] = parsed.model.as_dict()
        self._data_options = parsed.data.as_dict()
        if name in federation.sites:
            options["split_from"] = federation.sites[name].split_from
        self.data = SlideDataModule.from_slides(**{part: parts[part] for part in SPLITS}, **options)
        self.data.slides["predict"] = tuple(parts["predict"])
        with quiet():
            self.data.setup("fit")
        self.data.origin = self.grader.origin
        self.data.start_from()
        self.grader.whole_epochs = federation.rounds * federation.epochs_of(name)
        self._shared = tuple(_shared(self.grader))
        self.grader.transfer.start(self.grader.network.backbone)  # what never travels
        self._stays = Rounds(folder / "stays" / federation.sha256[:16], federation.sha256)
        _, self._start = self._divided()
        self.account: Account | None = None
        self._patients: list[PatientSlides] = []  # of a training by DP-SGD
        if federation.privacy is not None and federation.scheme not in BASELINES:
            self._releases = federation.privacy.steps_per_round(federation.epochs_of(name))
            planned = federation.rounds * self._releases
            self.account = Account(federation.privacy, planned, folder / "privacy.json")
            self._patients = self._prepare_private(federation.privacy)

    def _as_recorded(self, parts: Parts) -> Parts:
        """Divides the slides as in the first round that this site trained, once there is one.

        Divided again, after a patient was added or a grade corrected, some would be tested after training.
        """
        if not self._study.is_file():
            return parts
        try:
            record = StudyRecord.from_dict(json.loads(self._study.read_text(encoding="utf-8")))
            if record.slides == StudyRecord.of(parts).slides:
                return parts
            slides = tuple(parts["predict"])
            study = Study(tuple(slide.row for slide in slides), slides, self.folder)
            divided, _ = recorded_parts(study, record, resumes=True)
        except ValueError as error:
            raise CheckpointError(
                f"{self._study}: {error}. If no round of this federation is to be resumed, remove this file"
            ) from error
        return {**divided, "predict": slides}

    def _prepare_private(self, privacy: Privacy) -> list[PatientSlides]:
        """Checks that the training can be private; returns the samples of DP-SGD, none at site level."""
        groups: dict[str, list[CachedSlide]] = {}
        for slide in self.data.slides["train"]:
            groups.setdefault(slide.row.patient_id, []).append(slide)
        privacy.check_patients(len(groups))
        if privacy.level == "site":
            check_variances(self._divided()[0])
            return []
        grader, backbone = self.grader, self.grader.network.backbone
        if not self.data.features or self.data.bag_size:
            raise UsageError(
                "privacy.level patient needs stored features: data.features, and data.bag_size: 0"
            )
        if grader.tasks.tasks or grader.balance or grader.targets != Targets():
            raise UsageError("privacy.level patient knows no model.tasks, model.balance and model.targets")
        check_unmixed(grader.network, backbone.num_features)
        grader.check_features(self.data)  # as Lightning's fit would
        assert self.data.feature_source is not None
        features, identity = self.data.features, self.data.feature_source.identity
        return [
            PatientSlides(
                tuple(
                    torch.from_numpy(read_features(slide.cache, features, identity=identity))
                    for slide in slides
                ),
                tuple(int(slide.row.grade) for slide in slides),  # type: ignore[arg-type] # a training part is graded
            )
            for slides in groups.values()
        ]

    def resume(self, round_number: int, last: int) -> None:
        """Forgets the rounds after one, as :meth:`~slidetl.federation.records.Rounds.resume`.

        Raises:
            FederationError: what this site kept of its ``last`` round is gone.
        """
        if last and not self._study.is_file():
            raise FederationError(
                f"{self._study}: expected the parts of this site's slides in round {last}; without them, "
                "slides that were trained on could be tested: restore it, or start again in another --output"
            )
        self._stays.resume(round_number, last if self._start else 0)

    def train(self, weights: Weights, round_number: int) -> SiteUpdate:
        """Trains from the network that arrived.

        The round is a part of one training over all rounds: its epochs, the schedule of the learning rate and
        the ramps of penalties continue from the round before. The moments of Adam begin anew.

        Args:
            weights: the travelling entries.
            round_number: from 1.

        Raises:
            SlidetlError: the network does not fit, or the data cannot be read.
        """
        self._arrive(weights, round_number - 1)
        if not self._study.is_file():
            write_whole(self._study, json.dumps(self.data.record.to_dict()))
        if self.account is not None:
            self.account.spend(self._releases)
        metrics = self._train_private() if self._patients else self._train_round(round_number)
        sent, stays = self._divided()
        if stays:
            self._stays.write(round_number, stays, {})
        if self.account is not None:
            privacy, metrics = self.account.privacy, {"epsilon": self.account.epsilon}
            if privacy.level == "site" and privacy.noise is not None:
                sent = privatise_update(weights, sent, privacy.clip, privacy.noise)
        return SiteUpdate(self.name, sent, self.examples, metrics)

    def _train_private(self) -> dict[str, float]:
        """Trains aggregator and head by DP-SGD on the patients' features."""
        assert self.account is not None
        train_private(
            self.grader.network,
            self._patients,
            self.account.privacy,
            self._releases,
            lr=self.grader.lr,
            weight_decay=self.grader.weight_decay,
        )
        return {}

    def _train_round(self, round_number: int) -> dict[str, float]:
        epochs = self.federation.epochs_of(self.name)
        before = (round_number - 1) * epochs
        options = {"max_epochs": before + epochs, "limit_val_batches": 0}
        arrival = _Arrival(self._state(), self.federation.proximal)
        pl.seed_everything(self._seed, workers=True, verbose=False)
        with quiet():
            trainer = self._trainer(options, [arrival])
            progress = trainer.fit_loop.epoch_progress.current
            for counter in ("ready", "started", "processed", "completed"):
                setattr(progress, counter, before)
            trainer.fit(self.grader.train(), datamodule=self.data)
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        return {"train_loss": loss} if np.isfinite(loss) else {}

    def validate(self, weights: Weights, round_number: int) -> dict[str, float]:
        """Scores the network of a round on the validation part: :data:`METRICS`, and number of ``slides``.

        Raises:
            UsageError: some slides are not graded.
            SlidetlError: the network does not fit, or the data cannot be read.
        """
        evaluation = self.evaluate(weights, round_number)
        if evaluation.not_graded:
            raise UsageError(f"{len(evaluation.not_graded)} slides are not graded; lower model.lr")
        found = evaluation.scalars(())
        graded = sum(row.grade is not None for row in evaluation.predictions)
        return {"slides": float(graded), **{name: float(found[name]) for name in METRICS}}

    def evaluate(self, weights: Weights, round_number: int, part: str = "val") -> Evaluation:
        """Grades a part of the site's slides, ``val`` or ``test``, with the network of a round."""
        self._arrive(weights, round_number)
        with quiet():
            trainer = self._trainer({}, [])
            (trainer.validate if part == "val" else trainer.test)(
                self.grader, datamodule=self.data, verbose=False
            )
        found = self.grader.validated if part == "val" else self.grader.tested
        assert found is not None
        return found

    def write_checkpoint(self, weights: Weights, round_number: int, lineage: Sequence[str]) -> Path:
        """Writes the network of a round as this site's ``checkpoints/best.ckpt``, with ``config.yaml``.

        It records the site's own slides, so ``slidetl test`` and ``export`` work at the site.

        Args:
            weights: the travelling entries; what stayed at the site in this round is added.
            round_number: from 1.
            lineage: hashes of the networks that it comes from, nearest first.
        """
        self._arrive(weights, round_number)
        site = self.federation.sites.get(self.name)
        places = {"manifest": site.manifest, "cache": site.cache} if site is not None else {}
        config = {
            "seed_everything": self._seed,
            "model": self._model,
            "data": {**self._data_options, **places},
        }
        self.grader.tile_spec = self.data.tile_spec
        self.grader.record = replace(self.data.record, config_sha256=config_sha256(config))
        path = self.folder / "checkpoints" / "best.ckpt"
        _write(path, self.grader, self._model, lineage)
        write_whole(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return path

    @property
    def frozen_sha256(self) -> str:
        """SHA-256 of the pretrained weights that never travel, so must be the same at all sites.

        These are the frozen entries of the backbone, the weights behind stored features, and those towards
        which a strategy pulls; empty without any.
        """
        backbone, source = self.grader.network.backbone, self.data.feature_source
        held = {} if backbone.is_stored else backbone.state_dict()
        held = {name: value for name, value in held.items() if f"network.backbone.{name}" not in self._shared}
        hashes = [state_sha256(held)] if held else []
        hashes += [source.identity] if source is not None else []
        reference = self.grader.transfer.reference(backbone)
        hashes += [reference.sha256] if reference is not None else []
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else ""

    def _arrive(self, weights: Weights, round_number: int) -> None:
        """Puts the network that arrived into ours, if it fits, with what stayed here in a round."""
        ours, _ = self._divided()
        if fault := find_fault(SiteUpdate("server", weights, 1), ours):
            raise WeightsError(f"the network that arrived does not fit this site's: {fault}")
        if self._start:  # a round that the site has missed changed nothing here
            latest = self._stays.latest(round_number)
            _put(self.grader, self._shared, self._stays.read(latest) if latest else self._start)
        _put(self.grader, self._shared, weights)

    def _divided(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Returns the entries of the network that travel, and those that a training changes and that stay."""
        own = {name: _array(value) for name, value in self._state().items()}
        sent = travelling(own, self.federation.travel)
        return sent, {name: value for name, value in own.items() if name not in sent}

    def _state(self) -> dict[str, Tensor]:
        state = self.grader.state_dict()
        return {name: state[name] for name in self._shared}

    def _trainer(self, options: Mapping[str, Any], callbacks: Sequence[Callback]) -> pl.Trainer:
        return build_trainer({**self.federation.trainer, **options}, self.folder, callbacks)


class _Arrival(Callback):
    """Starts from the network that arrived, and pulls towards it.

    The pull is that of L2-SP (Li et al., ICML 2018) with the arrived network in place of the pretrained one:
    FedProx (Li et al., MLSys 2020), but decoupled from Adam, after each step at its rate.

    Args:
        state: of the network that arrived.
        proximal: weight of the pull.
    """

    def __init__(self, state: Mapping[str, Tensor], proximal: float) -> None:
        self._arrived = {name: value.detach().clone() for name, value in state.items()}
        self._proximal = proximal
        self._rates: list[tuple[list[Tensor], list[Tensor], float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Undoes the strategy's start, which is for new trainings."""
        own = pl_module.state_dict()
        with torch.no_grad():
            for name, value in self._arrived.items():
                own[name].copy_(value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the parameters of this step with their rates."""
        if not self._proximal:
            return
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.requires_grad]
            anchors = [self._arrived[names[parameter]].to(parameter.device) for parameter in moved]
            if moved:
                self._rates.append((moved, anchors, group["lr"] * self._proximal))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pulls after the optimiser's step."""
        for moved, anchors, factor in self._rates:
            pull(moved, anchors, factor)
        self._rates = []


def _put(grader: SlideGrader, names: Iterable[str], weights: Weights) -> None:
    """Puts arrays into the state of a grader, those of ``names`` alone."""
    state = grader.state_dict()
    with torch.no_grad():
        for name in names:
            if name in weights:
                state[name].copy_(torch.from_numpy(np.array(weights[name])))


def _write(path: Path, grader: SlideGrader, model: Mapping[str, Any], lineage: Sequence[str]) -> None:
    """Writes a checkpoint with a lineage that begins with the network of a round."""
    backbone = grader.network.backbone
    own, backbone.lineage = backbone.lineage, tuple(dict.fromkeys((*lineage, *backbone.lineage)))
    try:
        write_grader(path, grader, model)
    finally:
        backbone.lineage = own


def _shared(grader: SlideGrader) -> dict[str, Tensor]:
    """Returns the entries of the state that a training can change: a frozen backbone has none."""
    parameters = dict(grader.named_parameters())
    is_frozen = not any(parameter.requires_grad for parameter in grader.network.backbone.parameters())
    return {
        name: value
        for name, value in grader.state_dict().items()
        if not (name in parameters and not parameters[name].requires_grad)
        and not (is_frozen and name.startswith("network.backbone."))
    }


def _array(value: Tensor) -> NDArray[Any]:
    return np.array(value.detach().cpu().numpy())
