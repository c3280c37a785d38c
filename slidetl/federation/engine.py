"""Starts a federation: its baselines in this process, the others on NVFlare.

NVFlare's simulator reports no result, so the files that the coordinator writes decide.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import BASELINES, Federation, Site
from slidetl.federation.privacy import check_policy
from slidetl.federation.records import Rounds, only_job
from slidetl.files import read_yaml, write_whole
from slidetl.processor import usable_cores
from slidetl.text import one_line

Report = Callable[[str, dict[str, Any]], None]  # a name or "", and the account of a round

SITE_FILE = "SLIDETL_SITE"
"""Environment variable of a site's process: a YAML with ``manifest``, ``cache`` and ``folder`` of the site,
and its ``split_from`` if needed, or a folder with such a file for each site, ``NAME.yaml``."""
OUTCOME = "outcome.json"
SAYS, RESULT = "slidetl says: ", "outcome "  # before our lines in the log of a job
JOB = "slidetl"
KEYS_OF_SITES, KEYS_OF_SERVER = "client_context.tenseal", "server_context.tenseal"  # by NVFlare, in a kit
PROCESS_MARK = "SLIDETL_FEDERATION"
"""Environment variable of all processes of a run, with its mark."""
_END_SECONDS = 60.0  # for the engine to end after the outcome
_POLL_SECONDS = 0.5


def check_engine(federation: Federation) -> None:
    """Refuses to start without NVFlare, or TenSEAL where it is needed.

    Raises:
        UsageError: it is not installed.
    """
    needed = {"NVFlare": "runs this scheme"}
    if federation.averaged.encrypted:
        needed["TenSEAL"] = "encrypts its updates"
    for name, use in needed.items():
        if find_spec(name.lower()) is None:
            raise UsageError(f"{name} is not installed, which {use}: pip install 'slidetl[federated]'")


def check_places(federation: Federation) -> None:
    """Refuses sites without slides here.

    Raises:
        UsageError: a site names no manifest and cache.
    """
    if lacking := [name for name, site in federation.sites.items() if not site.manifest]:
        raise UsageError(f"sites: {', '.join(lacking)} needs manifest and cache, to run on one machine")


def read_site(name: str, federation: Federation) -> tuple[Site, Path]:
    """Reads the places of a site from the file that its environment names; returns its folder too.

    The file may state ``privacy``, too: the site then refuses a job under any other. With ``encrypted: true``
    it refuses a job that would send its updates in the clear.

    Raises:
        UsageError: there is no such file, it lacks a place, or the job is under other terms than it states.
    """
    where = os.environ.get(SITE_FILE, "")
    path = Path(where) / f"{name}.yaml" if where and Path(where).is_dir() else Path(where)
    if not where or not path.is_file():
        raise UsageError(f"{SITE_FILE}={where!r}: expected a file with manifest, cache and folder of {name}")
    keys = ("manifest", "cache", "folder")
    expected = (
        f"{', '.join(keys)}, split_from if needed, and its terms if it has some: privacy, encrypted: true"
    )
    values = read_yaml(path, "a site", expected)
    if (
        set(values) - {"privacy", "encrypted", "split_from"} != set(keys)
        or values.get("encrypted", True) is not True
    ):
        raise UsageError(f"{path}: expected {expected}, found {one_line(str(values))[:200]}")
    if "privacy" in values:
        check_policy(values["privacy"], federation.privacy if federation.scheme not in BASELINES else None)
    if "encrypted" in values and not federation.averaged.encrypted:
        raise UsageError(
            "this site sends encrypted updates alone, and the job has no averaged.encrypted: true"
        )
    declared = federation.sites.get(name)
    if declared is None:
        raise UsageError(f"{name} is no site of the federation; it has {', '.join(federation.sites)}")
    site = replace(
        declared,
        manifest=str(values["manifest"]),
        cache=str(values["cache"]),
        split_from=values.get("split_from", "checkpoint"),
    )
    return site, Path(str(values["folder"]))


def write_site(path: Path, site: Site, folder: Path) -> None:
    """Writes the file that :func:`read_site` reads, of a site with slides on this machine."""
    values = {
        "manifest": str(Path(site.manifest).absolute()),
        "cache": site.cache if "://" in site.cache else str(Path(site.cache).absolute()),
        "folder": str(folder),
        "split_from": site.split_from,
    }
    write_whole(path, yaml.safe_dump(values))


def run_baseline(federation: Federation, output: Path, report: Report) -> dict[str, dict[str, Any]]:
    """Trains each site alone (``local``), or all slides in one place (``pooled``).

    It resumes after the last finished round, as the other schemes do.

    Returns:
        By the name of the site, or ``pooled``: the outcome of its rounds.
    """
    from slidetl.federation.coordinator import SitesHere, run_rounds
    from slidetl.federation.participant import Participant
    from slidetl.federation.site import pooled_slides, site_slides

    check_places(federation)
    parts_of = {name: site_slides(federation, site) for name, site in federation.sites.items()}
    sites = dict(federation.sites)
    if federation.scheme == "pooled":
        parts_of = {"pooled": pooled_slides(parts_of)}
        sites = {"pooled": Site(sum(site.examples for site in sites.values()))}
    outcomes = {}
    for name, site in sites.items():
        alone = replace(federation, sites={name: site})
        here = SitesHere({name: Participant(alone, name, parts_of[name], output / "sites" / name)})

        def tell(account: dict[str, Any], name: str = name) -> None:
            report(name, account)

        outcomes[name] = run_rounds(alone, here, output / "sites" / name, tell)
    return outcomes


def simulate(federation: Federation, output: Path, report: Report) -> dict[str, Any]:
    """Runs a federation in NVFlare's simulator: a process for the server and one for each site.

    Args:
        federation: with the places of all slides.
        output: ``rounds/``, ``checkpoints/``, ``sites/NAME/`` and ``engine/`` with the logs.
        report: called with each finished round.

    Returns:
        The outcome of :func:`~slidetl.federation.coordinator.run_rounds`.

    Raises:
        FederationError: the engine, or too many sites, failed.
    """
    check_engine(federation)
    check_places(federation)
    output = output.absolute()
    with only_job(output):
        return _simulate(federation, output, report)


def _simulate(federation: Federation, output: Path, report: Report) -> dict[str, Any]:
    engine, places = output / "engine", output / "engine" / "sites"
    shutil.rmtree(engine, ignore_errors=True)
    for name, site in federation.sites.items():
        write_site(places / f"{name}.yaml", site, output / "sites" / name)
    write_whole(engine / "federation.json", json.dumps(federation.to_dict()))
    (output / OUTCOME).unlink(missing_ok=True)
    threads = max(1, usable_cores() // len(federation.sites))
    environment = {SITE_FILE: str(places), "SLIDETL_SIMULATED": "1", "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "slidetl.federation.nvflare_job", str(engine), str(output)]
    before = len(Rounds(output / "rounds", federation.sha256).accounts())
    with marked_process(words, environment, engine / "log.txt") as process:
        for account in _follow(federation, output, before, process):
            report("", account)
    return _read_outcome(output, engine / "log.txt")


def _follow(
    federation: Federation, output: Path, before: int, process: subprocess.Popen[bytes]
) -> Iterator[dict[str, Any]]:
    """Yields the account of each new round, until the engine has ended or the outcome is there."""
    rounds, deadline = Rounds(output / "rounds", federation.sha256), float("inf")
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        accounts = rounds.accounts()
        yield from accounts[before:]
        before = len(accounts)
        if ended:
            return
        if (output / OUTCOME).is_file() and deadline == float("inf"):
            deadline = time.monotonic() + _END_SECONDS
        time.sleep(_POLL_SECONDS)


def _read_outcome(output: Path, log: Path) -> dict[str, Any]:
    path = output / OUTCOME
    if not path.is_file():
        errors = [line for line in _tail(log) if "ERROR" in line or "Error" in line]
        last = f": {one_line(errors[-1])[:300]}" if errors else ""
        raise FederationError(f"the engine ended without a result{last}; see {log}, and run again to resume")
    outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "error" in outcome:
        raise FederationError(outcome["error"])
    return outcome


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]


@contextmanager
def marked_process(
    words: list[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process, and ends it with all processes that it has started, by a mark in their environment.

    The simulator starts sessions of its own: no group of processes holds them all.
    """
    mark = uuid.uuid4().hex
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            env={**os.environ, **environment, PROCESS_MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            deadline = time.monotonic() + seconds
            while (left := _marked(mark)) and time.monotonic() < deadline:
                for pid in left:
                    _send(pid, sign)
                process.poll()
                time.sleep(0.1)
        process.poll()


def _marked(mark: str) -> list[int]:
    """Lists the living processes of this user with the mark in their environment."""
    wanted = f"{PROCESS_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def _send(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return
