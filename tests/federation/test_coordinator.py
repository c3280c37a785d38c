from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import Averaged, Cyclic, Federation, PeerToPeer
from slidetl.federation.coordinator import Sites, SitesHere, describe, run_rounds
from slidetl.federation.participant import Answer
from slidetl.federation.records import best_round, pooled, read_arrays
from slidetl.federation.weights import normalisation_entries
from slidetl.files import file_sha256
from slidetl.training.checkpoint import load_grader
from tests.federation.conftest import START, Adder

Make = Callable[[Federation], SitesHere]
Reply = tuple[dict[str, Answer], dict[str, str]]


@dataclass
class Watched:
    """Sites whose messages are noted, and perhaps changed on the way."""

    sites: Sites
    change: Callable[[str, str, Any], Any] = lambda site, message, answer: answer
    lost: Callable[[str, str], bool] = lambda site, message: False
    asked: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, names: Sequence[str], message: str, **arguments: Any) -> Reply:
        self.asked += [(name, message) for name in names]
        gone = {name: "no answer" for name in names if self.lost(name, message)}
        answers, lost = self.sites.ask([name for name in names if name not in gone], message, **arguments)
        return {name: self.change(name, message, answer) for name, answer in answers.items()}, gone | lost


def run(federation: Federation, sites: Sites, output: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    accounts: list[dict[str, Any]] = []
    outcome = run_rounds(federation, sites, output, accounts.append)
    return outcome, accounts


@pytest.mark.slow
def test_averaged_keeps_each_round_and_an_ordinary_checkpoint(
    three: Federation, sites_here: Make, tmp_path: Path
) -> None:
    outcome, accounts = run(three, sites_here(three), tmp_path)
    assert [account["round"] for account in accounts] == [1, 2]
    for number, account in enumerate(accounts, 1):
        path = tmp_path / "rounds" / f"000{number}.safetensors"
        assert account["sha256"] == file_sha256(path)
        assert account["left_out"] == {} and account["used"] == ["north", "south", "west"]
        assert account["validated"].keys() == three.sites.keys()
        assert account["score"]["slides"] == 5  # two, two and one
    assert accounts[1]["parent_sha256"] == accounts[0]["sha256"]
    assert outcome["best"] == best_round(accounts) and outcome["kept"] == ["north", "south", "west"]
    network = read_arrays(tmp_path / "rounds" / f"000{outcome['best']}.safetensors")
    for path in (tmp_path, *(tmp_path / "sites" / name for name in three.sites)):
        grader = load_grader(path / "checkpoints" / "best.ckpt")
        assert grader.network.backbone.lineage[0] == accounts[outcome["best"] - 1]["sha256"]
        assert (grader.record is None) == (path == tmp_path)
        assert grader.tile_spec is not None and grader.tile_spec.mpp == 4
        for name, value in network.items():
            np.testing.assert_array_equal(grader.state_dict()[name].numpy(), value)
    line = describe(accounts[0], three.rounds)
    assert line.startswith("round 1 of 2: rps 0.") and "5 validation slides of 3 sites" in line


@pytest.mark.parametrize("travel", ["all", "all-but-normalisation"])
def test_peers_train_and_mix_real_networks(
    travel: Any, three: Federation, sites_here: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme="peer_to_peer", rounds=1, travel=travel)
    outcome, _ = run(federation, sites_here(federation), tmp_path)
    assert outcome["kept"] == ["north", "south", "west"]
    graders = [
        load_grader(tmp_path / "sites" / name / "checkpoints" / "best.ckpt").state_dict()
        for name in three.sites
    ]
    differ = {
        name
        for name, value in graders[0].items()
        if not np.allclose(value.numpy(), graders[1][name].numpy(), rtol=0, atol=1e-6)
    }
    own = normalisation_entries(graders[0])
    assert differ <= own and bool(differ) == (travel != "all")


def test_the_order_of_a_journey(three: Federation, adders: Make, tmp_path: Path) -> None:
    federation = replace(three, scheme="cyclic", cyclic=Cyclic(["west", "north", "south"]), rounds=1)
    sites = Watched(adders(federation))
    run(federation, sites, tmp_path)
    assert [name for name, message in sites.asked if message == "train"] == ["west", "north", "south"]


def spoil(kind: str) -> Callable[[str, str, Any], Any]:
    def change(site: str, message: str, answer: Any) -> Any:
        if site != "south" or message != "train":
            return answer
        name = max(answer["weights"], key=lambda name: answer["weights"][name].size)
        value = answer["weights"][name]
        if kind == "nan":
            return {**answer, "weights": {**answer["weights"], name: np.full_like(value, np.nan)}}
        if kind == "shape":
            return {**answer, "weights": {**answer["weights"], name: value[:1]}}
        if kind == "claim":
            return {**answer, "examples": 10**9}
        return {"text": 3} if kind == "form" else [answer]

    return change


@pytest.mark.parametrize("scheme", ["averaged", "cyclic"])
@pytest.mark.parametrize("kind", ["nan", "shape", "form", "list", "lost"])
def test_a_bad_site_does_not_stop_the_round(
    scheme: Any, kind: str, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme=scheme, rounds=1)
    gone = (lambda site, message: site == "south") if kind == "lost" else (lambda site, message: False)
    _, (account,) = run(federation, Watched(adders(federation), spoil(kind), gone), tmp_path)
    assert "south" in account["left_out"] and account["trained"].keys() == {"north", "west"}
    assert ("south" in account["validated"]) == (kind != "lost")
    network = read_arrays(tmp_path / "rounds" / "0001.safetensors")
    assert all(np.isfinite(value).all() for value in network.values())
    assert "south left out: " in describe(account, 1)


def test_a_claim_is_capped(three: Federation, adders: Make, tmp_path: Path) -> None:
    federation = replace(three, rounds=1)
    run(federation, adders(federation), tmp_path / "honest")
    _, (account,) = run(federation, Watched(adders(federation), spoil("claim")), tmp_path / "lying")
    assert "claims 1000000000 examples" in account["notes"]["south"]
    assert "claims 1000000000" in describe(account, 1)
    files = [tmp_path / name / "rounds" / "0001.safetensors" for name in ("honest", "lying")]
    assert file_sha256(files[0]) == file_sha256(files[1])


def test_a_site_cannot_choose_the_best_round_by_its_claims(
    three: Federation, adders: Make, tmp_path: Path
) -> None:
    def boast(site: str, message: str, answer: Any) -> Any:
        if site != "south" or message != "validate":
            return answer
        return {"metrics": {**answer["metrics"], "slides": 1e9}}

    federation = replace(three, rounds=1)
    _, (account,) = run(federation, Watched(adders(federation), boast), tmp_path)
    assert account["validated"]["south"]["slides"] == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"rps": -5.0},
        {"rps": float("nan")},
        {"slides": 0},
        {"accuracy": "1"},
        {"accuracy": 1e308},
        {"mae": 4.5},
        {"loss": 10**400},
        {"a": 1.0},
    ],
)
def test_metrics_that_cannot_be_are_left_out(
    wrong: dict[str, Any], three: Federation, adders: Make, tmp_path: Path
) -> None:
    def lie(site: str, message: str, answer: Any) -> Any:
        lies = site == "south" and message == "validate"
        return {"metrics": {**answer["metrics"], **wrong}} if lies else answer

    federation = replace(three, rounds=1)
    _, (account,) = run(federation, Watched(adders(federation), lie), tmp_path)
    assert account["validated"].keys() == {"north", "west"}
    assert "no usable metrics" in account["left_out"]["south"]


