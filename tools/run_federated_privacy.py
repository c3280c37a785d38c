"""Privacy of a federated head: the grade it reaches, the epsilon it spends, and what its messages reveal.

    python tools/run_federated_privacy.py --tiles TILES --target AC --output runs/privacy --page PAGE.md

TILES has a folder of small images for each class. Each patient is a bag of eight tiles that no other patient
has, embedded once by the packaged ImageNet network; the grade 0 to 4 is the number of tiles of the target
class. Each defence trains mean pooling and a head, at three sites for the grade and at single sites for the
attacks of :mod:`slidetl.federation.audit`. Then it measures homomorphic encryption: averaged.encrypted, and
NVFlare's own form. Results are kept under --output: what is there is not computed again.

    python tools/run_federated_privacy.py --encryption --output runs/privacy --page PAGE.md

measures the encryption alone, and writes that section of a page alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import platform
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval, bca_interval, share_interval
from slidetl.evaluation.metrics import qwk
from slidetl.federation.audit import (
    CountAudit,
    MembershipAudit,
    audit_count,
    audit_membership,
    centre_by_grade,
    logit_confidence,
)
from slidetl.federation.encryption import Cipher, make_keys, serialised
from slidetl.federation.privacy import PatientSlides, Privacy, privatise_update, train_private
from slidetl.federation.rounds import averaged
from slidetl.federation.weights import SiteUpdate, Weights
from slidetl.files import write_whole
from slidetl.models.aggregators import MeanPooling
from slidetl.models.backbones import Backbone
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.models.packaged import PACKAGED
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import FrozenFeatures
from slidetl.version import VERSION

TILES, GRADES, PATIENTS = 8, 5, 400
WIDTH = 1280  # features of the packaged network
SITE, POPULATION = 80, 160  # patients
FEWEST_TOP, MOST_TOP = 4, 28  # of the greatest grade at a site
ROUNDS, STEPS, RATE, SAMPLED = 5, 25, 0.01, 0.2
DELTA = 1e-3
SEEDS, SHADOWS = 3, 40
_FREE = Privacy("patient", clip=1e6, noise=1e-12, sample_rate=SAMPLED)  # clips nothing, adds 1e-6


@dataclass(frozen=True)
class Defence:
    """A row of the table.

    Attributes:
        name: as printed.
        training: DP-SGD of a site, or its ordinary training.
        update: clip and noise of each message, None for none.
    """

    name: str
    training: Privacy = _FREE
    update: Privacy | None = None

    @property
    def epsilon(self) -> float | None:
        """Epsilon of all rounds; None without a defence."""
        if self.update is not None:
            return self.update.spent(ROUNDS)
        return self.training.spent(ROUNDS * STEPS) if self.training is not _FREE else None


def defences() -> list[Defence]:
    """Returns the rows: none, noise on updates, and DP-SGD at three epsilons."""
    patient = [
        Privacy("patient", epsilon=e, delta=DELTA, sample_rate=SAMPLED).with_noise(ROUNDS * STEPS)
        for e in (8, 3, 1)
    ]
    strong = Privacy("site", clip=5.0, epsilon=8.0, delta=DELTA).with_noise(ROUNDS)
    light = Privacy("site", clip=5.0, noise=0.02, delta=DELTA)
    return [
        Defence("none"),
        Defence("little noise on updates", update=light),
        Defence("noise on updates, epsilon 8 per site", update=strong),
        *(Defence(f"DP-SGD, epsilon {e}", p) for e, p in zip((8, 3, 1), patient, strict=True)),
    ]


class Patients(NamedTuple):
    """Mean features ``[N, 1, D]`` of the patients' bags, and grades ``[N]``."""

    features: torch.Tensor
    grades: NDArray[np.int64]


