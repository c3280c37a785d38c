"""Runs a federation on this machine as on several: a server and its sites over mutual TLS, on loopback.

    python scripts/federated/here.py --config configs/federated/averaged.yaml --output runs/averaged

Certificates, ports and processes are of this run alone; all processes have ended when it ends.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import MappingProxyType

from slidetl.cli import main as slidetl
from slidetl.cli.shipped import find_config
from slidetl.federation.config import read_federation
from slidetl.federation.engine import SITE_FILE, check_places, marked_process, write_site
from slidetl.federation.provision import ADMIN, provision

_START_SECONDS = 180.0


def run_here(config: Path, output: Path, of_server: Mapping[str, str] = MappingProxyType({})) -> int:
    """Provisions, starts, runs and ends; returns the exit code of ``slidetl federate``.

    Args:
        config: the federation, with the places of all slides.
        output: folder for the rounds, the kits and the logs.
        of_server: environment of the server's processes.
    """
    federation = read_federation(find_config(config))
    check_places(federation)
    output = output.absolute()
    engine = output / "engine"
    port = _free_port()
    kits = provision(engine / "kits", f"localhost:{port}", list(federation.sites))
    run = "nvflare.private.fed.app"
    with ExitStack() as running:
        words = [f"{run}.server.server_train", "-m", str(kits["localhost"]), "-s", "fed_server.json"]
        processes = {
            "localhost": running.enter_context(_started(words, "", engine / "server.txt", dict(of_server)))
        }
        _wait_for(engine / "server.txt", "Server started", processes["localhost"])
        for name, site in federation.sites.items():
            place = engine / f"{name}.yaml"
            write_site(place, site, output / "sites" / name)
            words = [f"{run}.client.client_train", "-m", str(kits[name]), "-s", "fed_client.json"]
            started = _started(words, f"uid={name}", engine / f"{name}.txt", {SITE_FILE: str(place)})
            processes[name] = running.enter_context(started)
        for name in federation.sites:
            _wait_for(engine / f"{name}.txt", "Successfully registered", processes[name])
        return slidetl(
            ["federate", "--config", str(config), "--output", str(output), "--kit", str(kits[ADMIN])]
        )


def _started(
    words: list[str], uid: str, log: Path, environment: dict[str, str]
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    settings = ["--set", "secure_train=true", *([uid] if uid else []), "org=slidetl", "config_folder=config"]
    return marked_process([sys.executable, "-u", "-m", *words, *settings], environment, log)


def _wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while text not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{log}: expected {text!r}, and it has not come")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the federation, with the places of all slides"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the rounds, the kits and the logs"
    )
    options = parser.parse_args()
    sys.exit(run_here(options.config, options.output))
