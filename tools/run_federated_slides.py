r"""Federated training on the slides of three synthetic sites: two registered experiments, and their pages.

    python tools/run_federated_slides.py --output runs/slides --page docs/evidence/federated-slides.md
    python tools/run_federated_slides.py --fine-tuned --output runs/fedbn \
        --page docs/evidence/federated-fedbn.md

The second one trains the backbone too, and so has FedBN. Each redraw draws the slides of three sites with a
stain and scanner of their own, and trains by every scheme of :mod:`slidetl.federation.rounds`, without an
engine, with the ordinary training of a site. All schemes see each training slide as often. The last round
counts: nothing is chosen by a test slide. The page refuses redraws under a configuration that is not
registered (docs/evidence/registered.md). Predictions are kept under --output: a scheme that is there is not
computed again.
"""

import argparse
import csv
import platform
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidetl.cli import main as slidetl
from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Metric, bca_interval, resampled_metric, share_interval
from slidetl.evaluation.comparison import PatientResults, holm, patient_results, sign_flip_test
from slidetl.evaluation.metrics import accuracy, difference, mae, qwk
from slidetl.evaluation.protocol import canonical_sha256
from slidetl.evaluation.redraws import combine_redraws
from slidetl.federation.config import Federation, federation_from
from slidetl.federation.mixing import metropolis_weights
from slidetl.federation.rounds import Round, averaged, cyclic, peer_to_peer
from slidetl.federation.site import Parts, SiteTrainer, initial_weights, pooled_slides, site_slides
from slidetl.federation.weights import SiteUpdate, Weights
from slidetl.files import write_whole
from slidetl.synthetic.cohort import SyntheticCohort, write_cohort
from slidetl.version import VERSION

REGISTERED = Path(__file__).parents[1] / "docs" / "evidence" / "registered.md"
SITES = ("site-0", "site-1", "site-2")
FROZEN: dict[str, Any] = {
    "seeds": [2001, 2002, 2003],
    # Nine slides of each grade at each site, a patient each.
    "cohort": {"slides": 135, "patients": 135, "sites": 3, "size_px": 576, "mpp": 4.0},
    "split": ["train", "test", "train", "test", "val", "train", "test", "train", "test"],
    "tile": ["--mpp", "4", "--tile-size", "64"],
    # Training and grading read these alone, all tiles of a slide.
    "embed": ["--backbone", "tf_efficientnet_lite0", "--pretrained", "imagenet", "--name", "lite0"],
    "schemes": ["local", "pooled", "cyclic", "averaged", "peer to peer"],
    # A line, site-0 to site-1 to site-2: on three sites a ring would be a full graph.
    "neighbours": [[0, 1, 0], [1, 0, 1], [0, 1, 0]],
    "primary": ["averaged", "local"],
    "federation": {
        "rounds": 8,
        "local_epochs": 1,
        "model": {
            "backbone": {"name": "tf_efficientnet_lite0", "pretrained": "imagenet"},
            "aggregator": {"class_path": "slidetl.models.aggregators.GatedAttention"},
            "head": {"class_path": "slidetl.models.heads.CumulativeLink"},
            "transfer": {"class_path": "slidetl.models.transfer.FrozenFeatures"},
            "lr": 1e-2,
        },
        "data": {"bag_size": 0, "features": "lite0", "batch_size": 2, "num_workers": 0},
        "trainer": {"accelerator": "cpu"},
    },
}
FINE_TUNED: dict[str, Any] = {
    "seeds": [2011, 2012, 2013],
    **{name: FROZEN[name] for name in ("cohort", "split", "tile")},
    "schemes": ["local", "pooled", "averaged", "FedBN"],
    "primary": ["FedBN", "averaged"],
    "federation": {
        "rounds": 12,
        "local_epochs": 1,
        "model": {
            "backbone": FROZEN["federation"]["model"]["backbone"],
            "aggregator": {"class_path": "slidetl.models.aggregators.MeanPooling"},
            "head": {"class_path": "slidetl.models.heads.CumulativeLink"},
            # Batch statistics, since stored ones would leave FedBN little to keep at a site.
            "transfer": {
                "class_path": "slidetl.models.transfer.WarmRestart",
                "init_args": {"backbone_lr_scale": 0.1, "batch_statistics": True},
            },
            "lr": 1e-2,
        },
        "data": {"bag_size": 8, "batch_size": 4, "num_workers": 0},
        "trainer": {"accelerator": "cpu"},
    },
}

