"""Looks at all that reaches the server while sites exchange networks peer to peer: can it read them?

    python tools/look_at_the_wire.py --config FEDERATION.yaml --output FOLDER > federation-wire.md

Runs a swarm over mutual TLS on this machine twice, with and without ``peer_to_peer.secure``. The server's
processes keep every frame that they receive, after TLS is taken off. A site combines the updates and sends
the network to the others; bytes of this network, from the file that the site keeps, are looked for in the
frames.
"""

from __future__ import annotations

import argparse
import io
import os
import runpy
import threading
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import yaml

from slidetl.federation.engine import PROCESS_MARK
from slidetl.federation.records import read_arrays

_HERE = Path(__file__).parents[1] / "scripts" / "federated" / "here.py"
_PROBES, _PROBE_BYTES = 200, 64
_PAGE = """# Can the relaying server read the networks of peers?

One round of a swarm of three sites over mutual TLS on one machine. The server's processes kept every frame
that they received, without TLS. Probes of 64 bytes of the network that one site sent to the others were
looked for in these frames. Last column: the addresses on which processes of the run listened.

| `peer_to_peer.secure` | received by the server, MB | probes found | listening |
|---|---|---|---|
{rows}

So the server reads the networks unless `secure` is true, the default. It then sees who sends how much to
whom, and the metrics. Written by NVFlare 2.9.0 and
`python tools/look_at_the_wire.py --config FEDERATION.yaml --output FOLDER`."""
_KEEPER = """
import os, threading
_folder = os.environ.get("SLIDETL_WIRE")
if _folder:
    from nvflare.fuel.f3.sfm.conn_manager import ConnManager
    _receive, _lock = ConnManager.process_frame, threading.Lock()
    def process_frame(self, connection, frame):
        with _lock, open(f"{_folder}/{os.getpid()}.frames", "ab") as file:
            file.write(bytes(frame))
        return _receive(self, connection, frame)
    ConnManager.process_frame = process_frame
"""


def look(config: Path, output: Path, *, secure: bool) -> tuple[int, int, int, set[str]]:
    """Runs once; returns bytes that the server received, probes found, probes, and listening addresses."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values |= {"scheme": "peer_to_peer", "rounds": 1, "peer_to_peer": {"mixing": "swarm", "secure": secure}}
    frames, keeper = output / "frames", output / "keeper"
    frames.mkdir(parents=True)
    keeper.mkdir()
    (keeper / "sitecustomize.py").write_text(_KEEPER, encoding="utf-8")
    (output / "federation.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    paths = os.pathsep.join([str(keeper), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "SLIDETL_WIRE": str(frames)}
    addresses: set[str] = set()
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, addresses))
    watch.start()
    try:
        with redirect_stdout(io.StringIO()) as said:
            code = runpy.run_path(str(_HERE))["run_here"](
                output / "federation.yaml", output / "run", environment
            )
    finally:
        ended.set()
        watch.join()
    if code:
        raise SystemExit(f"the federation has failed: {said.getvalue()}")
    network = read_arrays(next((output / "run" / "sites").glob("*/rounds/*/0001.safetensors")))
    largest = max(network.values(), key=lambda value: value.nbytes).tobytes()
    step = (len(largest) - _PROBE_BYTES) // _PROBES
    probes = [largest[start * step : start * step + _PROBE_BYTES] for start in range(_PROBES)]
    received = [path.read_bytes() for path in frames.glob("*.frames")]
    found = sum(any(probe in content for content in received) for probe in probes)
    return sum(map(len, received)), found, len(probes), addresses


def _watch(ended: threading.Event, addresses: set[str]) -> None:
    """Collects the addresses on which processes of a federation listen."""
    while not ended.wait(1.0):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{PROCESS_MARK}=".encode() in (folder / "environ").read_bytes():
                    addresses |= _listening(folder)
            except OSError:  # it has ended
                continue


def _listening(folder: Path) -> set[str]:
    inodes = {str(link.readlink()) for link in (folder / "fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (folder / "net" / table).read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes:  # LISTEN
                found.add(_address(cells[1].partition(":")[0]))
    return found


def _address(hexadecimal: str) -> str:
    """Spells an address of /proc/net/tcp."""
    octets: Sequence[int] = bytes.fromhex(hexadecimal)[::-1]
    return ".".join(map(str, octets)) if len(octets) == 4 else f"IPv6 {hexadecimal}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="a federation with the places of all slides"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    rows = []
    for secure in (False, True):
        size, found, probes, addresses = look(options.config, options.output / str(secure), secure=secure)
        cells = (
            str(secure).lower(),
            f"{size / 1e6:.1f}",
            f"{found} of {probes}",
            ", ".join(sorted(addresses)),
        )
        rows.append(f"| {' | '.join(cells)} |")
    print(_PAGE.format(rows="\n".join(rows)))
