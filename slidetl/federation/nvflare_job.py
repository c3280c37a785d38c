"""The job that NVFlare runs: its start in the simulator, and on a server by an administrator's kit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvflare.collab import CollabRecipe
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.recipe.sim_env import SimEnv

from slidetl.errors import FederationError, UsageError
from slidetl.federation.config import Federation
from slidetl.federation.encryption import make_keys
from slidetl.federation.engine import JOB, KEYS_OF_SERVER, KEYS_OF_SITES, RESULT, SAYS
from slidetl.federation.nvflare_app import Client, Server

_LOGIN_SECONDS = 30.0
_POLL_SECONDS = 2.0

ALLOWED = ["nvflare.collab.runtime.", "slidetl.federation.nvflare_app."]
"""The ``class_allow_list`` in ``local/resources.json`` of the server and each site."""


class InstalledRecipe(CollabRecipe):  # type: ignore[misc]
    """A job of installed classes.

    A CollabRecipe sends the source of its classes to the sites, which then must let strangers' code run
    ("byoc"). This one sends none, so a site allows these classes by name and no code.
    """

    @staticmethod
    def _user_source_entries(objs: object) -> list[Any]:
        return []


def make_recipe(federation: dict[str, Any], output: Path) -> InstalledRecipe:
    """Makes the job of a federation.

    Args:
        federation: of :meth:`~slidetl.federation.config.Federation.to_dict`.
        output: folder for the rounds, on the server.
    """
    text = json.dumps(federation)
    server, client = Server(text, str(output)), Client(text)
    # A job ends if fewer sites than this are alive; rounds have their own rule.
    recipe = InstalledRecipe(job_name=JOB, server=server, client=client, min_clients=1)
    recipe._job.job.set_app_packages(["slidetl"])  # else the sources that the classes import go along
    return recipe


def submit(federation: Federation, output: Path, kit: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a federation on the server of a kit, and waits for its end.

    Args:
        federation: its sites have the places of their slides themselves.
        output: folder for the rounds, absolute, on the server.
        kit: folder of the administrator, of :mod:`slidetl.federation.provision`; it has the name of the user.
        say: called with each new line of the rounds.

    Returns:
        The outcome of the rounds.

    Raises:
        UsageError: a site is not connected, or ``output`` is not absolute.
        FederationError: the server cannot be reached, or the job failed.
    """
    if not output.is_absolute():
        raise UsageError(f"--output is a folder on the server: expected an absolute path, not {output}")
    try:
        session = new_secure_session(kit.resolve().name, str(kit), timeout=_LOGIN_SECONDS)
    except Exception as error:  # of the network, of the kit
        raise FederationError(
            f"{kit}: the server does not let in: {error or type(error).__name__}"
        ) from error
    try:
        connected = {client.name for client in session.get_connected_client_list()}
        if lacking := sorted(federation.sites.keys() - connected):
            raise UsageError(f"not connected with the server: {', '.join(lacking)}; start them first")
        with TemporaryDirectory() as folder:
            make_recipe(federation.to_dict(), output).export(folder)
            job = session.submit_job(str(Path(folder) / JOB))
        say(f"job {job}")
        told = 0
        while True:
            status = str(session.get_job_status(job))
            log = str(session.get_job_logs(job).get("logs", {}).get("server", ""))
            lines = [line.partition(SAYS)[2] for line in log.splitlines() if SAYS in line]
            for line in lines[told:]:
                if not line.startswith(RESULT):
                    say(line)
            told = len(lines)
            if status.startswith("FINISHED"):
                break
            time.sleep(_POLL_SECONDS)
    finally:
        session.close()
    if not lines or not lines[-1].startswith(RESULT):
        raise FederationError(
            f"job {job} ended with {status} and without a result; its log on the server says why"
        )
    outcome: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    if "error" in outcome:
        raise FederationError(outcome["error"])
    return outcome


def main(engine: Path, output: Path) -> None:
    """Runs the federation of ``engine/federation.json`` in the simulator, its workspace in ``engine``."""
    federation = json.loads((engine / "federation.json").read_text(encoding="utf-8"))
    local = engine / "workspace" / JOB / "local"
    local.mkdir(parents=True)
    policy = {"format_version": 2, "class_allow_list": ALLOWED}
    (local / "resources.json.default").write_text(json.dumps(policy), encoding="utf-8")
    if federation["averaged"].get("encrypted"):
        # Of this run alone. The simulator copies the folder to the server and all sites.
        startup = local.parent / "startup"
        startup.mkdir()
        for name, keys in zip((KEYS_OF_SITES, KEYS_OF_SERVER), make_keys(), strict=True):
            (startup / name).touch(mode=0o600)
            (startup / name).write_bytes(keys)
    sites = list(federation["sites"])
    recipe = make_recipe(federation, output)
    recipe.execute(SimEnv(clients=sites, workspace_root=str(engine / "workspace")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