ABOUT = """
{redraws} of {registered} redraws of everything (stains, scanners, patients, initial heads), in their
registered order. In each, three sites have 20 training slides and 20 test slides, a patient each, of the
five grades alike; H&E at 4 um/px, tiles of 64 px, every site with its own dyes, hue, glass, blur, noise and
compression ([how](../design/synthetic-slides.md)). Every scheme makes {rounds} passes over each training
slide from the same initial network, with the ordinary training of a site, and the last round counts.

{training}

{patients} test patients. Intervals over patients are the paired bootstrap (BCa), those of accuracies exact
(Clopper and Pearson), and p-values those of sign flips, as in `slidetl compare`: all given the trained
networks. The column over redraws takes each redraw for one of many ([why](../design/statistics.md)). The
primary comparison, bold, was registered before the run ([where](registered.md)): configuration `{sha256}`.
The others are secondary, corrected together by Holm.
"""
FROZEN_TRAINING = """
The backbone (Lite0, ImageNet weights) is frozen, its features stored: attention and head are trained, and
travel. **FedBN is not in the table**: what it keeps at a site, batch normalisation, is in the backbone
alone. [Another page](federated-fedbn.md) fine-tunes the backbone too.

A test slide is graded by the network of its own site: by the site's own one in local and peer to peer, by
the one for all in pooled, cyclic and averaged. Peers mix along a line, site-0 to site-1 to site-2. Averaged
weighs the sites by their slides, here alike.
"""
FINE_TUNED_TRAINING = """
The whole network is trained, with batch statistics: Lite0 from ImageNet weights at a tenth of the rate of
the head, mean pooling, 8 tiles of a slide a pass, 4 slides a step. Averaged averages the batch normalisation
of the sites too, running statistics included. FedBN averages all but the batch normalisation, which stays at
its site: scale, shift and running statistics ([why](../design/federation.md)). It is the only difference
between the two.

All tiles of a test slide are graded, with running statistics, by the network of its own site: the site's own
one in local; the one for all in pooled and averaged; in FedBN that one with the site's own batch
normalisation. So FedBN as tested here has nothing for a site that did not train. The sites count alike, as
their slides do. With a frozen backbone and stored features, [other redraws](federated-slides.md) had a
higher QWK in less time: this page compares what to average, it does not advise to fine-tune 20 slides.
"""


@dataclass(frozen=True)
class Experiment:
    """A registered experiment.

    Attributes:
        config: all of it; the hash of these values is registered.
        title: of the page.
        training: paragraphs of the page.
        command: repeats it.
    """

    config: dict[str, Any]
    title: str
    training: str
    command: str

    @property
    def sha256(self) -> str:
        """The hash to register."""
        return canonical_sha256(self.config)


_COMMAND = "python tools/run_federated_slides.py"
EXPERIMENTS = {
    "frozen": Experiment(
        FROZEN,
        "Federated training on slides of three synthetic sites",
        FROZEN_TRAINING,
        f"{_COMMAND} --output runs/slides --page docs/evidence/federated-slides.md",
    ),
    "fine-tuned": Experiment(
        FINE_TUNED,
        "Federated fine-tuning on slides of three synthetic sites: FedBN beside averaging",
        FINE_TUNED_TRAINING,
        f"{_COMMAND} --fine-tuned --output runs/fedbn --page docs/evidence/federated-fedbn.md",
    ),
}


