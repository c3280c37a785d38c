"""Provisions a federation: certificates and a kit for the server, each site and the administrator.

    python -m slidetl.federation.provision kits --server federation.example.org:8002 --site north south west

Each kit goes to its machine by a safe way: its key proves who it is. Kits of sites share the secret key of
homomorphic encryption ('averaged.encrypted'); the server's has none. Key files are readable by their owner
alone, and must stay so when they are copied. Kits differ from those of 'nvflare provision': sites and server
take jobs of slidetl's installed classes alone, no code and no shell commands; no log of a site goes to the
server; the server keeps its jobs in --storage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slidetl.federation.nvflare_job import ALLOWED

ADMIN = "admin@slidetl.local"
PROJECT = "slidetl"


def provision(
    folder: Path, server: str, sites: Sequence[str], admin: str = ADMIN, storage: str = ""
) -> dict[str, Path]:
    """Provisions a federation; returns the kit of each participant by its name.

    Args:
        folder: new, for all kits.
        server: HOST:PORT; a loopback name listens on loopback alone.
        sites: their names.
        admin: name of the administrator.
        storage: folder for jobs, on the server; beside its kit by default.
    """
    host, _, port = server.partition(":")
    people: list[dict[str, Any]] = [
        {
            "name": host,
            "type": "server",
            "org": PROJECT,
            "fed_learn_port": int(port),
            "admin_port": int(port),
        },
        *({"name": site, "type": "client", "org": PROJECT, "allow_log_streaming": False} for site in sites),
        {"name": admin, "type": "admin", "org": PROJECT, "role": "project_admin"},
    ]
    impl = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": PROJECT,
        "description": "a federation of slidetl",
        "participants": people,
        "builders": [
            {
                "path": f"{impl}.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{impl}.cert.CertBuilder"},
            {"path": f"{impl}.he.HEBuilder"},
            {"path": f"{impl}.signature.SignatureBuilder"},
        ],
    }
    folder.mkdir(mode=0o700, parents=True)
    (folder / "project.yml").write_text(yaml.safe_dump(project), encoding="utf-8")
    words = [sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "workspace"]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"nvflare provision has failed: {done.stdout.strip()}")
    for path in folder.rglob("*"):
        if path.name == "cert.json" or path.suffix in (".key", ".tenseal"):
            path.chmod(0o600)  # NVFlare leaves most of them to all users
    made = folder / "workspace" / PROJECT / "prod_00"
    kits = {name: made / name for name in (host, *sites, admin)}
    for name in (host, *sites):
        _restrict(kits[name] / "local")
    _store(kits[host] / "local", Path(storage or kits[host].absolute() / "storage"))
    return kits


def _restrict(local: Path) -> None:
    """Lets in jobs of installed classes alone and no shell commands, and no log out."""
    path = local / "resources.json.default"
    resources = json.loads(path.read_text(encoding="utf-8"))
    resources["class_allow_list"] = ALLOWED
    resources["components"] = [part for part in resources["components"] if part["id"] != "site_log_streamer"]
    if "allow_log_streaming" in resources:
        resources["allow_log_streaming"] = False
    (local / "resources.json").write_text(json.dumps(resources, indent=1), encoding="utf-8")
    path = local / "authorization.json.default"
    authorization = json.loads(path.read_text(encoding="utf-8"))
    for role, rights in authorization["permissions"].items():
        if rights == "any":
            rights = dict.fromkeys(("submit_job", "manage_job", "view", "operate", "get_job_log"), "any")
        authorization["permissions"][role] = {**rights, "byoc": "none", "shell_commands": "none"}
    (local / "authorization.json").write_text(json.dumps(authorization, indent=1), encoding="utf-8")


def _store(local: Path, storage: Path) -> None:
    """Keeps jobs and snapshots of the server in a folder of its own, not in the temporary one."""
    path = local / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    for part in resources["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(storage / "jobs")
    path.write_text(json.dumps(resources, indent=1), encoding="utf-8")


def main() -> None:
    """Provisions by the words of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder for the kits")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="address of the server")
    parser.add_argument(
        "--site", nargs="+", required=True, help="names of the sites, as in the configuration"
    )
    parser.add_argument("--admin", default=ADMIN, help=f"name of the administrator (default: {ADMIN})")
    parser.add_argument(
        "--storage", default="", help="folder for jobs on the server (default: beside its kit)"
    )
    options = parser.parse_args()
    for name, kit in provision(
        options.folder, options.server, options.site, options.admin, options.storage
    ).items():
        print(f"{name}: {kit}")


if __name__ == "__main__":
    main()
