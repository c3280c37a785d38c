"""Differential privacy of a site's training: clipping, noise and an account of the privacy spent.

Two levels. At ``site`` level the whole update of a round is clipped and gets noise before it leaves; another
set of slides at the site would have sent nearly the same. At ``patient`` level the training itself is private
(DP-SGD on stored features): with one patient more or less the network would be nearly the same.

Neither covers the number of examples and the validation metrics, which leave in the clear.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from slidetl.errors import FederationError, UsageError, needs_extra
from slidetl.federation.weights import Weights, is_floating
from slidetl.files import write_whole
from slidetl.models.network import GradingNetwork
from slidetl.models.targets import one_hot_grades
from slidetl.tiles.lock import kernel_lock

Release: TypeAlias = tuple[float, float, int]  # noise over sensitivity, rate of sampling, number

_ORDERS = [1 + x / 4 for x in range(1, 40)] + [*range(11, 64), 80, 128, 256]  # of RDP; more take seconds
_ELEMENTS = 1 << 24  # features in one batched gradient: 64 MB in float32


@dataclass(frozen=True)
class Privacy:
    """Options of differential privacy: a clip, and either the noise or the epsilon to keep.

    Attributes:
        level: ``site`` clips each round's update and adds noise; ``patient`` clips the gradient of each
            patient and adds noise to each step, on stored features.
        clip: greatest L2 norm of an update (site) or of a patient's gradient (patient), above 0.
        noise: standard deviation of the Gaussian noise, as a multiple of ``clip``.
        epsilon: target of the whole training, instead of ``noise``: the least noise to keep it is computed,
            and a site refuses to release more, whatever the server asks for.
        delta: probability with which epsilon may fail, below one over the number of patients of a site.
        sample_rate: probability of each patient to take part in a step (patient level), above 0, up to 1.
            An epoch has ``1 / sample_rate`` steps.
    """

    level: Literal["site", "patient"]
    clip: float = 1.0
    noise: float | None = None
    epsilon: float | None = None
    delta: float = 1e-3
    sample_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.level not in ("site", "patient"):
            raise UsageError(f"privacy.level must be site or patient, not {self.level!r}")
        if (self.noise is None) == (self.epsilon is None):
            raise UsageError(
                f"privacy: expected either noise or epsilon, not {self.noise} and {self.epsilon}; "
                "leave one of them out"
            )
        for name in ("clip", "noise", "epsilon", "delta", "sample_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"privacy.{name} must be above 0 and finite, not {value}")
        if self.delta >= 1 or self.sample_rate > 1:
            raise UsageError(
                "privacy.delta must be below 1 and privacy.sample_rate at most 1, "
                f"not {self.delta}, {self.sample_rate}"
            )

    def check_patients(self, patients: int) -> None:
        """Refuses a delta with which a patient's data may be published as they are.

        Raises:
            UsageError: delta is at least one over the number of patients.
        """
        if self.delta * patients >= 1:
            raise UsageError(
                f"privacy.delta {self.delta:g} is not below 1/{patients}, one over the number of the site's "
                "patients: it would allow to publish one of them; lower it"
            )

    def steps_per_round(self, epochs: float) -> int:
        """Returns the noisy releases of a round: one per step, or one update at site level."""
        return 1 if self.level == "site" else max(1, round(epochs / self.sample_rate))

    def with_noise(self, steps: int) -> Privacy:
        """Returns the options with the noise to keep ``epsilon`` over a number of noisy releases.

        Raises:
            UsageError: no noise below a million keeps it.
        """
        if self.epsilon is None:
            return self
        utils = _opacus("opacus.accountants.utils")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Optimal order")
                multiplier = utils.get_noise_multiplier(
                    target_epsilon=self.epsilon,
                    target_delta=self.delta,
                    sample_rate=self._rate,
                    steps=steps,
                    accountant="rdp",
                    epsilon_tolerance=self.epsilon / 100,
                    alphas=_ORDERS,
                )
        except ValueError as error:
            raise UsageError(
                f"privacy.epsilon {self.epsilon:g} at delta {self.delta:g} cannot be kept over {steps} "
                "releases; raise it, or train for fewer rounds"
            ) from error
        return replace(self, noise=multiplier / self._share, epsilon=None)

    def spent(self, steps: int) -> float:
        """Computes epsilon at ``delta`` after a number of noisy releases, by the accountant of Opacus.

        Renyi accounting (Mironov 2017; Mironov, Talwar and Zhang 2019). At patient level, neighbours differ
        by one patient more or less, and each patient takes part in a step with ``sample_rate``. At site
        level all data of the site may be replaced: two clipped updates differ by up to twice the clip.
        """
        return _epsilon([self._release(steps)], self.delta) if steps > 0 else 0.0

    def _release(self, steps: int) -> Release:
        if self.noise is None:
            raise UsageError("privacy: the noise is not known yet")
        return self.noise * self._share, self._rate, steps

    @property
    def _rate(self) -> float:
        return self.sample_rate if self.level == "patient" else 1.0

    @property
    def _share(self) -> float:
        """The noise over the sensitivity, relative to the noise over the clip."""
        return 1.0 if self.level == "patient" else 0.5


def check_policy(own: object, asked: Privacy | None) -> None:
    """Refuses a job with another privacy than the site's own file asks for: the server writes the job.

    Raises:
        UsageError: they differ, or the site's is not valid.
    """
    try:
        wanted = Privacy(**own) if isinstance(own, dict) else None
    except TypeError as error:
        raise UsageError(f"the site's privacy: {error}") from error
    if wanted is None or wanted != asked:
        raise UsageError(f"this site trains under privacy {own}, and the job asks for {asked}")


class Account:
    """A site's account of the privacy spent by the trainings of a folder, in a file that survives a restart.

    Args:
        privacy: the options.
        planned: noisy releases of the whole training, this one alone.
        path: of the file.

    Attributes:
        privacy: with its noise.
        epsilon: spent so far at ``privacy.delta``.
    """

    def __init__(self, privacy: Privacy, planned: int, path: Path) -> None:
        self._limit = privacy.epsilon
        self.privacy = privacy.with_noise(planned)
        self._path = path
        history = self._read()
        self.epsilon = _epsilon(history, privacy.delta) if history else 0.0

    def _read(self) -> list[Release]:
        if not self._path.is_file():
            return []
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            level = kept["level"]
            history = [(float(n), float(rate), int(steps)) for n, rate, steps in kept["releases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self._path}: expected a site's account of its privacy: {error}") from error
        if level != self.privacy.level:
            raise UsageError(
                f"{self._path}: the account is of {level} level, not {self.privacy.level}; two levels cannot "
                "be added up, so start the training in another folder"
            )
        return history

    def spend(self, steps: int) -> None:
        """Records noisy releases, before they happen, beside those of all other trainings in the folder.

        Raises:
            FederationError: they would exceed the target epsilon; nothing is recorded.
        """
        with kernel_lock(self._path.with_suffix(".lock")):
            self.epsilon = self._add(steps)

    def _add(self, steps: int) -> float:
        history = [*self._read(), self.privacy._release(steps)]
        if len(history) > 1 and history[-1][:2] == history[-2][:2]:
            history[-2:] = [(*history[-1][:2], history[-1][2] + history[-2][2])]
        epsilon = _epsilon(history, self.privacy.delta)
        if self._limit is not None and epsilon > self._limit:
            raise FederationError(
                f"this site sends nothing: epsilon would be {epsilon:.2f} at delta {self.privacy.delta:g}, "
                f"above privacy.epsilon {self._limit:g}"
            )
        kept = {
            "level": self.privacy.level,
            "delta": self.privacy.delta,
            "epsilon": epsilon,
            "releases": history,
        }
        write_whole(self._path, json.dumps(kept))
        return epsilon


def _epsilon(history: Sequence[Release], delta: float) -> float:
    accountant = _opacus("opacus.accountants").RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():  # the bound at the last order holds, though a tighter one exists
        warnings.filterwarnings("ignore", message="Optimal order")
        return float(accountant.get_epsilon(delta=delta, alphas=_ORDERS))


def _opacus(name: str) -> ModuleType:
    with needs_extra("differential privacy needs Opacus for its account", "federated"):
        return importlib.import_module(name)


def check_variances(names: Iterable[str]) -> None:
    """Refuses to add noise to the variances of a batch normalisation.

    Raises:
        UsageError: one of the names is such a variance.
    """
    for name in names:
        if name.endswith("running_var"):
            raise UsageError(
                f"privacy: noise could make {name} negative; keep the normalisation at each site, by "
                "travel: all-but-normalisation"
            )


def privatise_update(
    before: Weights, after: Weights, clip: float, noise: float, rng: np.random.Generator | None = None
) -> dict[str, NDArray[Any]]:
    """Clips an update to an L2 norm and adds Gaussian noise, in float64 (McMahan et al., ICLR 2018).

    Args:
        before: weights received for the round.
        after: weights after local training, of the same names and shapes.
        clip: greatest norm of the update of all floating-point entries together.
        noise: standard deviation of each value's noise, as a multiple of ``clip``.
        rng: source of the noise; by default a generator seeded by the operating system. A known seed
            removes the protection.

    Returns:
        The weights to send. Integer entries are those of ``after``, in the clear.

    Raises:
        UsageError: an entry is not finite, differs in shape, or is a variance of batch normalisation, which
            noise could make negative.
    """
    rng = rng or np.random.default_rng()
    if before.keys() != after.keys():
        raise UsageError("privacy: the weights before and after training have different names")
    check_variances(after)
    deltas: dict[str, NDArray[np.float64]] = {}
    for name, value in after.items():
        if not is_floating(value):
            continue
        if value.shape != before[name].shape:
            raise UsageError(f"privacy: {name} has the shape {value.shape}, not {before[name].shape}")
        deltas[name] = value.astype(np.float64) - before[name].astype(np.float64)
    norm = math.sqrt(sum(float(np.square(delta).sum()) for delta in deltas.values()))
    if not math.isfinite(norm):
        raise UsageError("privacy: the update is not finite; lower model.lr")
    scale = min(1.0, clip / norm) if norm else 1.0
    sent = {name: value.copy() for name, value in after.items()}
    for name, delta in deltas.items():
        noisy = scale * delta + rng.normal(0.0, noise * clip, delta.shape)
        sent[name] = (before[name].astype(np.float64) + noisy).astype(after[name].dtype)
    return sent


class PatientSlides(NamedTuple):
    """The stored features of one patient's slides.

    Attributes:
        features: of each slide, ``[N, D]`` float.
        grades: of each slide, 0..K-1.
    """

    features: tuple[Tensor, ...]
    grades: tuple[int, ...]


class _AfterBackbone(nn.Module):
    """Aggregator and head of a network, by the names that they have in it."""

    def __init__(self, network: GradingNetwork) -> None:
        super().__init__()
        self.aggregator = network.aggregator
        self.head = network.head

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Computes logits of bags ``[B, N, D]`` with a mask ``[B, N]``."""
        logits: Tensor = self.head(self.aggregator(embeddings, mask).embedding)
        return logits


