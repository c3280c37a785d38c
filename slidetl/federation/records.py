"""The rounds of a federation on disk: each network with its hash, its parent and the account of the sites."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import FederationError, UsageError
from slidetl.federation.weights import Weights
from slidetl.files import check_safetensors, file_sha256, replaced, write_whole
from slidetl.tiles.lock import only_process

SCORE = "rps"
"""The metric that chooses the best round, lower is better: a proper score."""


@dataclass(frozen=True)
class Rounds:
    """The finished rounds in a folder: ``0001.safetensors`` and, written last, ``0001.json``.

    Attributes:
        folder: of the files.
        config_sha256: of the federation; rounds of another one are refused.
    """

    folder: Path
    config_sha256: str

    def write(self, number: int, weights: Weights | None, account: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a round: its network, unless the sites alone have one, and its account.

        Raises:
            OutputError: a file cannot be written.
        """
        before = self._account(number - 1) or {}
        whole = {
            "round": number,
            "config_sha256": self.config_sha256,
            "sha256": write_arrays(self.path(number), weights) if weights is not None else None,
            "parent_sha256": before.get("sha256"),
            **account,
        }
        write_whole(self._account_path(number), json.dumps(whole, indent=1, allow_nan=False))
        return whole

    def accounts(self) -> list[dict[str, Any]]:
        """Reads the accounts of all finished rounds, in order.

        Raises:
            UsageError: they are of another configuration.
        """
        found: list[dict[str, Any]] = []
        while (path := self._account_path(len(found) + 1)).is_file():
            account = json.loads(path.read_text(encoding="utf-8"))
            if account.get("config_sha256") != self.config_sha256:
                raise UsageError(
                    f"{path} is of another configuration; name another --output, or use the one of then"
                )
            found.append(account)
        return found

    def latest(self, number: int) -> int:
        """Returns the latest finished round up to ``number``; 0 for none. A site may have missed some."""
        return next((n for n in range(number, 0, -1) if self._account(n)), 0)

    def resume(self, number: int, last: int) -> None:
        """Removes the rounds after one: they were cut off, or are of another output.

        Args:
            number: the last round that is finished.
            last: the last one that must be here, 0 for none.

        Raises:
            FederationError: it is gone, and so is what it would be resumed from.
        """
        self.keep_only(range(1, number + 1))
        if self.latest(number) < last:
            raise FederationError(
                f"{self.path(last)}: expected what this site kept of round {last}, to resume after it; it is "
                "gone, as when the same configuration was started in another --output: restore the folder, "
                "or start again in another --output"
            )

    def keep_only(self, numbers: Container[int]) -> None:
        """Removes all other rounds, those of another configuration too."""
        for path in self.folder.glob("[0-9]*"):
            if int(path.stem) not in numbers:
                path.unlink()

    def read(self, number: int) -> dict[str, NDArray[Any]]:
        """Reads the network of a round, and checks its hash.

        Raises:
            FederationError: there is none, or it was changed.
        """
        path, expected = self.path(number), self.sha256(number)
        if not path.is_file() or file_sha256(path) != expected:
            raise FederationError(
                f"{path}: expected the network with SHA-256 {expected}; it is gone or changed"
            )
        return read_arrays(path)

    def sha256(self, number: int) -> str:
        """Returns the SHA-256 of the file of a round's network.

        Raises:
            FederationError: there is no such round of this configuration.
        """
        account = self._account(number)
        if account is None:
            raise FederationError(f"{self._account_path(number)}: no such round of this configuration")
        return str(account["sha256"])

    def lineage(self, number: int) -> list[str]:
        """Returns the hashes of the networks of a round and of those before it, nearest first.

        Raises:
            FederationError: there is no such round.
        """
        before = [n for n in range(number - 1, 0, -1) if self._account(n)]
        return [self.sha256(n) for n in (number, *before)]

    def path(self, number: int) -> Path:
        """Returns the place of the network of a round."""
        return self.folder / f"{number:04}.safetensors"

    def _account_path(self, number: int) -> Path:
        return self.folder / f"{number:04}.json"

    def _account(self, number: int) -> dict[str, Any] | None:
        """Reads the account of a round; None without one of this configuration."""
        path = self._account_path(number)
        account: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return account if account.get("config_sha256") == self.config_sha256 else None


@contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Keeps other jobs out of a folder while the context is open, or until this process dies.

    Raises:
        FederationError: another job is at work in it.
        OutputError: nothing can be written there.
    """
    busy = FederationError(
        f"{folder}: another training is at work in it; wait for its end, or abort its job, which goes on "
        "when 'slidetl federate --kit' is interrupted"
    )
    with only_process(folder, busy):
        yield


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Writes arrays as safetensors, whole or not at all; returns the SHA-256 of the file."""
    from safetensors.numpy import save

    content = save({name: np.array(value, order="C") for name, value in arrays.items()})
    with replaced(path) as file:
        file.write(content)
    return file_sha256(path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Reads arrays of safetensors.

    Raises:
        FederationError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        check_safetensors(path)
        found: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise FederationError(f"{path}: not the arrays of a round: {error}") from error
    return found


def pooled(validated: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Pools the metrics of sites, means over slides, into those over all their slides.

    Args:
        validated: ``slides`` and the same metrics of each site.
    """
    slides = sum(metrics["slides"] for metrics in validated.values())
    names = set.intersection(*(set(metrics) for metrics in validated.values())) if validated else set()
    return {
        name: slides
        if name == "slides"
        else sum(metrics[name] * metrics["slides"] for metrics in validated.values()) / slides
        for name in sorted(names)
    }


def best_round(accounts: Sequence[Mapping[str, Any]]) -> int:
    """Chooses the round with the best pooled score, the first in a tie.

    Only the sites that validated the last round count, and only rounds that all of them validated: a site
    that is gone does not decide, and no round is better for lack of a site with harder slides.

    Raises:
        FederationError: no site validated the last round.
    """
    sites = set(accounts[-1]["validated"])
    if not sites:
        raise FederationError("no site has validated the last round; there is no best one")
    scores = {
        int(account["round"]): pooled({name: account["validated"][name] for name in sites})[SCORE]
        for account in accounts
        if sites <= set(account["validated"])
    }
    return min(scores, key=lambda number: scores[number])