def read_patients(tiles: Path, target: str, kept: Path) -> Patients:
    """Embeds the tiles, and deals them to patients, each tile once."""
    files = sorted(
        path for path in tiles.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif")
    )
    classes = np.array([path.parent.name for path in files])
    if target not in classes or len(set(classes)) < 2:
        raise UsageError(
            f"{tiles}: expected folders of tiles, one of them {target}, found {sorted(set(classes))}"
        )
    if not kept.is_file():
        backbone = Backbone(BackboneSpec(PACKAGED, pretrained="imagenet"))
        FrozenFeatures().start(backbone)
        backbone.eval()
        rows = []
        for start in range(0, len(files), 50):
            batch = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in files[start : start + 50]])
            with torch.no_grad():
                rows.append(backbone(torch.from_numpy(batch).permute(0, 3, 1, 2)).half().numpy())
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.concatenate(rows))
    stored = np.load(kept).astype(np.float32)
    rng = np.random.default_rng(0)
    positive = list(rng.permutation(np.flatnonzero(classes == target)))
    others = list(rng.permutation(np.flatnonzero(classes != target)))
    grades = rng.permutation(np.arange(PATIENTS) % GRADES)
    if len(positive) < grades.sum() or len(others) < (TILES - grades).sum():
        raise UsageError(f"expected {grades.sum()} tiles of {target} and {(TILES - grades).sum()} others")
    bags = [
        stored[[positive.pop() for _ in range(grade)] + [others.pop() for _ in range(TILES - grade)]].mean(0)
        for grade in grades
    ]
    # The mean of a bag is all that mean pooling reads.
    return Patients(torch.from_numpy(np.stack(bags))[:, None], grades.astype(np.int64))


def build(width: int, seed: int) -> GradingNetwork:
    """Builds mean pooling and a head."""
    torch.manual_seed(seed)
    return GradingNetwork(nn.Identity(), MeanPooling(width), CumulativeLink(width, GRADES))  # type: ignore[arg-type]


def state_of(network: nn.Module) -> dict[str, NDArray[Any]]:
    """Copies weights into arrays."""
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def train_site(
    patients: Patients,
    defence: Defence,
    members: Mapping[str, NDArray[np.intp]],
    rng: np.random.Generator,
    site: str,
    weights: Weights,
) -> SiteUpdate:
    """Trains one round of a site, with the defence."""
    chosen = members[site]
    network = build(patients.features.shape[2], 0)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    data = [PatientSlides((patients.features[k],), (int(patients.grades[k]),)) for k in chosen]
    train_private(network, data, defence.training, STEPS, lr=RATE, weight_decay=0.01, rng=rng)
    sent = state_of(network)
    if defence.update is not None and defence.update.noise is not None:
        sent = privatise_update(weights, sent, defence.update.clip, defence.update.noise, rng)
    return SiteUpdate(site, sent, len(chosen))