def train_private(
    network: GradingNetwork,
    patients: Sequence[PatientSlides],
    privacy: Privacy,
    steps: int,
    *,
    lr: float,
    weight_decay: float = 0.0,
    rng: np.random.Generator | None = None,
) -> None:
    """Trains aggregator and head by DP-SGD, one patient being one sample (Abadi et al., CCS 2016).

    Each step draws every patient with ``sample_rate`` (Poisson sampling), clips the gradient of each
    patient's mean loss over the patient's slides, sums them, adds noise and divides by the expected number
    of patients. Departure: AdamW takes the noisy gradients, which costs no privacy.

    Args:
        network: its backbone is not used.
        patients: of the training part.
        privacy: of level ``patient``, with its noise.
        steps: number of steps, each to be accounted for.
        lr: constant learning rate.
        weight_decay: of AdamW.
        rng: source of draws and noise; by default seeded by the operating system.

    Raises:
        UsageError: a layer mixes samples, or an option does not fit.
    """
    if privacy.level != "patient" or privacy.noise is None:
        raise UsageError("train_private expects privacy of level patient with its noise")
    if not patients:
        raise UsageError("privacy: expected at least one patient to train on")
    privacy.check_patients(len(patients))
    rng = rng or np.random.default_rng()
    check_unmixed(network, patients[0].features[0].shape[1])
    parts = _AfterBackbone(network)
    weights = {name: weight for name, weight in parts.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=weight_decay)
    parts.train()
    for _ in range(steps):
        taken = rng.random(len(patients)) < privacy.sample_rate
        drawn = [patient for patient, takes in zip(patients, taken, strict=True) if takes]
        gradients = patient_gradients(network, drawn) if drawn else {}
        clipped = _clipped_sum(gradients, privacy.clip)
        for name, weight in weights.items():
            noise = torch.from_numpy(rng.normal(0.0, privacy.noise * privacy.clip, tuple(weight.shape))).to(
                weight.device
            )
            summed = clipped[name].double() + noise if clipped else noise
            weight.grad = (summed / (privacy.sample_rate * len(patients))).to(weight.dtype)
        optimizer.step()
    for weight in weights.values():
        weight.grad = None


