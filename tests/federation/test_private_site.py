"""Rounds of one site under differential privacy, from the configuration to the message."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from slidetl.data.study import read_study
from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import Averaged, Federation, Site, federation_from
from slidetl.federation.coordinator import SitesHere, describe, run_rounds
from slidetl.federation.encryption import Cipher, make_keys
from slidetl.federation.engine import SITE_FILE, read_site
from slidetl.federation.participant import Participant
from slidetl.federation.privacy import Account, Privacy
from slidetl.federation.site import SiteTrainer, initial_weights, site_slides
from slidetl.federation.weights import METRIC_BOUNDS
from slidetl.tiles.features import NOT_STATED, FeatureSource, write_features
from slidetl.training.configured import parse_training
from tests.conftest import Study
from tests.small import SMALL, small_weights

WIDTH = 8
PATIENT = Privacy("patient", noise=0.6, delta=1e-3, sample_rate=0.5)


@pytest.fixture(scope="module")
def site(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The study with stored features in which the grade is plain."""
    cache = tmp_path_factory.mktemp("private") / "cache"
    shutil.copytree(study.cache, cache)
    source = FeatureSource("lab", "", "", (), (), NOT_STATED)
    rng = np.random.default_rng(0)
    for slide in read_study(study.manifest, cache, 5, ()).slides:
        values = 0.3 * rng.normal(size=(len(slide.cache), WIDTH)) + (slide.row.grade or 0) / 2 - 1
        write_features(slide.cache, {"lab": (source, values.astype(np.float16))})
    return Site(13, str(study.manifest), str(cache))


@pytest.fixture(scope="module")
def federation(site: Site) -> Federation:
    return Federation(
        {"here": site, "there": Site(9)},
        model={
            "backbone": {"name": f"stored_{WIDTH}"},
            "aggregator": "slidetl.models.aggregators.MeanPooling",
            "transfer": "slidetl.models.transfer.FrozenFeatures",
            "lr": 0.05,
        },
        data={"bag_size": 0, "features": "lab", "num_workers": 0},
        trainer={"accelerator": "cpu"},
        rounds=2,
        local_epochs=5,
        privacy=PATIENT,
    )


def build(federation: Federation, folder: Path) -> tuple[SiteTrainer, dict[str, NDArray[Any]]]:
    parts = site_slides(federation, federation.sites["here"])
    return SiteTrainer(federation, "here", parts, folder), initial_weights(federation)


def test_patients_train_privately_and_the_account_survives_a_restart(
    federation: Federation, tmp_path: Path
) -> None:
    trainer, start = build(federation, tmp_path)
    before = trainer.validate(start, 0)
    update = trainer.train(start, 1)
    assert update.weights.keys() == start.keys() and all("backbone" not in name for name in start)
    assert update.metrics == {"epsilon": pytest.approx(PATIENT.spent(10))}  # no loss of the training
    assert update.metrics.keys() <= METRIC_BOUNDS.keys()
    assert trainer.validate(update.weights, 1)["rps"] < before["rps"]

    again, _ = build(federation, tmp_path)
    assert again.train(update.weights, 2).metrics["epsilon"] == pytest.approx(PATIENT.spent(20))
    assert json.loads((tmp_path / "privacy.json").read_text())["releases"] == [[0.6, 0.5, 20]]
    other = replace(federation, privacy=Privacy("site", noise=1.0))
    with pytest.raises(UsageError, match="the account is of patient level, not site"):
        build(other, tmp_path)


def test_the_network_behind_stored_features_is_compared(federation: Federation, tmp_path: Path) -> None:
    trainer, _ = build(federation, tmp_path)
    here, source = trainer.frozen_sha256, trainer.data.feature_source
    assert len(here) == 64 and source is not None
    trainer.data.feature_source = replace(source, weights_sha256="f" * 64)
    assert trainer.frozen_sha256 != here


def test_a_site_refuses_rounds_beyond_its_epsilon(federation: Federation, tmp_path: Path) -> None:
    target = Privacy("patient", epsilon=3.0, delta=1e-3, sample_rate=0.5)
    trainer, weights = build(replace(federation, privacy=target), tmp_path)
    for number in (1, 2):
        weights = dict(trainer.train(weights, number).weights)
    assert trainer.account is not None and 2.95 < trainer.account.epsilon <= 3
    with pytest.raises(
        FederationError, match=r"sends nothing: epsilon would be 3\.\d+ at delta 0.001, above"
    ):
        trainer.train(weights, 3)


def test_an_update_is_clipped_and_noised_at_the_site(federation: Federation, tmp_path: Path) -> None:
    kind = replace(federation, privacy=Privacy("site", clip=0.01, noise=1e-9), local_epochs=1)
    trainer, start = build(kind, tmp_path)
    update = trainer.train(start, 1)
    change = np.concatenate([(update.weights[name] - start[name]).ravel() for name in start])
    assert np.linalg.norm(change) == pytest.approx(0.01, rel=1e-3)
    assert (
        update.metrics.keys() == {"epsilon"} and update.metrics["epsilon"] > 1e6
    )  # the noise is next to none
    noisy, _ = build(replace(kind, privacy=Privacy("site", clip=100.0, noise=1.0)), tmp_path / "noisy")
    sent = noisy.train(start, 1)
    assert np.abs(np.concatenate([(sent.weights[name] - start[name]).ravel() for name in start])).mean() > 30


