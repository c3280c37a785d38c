import math

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d  # type: ignore[attr-defined] # timm's __init__ has no __all__
from torch import Tensor, nn

from slidetl.errors import UsageError
from slidetl.federation.privacy import (
    PatientSlides,
    Privacy,
    check_unmixed,
    patient_gradients,
    privatise_update,
    train_private,
)
from slidetl.models.aggregators import (
    Aggregated,
    Chowder,
    GatedAttention,
    MeanPooling,
    MultiHopAttention,
    Pooling,
)
from slidetl.models.heads import Corn, CumulativeLink, Head, RegressionWithThresholds
from slidetl.models.network import GradingNetwork

WIDTH = 6


def draw_patients(n: int, seed: int = 0, width: int = WIDTH) -> list[PatientSlides]:
    rng = np.random.default_rng(seed)
    patients = []
    for number in range(n):
        slides = 1 + number % 3
        bags = tuple(
            torch.from_numpy(rng.normal(size=(int(rng.integers(2, 7)), width))).float() for _ in range(slides)
        )
        patients.append(PatientSlides(bags, tuple(int(grade) for grade in rng.integers(0, 5, slides))))
    return patients


def build(
    pooling: type[Pooling] = MeanPooling, head: type[Head] = CumulativeLink, width: int = WIDTH
) -> GradingNetwork:
    torch.manual_seed(0)
    aggregator = pooling(width)
    return GradingNetwork(nn.Identity(), aggregator, head(aggregator.out_features, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("epsilon", "noise"), [(1, 9.3), (3, 3.8), (8, 1.8)])
def test_noise_for_an_epsilon_is_the_published_one(epsilon: float, noise: float) -> None:
    # 80 patients, a fifth of them in each of 250 steps.
    found = Privacy("patient", epsilon=epsilon, delta=1e-3, sample_rate=0.2).with_noise(250)
    assert found.noise == pytest.approx(noise, abs=0.06)
    assert epsilon * 0.99 < found.spent(250) <= epsilon
    assert found.spent(500) > epsilon


def test_site_level_takes_twice_the_clip_for_the_sensitivity() -> None:
    """Compares with the exact epsilon of one Gaussian release (Balle and Wang, ICML 2018)."""
    privacy = Privacy("site", noise=4.0, delta=1e-3)
    epsilon = privacy.spent(1)
    ratio = 2.0 / 4.0  # sensitivity over deviation

    def delta(eps: float) -> float:
        def phi(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        return phi(ratio / 2 - eps / ratio) - math.exp(eps) * phi(-ratio / 2 - eps / ratio)

    assert delta(epsilon) <= 1e-3  # an upper bound,
    assert delta(0.8 * epsilon) > 1e-3  # and no loose one
    assert privacy.spent(0) == 0 and privacy.spent(10) > 2 * epsilon


def test_update_is_clipped_to_its_norm_and_noised_to_its_deviation() -> None:
    before = {"a": np.zeros((300, 400), np.float32), "b": np.ones(7, np.float32), "n": np.array(3)}
    after = {"a": before["a"] + 1, "b": before["b"] - 1, "n": np.array(5)}
    sent = privatise_update(before, after, clip=2.0, noise=1e-12)
    change = np.concatenate([(sent[name] - before[name]).ravel() for name in "ab"])
    assert np.linalg.norm(change) == pytest.approx(2.0, rel=1e-5)
    assert change[0] == pytest.approx(-change[-1], rel=1e-4) and change[0] > 0
    assert sent["n"] == 5 and sent["n"].dtype == after["n"].dtype and sent["a"].dtype == np.float32

    small = {"a": before["a"], "b": before["b"] + 0.1, "n": before["n"]}
    kept = privatise_update(before, small, clip=2.0, noise=1e-12)
    np.testing.assert_allclose(kept["b"], small["b"], atol=1e-6)

    noisy = [privatise_update(before, before, clip=2.0, noise=0.5)["a"] for _ in range(2)]
    assert float(noisy[0].std()) == pytest.approx(1.0, rel=0.02) and abs(float(noisy[0].mean())) < 0.02
    assert not np.array_equal(noisy[0], noisy[1])  # each is seeded by the system


def test_update_without_a_protection_is_refused() -> None:
    weights = {"bn.running_var": np.ones(2, np.float32)}
    with pytest.raises(UsageError, match=r"bn\.running_var negative; .* by travel: all-but-normalisation"):
        privatise_update(weights, weights, 1.0, 1.0)
    one = {"a": np.zeros(2, np.float32)}
    with pytest.raises(UsageError, match="not finite"):
        privatise_update(one, {"a": np.array([np.nan, 0], np.float32)}, 1.0, 1.0)
    with pytest.raises(UsageError, match="different names"):
        privatise_update(one, {"b": one["a"]}, 1.0, 1.0)


@pytest.mark.parametrize(
    ("pooling", "head"),
    [(MeanPooling, CumulativeLink), (GatedAttention, Corn), (MultiHopAttention, RegressionWithThresholds)],
)
def test_gradients_are_those_of_each_patient_alone(pooling: type[Pooling], head: type[Head]) -> None:
    network, patients = build(pooling, head), draw_patients(5)
    gradients = patient_gradients(network, patients)
    for number, patient in enumerate(patients):
        network.zero_grad()
        for tiles, grade in zip(patient.features, patient.grades, strict=True):
            logits, _ = network.grade(tiles[None], torch.ones(1, len(tiles), dtype=torch.bool))
            (network.head.loss(logits, torch.tensor([grade])) / len(patient.grades)).backward()
        names = []
        for name, weight in network.named_parameters():
            assert weight.grad is not None
            torch.testing.assert_close(gradients[name][number], weight.grad, rtol=1e-4, atol=1e-6)
            names.append(name)
        assert sorted(names) == sorted(gradients)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients of all weights that the optimiser is given, step by step."""
    gradients: list[Tensor] = []

    def step(self: torch.optim.AdamW) -> None:
        gradients.append(torch.cat([p.grad.ravel() for group in self.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return gradients


def clipped(network: GradingNetwork, patients: list[PatientSlides], clip: float) -> Tensor:
    """The gradient of each patient ``[P, weights]``, its norm over all weights at most ``clip``."""
    gradients = patient_gradients(network, patients).values()
    each = torch.cat([value.flatten(1) for value in gradients], 1).double()
    scale: Tensor = (clip / each.norm(dim=1, keepdim=True)).clamp(max=1)
    return scale * each


def test_a_step_is_the_clipped_sum_with_noise_over_the_expected_number(seen: list[Tensor]) -> None:
    """Of 20 000 weights the standard deviation is known within half a per cent."""
    width = 20_000
    patients, network = draw_patients(3, width=width), build(width=width)
    drawn = Privacy("patient", clip=0.5, noise=2.0, delta=1e-3, sample_rate=1.0)
    nobody = Privacy("patient", clip=0.5, noise=2.0, delta=1e-3, sample_rate=1e-9)
    for privacy in (drawn, drawn, nobody):
        train_private(network, patients, privacy, 1, lr=0.1)
    noise = [3 * seen[0] - clipped(network, patients, 0.5).sum(0), 3e-9 * seen[2]]
    for values in noise:
        assert float(values.std()) == pytest.approx(1.0, rel=0.03) and abs(float(values.mean())) < 0.03
    assert not torch.equal(seen[0], seen[1])  # each is seeded by the system


def test_a_step_of_few_or_many_patients_is_over_the_expected_number(seen: list[Tensor]) -> None:
    patients, network = draw_patients(6), build()
    privacy = Privacy("patient", clip=0.5, noise=1e-9, delta=1e-3, sample_rate=0.5)
    each, numbers = clipped(network, patients, 0.5), set()
    for seed in range(8):
        train_private(network, patients, privacy, 1, lr=0.1, rng=np.random.default_rng(seed))
        taken = torch.from_numpy(np.random.default_rng(seed).random(6) < 0.5)
        numbers.add(int(taken.sum()))
        torch.testing.assert_close(3 * seen[-1].double(), each[taken].sum(0), rtol=1e-4, atol=1e-6)
    assert min(numbers) < 3 < max(numbers)


def test_one_patient_moves_a_step_by_no_more_than_the_clip(seen: list[Tensor]) -> None:
    """Two trainings differ by one patient of huge features."""
    patients = draw_patients(4)
    huge = PatientSlides(tuple(1e3 * tiles for tiles in patients[0].features), patients[0].grades)
    privacy = Privacy("patient", clip=0.5, noise=1e-9, delta=1e-3, sample_rate=1.0)
    for first in (patients[0], huge):
        train_private(build(), [first, *patients[1:]], privacy, 1, lr=0.1)
    moved = [4 * gradient for gradient in seen]  # the sum over four patients
    assert 0 < float((moved[0] - moved[1]).norm()) <= 2 * 0.5 + 1e-6
    assert float(moved[0].norm()) <= 4 * 0.5 + 1e-6


def test_training_learns_with_little_noise_and_draws_patients_at_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    patients = []
    for number in range(60):
        grade = number % 5
        tiles = rng.normal(size=(4, WIDTH)) + (grade - 2)
        patients.append(PatientSlides((torch.from_numpy(tiles).float(),), (grade,)))
    network = build()
    counts: list[int] = []

    def counted(network: GradingNetwork, drawn: list[PatientSlides]) -> dict[str, Tensor]:
        counts.append(len(drawn))
        return patient_gradients(network, drawn)

    monkeypatch.setattr("slidetl.federation.privacy.patient_gradients", counted)
    privacy = Privacy("patient", noise=0.1, delta=1e-3, sample_rate=0.2)
    train_private(network, patients, privacy, 120, lr=0.1, rng=rng)
    assert np.mean(counts) == pytest.approx(12, abs=1.2) and len(set(counts)) > 5  # Poisson, not fixed
    with torch.no_grad():
        logits = network.grade(
            torch.stack([p.features[0] for p in patients]), torch.ones(60, 4, dtype=torch.bool)
        )[0]
    right = network.head.probabilities(logits).argmax(1) == torch.tensor([p.grades[0] for p in patients])
    assert float(right.float().mean()) > 0.7


class _BatchAware(MeanPooling):
    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        return super().forward(embeddings - embeddings.mean((0, 1)), mask)


class _Counting(MeanPooling):
    centre: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.register_buffer("centre", torch.zeros(in_features))

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        if self.training:
            self.centre += embeddings[0].mean(0)
        return super().forward(embeddings, mask)


def test_layers_that_mix_patients_are_refused() -> None:
    for norm in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3), BatchNormAct2d(3)):
        network = build(Chowder)
        network.aggregator.norm = nn.Sequential(norm)
        with pytest.raises(UsageError, match=rf"aggregator\.norm\.0 is a {type(norm).__name__}"):
            check_unmixed(network, WIDTH)
    with pytest.raises(UsageError, match="one slide changes the output of another"):
        check_unmixed(build(_BatchAware), WIDTH)
    counting = build(_Counting)
    with pytest.raises(UsageError, match=r"aggregator\.centre keeps statistics"):
        check_unmixed(counting, WIDTH)
    assert not counting.get_buffer("aggregator.centre").any()  # the check leaves the network as it was


def test_options_that_protect_nobody_are_refused() -> None:
    with pytest.raises(UsageError, match="either noise or epsilon"):
        Privacy("site")
    with pytest.raises(UsageError, match="either noise or epsilon"):
        Privacy("site", noise=1, epsilon=1)
    for wrong in (
        {"clip": 0.0},
        {"clip": math.inf},
        {"delta": 0.0},
        {"noise": -1.0},
        {"sample_rate": math.nan},
    ):
        with pytest.raises(UsageError, match=f"privacy.{next(iter(wrong))} must be above 0"):
            Privacy("patient", **{"noise": 1.0, **wrong})
    with pytest.raises(UsageError, match="sample_rate at most 1"):
        Privacy("patient", noise=1, sample_rate=1.5)
    with pytest.raises(UsageError, match="1/1000, one over the number of the site's patients"):
        Privacy("patient", noise=1, delta=1e-3).check_patients(1000)
    with pytest.raises(UsageError, match="cannot be kept"):
        Privacy("site", epsilon=1e-7, delta=1e-9).with_noise(10**6)
    with pytest.raises(UsageError, match="level patient with its noise"):
        train_private(build(), draw_patients(2), Privacy("patient", epsilon=1), 1, lr=0.1)
