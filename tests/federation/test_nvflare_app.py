"""Messages to sites that are late, gone or back, by the engine's classes on a wire of this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slidetl.errors import FederationError, SlidetlError
from slidetl.federation import nvflare_app
from slidetl.federation.config import Averaged, Federation
from slidetl.federation.coordinator import SitesHere, run_rounds
from slidetl.federation.encryption import CIPHERTEXT_BYTES
from slidetl.federation.engine import SITE_FILE
from slidetl.federation.nvflare_app import Client, _ConnectedSites
from slidetl.federation.records import read_arrays
from slidetl.federation.weights import SiteUpdate, Weights
from tests.conftest import PATIENCE_S
from tests.federation.conftest import START

Make = Callable[[Federation], SitesHere]


class Results(dict[str, Any]):
    failures: dict[str, str]


@dataclass
class Wire:
    """Takes the place of NVFlare's calls; those to a site in ``broken`` fail."""

    sites: dict[str, Client]
    caller: str = "server"
    broken: set[str] = field(default_factory=set)

    @property
    def clients(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.sites]

    def get_clients(self, names: Sequence[str]) -> Callable[..., SimpleNamespace]:
        def call(method: str) -> Callable[..., Results]:
            def all_sites(**arguments: Any) -> Results:
                failed = self.broken & set(names)
                reached = [name for name in names if name not in failed]
                found = Results({name: getattr(self.sites[name], method)(**arguments) for name in reached})
                found.failures = dict.fromkeys(failed, "gone")
                return found

            return all_sites

        return lambda timeout: SimpleNamespace(
            **{method: call(method) for method in ("start", "is_done", "collect")}
        )


@dataclass
class Slow:
    """Delays a site's training of the first round until it is released."""

    wire: Wire
    site: str
    released: threading.Event = field(default_factory=threading.Event)
    breaks: bool = False  # the wire, as it begins

    def __post_init__(self) -> None:
        participant = self.wire.sites[self.site]._participant
        assert participant is not None
        self._train = participant.trainer.train
        participant.trainer.train = self.train  # type: ignore[method-assign]

    def train(self, weights: Weights, round_number: int) -> SiteUpdate:
        if self.breaks:
            self.wire.broken.add(self.site)
        if round_number == 1:
            assert self.released.wait(PATIENCE_S)
        return self._train(weights, round_number)

    def finish(self) -> None:
        """Lets the site finish its first round, and waits for that."""
        self.released.set()
        for thread in threading.enumerate():
            if thread.name == "slidetl":
                thread.join(PATIENCE_S)


@pytest.fixture
def wired(adders: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[Federation], Wire]:
    monkeypatch.setattr(nvflare_app, "initial_weights", lambda federation: dict(START))
    monkeypatch.setattr(nvflare_app, "_POLL_SECONDS", (0.005, 0.01))

    def make(federation: Federation) -> Wire:
        wire = Wire({})
        for name, participant in adders(federation).participants.items():
            wire.sites[name] = Client("")
            wire.sites[name]._participant = participant
        monkeypatch.setattr(nvflare_app, "collab", wire)
        return wire

    return make


def test_a_late_site_is_left_out_and_its_answer_is_of_no_later_round(
    three: Federation, wired: Callable[[Federation], Wire], tmp_path: Path
) -> None:
    federation = replace(three, answer_seconds=0.4, rounds=2)
    slow = Slow(wired(federation), "south")
    accounts: list[dict[str, Any]] = []

    def report(account: dict[str, Any]) -> None:
        accounts.append(account)
        slow.finish()  # between the rounds: its answer of round 1 is there when round 2 begins

    run_rounds(federation, _ConnectedSites(federation), tmp_path, report)
    first, second = accounts
    assert first["left_out"]["south"] == "late: no answer within 0.4 s"
    assert first["used"] == ["north", "west"] and first["validated"].keys() == {"north", "west"}
    assert second["used"] == ["north", "south", "west"] and second["left_out"] == {}
    one, two = (read_arrays(tmp_path / "rounds" / f"000{number}.safetensors") for number in (1, 2))
    np.testing.assert_allclose(one["head.weight"], 2)  # (1 + 3) / 2
    np.testing.assert_allclose(two["head.weight"], 6)  # 2 + 2 (1 + 2 + 3) / 3, not (2 + 2 + 6) / 3