def test_trainings_that_would_not_be_private_are_refused(federation: Federation, tmp_path: Path) -> None:
    model, data = federation.model, federation.data
    for changes, told in (
        ({"data": {"bag_size": 4, "num_workers": 0}}, "needs stored features"),
        ({"model": {**model, "balance": True}}, "model.balance"),
        ({"model": {**model, "targets": {"smoothing": 0.1}}}, "model.targets"),
        ({"privacy": replace(PATIENT, delta=0.5)}, "one over the number of the site's patients"),
        (
            {
                "model": {"backbone": {"name": SMALL, "pretrained": str(small_weights())}},
                "data": {"bag_size": 4, "num_workers": 0},
                "privacy": Privacy("site", noise=1.0),
            },
            "travel: all-but-normalisation",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            build(replace(federation, **{"data": data, **changes}), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="proximal"):
        replace(federation, proximal=0.1)


def test_the_section_is_read_from_plain_values(federation: Federation) -> None:
    sites = {"a": {"examples": 9}, "b": {"examples": 9}}
    read = federation_from({"sites": sites, "privacy": {"level": "patient", "epsilon": 3, "delta": 1e-3}})
    assert read.privacy == Privacy("patient", epsilon=3.0)
    assert federation_from(read.to_dict()) == read
    with pytest.raises(UsageError, match="either noise or epsilon"):
        federation_from({"sites": sites, "privacy": {"level": "site"}})


@pytest.mark.parametrize("encrypted", [False, True])
def test_rounds_print_the_epsilon_beside_the_score(
    encrypted: bool, federation: Federation, tmp_path: Path
) -> None:
    here = federation.sites["here"]
    both = replace(
        federation,
        sites={"here": here, "there": replace(here, local_epochs=1)},
        local_epochs=2,
        averaged=Averaged(encrypted=encrypted),
    )
    parts = site_slides(both, here)
    of_sites, of_server = map(Cipher.read, make_keys()) if encrypted else (None, None)
    sites = {name: Participant(both, name, parts, tmp_path / name, cipher=of_sites) for name in both.sites}
    lines: list[str] = []

    def tell(account: dict[str, Any]) -> None:
        lines.append(describe(account, both.rounds))

    run_rounds(both, SitesHere(sites), tmp_path, tell, of_server)
    assert len(lines) == both.rounds == 2
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"round {number} of 2: rps 0.") and "accuracy" in line
        assert f"; epsilon up to {PATIENT.spent(4 * number):.3g}" in line  # of the site with more steps


def test_a_site_trains_under_its_own_privacy_alone(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site.yaml"
    monkeypatch.setenv(SITE_FILE, str(path))
    places = {"manifest": "m.csv", "cache": "cache", "folder": "here"}
    own = {"level": "patient", "noise": 0.6, "delta": 1e-3, "sample_rate": 0.5}
    path.write_text(json.dumps({**places, "privacy": own}))
    assert read_site("here", federation)[1] == Path("here")
    for weaker in (
        replace(federation, privacy=None),
        replace(federation, privacy=replace(PATIENT, noise=0.1)),
        replace(federation, scheme="local"),  # a baseline is not private
    ):
        with pytest.raises(UsageError, match="this site trains under privacy"):
            read_site("here", weaker)
    path.write_text(json.dumps({**places, "privacy": {"levl": "site"}}))
    with pytest.raises(UsageError, match="the site's privacy"):
        read_site("here", federation)


def test_the_how_to_shows_sections_that_work() -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "federated-privacy.md").read_text()
    sites = {"a": {"examples": 9}, "b": {"examples": 9}}
    patient, site, encrypted = (
        federation_from({"sites": sites, **yaml.safe_load(block)})
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    )
    assert encrypted.averaged.encrypted
    assert patient.privacy == Privacy("patient", epsilon=8.0) and site.travel == "all-but-normalisation"
    parsed = parse_training(patient.fit_config, patient.grades, 0)
    assert parsed.model.backbone.name == parsed.data.features


def test_two_trainings_in_a_folder_share_an_account(tmp_path: Path) -> None:
    path = tmp_path / "site" / "privacy.json"
    one, other = (Account(Privacy("site", noise=10.0), 5, path) for _ in range(2))
    for _ in range(3):
        one.spend(1)
        other.spend(1)
    assert json.loads(path.read_text())["releases"] == [[5.0, 1.0, 6]]
    assert other.epsilon == pytest.approx(Privacy("site", noise=10.0).spent(6))
    limited = Account(Privacy("site", epsilon=other.epsilon, delta=1e-3), 1, path)
    with pytest.raises(FederationError, match="this site sends nothing"):
        limited.spend(1)


@pytest.mark.parametrize(
    "text", ['{"level": "patient"}', '{"level": "patient", "releases": [["a", 1, 1]]}', "[]", "{"]
)
def test_a_damaged_account_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(UsageError, match="expected a site's account"):
        Account(PATIENT, 40, tmp_path / "privacy.json")
