"""A site as it answers the coordinator and other sites: each public method is one kind of message.

An answer has fields of the list in :mod:`slidetl.federation.message` alone. A failure leaves the site as the
name of its class: the text may hold paths and names of slides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

from slidetl.errors import FederationError, SlidetlError
from slidetl.federation.combine import WeightedMean, combine_round
from slidetl.federation.config import Federation
from slidetl.federation.encryption import Cipher
from slidetl.federation.message import outgoing
from slidetl.federation.mixing import mix, without
from slidetl.federation.records import Rounds
from slidetl.federation.site import Parts, SiteTrainer
from slidetl.federation.weights import SiteUpdate, Weights, counters, find_fault, shown

Answer = dict[str, Any]
AskSite = Callable[..., Answer]  # (name of a site, number of a round, "update" or "network") -> its answer
_P = ParamSpec("_P")


def _answers(method: Callable[_P, Answer]) -> Callable[_P, Answer]:
    """Computes one answer at a time, lets out what is on the list alone, and keeps the texts of errors."""

    @wraps(method)
    def answer(*args: _P.args, **kwargs: _P.kwargs) -> Answer:
        self = cast(Participant, args[0])
        if not self.busy.acquire(blocking=False):
            return {"failed": "Busy"}  # with a round that the coordinator no longer waits for
        try:
            return self.let_out(method(*args, **kwargs))
        except Exception as error:
            self.note(error)
            return {"failed": type(error).__name__}
        finally:
            self.busy.release()

    return answer


@dataclass
class Participant:
    """Answers for one site.

    Attributes:
        federation: the configuration.
        name: of the site.
        parts: its slides.
        folder: for its files.
        ask: asks another site for its update or network of a round; peer to peer only.
        note: takes an error that stays at the site.
        cipher: with the keys of the sites; for ``averaged.encrypted`` only.
        busy: held while a message is computed.
    """

    federation: Federation
    name: str
    parts: Parts
    folder: Path
    ask: AskSite | None = None
    note: Callable[[Exception], None] = print
    cipher: Cipher | None = None

    def __post_init__(self) -> None:
        self.busy = threading.Lock()
        self._trainer: SiteTrainer | None = None
        self._network: Weights = {}  # that arrived; peer to peer this site's own
        self._encrypted = 0  # the round whose mean this site has not decrypted yet
        self._offered: dict[str, tuple[int, Answer]] = {}  # to other sites: update and network of a round

    @property
    def trainer(self) -> SiteTrainer:
        """The site's training, built with the first message that needs it."""
        if self._trainer is None:
            self._trainer = SiteTrainer(self.federation, self.name, self.parts, self.folder)
        return self._trainer

    def let_out(self, answer: Answer) -> Answer:
        """Builds what leaves the site of an answer.

        Raises:
            FederationError: a field is not on the list of :mod:`slidetl.federation.message`.
        """
        return outgoing(answer, self._network, self.federation.sites)

    @_answers
    def hello(self, number: int, last: Mapping[str, int]) -> Answer:
        """Tells what must be the same at all sites, and the number of training slides.

        Rounds of this federation after ``number``, the last that is finished, are removed here.

        Raises:
            FederationError: this site lacks what it kept of the ``last`` round that it was a part of.
        """
        self.trainer.resume(number, last.get(self.name, 0))
        if self.federation.scheme == "peer_to_peer":
            self._rounds.resume(number, last.get(self.name, 0))
        spec = self.trainer.data.tile_spec
        assert spec is not None  # set up
        return {
            "tile_spec": spec.to_dict(),
            "examples": self.trainer.examples,
            "frozen_sha256": self.trainer.frozen_sha256,
        }

    @_answers
    def train(self, weights: Weights, number: int) -> Answer:
        """Trains from a network, and returns the site's, or the encrypted change."""
        update = self.trainer.train(weights, number)
        self._network = weights
        if not self.federation.averaged.encrypted:
            return _update_answer(update)
        if fault := find_fault(update, weights):
            raise FederationError(f"this site sends nothing: {fault}")
        ciphertexts = self._keys.encrypt(weights, update.weights)
        self._encrypted = number
        answer = {**_update_answer(update), "ciphertexts": ciphertexts, "counters": counters(update.weights)}
        del answer["weights"]
        return answer

    @_answers
    def decrypt(self, ciphertexts: Sequence[bytes], number: int, present: Sequence[str]) -> Answer:
        """Decrypts the mean of the sites ``present`` in a round, once: of two sums one could be an update."""
        if number != self._encrypted:
            raise FederationError(
                f"this site has no mean of round {number} to decrypt, or has done so already"
            )
        if self.name not in present or len(set(present) & self.federation.sites.keys()) < 2:
            raise FederationError(f"expected a sum of this site and others, not of {', '.join(present)}")
        self._encrypted = 0
        return {"weights": self._keys.decrypt(ciphertexts, self._network)}

    @property
    def _keys(self) -> Cipher:
        if self.cipher is None:
            raise FederationError("this site has no keys for averaged.encrypted")
        return self.cipher

    @_answers
    def validate(self, weights: Weights, number: int) -> Answer:
        """Scores the network of a round on the site's validation slides."""
        return {"metrics": self.trainer.validate(weights, number)}

    @_answers
    def keep(self, weights: Weights, number: int, lineage: Sequence[str]) -> Answer:
        """Writes the network of a round as the site's checkpoint."""
        self.trainer.write_checkpoint(weights, number, lineage)
        return {}

    @_answers
    def begin(self, weights: Weights, number: int) -> Answer:
        """Starts peer to peer from a common network, or continues from the site's own of a round."""
        latest = self._rounds.latest(number)
        self._network = self._rounds.read(latest) if latest else weights
        return {}

    @_answers
    def train_own(self, number: int) -> Answer:
        """Trains the site's own network, and offers the update to other sites."""
        offered = self.let_out(_update_answer(self.trainer.train(self._network, number)))
        self._offered["update"] = (number, offered)
        return {"metrics": offered["metrics"]}

    def give(self, number: int, what: str) -> Answer:
        """Gives another site the ``update`` or ``network`` of a round. The coordinator may not ask for it."""
        of, answer = self._offered.get(what, (0, {}))
        return answer if of == number else {"failed": "NotReady"}

    @_answers
    def mix(self, number: int, present: Sequence[str]) -> Answer:
        """Mixes the site's network with those of its neighbours.

        A neighbour without a usable update leaves its share to this site.
        """
        names = list(self.federation.sites)
        matrix = self.federation.peer_to_peer.matrix(len(names))
        assert matrix is not None  # not a swarm
        matrix = without(matrix, [place for place, name in enumerate(names) if name not in present])
        mine = names.index(self.name)
        networks: dict[str, Weights] = {self.name: self._own_update(number)["weights"]}
        left_out = {}
        for place, name in enumerate(names):
            if name != self.name and matrix[mine, place]:
                update, fault = self._fetch(name, number)
                if update is None:
                    left_out[name] = fault
                else:
                    networks[name] = update.weights
        matrix = without(matrix, [names.index(name) for name in left_out])
        others = [networks.get(name, networks[self.name]) for name in names]
        self._settle(number, mix(others, matrix)[mine])
        return {"left_out": left_out}

    @_answers
    def combine(self, number: int, present: Sequence[str]) -> Answer:
        """Combines the updates of all sites in a round of a swarm, and offers the network."""
        updates, left_out = [], {}
        for name in present:
            if name == self.name:
                answer = self._own_update(number)
                updates.append(SiteUpdate(name, answer["weights"], answer["examples"]))
                continue
            update, fault = self._fetch(name, number)
            if update is None:
                left_out[name] = fault
            else:
                updates.append(update)
        found = combine_round(self._network, updates, self.federation.declared, WeightedMean())
        self._offered["network"] = (number, self.let_out({"weights": found.weights}))
        self._settle(number, found.weights)
        return {"left_out": left_out | found.left_out}

    @_answers
    def take(self, number: int, centre: str) -> Answer:
        """Takes the network of a round from the site that combined it."""
        assert self.ask is not None  # peer to peer
        weights = self.ask(centre, number, "network").get("weights", {})
        if fault := find_fault(SiteUpdate(centre, weights, 1), self._network):
            raise FederationError(f"the network of {centre} is not usable: {fault}")
        self._settle(number, weights)
        return {}

    @_answers
    def validate_own(self, number: int) -> Answer:
        """Scores the site's own network of a round on its validation slides."""
        return {"metrics": self.trainer.validate(self._network, number)}

    @_answers
    def keep_own(self, number: int) -> Answer:
        """Writes the site's own network of a round as its checkpoint."""
        latest = self._rounds.latest(number)
        self.trainer.write_checkpoint(self._rounds.read(latest), number, self._rounds.lineage(latest))
        return {}

    @property
    def _rounds(self) -> Rounds:
        return Rounds(self.folder / "rounds" / self.federation.sha256[:16], self.federation.sha256)

    def _settle(self, number: int, weights: Weights) -> None:
        """Makes a network the site's own, and keeps it."""
        self._network = weights
        self._rounds.write(number, weights, {})

    def _own_update(self, number: int) -> Answer:
        answer = self.give(number, "update")
        if "failed" in answer:
            raise FederationError(f"this site has no update of round {number}")
        return answer

    def _fetch(self, name: str, number: int) -> tuple[SiteUpdate | None, str]:
        """Asks another site for its update; returns it, or the reason why it is not usable."""
        assert self.ask is not None  # peer to peer
        try:
            update = read_update(name, self.ask(name, number, "update"))
        except SlidetlError as error:
            return None, str(error)
        fault = find_fault(update, self._network)
        return (None, fault) if fault else (update, "")


def _update_answer(update: SiteUpdate) -> Answer:
    return {
        "weights": dict(update.weights),
        "examples": update.examples,
        "metrics": dict(update.metrics),
    }


def read_update(site: str, answer: object, entries: str = "weights") -> SiteUpdate:
    """Reads the update in an answer; its site is the one that was asked, whatever the answer says.

    Args:
        site: that was asked.
        answer: came from it.
        entries: field with the entries: ``weights``, or ``counters`` of an encrypted update.

    Raises:
        FederationError: the site failed, or the answer has another form.
    """
    if not isinstance(answer, dict):
        raise FederationError("its answer has another form")
    if "failed" in answer:
        raise FederationError(f"failed with {shown(answer['failed'])}; its log says why")
    weights, metrics = answer.get(entries), answer.get("metrics")
    if not isinstance(weights, dict) or not isinstance(metrics, dict):
        raise FederationError(f"its answer has no {entries} and metrics")
    return SiteUpdate(site, weights, answer.get("examples", 0), metrics)
