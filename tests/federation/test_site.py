from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from slidetl.cli import main
from slidetl.data.study import read_study
from slidetl.errors import CheckpointError, FederationError, UsageError, WeightsError
from slidetl.federation.config import Federation, Site
from slidetl.federation.engine import run_baseline
from slidetl.federation.participant import Participant
from slidetl.federation.privacy import Privacy
from slidetl.federation.site import (
    METRICS,
    Parts,
    SiteTrainer,
    initial_weights,
    pooled_slides,
    site_slides,
)
from slidetl.federation.weights import normalisation_entries
from slidetl.training.checkpoint import load_grader
from tests.conftest import Study
from tests.small import SMALL, small_weights

ArrayDict = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def site(study: Study) -> Site:
    return Site(13, str(study.manifest), str(study.cache))


@pytest.fixture(scope="module")
def federation(site: Site) -> Federation:
    return Federation(
        {"here": site, "there": Site(9)},
        model={
            "backbone": {"name": SMALL, "pretrained": str(small_weights())},
            "transfer": {
                "class_path": "slidetl.models.transfer.WarmRestart",
                "init_args": {"batch_statistics": True},
            },
        },
        data={"bag_size": 4, "num_workers": 0},
        trainer={"accelerator": "cpu"},
        rounds=2,
    )


@pytest.fixture(scope="module")
def parts(federation: Federation, site: Site) -> Parts:
    return site_slides(federation, site)


@pytest.fixture(scope="module")
def start(federation: Federation) -> ArrayDict:
    return initial_weights(federation)


def distance(a: ArrayDict, b: ArrayDict) -> float:
    return float(np.sqrt(sum(np.square(a[name] - b[name].astype(np.float64)).sum() for name in a)))


def rows_of(study: Study) -> list[dict[str, str]]:
    """Reads the manifest of a study, with the whole paths of its slides."""
    with study.manifest.open() as file:
        return [{**row, "path": str(study.manifest.parent / row["path"])} for row in csv.DictReader(file)]


def write_rows(rows: list[dict[str, str]], folder: Path) -> Path:
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


def trained(trainer: SiteTrainer, weights: ArrayDict, number: int = 1) -> ArrayDict:
    return dict(trainer.train(weights, number).weights)