def test_an_answer_that_comes_in_the_next_round_is_dropped(
    three: Federation, wired: Callable[[Federation], Wire]
) -> None:
    federation = replace(three, answer_seconds=0.2)
    wire = wired(federation)
    slow, sites = Slow(wire, "south"), _ConnectedSites(federation)
    _, lost = sites.ask(["south"], "train", weights=START, number=1)
    assert lost == {"south": "late: no answer within 0.2 s"}
    (late,) = wire.sites["south"]._answers
    answers, lost = sites.ask(["south", "north"], "train", weights=START, number=2)
    assert answers["south"] == {"failed": "Busy"} and "weights" in answers["north"] and not lost
    south = wire.sites["south"]
    assert south.start("waited for", "train", {"weights": START, "number": 2})
    slow.finish()
    assert south.is_done("waited for") and south.collect("waited for") == {"failed": "Busy"}
    assert south.collect(late) == {"failed": "Restarted"}
    answers, _ = sites.ask(["south"], "train", weights=START, number=3)
    np.testing.assert_array_equal(answers["south"]["weights"]["head.weight"], 6)  # 2 in each of round 3


def test_a_site_without_a_sign_of_life_is_left_out_until_it_answers(
    three: Federation, wired: Callable[[Federation], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvflare_app, "_LOST_SECONDS", 0.1)
    wire = wired(three)
    slow, sites = Slow(wire, "south", breaks=True), _ConnectedSites(three)
    answers, lost = sites.ask(["north", "south"], "train", weights=START, number=1)
    assert answers.keys() == {"north"} and lost == {"south": "no sign of life for 0 s"}
    assert sites.ask(["south"], "hello", number=0, last={}) == ({}, {"south": "is gone"})
    slow.finish()
    wire.broken.clear()
    answers, lost = sites.ask(["south"], "hello", number=0, last={})
    assert "tile_spec" in answers["south"] and not lost


def test_sites_that_cannot_be_asked(
    three: Federation, wired: Callable[[Federation], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = wired(three)
    sites = _ConnectedSites(three)
    wire.broken.add("west")
    del wire.sites["south"]
    answers, lost = sites.ask(list(three.sites), "hello", number=0, last={})
    assert answers.keys() == {"north"}
    assert lost == {"south": "is not connected", "west": "does not answer"}
    assert sites.ask(["north"], "let_out") == ({}, {"north": "has refused the message"})
    wire.caller = "west"
    assert wire.sites["north"].collect("token") == {"failed": "Refused"}


def test_a_site_takes_part_in_one_job_at_a_time(
    three: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"manifest": three.sites["west"].manifest, "cache": three.sites["west"].cache}
    path = tmp_path / "site.yaml"
    monkeypatch.setenv(SITE_FILE, str(path))
    one, other = (Client(json.dumps(three.to_dict())) for _ in range(2))
    path.write_text(json.dumps({**places, "manifest": str(tmp_path / "none.csv"), "folder": str(tmp_path)}))
    with pytest.raises(SlidetlError, match=r"none\.csv"):
        one._join("west")
    path.write_text(json.dumps({**places, "folder": str(tmp_path)}))
    assert one._join("west").name == "west"  # a join that has failed holds nothing
    with pytest.raises(FederationError, match="another training is at work"):
        other._join("west")
    one._held.close()
    assert other._join("west").name == "west"


def test_ciphertexts_have_time_to_travel(three: Federation, wired: Callable[[Federation], Wire]) -> None:
    wired(three)
    hidden = replace(three, averaged=Averaged(encrypted=True))
    more = _ConnectedSites(hidden)._move_seconds - _ConnectedSites(three)._move_seconds
    assert more == pytest.approx(CIPHERTEXT_BYTES / 5e5)
