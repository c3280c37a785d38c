"""The rounds of a federation, seen from the server: asks the sites, combines, keeps, and chooses the best.

It knows no engine: :class:`Sites` carries the messages. Answers are untrusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slidetl.errors import FederationError, UsageError
from slidetl.federation.combine import accept, combine_round, middle_value
from slidetl.federation.config import BASELINES, Federation
from slidetl.federation.encryption import Cipher
from slidetl.federation.message import read_hello
from slidetl.federation.participant import Answer, Participant, read_update
from slidetl.federation.records import SCORE, Rounds, best_round, only_job, pooled
from slidetl.federation.rounds import cyclic
from slidetl.federation.site import METRICS, initial_weights, write_shared_checkpoint
from slidetl.federation.weights import (
    SiteUpdate,
    Weights,
    counters,
    find_fault,
    find_metric_fault,
    is_floating,
    shown,
)
from slidetl.text import one_line
from slidetl.tiles.grid import TileSpec

Report = Callable[[dict[str, Any]], None]
Account = dict[str, Any]


class Sites(Protocol):
    """Carries messages to the sites."""

    def ask(
        self, names: Sequence[str], message: str, **arguments: Any
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Asks sites at the same time.

        Args:
            names: of the sites.
            message: a method of :class:`~slidetl.federation.participant.Participant`.
            arguments: of the method.

        Returns:
            The answers, and a reason for each site without one.
        """
        ...