def predict(patients: Patients, weights: Weights, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
    """Computes probabilities ``[n, K]`` of chosen patients."""
    network = build(patients.features.shape[2], 0)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    with torch.no_grad():
        logits, _ = network.grade(patients.features[chosen], torch.ones(len(chosen), 1, dtype=torch.bool))
        return network.head.probabilities(logits).double().numpy()


def run_grade(patients: Patients, defence: Defence, seed: int) -> NDArray[np.int64]:
    """Trains three sites together; returns the grades ``[n]`` of the patients of no site."""
    order = np.random.default_rng([seed, 7]).permutation(PATIENTS)
    members = {f"site_{k}": order[k * SITE : (k + 1) * SITE] for k in range(3)}
    train = partial(train_site, patients, defence, members, np.random.default_rng([seed, 8]))
    start = state_of(build(patients.features.shape[2], seed))
    *_, last = averaged(train, start, dict.fromkeys(members, SITE), ROUNDS)
    test = np.sort(order[3 * SITE :])
    grades = np.full(PATIENTS, -1)
    grades[test] = predict(patients, last.weights, test).argmax(1)
    return grades


class Shadow(NamedTuple):
    """A site whose messages the attacker sees.

    Attributes:
        member: ``[POPULATION]`` bool.
        confidence: ``[POPULATION]``, the mean over the messages.
        update: ``[P]``, the last message less the start.
        top: number of patients of the greatest grade.
    """

    member: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    update: NDArray[np.float64]
    top: int


def run_shadow(patients: Patients, defence: Defence, number: int) -> Shadow:
    """Trains a site of one population alone, from the start that all know."""
    rng = np.random.default_rng([number, 9])
    population = np.arange(POPULATION) + (number % 2) * POPULATION
    top = rng.permutation(population[patients.grades[population] == GRADES - 1])
    rest = rng.permutation(population[patients.grades[population] < GRADES - 1])
    count = min(int(rng.integers(FEWEST_TOP, MOST_TOP + 1)), len(top))
    chosen = np.concatenate([top[:count], rest[: SITE - count]])
    start = state_of(build(patients.features.shape[2], 0))
    train = partial(train_site, patients, defence, {"site": chosen}, rng)
    rounds = list(averaged(train, start, {"site": SITE}, ROUNDS))
    confidence = [
        logit_confidence(patients.grades[population], predict(patients, found.weights, population))
        for found in rounds
    ]
    update = np.concatenate([(rounds[-1].weights[name] - start[name]).ravel() for name in start])
    return Shadow(np.isin(population, chosen), np.mean(confidence, axis=0), update.astype(np.float64), count)


class Row(NamedTuple):
    """Results of one defence."""

    defence: Defence
    qwk: Interval
    accuracy: Interval
    membership: MembershipAudit
    property: CountAudit


def run_row(patients: Patients, defence: Defence, place: int, output: Path) -> Row:
    """Computes the results of a defence, or reads them."""
    path = output / f"defence-{place}.npz"
    if not path.is_file():
        began = time.perf_counter()
        grades = [run_grade(patients, defence, seed) for seed in range(SEEDS)]
        shadows = [run_shadow(patients, defence, number) for number in range(SHADOWS)]
        fields = {name: np.array([getattr(shadow, name) for shadow in shadows]) for name in Shadow._fields}
        np.savez(path, allow_pickle=False, grades=np.array(grades), **fields)
        print(f"{defence.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    with np.load(path) as kept:
        grades, fields = kept["grades"], {name: kept[name] for name in Shadow._fields}
    # Each seed has other test patients: their results are pooled, patients being the units.
    seeds, patient = np.nonzero(grades >= 0)
    true, guessed = patients.grades[patient], grades[seeds, patient]
    return Row(
        defence,
        bca_interval(partial(qwk, true, guessed, GRADES), patient, n_draws=1000),
        share_interval(true == guessed, patient),
        _audit_members(patients, fields["confidence"], fields["member"]),
        audit_count(_outputs(patients, fields["update"]), fields["top"], np.arange(SHADOWS) % 2),
    )


def _outputs(patients: Patients, updates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the mean probability ``[S, K]`` of each grade for the patients of neither population."""
    start = state_of(build(patients.features.shape[2], 0))
    ends = np.cumsum([value.size for value in start.values()])
    rows = []
    for update in updates:
        parts = np.split(update, ends[:-1])
        weights = {
            name: (value + part.reshape(value.shape)).astype(value.dtype)
            for (name, value), part in zip(start.items(), parts, strict=True)
        }
        rows.append(predict(patients, weights, np.arange(2 * POPULATION, PATIENTS)).mean(0))
    return np.stack(rows)


def _audit_members(
    patients: Patients, confidence: NDArray[np.float64], member: NDArray[np.bool_]
) -> MembershipAudit:
    """Audits both populations together, patients side by side, each with the shadows of its population.

    Patients who were in or out of fewer than three trainings are left out.
    """
    grades = patients.grades[: 2 * POPULATION].reshape(2, POPULATION)
    values = np.concatenate([centre_by_grade(confidence[k::2], grades[k]) for k in (0, 1)], axis=1)
    inside = np.concatenate([member[k::2] for k in (0, 1)], axis=1)
    usable = (inside.sum(0) >= 3) & ((~inside).sum(0) >= 3)
    return audit_membership(values[:, usable], inside[:, usable])


COUNTS = (80, 60, 100)  # examples of three sites under encryption


class Encrypted(NamedTuple):
    """A round of three sites under homomorphic encryption.

    Attributes:
        name: of the network's part.
        form: of the encryption, ours or NVFlare's.
        values: that travel.
        clear_mb: size of an update in the clear.
        sent_mb: size of an update as a site sends it.
        back_mb: size of the sum as a site gets it.
        encrypt_s: of one site, with packing.
        add_s: of the server, with checks and unpacking, three sites together.
        decrypt_s: of one site.
        error: greatest difference from the weighted mean in the clear.
    """

    name: str
    form: str
    values: int
    clear_mb: float
    sent_mb: float
    back_mb: float
    encrypt_s: float
    add_s: float
    decrypt_s: float
    error: float


def measure_packed(name: str, sizes: Mapping[str, int]) -> Encrypted:
    """Runs the encryption of ``averaged.encrypted`` on updates, without transport."""
    of_sites, of_server = map(Cipher.read, make_keys())
    rng = np.random.default_rng(0)
    start = {key: np.ones(size, np.float32) for key, size in sizes.items()}  # no variance falls below 0
    expected = {key: np.zeros(size) for key, size in sizes.items()}
    shares = [count / sum(COUNTS) for count in COUNTS]
    times, sent = [0.0, 0.0], []
    for share in shares:
        update = {key: rng.normal(1, 0.05, size).astype(np.float32) for key, size in sizes.items()}
        expected = {key: expected[key] + share * value.astype(float) for key, value in update.items()}
        began = time.perf_counter()
        sent.append(serialised(of_sites.encrypt(start, update), start))
        times[0] += (time.perf_counter() - began) / len(COUNTS)
    began = time.perf_counter()
    assert not any(of_server.find_fault(ciphertexts, start) for ciphertexts in sent)
    summed = of_server.add(sent, shares)
    times[1] = time.perf_counter() - began
    began = time.perf_counter()
    found = of_sites.decrypt(summed, start)
    decrypting = time.perf_counter() - began
    error = max(float(np.abs(found[key] - expected[key]).max()) for key in sizes)
    values = sum(sizes.values())
    sent_mb, back_mb = (sum(map(len, contents)) / 1e6 for contents in (sent[0], summed))
    return Encrypted(
        name,
        "averaged.encrypted",
        values,
        4 * values / 1e6,
        sent_mb,
        back_mb,
        times[0],
        times[1],
        decrypting,
        error,
    )


def measure_entries(name: str, sizes: Mapping[str, int]) -> Encrypted:
    """Runs NVFlare's own encryptor, aggregation and decryptor on a message, with keys as it provisions."""
    import tenseal
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
    from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
    from nvflare.fuel.utils import fobs
    from nvflare.lighter.impl.he import HEBuilder

    builder = HEBuilder()
    builder.initialize(None, None)  # it reads neither
    keys = tenseal.context_from(builder.get_serialized_context(is_client=True))
    encryptor, decryptor = HEModelEncryptor(), HEModelDecryptor()
    encryptor.tenseal_context = decryptor.tenseal_context = keys
    encryptor.encrypt_layers = [True]
    helper = WeightedAggregationHelper(weigh_by_local_iter=False)  # the sites weigh before they encrypt
    rng, context = np.random.default_rng(0), FLContext()
    expected = dict.fromkeys(sizes, np.zeros(1))
    times, sent = [0.0, 0.0], b""
    for count in COUNTS:
        update = {key: rng.normal(0, 0.05, size).astype(np.float32) for key, size in sizes.items()}
        expected = {
            key: expected[key] + value.astype(float) * count / sum(COUNTS) for key, value in update.items()
        }
        began = time.perf_counter()
        encryptor.n_iter = count
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: count}
        sent = fobs.dumps(encryptor._process(DXO(DataKind.WEIGHTS, data=update, meta=meta), context).data)
        times[0] += (time.perf_counter() - began) / len(COUNTS)
        began = time.perf_counter()
        helper.add(fobs.loads(sent), count, str(count), 0)
        times[1] += time.perf_counter() - began
    began = time.perf_counter()
    mean = helper.get_result()
    back = fobs.dumps(mean)
    times[1] += time.perf_counter() - began
    began = time.perf_counter()
    found = decryptor.decryption(
        {key: value.serialize() for key, value in mean.items()}, dict.fromkeys(mean, True), context
    )
    decrypting = time.perf_counter() - began
    error = max(float(np.abs(np.array(found[key]) - expected[key]).max()) for key in sizes)
    values = sum(sizes.values())
    clear_mb, sent_mb, back_mb = 4 * values / 1e6, len(sent) / 1e6, len(back) / 1e6
    return Encrypted(
        name, "NVFlare's, by entry", values, clear_mb, sent_mb, back_mb, times[0], times[1], decrypting, error
    )


def encryption_rows(width: int, kept: Path) -> list[Encrypted]:
    """Measures the encryption of a head and of a backbone if it is installed, or reads the results."""
    if kept.is_file():
        return [Encrypted(**row) for row in json.loads(kept.read_text())]
    if not (importlib.util.find_spec("tenseal") and importlib.util.find_spec("nvflare")):
        return []
    head = {name: value.size for name, value in state_of(build(width, 0)).items()}
    network = Backbone(BackboneSpec(PACKAGED, pretrained="imagenet")).state_dict()
    backbone = {name: value.numel() for name, value in network.items() if value.is_floating_point()}
    parts = {"mean pooling and head": head, f"backbone {PACKAGED}": backbone}
    rows = [
        measure(name, sizes) for name, sizes in parts.items() for measure in (measure_packed, measure_entries)
    ]
    write_whole(kept, json.dumps([row._asdict() for row in rows]))
    return rows


PAGE = """# Privacy of a federation: grade, epsilon, attack

{patients} patients, each a bag of {tiles} tiles of colorectal tissue that no other patient has; the grade 0
to 4 is the number of tiles of adenocarcinoma. Features of the packaged ImageNet network ({width} values),
mean pooling and a cumulative-link head: {weights:,} weights travel. {rounds} rounds of {steps} steps; a
step draws each patient with probability {sampled}. Delta is {delta:g}. Intervals are 95 % over patients,
for the property over sites; those of shares are exact. **The tiles are real, the patients are not**: a real
patient's tiles are more alike, so it is easier to recognise.

## The price and the gain

Grade: three sites of {site} patients, averaged; {seeds} divisions, tested on patients of no site. Attack:
the attacker sees every message of one site that trains alone, and has trained sites like it: {own} on
other draws of its patients (membership), {other} on other patients (property).

- **Membership** (LiRA): was this patient in the training? AUROC and balanced accuracy are 0.5 by chance,
  the share of members found at 5 % false alarms is 0.05.
- **Property**: has the site more patients of grade 4 than the median of the sites ({fewest} to {most} of
  {site})? AUROC is 0.5 by chance. Then the mean error of the inferred number, and of a guess without any
  message. The attacker reads the mean probability of each grade for patients of its own.

{columns}
{rows}

{reading}

{more_columns}
{more}

Epsilon of DP-SGD is per patient (one more or less), that of noise on updates per site (all its data
replaced): they cannot be compared. The number of examples and the metrics of the validation leave in the
clear, in no epsilon. An attack that fails proves nothing: a better one may not. Only epsilon is a bound.

{encryption}

## Repeat

```console
$ python tools/run_federated_privacy.py --tiles data/crc5_112 --target AC \\
    --output runs/privacy --page docs/evidence/federated-privacy.md
```

slidetl {version}, Python {python}, torch {torch}.
"""


ENCRYPTION = """## Homomorphic encryption

A round of three sites of 80, 60 and 100 examples, in one process and without transport, with the keys that
NVFlare provisions (`HEBuilder`: CKKS, degree 8192, coefficients 60-40-40, scale 2^40): `averaged.encrypted`,
and NVFlare's own encryptor, aggregation and decryptor. Seconds of one core that others used, too.

{columns}
{rows}

NVFlare makes at least one ciphertext of 4,096 places of each entry and sends the public context with each;
`averaged.encrypted` packs all entries together and sends no context. Its site also returns the decrypted mean
in the clear, as large as an update in the clear, and its server checks each ciphertext before it adds.

"""


COLUMNS = ("defence", "noise / clip", "epsilon", "QWK", "membership, AUROC", "property, AUROC")
MORE_COLUMNS = (
    "defence",
    "accuracy",
    "members: balanced accuracy",
    "found at 5 %",
    "property: error (guess)",
)
ENCRYPTION_COLUMNS = (
    *("update", "form", "values", "MB in the clear", "MB to the server", "MB back", "s a site, encrypt"),
    *("s server, add three", "s a site, decrypt", "greatest error"),
)


def _header(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _refilled(text: str) -> str:
    """Fills paragraphs and items to 120 columns; headings, tables and code stay."""
    blocks = []
    for block in text.split("\n\n"):
        if block[0] in "#|`":
            blocks.append(block)
            continue
        items = block.split("\n- ")
        filled = [textwrap.fill(" ".join(items[0].split()), 120, subsequent_indent="  " * (block[0] == "-"))]
        filled += [
            textwrap.fill("- " + " ".join(item.split()), 120, subsequent_indent="  ") for item in items[1:]
        ]
        blocks.append("\n".join(filled))
    return "\n\n".join(blocks).rstrip() + "\n"


def describe(row: Row) -> str:
    """Formats a row of the first table."""
    defence = row.defence
    noised = defence.update or (defence.training if defence.training is not _FREE else None)
    epsilon = defence.epsilon
    return _line(
        defence.name,
        f"{noised.noise:.2f}" if noised is not None else "-",
        "none" if epsilon is None else f"{epsilon:.1f}" if epsilon < 100 else f"{epsilon:.0f}, no protection",
        *(f"{found:.2f}" for found in (row.qwk, row.membership.auroc, row.property.auroc)),
    )


def describe_more(row: Row) -> str:
    """Formats a row of the second table."""
    return _line(
        row.defence.name,
        *(f"{found:.2f}" for found in (row.accuracy, row.membership.balanced_accuracy, row.membership.tpr)),
        f"{row.property.error:.1f} ({row.property.error_of_mean:.1f})",
    )


def read_aloud(rows: Sequence[Row]) -> str:
    """Says in words what the table shows."""
    first, last = rows[0], rows[-1]
    found = [row.defence.name for row in rows if row.membership.auroc.low > 0.5]
    counted = [row.defence.name for row in rows if row.property.auroc.low > 0.5]
    lines = (
        f"Without a defence the QWK is {first.qwk.estimate:.2f} and membership is told with an AUROC of "
        f"{first.membership.auroc.estimate:.2f}; with {last.defence.name} they are {last.qwk.estimate:.2f} "
        f"and {last.membership.auroc.estimate:.2f}.",
        f"The interval of the membership attack lies above chance for: {'; '.join(found) or 'no row'}.",
        f"That of the property attack: {'; '.join(counted) or 'no row'}.",
        "DP-SGD hides a patient, not a number of patients: only noise on whole updates is meant for that.",
    )
    return " ".join(lines)


def describe_encryption(rows: Sequence[Encrypted]) -> str:
    """Formats the section on encryption."""
    shown = [
        f"| {row.name} | {row.form} | {row.values:,} | {row.clear_mb:.3g} | {row.sent_mb:.3g} | "
        f"{row.back_mb:.3g} | {row.encrypt_s:.2g} | {row.add_s:.2g} | {row.decrypt_s:.2g} | {row.error:.0e} |"
        for row in rows
    ]
    found = "\n".join(shown) or "Not measured: tenseal is not installed."
    return ENCRYPTION.format(columns=_header(ENCRYPTION_COLUMNS), rows=found).rstrip()


def replace_encryption(rows: Sequence[Encrypted], page: Path) -> None:
    """Writes the section on encryption into a page that is there, and leaves the rest."""
    before, heading, rest = page.read_text(encoding="utf-8").partition("## Homomorphic encryption\n")
    _, repeat, after = rest.partition("## Repeat\n")
    if not heading or not repeat:
        raise UsageError(f"{page}: expected a page of this program with its section on encryption")
    write_whole(page, f"{before}{_refilled(describe_encryption(rows))}\n{repeat}{after}")


def write_page(rows: Sequence[Row], encryption: Sequence[Encrypted], width: int, page: Path) -> None:
    """Writes the page."""
    text = PAGE.format(
        patients=PATIENTS,
        tiles=TILES,
        width=width,
        weights=sum(value.size for value in state_of(build(width, 0)).values()),
        rounds=ROUNDS,
        steps=STEPS,
        sampled=SAMPLED,
        delta=DELTA,
        site=SITE,
        fewest=FEWEST_TOP,
        most=MOST_TOP,
        seeds=SEEDS,
        own=SHADOWS // 2 - 1,
        other=SHADOWS // 2,
        columns=_header(COLUMNS),
        rows="\n".join(map(describe, rows)),
        more_columns=_header(MORE_COLUMNS),
        more="\n".join(map(describe_more, rows)),
        reading=read_aloud(rows),
        encryption=describe_encryption(encryption),
        version=VERSION,
        python=platform.python_version(),
        torch=torch.__version__,
    )
    write_whole(page, _refilled(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=Path, help="a folder of tiles for each class, in any depth")
    parser.add_argument("--target", help="name of the folder of the class that makes the grade")
    parser.add_argument(
        "--encryption", action="store_true", help="measure the encryption alone, into a page that is there"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = options.output / "encryption.json"
    if options.encryption:
        replace_encryption(encryption_rows(WIDTH, kept), options.page)
        return 0
    if options.tiles is None or options.target is None:
        parser.error("expected --tiles and --target, or --encryption")
    patients = read_patients(options.tiles, options.target, options.output / "features.npy")
    rows = [run_row(patients, defence, place, options.output) for place, defence in enumerate(defences())]
    width = patients.features.shape[2]
    write_page(rows, encryption_rows(width, kept), width, options.page)
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # NVFlare writes a line for each entry
    sys.exit(main())