def patient_gradients(network: GradingNetwork, patients: Sequence[PatientSlides]) -> dict[str, Tensor]:
    """Computes the gradient of each patient's mean loss.

    Args:
        network: its backbone is not used.
        patients: P of them.

    Returns:
        ``[P, ...]`` for each trained weight of aggregator and head, by name.
    """
    parts = _AfterBackbone(network)
    weights = {name: weight.detach() for name, weight in parts.named_parameters() if weight.requires_grad}

    def loss(values: dict[str, Tensor], tiles: Tensor, target: Tensor) -> Tensor:
        mask = torch.ones(1, len(tiles), dtype=torch.bool, device=tiles.device)
        logits = functional_call(parts, values, (tiles[None], mask))
        summed: Tensor = network.head.summed_loss(logits, target[None])[0]
        return summed

    owners: dict[int, list[tuple[int, int]]] = defaultdict(list)  # of slides, by their number of tiles
    for number, patient in enumerate(patients):
        for slide, tiles in enumerate(patient.features):
            owners[len(tiles)].append((number, slide))
    summed = {
        name: torch.zeros(len(patients), *value.shape, device=value.device) for name, value in weights.items()
    }
    device = next(iter(weights.values())).device
    # Slides of one length share a batch: padding would cost memory, and vmap takes no branch on a mask.
    for members in owners.values():
        bags = torch.stack([patients[k].features[slide] for k, slide in members]).float().to(device)
        grades = torch.tensor([patients[k].grades[slide] for k, slide in members], device=device)
        chunk = max(1, _ELEMENTS // max(1, bags[0].numel()))
        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk)
        index = torch.tensor([k for k, _ in members], device=device)
        share = torch.tensor([1 / len(patients[k].features) for k, _ in members], device=device)
        for name, values in each(weights, bags, one_hot_grades(grades, network.head.n_grades)).items():
            summed[name].index_add_(0, index, values * share.view(-1, *[1] * (values.ndim - 1)))
    return summed