class SitesHere:
    """Sites in this process, one after the other: for the baselines and tests."""

    def __init__(self, participants: Mapping[str, Participant]) -> None:
        self.participants = participants
        for participant in participants.values():
            participant.ask = self.between

    def ask(
        self, names: Sequence[str], message: str, **arguments: Any
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Asks one after the other."""
        return {name: getattr(self.participants[name], message)(**arguments) for name in names}, {}

    def between(self, name: str, number: int, what: str) -> Answer:
        """Asks a site on behalf of another one."""
        return self.participants[name].give(number, what)


def run_rounds(
    federation: Federation, sites: Sites, output: Path, report: Report, cipher: Cipher | None = None
) -> Account:
    """Runs the rounds that are not finished in ``output``, then hands the best network to the sites.

    Args:
        federation: the configuration.
        sites: carry the messages.
        output: ``rounds/`` with each network and account; ``checkpoints/best.ckpt`` at the end, unless
            networks are at the sites alone.
        report: called with the account of each new round.
        cipher: with the keys of the server; for ``averaged.encrypted`` only.

    Returns:
        ``best``, the number of the best round, its ``score``, and ``kept``, the sites that wrote it.

    Raises:
        FederationError: too few sites are left.
        UsageError: ``output`` has rounds of another configuration, or the keys are missing.
    """
    if federation.averaged.encrypted and cipher is None:
        raise UsageError("averaged.encrypted needs keys of the server")
    with only_job(output / "rounds"):
        return _run_rounds(federation, sites, output, report, cipher)


def _run_rounds(
    federation: Federation, connected: Sites, output: Path, report: Report, cipher: Cipher | None
) -> Account:
    rounds = Rounds(output / "rounds", federation.sha256)
    accounts = rounds.accounts()
    is_shared = federation.scheme != "peer_to_peer"
    sites = _AlikeSites(connected, federation.declared, accounts)
    tile_spec = _greet_all(sites, federation)
    weights: Weights = rounds.read(len(accounts)) if accounts and is_shared else initial_weights(federation)
    loops: dict[str, Callable[..., Iterator[tuple[Account, Weights]]]] = {
        "averaged": partial(_averaged, cipher=cipher),
        "peer_to_peer": _peer_to_peer,
    }
    run = loops.get(federation.scheme, _cyclic)
    for account, network in run(federation, sites, weights, len(accounts), output):
        number = account["round"]
        message = {"message": "validate", "weights": network} if is_shared else {"message": "validate_own"}
        validated, unscored = _ask_metrics(federation, sites, number=number, **message)
        account |= {
            "alike": sites.alike,
            "validated": validated,
            "score": pooled(validated),
            "left_out": unscored | account["left_out"],
        }
        accounts.append(rounds.write(number, network if is_shared else None, account))
        report(accounts[-1])
        sites.greet()
    best = best_round(accounts)
    if is_shared:
        network, lineage = rounds.read(best), rounds.lineage(best)
        if federation.travel == "all" and federation.scheme not in BASELINES:
            path = output / "checkpoints" / "best.ckpt"
            write_shared_checkpoint(federation, network, tile_spec, lineage, path)
        answers, lost = sites.ask(
            list(federation.declared), "keep", weights=network, number=best, lineage=lineage
        )
    else:
        answers, lost = sites.ask(list(federation.declared), "keep_own", number=best)
    kept, failed = _split(answers)
    return {"best": best, "score": accounts[best - 1]["score"], "kept": sorted(kept), "lost": lost | failed}


def describe(account: Mapping[str, Any], rounds: int) -> str:
    """Describes a round in one line."""
    score = account["score"]
    shown = ", ".join(f"{name} {score[name]:.4f}" for name in (SCORE, "accuracy") if name in score)
    slides = f"{score['slides']:.0f} validation slides of {len(account['validated'])} sites" if score else ""
    spent = [values["epsilon"] for values in account["trained"].values() if "epsilon" in values]
    privacy = [f"epsilon up to {max(spent):.3g}"] if spent else []
    rest = [f"{name} left out: {reason}" for name, reason in sorted(account["left_out"].items())]
    rest += [f"{name} {note}" for name, note in sorted(account["notes"].items())]
    return one_line(
        "; ".join((f"round {account['round']} of {rounds}: {shown or 'no score'}", slides, *privacy, *rest))
    )


class _AlikeSites:
    """Sites that have the same tiles and frozen weights; the others are left out of every message.

    Args:
        sites: carry the messages.
        names: of all sites.
        accounts: of all finished rounds, also of later ones. The latest tells what is the same; a new
            federation takes that of the first site to answer.
    """

    def __init__(self, sites: Sites, names: Iterable[str], accounts: Sequence[Account]) -> None:
        self._sites, self._accounts = sites, accounts
        self.alike: Account = dict(accounts[-1].get("alike", {})) if accounts else {}
        self.left_out = dict.fromkeys(names, "not asked yet")

    def ask(
        self, names: Sequence[str], message: str, **arguments: Any
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        """Asks the sites that are not left out."""
        lost = {name: self.left_out[name] for name in names if name in self.left_out}
        answers, more = self._sites.ask([name for name in names if name not in lost], message, **arguments)
        return answers, lost | more

    def greet(self) -> dict[str, str]:
        """Asks the sites that are left out; returns those that are not alike."""
        if not self.left_out:
            return {}
        last = {
            name: account["round"]
            for account in self._accounts
            for name in account["trained"]
            if name not in account["left_out"]
        }
        found, lost = self._sites.ask(list(self.left_out), "hello", number=len(self._accounts), last=last)
        answers, failed = _split(found)
        other = {}
        for name, answer in answers.items():
            try:
                told = read_hello(answer)
            except FederationError as error:
                failed[name] = str(error)
                continue
            self.alike = self.alike or {"site": name, **told}
            for key, (what, remedy) in _ALIKE.items():
                first, here, there = self.alike["site"], self.alike[key], told[key]
                if here != there:
                    other[name] = f"sites have other {what}: {first} {here}, {name} {there}; {remedy}"
        self.left_out = lost | failed | other
        return other


_ALIKE = {
    "tile_spec": ("tiles", "cut all with the same options of 'slidetl tile'"),
    "frozen_sha256": ("pretrained weights", "give all the same file of pretrained weights"),
}


def _greet_all(sites: _AlikeSites, federation: Federation) -> TileSpec:
    """Compares what must be the same at all sites; returns the specification of their tiles."""
    for difference in sites.greet().values():
        raise FederationError(difference)
    if sites.left_out.keys() == federation.sites.keys():
        raise FederationError(f"no site answered{_in_brackets(sites.left_out)}")
    try:
        return TileSpec.from_dict(sites.alike["tile_spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise FederationError(f"{sites.alike['site']} has told no tile specification: {error}") from error


def _cyclic(
    federation: Federation, sites: Sites, weights: Weights, done: int, output: Path
) -> Iterator[tuple[Account, Weights]]:
    number = done + 1

    def train(site: str, sent: Weights) -> SiteUpdate:
        answers, lost = sites.ask([site], "train", weights=sent, number=number)
        if site in lost:
            raise FederationError(lost[site])
        return read_update(site, answers[site])

    for found in cyclic(train, weights, federation.declared, federation.rounds - done):
        metrics = {site: dict(values) for site, values in found.metrics.items()}
        account = {
            "round": number,
            "trained": metrics,
            "left_out": dict(found.left_out),
            "notes": dict(found.notes),
        }
        yield account, found.weights
        number += 1


def _averaged(
    federation: Federation,
    sites: Sites,
    weights: Weights,
    done: int,
    output: Path,
    cipher: Cipher | None,
) -> Iterator[tuple[Account, Weights]]:
    options, declared = federation.averaged, federation.declared
    velocities = Rounds(output / "velocity", federation.sha256)
    velocity: dict[str, Any] = {}
    if options.momentum and 0 < done < federation.rounds:
        if velocities.latest(done) != done:
            raise FederationError(
                f"{velocities.path(done)}: expected the momentum of the server after round {done}, to resume "
                "from it; it is gone: start again in another --output"
            )
        velocity = velocities.read(done)
    for number in range(done + 1, federation.rounds + 1):
        answers, lost = sites.ask(list(declared), "train", weights=weights, number=number)
        updates, metrics = [], {}
        for site, answer in answers.items():
            try:
                updates.append(read_update(site, answer, "counters" if options.encrypted else "weights"))
            except FederationError as error:
                lost[site] = str(error)
        try:
            if options.encrypted:
                assert cipher is not None  # run_rounds has refused
                mean, used, left_out, notes = _add_encrypted(
                    federation, sites, cipher, weights, updates, answers, number
                )
                found = combine_round(
                    weights,
                    [mean],
                    {mean.site: mean.examples},
                    options.rule,
                    momentum=options.momentum,
                    velocity=velocity,
                )
                found = replace(found, used=used, left_out=left_out, notes=notes)
            else:
                found = combine_round(
                    weights,
                    updates,
                    declared,
                    options.rule,
                    fewest=options.fewest,
                    momentum=options.momentum,
                    velocity=velocity,
                )
        except FederationError as error:
            reasons = "".join(f"; {site}: {reason}" for site, reason in sorted(lost.items()))
            raise FederationError(f"round {number}: {error}{reasons}") from error
        weights, velocity = found.weights, dict(found.velocity)
        if velocity:
            velocities.write(number, velocity, {})
        metrics = {
            update.site: dict(update.metrics) for update in updates if update.site not in found.left_out
        }
        yield (
            {
                "round": number,
                "trained": metrics,
                "used": list(found.used),
                "left_out": lost | found.left_out,
                "notes": dict(found.notes),
            },
            weights,
        )
        velocities.keep_only([number])  # the round is written, so nothing resumes from one before it


def _add_encrypted(
    federation: Federation,
    sites: Sites,
    cipher: Cipher,
    weights: Weights,
    updates: Sequence[SiteUpdate],
    answers: Mapping[str, Any],
    number: int,
) -> tuple[SiteUpdate, tuple[str, ...], dict[str, str], dict[str, str]]:
    """Adds the encrypted updates of a round, and lets the sites in the sum decrypt it.

    More than half of them must agree on the mean, so a minority cannot invent one.

    Args:
        federation: the configuration.
        sites: carry the messages.
        cipher: with the keys of the server.
        weights: the network that the sites were sent.
        updates: their counters, which are in the clear, examples and metrics.
        answers: with the ciphertexts.
        number: of the round.

    Returns:
        The mean as one update; the sites in it; the reason for each other one; remarks on those in it.

    Raises:
        FederationError: fewer than two updates are usable, or there is no agreement.
    """
    declared = federation.declared
    usable, left_out, notes = accept(counters(weights), updates, declared)
    for update in usable:
        if fault := cipher.find_fault(answers[update.site].get("ciphertexts"), weights):
            left_out[update.site] = fault
    usable = [update for update in usable if update.site not in left_out]
    needed = max(2, federation.averaged.fewest)
    if len(usable) < needed:
        raise FederationError(
            f"an encrypted mean needs {needed} usable updates, since that of one site is its update, and "
            f"{len(usable)} of {len(declared)} sites sent one{_in_brackets(left_out)}: mend them and resume "
            "from the last round"
        )
    names = tuple(update.site for update in usable)
    total = sum(update.examples for update in usable)
    summed = cipher.add(
        [answers[name]["ciphertexts"] for name in names], [update.examples / total for update in usable]
    )
    found, silent = sites.ask(names, "decrypt", ciphertexts=summed, number=number, present=names)
    given, failed = _split(found)
    silent |= failed
    means = []
    for name, answer in given.items():
        try:
            mean = read_update(name, {**answer, "examples": total, "metrics": {}})
            fault = find_fault(mean, weights)
        except FederationError as error:
            fault = str(error)
        if fault:
            silent[name] = fault
        else:
            means.append(mean)
    middle: dict[str, Any] = {}
    if means:
        middle = {name: middle_value([mean.weights[name] for mean in means]) for name in weights}
        others = [mean.site for mean in means if not _is_close(mean.weights, middle)]
        silent |= dict.fromkeys(others, "has another mean than most")
    if len(names) - len(silent) <= len(names) / 2:
        raise FederationError(
            f"{len(names) - len(silent)} of {len(names)} sites agree on the decrypted mean"
            f"{_in_brackets(silent)}, and more than half must: see their logs, and resume from the last round"
        )
    for name, reason in silent.items():
        notes[name] = "; ".join([*filter(None, [notes.get(name)]), f"did not decrypt the mean: {reason}"])
    middle |= {name: middle_value([update.weights[name] for update in usable]) for name in counters(weights)}
    return SiteUpdate("mean", middle, total), names, left_out, notes


def _is_close(one: Weights, other: Weights) -> bool:
    """Tells if two networks are the same up to some rounding; all sites decrypt the same error."""
    return all(
        np.allclose(value, other[name], rtol=4 * float(np.finfo(value.dtype).eps), atol=1e-6)
        for name, value in one.items()
        if is_floating(value)
    )


def _in_brackets(reasons: Mapping[str, str]) -> str:
    """Returns the reasons of sites in one line, empty without any."""
    return f" ({'; '.join(f'{site}: {reason}' for site, reason in sorted(reasons.items()))})" * bool(reasons)


def _peer_to_peer(
    federation: Federation, sites: Sites, weights: Weights, done: int, output: Path
) -> Iterator[tuple[Account, Weights]]:
    """Tells the sites when to train and exchange; no network comes to the server."""
    names = list(federation.declared)
    answers, lost = sites.ask(names, "begin", weights=weights, number=done)
    begun, failed = _split(answers)
    lost |= failed
    for number in range(done + 1, federation.rounds + 1):
        left_out = dict(lost)
        answers, late = sites.ask(list(begun), "train_own", number=number)
        trained, failed = _split(answers)
        metrics, unusable = _split_metrics(trained)
        left_out |= late | failed | unusable
        if len(metrics) < 2:
            raise FederationError(f"round {number}: fewer than two sites have trained: {left_out}")
        exchange = _swarm if federation.peer_to_peer.mixing == "swarm" else _neighbours
        left_out |= exchange(sites, list(metrics), number)
        yield {"round": number, "trained": metrics, "left_out": left_out, "notes": {}}, {}


def _neighbours(sites: Sites, present: Sequence[str], number: int) -> dict[str, str]:
    answers, lost = sites.ask(present, "mix", number=number, present=present)
    mixed, failed = _split(answers)
    missed = {
        name: f"{site} could not use its network"
        for site, answer in mixed.items()
        for name in _names(answer.get("left_out"), present)
    }
    return missed | lost | failed


def _swarm(sites: Sites, present: Sequence[str], number: int) -> dict[str, str]:
    """Lets one site combine the updates, another one in each round, the next one if it fails."""
    left_out: dict[str, str] = {}
    for place in range(len(present)):
        centre = present[(number - 1 + place) % len(present)]
        answers, lost = sites.ask([centre], "combine", number=number, present=present)
        combined, failed = _split(answers)
        if centre in combined:
            missed = _names(combined[centre].get("left_out"), present)
            left_out |= dict.fromkeys(missed, f"{centre} could not use its update")
            others = [name for name in present if name != centre]
            answers, lost = sites.ask(others, "take", number=number, centre=centre)
            return left_out | lost | _split(answers)[1]
        left_out |= lost | failed
    raise FederationError(f"round {number}: no site could combine the updates: {left_out}")


def _ask_metrics(
    federation: Federation, sites: Sites, message: str, **arguments: Any
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Asks all sites to validate; returns usable metrics, and a reason for each other site.

    A site counts at most as many validation slides as it declares training slides.
    """
    answers, lost = sites.ask(list(federation.declared), message, **arguments)
    answers, failed = _split(answers)
    found, unusable = _split_metrics(answers)
    failed |= unusable
    validated = {}
    for name, metrics in found.items():
        if lacking := {"slides", *METRICS} - metrics.keys():
            failed[name] = f"no usable metrics: without {', '.join(sorted(lacking))}"
            continue
        if metrics["slides"] < 1 or metrics["mae"] > len(federation.grades) - 1:
            failed[name] = "no usable metrics: expected slides, and an mae of at most the highest grade"
            continue
        slides = min(metrics["slides"], float(federation.declared[name]))
        validated[name] = {**{metric: metrics[metric] for metric in METRICS}, "slides": slides}
    return validated, {name: f"not validated: {reason}" for name, reason in (lost | failed).items()}


def _split(answers: Mapping[str, Any]) -> tuple[dict[str, Answer], dict[str, str]]:
    """Divides answers into usable ones and reasons of failures."""
    good, failed = {}, {}
    for name, answer in answers.items():
        if not isinstance(answer, dict):
            failed[name] = "its answer has another form"
        elif "failed" in answer:
            failed[name] = f"failed with {shown(answer['failed'])}; its log says why"
        else:
            good[name] = answer
    return good, failed


def _split_metrics(answers: Mapping[str, Answer]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Divides the metrics of answers into usable ones and reasons of failures."""
    good, failed = {}, {}
    for name, answer in answers.items():
        metrics: Any = answer.get("metrics")
        if fault := find_metric_fault(metrics):
            failed[name] = f"no usable metrics: {fault}"
        else:
            good[name] = {metric: float(value) for metric, value in metrics.items()}
    return good, failed


def _names(found: object, known: Sequence[str]) -> list[str]:
    return [name for name in known if name in found] if isinstance(found, dict) else []