METRICS_OF_NO_SITE: list[Any] = [
    {b"x": 1.0},
    {"train_loss": 1e308},
    {"train_loss": 10**400},
    {str(number): 1.0 for number in range(200_000)},
]


@pytest.mark.parametrize("scheme", ["averaged", "cyclic", "peer_to_peer"])
@pytest.mark.parametrize("metrics", METRICS_OF_NO_SITE, ids=["bytes", "huge", "int", "many"])
def test_metrics_of_a_training_that_cannot_be_leave_the_site_out(
    scheme: Any, metrics: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    def lie(site: str, message: str, answer: Any) -> Any:
        lies = site == "south" and message in ("train", "train_own")
        return {**answer, "metrics": metrics} if lies else answer

    federation = replace(three, scheme=scheme, rounds=1)
    outcome, (account,) = run(federation, Watched(adders(federation), lie), tmp_path)
    assert outcome["best"] == 1 and account["trained"].keys() == {"north", "west"}
    assert account["left_out"].keys() == {"south"} and "metric" in account["left_out"]["south"]


@pytest.mark.parametrize(
    ("field", "value"), [("frozen_sha256", np.zeros(2)), ("tile_spec", {b"x": 1.0}), ("tile_spec", 3)]
)
@pytest.mark.parametrize("site", ["north", "west"])  # the first to answer, the last
def test_a_hello_that_cannot_be_leaves_the_site_out(
    site: str, field: str, value: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    def lie(name: str, message: str, answer: Any) -> Any:
        return {**answer, field: value} if (name, message) == (site, "hello") else answer

    outcome, accounts = run(three, Watched(adders(three), lie), tmp_path)
    assert {account["left_out"][site] for account in accounts} == {f"{field} has another form"}
    assert sorted({*outcome["kept"], site}) == ["north", "south", "west"] != outcome["kept"]


def peer_rounds(site: Path, federation: Federation) -> Path:
    return site / "rounds" / federation.sha256[:16]


def adder(sites: SitesHere, name: str) -> Adder:
    trainer: Any = sites.participants[name].trainer
    assert isinstance(trainer, Adder)
    return trainer


class Killed(Exception):
    pass


@pytest.mark.parametrize("scheme", ["averaged", "cyclic", "peer_to_peer"])
def test_a_killed_federation_continues_from_its_last_round(
    scheme: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    averaged = Averaged(momentum=0.5 if scheme == "averaged" else 0.0)
    federation = replace(three, scheme=scheme, averaged=averaged, rounds=3)
    at_once, whole = run(federation, adders(federation), tmp_path / "whole")

    def stop(account: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_rounds(federation, adders(federation), tmp_path / "killed", stop)
    outcome, rest = run(federation, adders(federation), tmp_path / "killed")
    assert [account["round"] for account in rest] == [2, 3] and outcome["best"] == at_once["best"]
    for before, after in zip(whole[1:], rest, strict=True):
        assert {name: after[name] for name in before} == before
    again, nothing = run(federation, adders(federation), tmp_path / "killed")
    assert nothing == [] and again == outcome


@pytest.mark.parametrize("scheme", ["averaged", "cyclic", "peer_to_peer"])
def test_the_lineage_of_the_result_is_its_round_and_all_before(
    scheme: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme=scheme, rounds=3)
    best = run(federation, adders(federation), tmp_path)[0]["best"]
    assert best > 1 or scheme == "cyclic"
    for name in federation.sites:
        site = tmp_path / "sites" / name
        own = peer_rounds(site, federation)
        rounds = own if scheme == "peer_to_peer" else tmp_path / "rounds"
        expected = [file_sha256(rounds / f"{number:04}.safetensors") for number in range(best, 0, -1)]
        assert (site / "lineage.txt").read_text().split() == expected


@pytest.mark.parametrize("scheme", ["averaged", "cyclic", "peer_to_peer"])
def test_sites_validate_and_keep_the_network_of_a_round_by_its_number(
    scheme: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme=scheme, rounds=3)
    sites = adders(federation)
    best = run(federation, sites, tmp_path)[0]["best"]
    expected = [("resume", 0), ("validate", 1), ("validate", 2), ("validate", 3), ("keep", best)]
    for name in federation.sites:
        assert adder(sites, name).asked == expected


def test_momentum_is_kept_until_the_next_round_is_written(
    three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, averaged=Averaged(momentum=0.5), rounds=3)
    _, whole = run(federation, adders(federation), tmp_path / "whole")
    asked = []

    def kill(site: str, message: str) -> bool:
        asked.append(message)
        if asked.count("validate") == 4:  # of round 2
            raise Killed
        return False

    with pytest.raises(Killed):
        run(federation, Watched(adders(federation), lost=kill), tmp_path / "killed")
    _, rest = run(federation, adders(federation), tmp_path / "killed")
    assert [account["sha256"] for account in rest] == [account["sha256"] for account in whole[1:]]
    left = tmp_path / "killed" / "velocity"
    assert sorted(path.name for path in left.iterdir()) == ["0003.json", "0003.safetensors"]


def test_a_federation_whose_momentum_is_gone_is_not_resumed(
    three: Federation, adders: Make, tmp_path: Path
) -> None:
    def stop(account: dict[str, Any]) -> None:
        raise Killed

    federation = replace(three, averaged=Averaged(momentum=0.5))
    with pytest.raises(Killed):
        run_rounds(federation, adders(federation), tmp_path, stop)
    (tmp_path / "velocity" / "0001.json").unlink()
    with pytest.raises(FederationError, match="expected the momentum of the server after round 1"):
        run(federation, adders(federation), tmp_path)


def test_a_second_training_in_an_output_is_refused(three: Federation, adders: Make, tmp_path: Path) -> None:
    def again(account: dict[str, Any]) -> None:
        with pytest.raises(FederationError, match="another training is at work"):
            run_rounds(three, adders(three), tmp_path, lambda account: None)

    assert run_rounds(three, adders(three), tmp_path, again)["kept"] == ["north", "south", "west"]


def test_rounds_of_another_configuration_are_refused(three: Federation, adders: Make, tmp_path: Path) -> None:
    federation = replace(three, rounds=1)
    run(federation, adders(federation), tmp_path)
    other = replace(federation, proximal=0.1)
    with pytest.raises(UsageError, match="another configuration"):
        run(other, adders(other), tmp_path)
    file = tmp_path / "rounds" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FederationError, match="gone or changed"):
        run(federation, adders(federation), tmp_path)


def test_sites_with_other_tiles_do_not_train(three: Federation, adders: Make, tmp_path: Path) -> None:
    def cut(site: str, message: str, answer: Any) -> Any:
        if message != "hello" or site != "west":
            return answer
        return {**answer, "tile_spec": {**answer["tile_spec"], "mpp": 8.0}}

    sites = Watched(adders(three), cut)
    with pytest.raises(FederationError, match=r"sites have other tiles: north .* west"):
        run(three, sites, tmp_path)
    assert {message for _, message in sites.asked} == {"hello"}


def fails_hello(rounds: int) -> Callable[[str, str, Any], Any]:
    """Lets the hello of west fail so often."""
    failed: list[str] = []

    def change(site: str, message: str, answer: Any) -> Any:
        if (site, message) != ("west", "hello") or len(failed) == rounds:
            return answer
        failed.append(message)
        return {"failed": "ManifestError"}

    return change


@pytest.mark.parametrize("scheme", ["averaged", "cyclic"])
def test_a_site_trains_once_it_has_said_what_must_be_the_same(
    scheme: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme=scheme)
    outcome, (first, second) = run(federation, Watched(adders(federation), fails_hello(1)), tmp_path)
    assert first["left_out"].keys() == {"west"} and "failed with ManifestError" in first["left_out"]["west"]
    assert first["trained"].keys() == first["validated"].keys() == {"north", "south"}
    assert second["trained"].keys() == second["validated"].keys() == {"north", "south", "west"}
    assert second["left_out"] == {} and outcome["kept"] == ["north", "south", "west"]


@pytest.mark.parametrize(
    ("other", "told"),
    [({"mpp": 8.0}, "other tiles"), ({"frozen_sha256": "f" * 64}, "other pretrained weights")],
)
def test_a_late_site_that_is_not_alike_is_left_out_and_refused_on_resuming(
    other: dict[str, Any], told: str, three: Federation, adders: Make, tmp_path: Path
) -> None:
    def make() -> SitesHere:
        sites = adders(three)
        west = adder(sites, "west")
        sites.participants["west"]._trainer = replace(west, **other)  # type: ignore[assignment]
        return sites

    sites = Watched(make(), fails_hello(1))
    outcome, (_, second) = run(three, sites, tmp_path)
    assert {message for name, message in sites.asked if name == "west"} == {"hello"}
    assert second["left_out"]["west"].startswith(f"sites have {told}: north ")
    assert outcome["kept"] == ["north", "south"] and "other" in outcome["lost"]["west"]
    alone = Watched(make(), lost=lambda site, message: site != "west")
    with pytest.raises(FederationError, match=f"sites have {told}: north .* west"):
        run(three, alone, tmp_path)


def test_peers_take_no_round_of_another_federation_for_theirs(
    three: Federation, adders: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = replace(three, scheme="peer_to_peer")
    run(federation, adders(federation), tmp_path / "earlier")
    west = adders(replace(federation, seed=7)).participants["west"]
    assert west.begin(START, 2) == {} and west._network is START
    assert west.keep_own(2) == {"failed": "FederationError"}
    assert "no such round of this configuration" in capsys.readouterr().out
    # Of the same configuration, in another output.
    away = Watched(adders(federation), lost=lambda site, message: (site, message) == ("west", "begin"))
    outcome, _ = run(federation, away, tmp_path / "again")
    assert outcome["kept"] == ["north", "south"]
    assert outcome["lost"] == {"west": "failed with FederationError; its log says why"}


def test_peers_resume_from_their_own_network_or_not_at_all(
    three: Federation, adders: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = replace(three, scheme="peer_to_peer")
    before, _ = run(federation, adders(federation), tmp_path / "one")
    other = replace(federation, seed=7)
    run(other, adders(other), tmp_path / "other")
    assert run(federation, adders(federation), tmp_path / "one")[0] == before
    sites = adders(federation)
    assert "failed" not in sites.participants["west"].hello(0, {})  # as by a mistyped --output
    outcome, _ = run(federation, sites, tmp_path / "one")
    assert outcome["kept"] == ["north", "south"] and "FederationError" in outcome["lost"]["west"]
    assert "expected what this site kept of round 2" in capsys.readouterr().out


@pytest.mark.parametrize("mixing", ["ring", "swarm", [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]])
def test_peer_to_peer_sends_no_network_to_the_server(
    mixing: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme="peer_to_peer", peer_to_peer=PeerToPeer(mixing))
    came: list[Any] = []

    def note(site: str, message: str, answer: Any) -> Any:
        came.append(answer)
        return answer

    outcome, accounts = run(federation, Watched(adders(federation), note), tmp_path)
    assert not any("weights" in answer for answer in came)
    assert not list(tmp_path.glob("rounds/*.safetensors")) and not (tmp_path / "checkpoints").exists()
    networks = [
        read_arrays(peer_rounds(tmp_path / "sites" / name, federation) / "0002.safetensors")
        for name in three.sites
    ]
    some = max(networks[0], key=lambda name: networks[0][name].size)
    same = np.allclose(networks[0][some], networks[1][some], rtol=0, atol=1e-7)
    assert same == (mixing in ("ring", "swarm"))  # a ring of three is the full graph
    assert outcome["kept"] == ["north", "south", "west"] and len(accounts) == 2
    for name in three.sites:
        kept = read_arrays(tmp_path / "sites" / name / "best.safetensors")
        own = peer_rounds(tmp_path / "sites" / name, federation) / f"000{outcome['best']}.safetensors"
        assert all(np.array_equal(kept[entry], value) for entry, value in read_arrays(own).items())


@pytest.mark.parametrize("mixing", ["ring", "swarm"])
def test_peers_do_without_a_site_that_is_gone(
    mixing: Any, three: Federation, adders: Make, tmp_path: Path
) -> None:
    federation = replace(three, scheme="peer_to_peer", peer_to_peer=PeerToPeer(mixing), rounds=1)
    sites = Watched(adders(federation), lost=lambda site, message: site == "north")
    _, (account,) = run(federation, sites, tmp_path)
    assert account["left_out"] == {"north": "no answer"}
    networks = [
        read_arrays(peer_rounds(tmp_path / "sites" / name, federation) / "0001.safetensors")
        for name in ("south", "west")
    ]
    some = max(networks[0], key=lambda name: networks[0][name].size)
    assert np.array_equal(networks[0][some], networks[1][some]) == (mixing == "swarm")


def test_a_swarm_goes_on_when_its_centre_fails(three: Federation, adders: Make, tmp_path: Path) -> None:
    federation = replace(three, scheme="peer_to_peer", peer_to_peer=PeerToPeer("swarm"), rounds=1)
    sites = Watched(adders(federation), lost=lambda site, what: (site, what) == ("north", "combine"))
    _, (account,) = run(federation, sites, tmp_path)
    assert ("south", "combine") in sites.asked and account["left_out"] == {"north": "no answer"}


def test_a_failure_leaves_a_site_without_its_text(
    three: Federation, sites_here: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = sites_here(three)
    answers, lost = sites.ask(["north"], "train", weights={}, number=1)
    assert answers == {"north": {"failed": "WeightsError"}} and not lost
    assert "does not fit" in capsys.readouterr().out  # it stays in the site's log
    busy = sites.participants["south"]
    with busy.busy:
        assert busy.validate({}, 1) == {"failed": "Busy"}


def test_best_round_is_of_the_sites_that_are_left() -> None:
    def account(number: int, **rps: float) -> dict[str, Any]:
        return {"round": number, "validated": {name: {"slides": 2.0, "rps": v} for name, v in rps.items()}}

    # b is gone: its low score in round 1 does not count, nor does round 2, without c.
    accounts = [account(1, a=0.3, b=0.0, c=0.3), account(2, a=0.1), account(3, a=0.2, c=0.3)]
    assert best_round(accounts) == 3
    assert best_round([account(1, a=0.2), account(2, a=0.2)]) == 1
    with pytest.raises(FederationError):
        best_round([account(1)])


def test_pooled_metrics_are_those_of_all_slides() -> None:
    found = pooled({"a": {"slides": 3.0, "rps": 0.2}, "b": {"slides": 1.0, "rps": 0.6}})
    assert found == pytest.approx({"slides": 4.0, "rps": 0.3})
    assert pooled({}) == {}