def _clipped_sum(gradients: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Clips the gradient ``[P, ...]`` of each patient to an L2 norm over all weights, and sums over P."""
    if not gradients:
        return {}
    squares = torch.stack([value.double().flatten(1).square().sum(1) for value in gradients.values()])
    norms = squares.sum(0).sqrt()  # [P]
    if not torch.isfinite(norms).all():
        raise UsageError("privacy: the gradient of a patient is not finite; check the stored features")
    scale = (clip / norms.clamp(min=clip)).float()
    return {name: torch.tensordot(scale, value, dims=1) for name, value in gradients.items()}


def check_unmixed(network: GradingNetwork, n_features: int) -> None:
    """Refuses aggregators and heads that mix the slides of a batch or keep statistics of them.

    Args:
        network: its backbone is not used.
        n_features: length D of a tile's embedding.

    Raises:
        UsageError: a layer is a batch normalisation; one slide changes the output of another; or a forward
            pass changes a buffer.
    """
    parts = _AfterBackbone(network)
    remedy = "privacy per patient needs an aggregator and a head that take each slide alone"
    for name, module in parts.named_modules():
        if isinstance(module, _BatchNorm):  # timm's BatchNormAct2d is one too
            raise UsageError(f"{remedy}; {name} is a {type(module).__name__}")
    modes = {module: module.training for module in parts.modules()}
    kept = {name: value.clone() for name, value in parts.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(3, 5, n_features, generator=generator)
    changed = tiles.clone()
    changed[0] = torch.randn(5, n_features, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    try:
        parts.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = []
            for bags in (tiles, changed):
                torch.manual_seed(0)
                outputs.append(parts(bags, mask))
        if not torch.allclose(outputs[0][1:], outputs[1][1:], rtol=1e-5, atol=1e-6):
            raise UsageError(f"{remedy}; here one slide changes the output of another")
        for name, value in parts.named_buffers():
            if not torch.equal(value, kept[name]):
                raise UsageError(f"{remedy}; {name} keeps statistics of slides without noise")
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, value in parts.named_buffers():
            value.copy_(kept[name])