@pytest.mark.slow
def test_a_round_is_the_training_of_slidetl_fit(
    federation: Federation, site: Site, start: ArrayDict, parts: Parts, study: Study, tmp_path: Path
) -> None:
    one = replace(federation, rounds=1, local_epochs=2)
    update = SiteTrainer(one, "here", parts, tmp_path).train(start, 1)
    assert (update.site, update.examples) == ("here", len(parts["train"]))
    assert update.weights.keys() == start.keys()
    assert all(update.weights[name].dtype == start[name].dtype for name in start)
    options = [*study.options(tmp_path), "--data.bag_size=4", "--data.every_grade=false"]
    strategy = [
        "--model.transfer=slidetl.models.transfer.WarmRestart",
        "--model.transfer.batch_statistics=true",
    ]
    assert main(["fit", *options, *strategy, "--trainer.max_epochs=2"]) == 0
    fitted = load_grader(next(tmp_path.glob("logs/version_0/checkpoints/last.ckpt"))).state_dict()
    for name, value in update.weights.items():
        np.testing.assert_allclose(value, fitted[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_later_round_continues_epochs_and_schedule(
    federation: Federation, start: ArrayDict, parts: Parts, tmp_path: Path
) -> None:
    trainer = SiteTrainer(federation, "here", parts, tmp_path)
    rates: list[float] = []
    epochs: list[int] = []
    take = trainer.grader.optimizer_step

    def note(epoch: int, batch: int, optimizer: Any, closure: Any = None) -> None:
        rates.append(optimizer.param_groups[-1]["lr"])
        epochs.append(epoch)
        take(epoch, batch, optimizer, closure)

    trainer.grader.optimizer_step = note  # type: ignore[assignment]
    first = trained(trainer, start)
    trained(trainer, first, 2)
    steps = len(rates) // 2
    assert epochs == [0] * steps + [1] * steps
    schedule = trainer.grader.schedule
    expected = [trainer.grader.lr * schedule.rate(step / steps, 2) for step in range(2 * steps)]
    assert rates == pytest.approx(expected)


def test_sites_draw_differently_and_the_same_again(
    federation: Federation, start: ArrayDict, parts: Parts, tmp_path: Path
) -> None:
    def weights(name: str) -> ArrayDict:
        return trained(SiteTrainer(federation, name, parts, tmp_path / name), start)

    here = weights("here")
    assert distance(here, weights("here")) == 0
    assert distance(here, weights("there")) > 0


def test_validation_says_what_the_pooled_score_needs(
    federation: Federation, start: ArrayDict, parts: Parts, tmp_path: Path
) -> None:
    trainer = SiteTrainer(federation, "here", parts, tmp_path)
    metrics = trainer.validate(start, 0)
    assert metrics.keys() == {"slides", *METRICS} and metrics["slides"] == len(parts["val"])
    assert all(np.isfinite(value) for value in metrics.values())
    # A validation changes nothing.
    assert (
        distance(trained(trainer, start), trained(SiteTrainer(federation, "here", parts, tmp_path), start))
        == 0
    )


def test_the_pull_keeps_the_network_near_the_one_that_arrived(
    federation: Federation, start: ArrayDict, parts: Parts, tmp_path: Path
) -> None:
    def moved(proximal: float) -> float:
        kept = replace(federation, proximal=proximal)
        after = trained(SiteTrainer(kept, "here", parts, tmp_path), start)
        stays = normalisation_entries(start)
        return distance({name: after[name] for name in start if name not in stays}, start)

    free, pulled, held = moved(0), moved(1000), moved(1e9)
    assert held < 1e-4 * free  # a pull of the whole way: the network that arrived comes back after each step
    assert 2 * pulled < free


def test_what_no_training_changes_never_travels(federation: Federation, parts: Parts, tmp_path: Path) -> None:
    frozen = replace(
        federation,
        model={**federation.model, "transfer": {"class_path": "slidetl.models.transfer.FrozenFeatures"}},
    )
    start = initial_weights(frozen)
    assert start and not any(name.startswith("network.backbone.") for name in start)
    trainer = SiteTrainer(frozen, "here", parts, tmp_path)
    update = trainer.train(start, 1)
    assert update.weights.keys() == start.keys() and distance(dict(update.weights), start) > 0
    kept = trainer.grader.network.backbone.net.state_dict()
    for name, value in load_file(small_weights()).items():
        assert torch.equal(kept[name], value), name
    # A site that restarts, and only validates, has the pretrained backbone too.
    again = SiteTrainer(frozen, "here", parts, tmp_path)
    assert again.frozen_sha256 == trainer.frozen_sha256 != ""
    assert again.validate(update.weights, 1) == trainer.validate(update.weights, 1)


def test_normalisation_stays_at_its_site_and_outlives_a_restart(
    federation: Federation, parts: Parts, tmp_path: Path
) -> None:
    own = replace(federation, travel="all-but-normalisation")
    start = initial_weights(own)
    assert not normalisation_entries(start)
    trainer = SiteTrainer(own, "here", parts, tmp_path)
    update = trainer.train(start, 1)
    assert update.weights.keys() == start.keys()
    statistics = {
        name: value for name, value in trainer.grader.state_dict().items() if name.endswith("running_mean")
    }
    assert statistics
    again = SiteTrainer(own, "here", parts, tmp_path)
    assert again.validate(update.weights, 1) == trainer.validate(update.weights, 1)
    for name, value in statistics.items():
        assert torch.equal(again.grader.state_dict()[name], value), name
    other = SiteTrainer(own, "here", parts, tmp_path)
    first = other.train(start, 1)  # of a new federation: what stayed of the earlier one is gone
    for name in start:
        assert np.array_equal(first.weights[name], update.weights[name]), name


def test_normalisation_is_that_of_the_round(federation: Federation, parts: Parts, tmp_path: Path) -> None:
    own = replace(federation, travel="all-but-normalisation")
    start = initial_weights(own)
    trainer = SiteTrainer(own, "here", parts, tmp_path)

    def stays(of: SiteTrainer) -> ArrayDict:
        state = of.grader.state_dict()
        return {name: state[name].numpy().copy() for name in normalisation_entries(state)}

    before = stays(trainer)
    first = trained(trainer, start)
    of_first = stays(trainer)
    second = trained(trainer, first, 2)
    of_second = stays(trainer)
    assert min(distance(of_first, before), distance(of_second, of_first)) > 0
    path = trainer.write_checkpoint(first, 1, ["f" * 64])
    assert distance(stays(trainer), of_first) == 0
    kept = load_grader(path).state_dict()
    assert all(np.array_equal(kept[name].numpy(), value) for name, value in of_first.items())
    # A round that is trained again, since the server did not record it, begins from the round before.
    assert distance(trained(trainer, first, 2), second) == 0 and distance(stays(trainer), of_second) == 0
    # A round that the site has missed, and rounds that were cut off or are of another federation.
    trainer.validate(second, 3)
    assert distance(stays(trainer), of_second) == 0
    other = SiteTrainer(replace(own, seed=1), "here", parts, tmp_path)
    other.validate(second, 2)
    assert distance(stays(other), before) == 0
    trainer.resume(1, 1)
    trainer.validate(second, 2)
    assert distance(stays(trainer), of_first) == 0


def test_a_site_goes_on_with_its_own_normalisation_or_not_at_all(
    federation: Federation, parts: Parts, tmp_path: Path
) -> None:
    own = replace(federation, travel="all-but-normalisation")
    start = initial_weights(own)
    errors: list[Exception] = []

    def hello(of: Federation, number: int, last: dict[str, int]) -> bool:
        asked = Participant(of, "here", parts, tmp_path, note=errors.append)
        return "failed" not in asked.hello(number, last)

    trainer = SiteTrainer(own, "here", parts, tmp_path)
    after = trained(trainer, start)
    scored = trainer.validate(after, 1)
    assert hello(replace(own, seed=1), 0, {})  # another federation begins here
    assert (
        hello(own, 1, {"here": 1}) and SiteTrainer(own, "here", parts, tmp_path).validate(after, 1) == scored
    )
    assert hello(own, 0, {})  # the same configuration, in another output
    assert not hello(own, 1, {"here": 1})
    assert "expected what this site kept of round 1" in str(errors.pop())
    assert hello(own, 1, {"there": 1})  # a site that has not trained yet has kept nothing
    # All travels: nothing stays but the parts of the slides.
    assert not hello(federation, 1, {"here": 1})
    assert "expected the parts of this site's slides in round 1" in str(errors.pop())
    trained(SiteTrainer(federation, "here", parts, tmp_path), initial_weights(federation))
    assert hello(federation, 1, {"here": 1}) and not errors


def parts_by_id(parts: Parts) -> dict[str, str]:
    return {slide.row.slide_id: part for part in ("train", "val", "test") for slide in parts[part]}


def test_a_resumed_site_keeps_the_parts_of_its_slides(
    federation: Federation, site: Site, start: ArrayDict, study: Study, tmp_path: Path
) -> None:
    rows = rows_of(study)

    def read() -> Parts:
        return site_slides(federation, replace(site, manifest=str(write_rows(rows, tmp_path))))

    began = parts_by_id(read())
    record_of = tmp_path / "study" / f"{federation.sha256[:16]}.json"
    trainer = SiteTrainer(federation, "here", read(), tmp_path)
    assert not record_of.exists()  # nobody was trained on
    after = trained(trainer, start)
    rows[4]["grade"] = str((int(rows[4]["grade"]) + 1) % 5)
    now = read()
    assert parts_by_id(now) != began  # a corrected grade divides others, too
    again = SiteTrainer(federation, "here", now, tmp_path)
    assert parts_by_id(again.data.slides) == began and again.examples == len(again.data.slides["train"])
    record = load_grader(again.write_checkpoint(after, 1, [])).record
    assert record is not None and {was.slide_id: was.part for was in record.slides} == began
    other = replace(federation, seed=1)
    assert SiteTrainer(other, "here", now, tmp_path).data.slides["train"] == now["train"]
    left_out = {**now, "predict": now["predict"][1:]}
    with pytest.raises(CheckpointError, match=rf"{record_of}: .* 1 gone: .*remove this file"):
        SiteTrainer(federation, "here", left_out, tmp_path)
    record_of.write_text("{")
    with pytest.raises(CheckpointError, match=str(record_of)):
        SiteTrainer(federation, "here", now, tmp_path)


class Killed(Exception):
    pass


@pytest.mark.parametrize("scheme", ["local", "pooled"])
def test_a_baseline_is_not_resumed_with_other_slides(
    scheme: Any,
    federation: Federation,
    site: Site,
    study: Study,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_of(study)

    def run(report: Any) -> dict[str, Any]:
        manifest = write_rows(rows, tmp_path)
        sites = {"here": replace(site, manifest=str(manifest))}
        return run_baseline(replace(federation, sites=sites, scheme=scheme), tmp_path / "out", report)

    def kill(name: str, account: dict[str, Any]) -> None:
        raise Killed

    added = [rows.pop() for _ in range(3)]
    with pytest.raises(Killed):
        run(kill)
    rows += added
    with pytest.raises(FederationError, match=r"no site answered .*: failed with CheckpointError"):
        run(lambda name, account: None)
    assert "3 added: " in capsys.readouterr().out
    del rows[-3:]
    ((name, outcome),) = run(lambda name, account: None).items()
    assert outcome["kept"] == [name]


def test_a_network_that_does_not_fit_is_refused(
    federation: Federation, start: ArrayDict, parts: Parts, tmp_path: Path
) -> None:
    trainer = SiteTrainer(federation, "here", parts, tmp_path)
    name = max(start, key=lambda name: start[name].size)
    for wrong in (
        {key: value for key, value in start.items() if key != name},
        {**start, name: np.full_like(start[name], np.nan)},
        {**start, name: start[name][:1]},
        {**start, "other": start[name]},
    ):
        with pytest.raises(WeightsError, match="does not fit"):
            trainer.train(wrong, 1)


def frozen_hashes(federation: Federation, parts: Parts, folder: Path, files: list[Path]) -> list[str]:
    """Hashes the frozen weights of sites with the same configuration and these files of weights."""
    found, path = [], folder / "weights.safetensors"
    named = replace(
        federation,
        model={
            **federation.model,
            "backbone": {**federation.model["backbone"], "pretrained": str(path)},
        },
    )
    for file in files:
        shutil.copy(file, path)
        found.append(SiteTrainer(named, "here", parts, folder).frozen_sha256)
    return found


@pytest.mark.parametrize(
    "strategy", ["LoRA", "FrozenFeatures", "SharedWeights", "SharedActivations", "WarmRestart"]
)
def test_pretrained_weights_that_never_travel_are_compared(
    strategy: str, federation: Federation, parts: Parts, tmp_path: Path
) -> None:
    name = "test_vit" if strategy == "LoRA" else SMALL
    transfer: dict[str, Any] = {"class_path": f"slidetl.models.transfer.{strategy}"}
    if strategy == "SharedActivations":
        transfer["init_args"] = {"layers": ["blocks.0"]}
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = timm.create_model(name, num_classes=0)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(network.state_dict(), files[-1])
    kind = replace(federation, model={"backbone": {"name": name}, "transfer": transfer})
    one, again, other = frozen_hashes(kind, parts, tmp_path, [files[0], files[0], files[1]])
    assert one == again
    if strategy == "WarmRestart":  # all of it travels
        assert one == other == ""
    else:
        assert len(one) == 64 and one != other


def test_numbers_are_refused(federation: Federation, site: Site, parts: Parts, tmp_path: Path) -> None:
    task = {"name": "mm", "column": "mm", "numeric": True}
    numbers = replace(federation, model={**federation.model, "tasks": [task]})
    for build in (
        lambda: initial_weights(numbers),
        lambda: site_slides(numbers, site),
        lambda: SiteTrainer(numbers, "here", parts, tmp_path),
    ):
        with pytest.raises(UsageError, match=r"model\.tasks: mm is a number"):
            build()


def test_a_site_learns_a_task_that_is_given_once(federation: Federation, site: Site, tmp_path: Path) -> None:
    task = {"name": "second", "column": "grade", "grades": ["0", "1", "2", "3", "4"]}
    two = replace(federation, model={**federation.model, "tasks": [task]})
    start = initial_weights(two)
    heads = [name for name in start if name.startswith("tasks.heads.0.")]
    after = trained(SiteTrainer(two, "here", site_slides(two, site), tmp_path), start)
    assert heads and distance({name: after[name] for name in heads}, start) > 0


def test_the_checkpoint_records_slides_without_a_grade(
    federation: Federation, site: Site, study: Study, tmp_path: Path
) -> None:
    rows = rows_of(study)
    rows[0]["grade"] = ""
    manifest = write_rows(rows, tmp_path)
    with pytest.warns(UserWarning, match="1 of 20 slides have no grade"):
        parts = site_slides(federation, replace(site, manifest=str(manifest)))
    trainer = SiteTrainer(federation, "here", parts, tmp_path)
    record = load_grader(trainer.write_checkpoint(initial_weights(federation), 1, [])).record
    assert record is not None and record.differences(read_study(manifest, study.cache, 5)) == []
    assert [was.part for was in record.slides].count("") == 1


def test_a_site_knows_whom_its_initial_weights_have_seen(
    federation: Federation, site: Site, trained: Path, study: Study, tmp_path: Path
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    record = load_grader(best).record
    assert record is not None
    backbone = {**federation.model["backbone"], "pretrained": str(best)}
    warm = replace(federation, model={**federation.model, "backbone": backbone}, seed=1)
    with pytest.warns(UserWarning, match="of 20 slides take the part that their patient had"):
        own = site_slides(warm, site)  # without a split, patients keep their parts
    for part in ("train", "val", "test"):
        was = {slide.slide_id for slide in record.slides if slide.part == part}
        assert {slide.row.slide_id for slide in own[part]} == was
    # Nothing but the checkpoint is written, as when a finished command is run again.
    asked = Participant(warm, "here", own, tmp_path / "keep")
    assert asked.keep(initial_weights(warm), 1, ["f" * 64]) == {}
    kept = load_grader(tmp_path / "keep" / "checkpoints" / "best.ckpt").record
    assert kept is not None and set(kept.before) == set(record.used)
    # A test part that was trained on is refused at the first message, before any privacy is spent.
    errors: list[Exception] = []
    swapped = {**own, "train": own["train"][1:], "test": (*own["test"], own["train"][0])}
    site_level = replace(warm, privacy=Privacy("site", noise=1.0), travel="all-but-normalisation")
    for number, one in enumerate((warm, site_level)):
        folder = tmp_path / f"refused-{number}"
        refused = Participant(one, "here", swapped, folder, note=errors.append)
        assert refused.hello(0, {}) == {"failed": "UsageError"}
        assert "the initial weights were trained or chosen on 1 of the slides" in str(errors.pop())
        assert refused.train(initial_weights(one), 1) == {"failed": "UsageError"}
        assert not (folder / "privacy.json").exists()


def test_a_site_tells_strangers_from_patients_of_its_initial_weights(
    federation: Federation, trained: Path, three_sites: dict[str, Site], tmp_path: Path
) -> None:
    best = trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    slides = [[*slide[:2], "f" * 64, "train"] for slide in checkpoint["record"]["slides"]]  # of other content
    checkpoint["record"]["slides"] = slides
    torch.save(checkpoint, tmp_path / "a.ckpt")
    backbone = {**federation.model["backbone"], "pretrained": str(tmp_path / "a.ckpt")}
    model = {**federation.model, "backbone": backbone}
    warm = replace(federation, model=model, sites=three_sites, scheme="pooled")
    # By the names of patients, before those of a site are put before them.
    with pytest.raises(
        UsageError, match=r"on their patients: .* \(of a site of 'slidetl federate': its split_from\)"
    ):
        run_baseline(warm, tmp_path / "refused", lambda name, account: None)
    sites = {name: replace(site, split_from="external") for name, site in three_sites.items()}
    warm = replace(warm, sites=sites)
    parts_of = {name: site_slides(warm, site) for name, site in warm.sites.items()}
    joined = {"pooled": pooled_slides(parts_of)}
    for name, parts in {**parts_of, **joined}.items():
        assert SiteTrainer(warm, name, parts, tmp_path / name).examples == len(parts["train"])


@pytest.mark.slow
def test_the_result_is_an_ordinary_checkpoint(
    federation: Federation, start: ArrayDict, parts: Parts, study: Study, tmp_path: Path
) -> None:
    trainer = SiteTrainer(federation, "here", parts, tmp_path)
    after = trained(trainer, start)
    path = trainer.write_checkpoint(after, 1, ["f" * 64])
    grader = load_grader(path)
    assert grader.record is not None and len(grader.record.slides) == 20
    assert grader.network.backbone.lineage[0] == "f" * 64
    for name, value in after.items():
        np.testing.assert_array_equal(grader.state_dict()[name].numpy(), value)
    options = study.options(tmp_path)
    assert main(["test", *options, f"--ckpt_path={path}"]) == 0
    assert main(["export", str(path), "--output", str(tmp_path / "model.pt")]) == 0


def test_pooled_slides_of_sites_keep_apart(federation: Federation, parts: Parts, tmp_path: Path) -> None:
    pooled = pooled_slides({"a": parts, "b": parts})
    ids = [slide.row.slide_id for slide in pooled["train"]]
    assert len(set(ids)) == len(ids) == 2 * len(parts["train"])
    assert SiteTrainer(federation, "pooled", pooled, tmp_path).examples == len(ids)


def test_a_site_without_slides_says_so(federation: Federation) -> None:
    with pytest.raises(UsageError, match="SLIDETL_SITE"):
        site_slides(federation, Site(3))
