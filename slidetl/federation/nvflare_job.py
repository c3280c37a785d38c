"""The job that NVFlare runs, and its start in the simulator: ``python -m slidetl.federation.nvflare_job``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.collab import CollabRecipe
from nvflare.recipe.sim_env import SimEnv

from slidetl.federation.engine import JOB
from slidetl.federation.nvflare_app import Client, Server

ALLOWED = "slidetl.federation.nvflare_app."
"""Entry for ``class_allow_list`` in ``local/resources.json`` of the server and each site."""


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
    return InstalledRecipe(job_name=JOB, server=server, client=client, min_clients=1)


def main(engine: Path, output: Path) -> None:
    """Runs the federation of ``engine/federation.json`` in the simulator, its workspace in ``engine``."""
    federation = json.loads((engine / "federation.json").read_text(encoding="utf-8"))
    local = engine / "workspace" / JOB / "local"
    local.mkdir(parents=True)
    policy = {"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, ALLOWED]}
    (local / "resources.json.default").write_text(json.dumps(policy), encoding="utf-8")
    sites = list(federation["sites"])
    recipe = make_recipe(federation, output)
    recipe.execute(SimEnv(clients=sites, workspace_root=str(engine / "workspace")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