def draw(config: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Draws and tiles the slides of a redraw, and writes a manifest for each site."""
    if (folder / "data" / f"{SITES[-1]}.csv").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_cohort(SyntheticCohort(**config["cohort"], seed=seed), folder / "data")
    manifest = folder / "data" / "manifest.csv"
    cache = str(folder / "cache")
    if slidetl(["tile", str(manifest), "--cache", cache, *config["tile"]]) or (
        "embed" in config and slidetl(["embed", cache, *config["embed"]])
    ):
        raise UsageError("slidetl tile or embed failed; the lines above say why")
    rows = list(csv.DictReader(manifest.read_text(encoding="utf-8").splitlines()))
    parts = config["split"]
    for site in SITES:
        with (folder / "data" / f"{site}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "split"])
            writer.writeheader()
            for grade in "01234":
                own = [row for row in rows if row["site"] == site and row["grade"] == grade]
                for number, row in enumerate(own):
                    writer.writerow({**row, "split": parts[number % len(parts)]})


def federation_of(config: Mapping[str, Any], seed: int, folder: Path, scheme: str) -> Federation:
    """Configures the sites of a redraw."""
    sites = {
        name: {
            "examples": len((folder / "data" / f"{name}.csv").read_text(encoding="utf-8").splitlines()) - 1,
            "manifest": str(folder / "data" / f"{name}.csv"),
            "cache": str(folder / "cache"),
        }
        for name in SITES
    }
    travel = "all-but-normalisation" if scheme == "FedBN" else "all"
    return federation_from({**config["federation"], "sites": sites, "seed": seed, "travel": travel})


class Sites:
    """The trainers of the sites, and the rounds that each has trained."""

    def __init__(self, federation: Federation, parts_of: Mapping[str, Parts], folder: Path) -> None:
        self.trainers = {
            name: SiteTrainer(federation, name, parts, folder / name) for name, parts in parts_of.items()
        }
        self.declared = {name: trainer.examples for name, trainer in self.trainers.items()}
        self._rounds = dict.fromkeys(parts_of, 0)

    def __call__(self, site: str, weights: Weights) -> SiteUpdate:
        """Trains a site for a round."""
        self._rounds[site] += 1
        return self.trainers[site].train(weights, self._rounds[site])


def run(config: Mapping[str, Any], seed: int, folder: Path, scheme: str) -> dict[str, Any]:
    """Trains by a scheme, and grades the test slides of each site with the network of that site.

    Returns:
        Site, patient, grade and probabilities of each test slide, and seconds of the training.
    """
    federation = federation_of(config, seed, folder, scheme)
    parts_of = {name: site_slides(federation, site) for name, site in federation.sites.items()}
    place = folder / scheme
    shutil.rmtree(place, ignore_errors=True)
    trained = {"pooled": pooled_slides(parts_of)} if scheme == "pooled" else parts_of
    sites = Sites(federation, trained, place)
    start, rounds = initial_weights(federation), federation.rounds
    loops: dict[str, Callable[..., Iterator[Round]]] = {
        "pooled": cyclic,
        "cyclic": cyclic,
        "averaged": averaged,
        "FedBN": averaged,
    }
    if "neighbours" in config:
        loops["peer to peer"] = partial(peer_to_peer, matrix=metropolis_weights(config["neighbours"]))
    began = time.monotonic()
    if scheme == "local":
        networks: dict[str, Weights] = {
            name: _last(cyclic(sites, start, {name: examples}, rounds)).weights
            for name, examples in sites.declared.items()
        }
    else:
        networks = dict(_last(loops[scheme](sites, start, sites.declared, rounds)).networks)
    seconds = time.monotonic() - began
    graded = [
        (f"{seed}/{row.site}/{row.patient_id}", row.grade, row.probabilities)
        for name, trainer in sites.trainers.items()
        for row in trainer.evaluate(networks[name], federation.rounds, "test").predictions
    ]
    # Pooled slides have their site in their identifiers already; the last two parts are site and patient.
    patients = ["/".join((str(seed), *name.split("/")[-2:])) for name, _, _ in graded]
    order = np.argsort(patients)
    return {
        "patients": np.array(patients)[order],
        "true": np.array([grade for _, grade, _ in graded])[order],
        "probabilities": np.array([row for _, _, row in graded])[order],
        "seconds": seconds,
    }


def _last(rounds: Iterator[Round]) -> Round:
    """Returns the last round; a synthetic site loses none."""
    *_, done = rounds
    assert not done.left_out, done.left_out
    return done


def results_of(
    config: Mapping[str, Any], output: Path, seeds: Sequence[int]
) -> dict[str, list[PatientResults]]:
    """Computes what is missing; returns the results of each redraw, by scheme."""
    found: dict[str, list[PatientResults]] = {scheme: [] for scheme in config["schemes"]}
    for seed in seeds:
        folder = output / str(seed)
        draw(config, seed, folder)
        for scheme in config["schemes"]:
            path = folder / f"{scheme}.npz"
            if not path.exists():
                np.savez(path, **run(config, seed, folder, scheme))
            kept = np.load(path)
            results = patient_results(kept["true"], kept["probabilities"], kept["patients"], "worst")
            found[scheme].append(results)
            print(
                f"{seed} {scheme}: QWK {qwk(results.true, results.predicted[0], 5):.3f}, "
                f"accuracy {accuracy(results.true, results.predicted[0]):.3f}, "
                f"{float(kept['seconds']):.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return found


def effect(
    metric: Callable[[PatientResults], Metric],
    ours: Sequence[PatientResults],
    theirs: Sequence[PatientResults],
) -> tuple[str, str]:
    """Formats the paired difference of two schemes: over all patients, and over redraws as random effects."""
    first, second = _joined(ours), _joined(theirs)
    strata = [name.split("/")[0] for name in first.patients]
    over_patients = bca_interval(difference(metric(first), metric(second)), first.patients, strata=strata)
    values, errors = [], []
    for one, other in zip(ours, theirs, strict=True):
        paired = difference(metric(one), metric(other))
        values.append(float(paired(np.ones((1, len(one.true))))[0]))
        errors.append(float(np.nanstd(resampled_metric(paired, one.patients), ddof=1)))
    if len(errors) < 2 or not all(errors):  # one redraw, or equal predictions in one
        return f"{over_patients:+.2f}", ""
    return f"{over_patients:+.2f}", f"{combine_redraws(values, errors).interval:+.2f}"


def _joined(redraws: Sequence[PatientResults]) -> PatientResults:
    """Joins the patients of redraws."""
    return PatientResults(
        np.concatenate([one.patients for one in redraws]),
        np.concatenate([one.true for one in redraws]),
        np.concatenate([one.predicted for one in redraws], axis=1),
        np.concatenate([one.probabilities for one in redraws], axis=1),
    )


def _qwk(results: PatientResults) -> Metric:
    return partial(qwk, results.true, results.predicted[0], 5)


def page(experiment: Experiment, found: Mapping[str, Sequence[PatientResults]]) -> str:
    """Writes the page."""
    config = experiment.config
    schemes, (first, second) = config["schemes"], config["primary"]
    rows = []
    for scheme in schemes:
        joined = _joined(found[scheme])
        strata = [name.split("/")[0] for name in joined.patients]
        intervals = [
            bca_interval(_qwk(joined), joined.patients, strata=strata),
            share_interval(joined.predicted[0] == joined.true, joined.patients),
            bca_interval(partial(mae, joined.true, joined.predicted[0]), joined.patients, strata=strata),
        ]
        rows.append(" | ".join([f"| {scheme}", *(f"{interval:.2f}" for interval in intervals)]) + " |")
    pairs = [(scheme, against) for against in ("local", "pooled") for scheme in schemes if scheme != against]
    secondary = [pair for pair in pairs if pair not in ((first, second), ("local", "pooled"))]

    def flips(pair: tuple[str, str]) -> float:
        ours, theirs = (_joined(found[name]) for name in pair)
        metric = partial(qwk, n_grades=5)
        return sign_flip_test(
            lambda true, predicted, weights: metric(true, predicted, weights=weights),
            *(ours.true, ours.predicted, theirs.predicted, ours.patients),
        ).p

    p_values = {pair: flips(pair) for pair in [(first, second), *secondary]}
    adjusted = dict(zip(secondary, holm([p_values[pair] for pair in secondary]), strict=True))
    compared = []
    for pair in [(first, second), *secondary]:
        over_patients, over_redraws = effect(_qwk, found[pair[0]], found[pair[1]])
        name = f"**{pair[0]} minus {pair[1]}**" if pair == (first, second) else f"{pair[0]} minus {pair[1]}"
        corrected = f"{adjusted[pair]:.3f}" if pair in adjusted else ""
        corrected = corrected.replace("0.000", "< 0.001")
        compared.append(f"| {name} | {over_patients} | {p_values[pair]:.4f} | {corrected} | {over_redraws} |")
    n_redraws, n_patients = len(found[first]), len(_joined(found[first]).patients)
    about = ABOUT.format(
        redraws=n_redraws,
        registered=len(config["seeds"]),
        patients=n_patients,
        rounds=config["federation"]["rounds"] * config["federation"]["local_epochs"],
        sha256=experiment.sha256,
        training=experiment.training.strip(),
    )
    wrapped = [textwrap.fill(part, 120, break_on_hyphens=False) for part in about.strip().split("\n\n")]
    decided = p_values[first, second] <= 0.05
    name = f"{first[0].upper()}{first[1:]} minus {second}"
    verdict = f"{name}, the primary comparison: p = {p_values[first, second]:.2f}, so a difference is "
    if n_redraws < len(config["seeds"]):
        verdict = f"{name}, the primary comparison, is not decided before all registered redraws are done."
    else:
        verdict += "found." if decided else "not shown; that is no proof of equality."
    run = (
        f"slidetl {VERSION}, torch {torch.__version__}, Python {platform.python_version()}, one thread. "
        f"Repeat: `{experiment.command}`."
    )
    return (
        "\n\n".join(
            [
                f"# {experiment.title}",
                *wrapped,
                "| scheme | QWK | accuracy | MAE, grades |\n|---|---|---|---|\n" + "\n".join(rows),
                "## Differences of QWK",
                "| | over patients | sign flips, p | Holm | over redraws |\n|---|---|---|---|---|\n"
                + "\n".join(compared),
                textwrap.fill(verdict, 120),
                textwrap.fill(run, 120),
            ]
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    parser.add_argument(
        "--fine-tuned",
        action="store_const",
        const="fine-tuned",
        default="frozen",
        dest="experiment",
        help="train the backbone too, by FedBN among others",
    )
    parser.add_argument(
        "--redraws", type=int, help="so many of the registered redraws, from the first; all by default"
    )
    parser.add_argument(
        "--tune", type=int, metavar="SEED", help="one redraw with a seed that is not registered"
    )
    parser.add_argument("--hash", action="store_true", help="print the hash to register")
    options = parser.parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    sha256, config = experiment.sha256, experiment.config
    if options.hash:
        print(sha256)
        return 0
    torch.set_num_threads(1)
    if options.tune is not None:
        results_of(config, options.output, [options.tune])
        return 0
    if sha256 not in REGISTERED.read_text(encoding="utf-8"):
        raise SystemExit(f"the configuration {sha256} is not in {REGISTERED}: register it before the run")
    found = results_of(config, options.output, config["seeds"][: options.redraws])
    if options.page:
        write_whole(options.page, page(experiment, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
