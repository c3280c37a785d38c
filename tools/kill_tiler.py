"""Kills ``slidetl tile`` at random moments, lets it continue, and compares with an undisturbed run.

    python tools/kill_tiler.py --kills 50

Each time the whole process group gets SIGKILL, as on a machine that runs out of memory; then the same
command runs again. Whenever one comes to its end, the ``.zarr`` groups must equal those of the undisturbed
run byte for byte, ``slidetl cache verify`` must find nothing, and the next round begins with an empty cache.
Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KillReport:
    """What came of it.

    Attributes:
        kills: how many processes were killed while they ran.
        rounds: how often a cache came to its end.
        with_shards: kills after which an unfinished slide had at least one whole shard to continue from.
        different: what differs from the undisturbed run, one line each.
        seconds: of the undisturbed run.
    """

    kills: int
    rounds: int
    with_shards: int
    different: tuple[str, ...]
    seconds: float


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="how many (50)")
    parser.add_argument("--seconds", type=float, default=1800, help="give up after so long (1800)")
    parser.add_argument("--slides", type=int, default=3, help="synthetic slides (3)")
    parser.add_argument("--size", type=int, default=4096, help="their width and height, pixels (4096)")
    parser.add_argument("--workers", type=int, default=2, help="of slidetl tile (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        report = kill_tiler(
            Path(folder),
            kills=options.kills,
            seconds=options.seconds,
            slides=options.slides,
            size_px=options.size,
            workers=options.workers,
            seed=options.seed,
        )
    print(
        f"undisturbed: {report.seconds:.1f} s; {report.kills} kills, {report.with_shards} of them with whole"
    )
    print(f"shards of an unfinished slide to continue from; {report.rounds} caches came to their end")
    for line in report.different:
        print(f"DIFFERENT: {line}")
    if report.kills < options.kills:
        print(f"only {report.kills} of {options.kills} kills in {options.seconds:.0f} s")
    elif not report.different:
        print("all of them equal the undisturbed run byte for byte")
    return 1 if report.different or report.kills < options.kills else 0


def kill_tiler(
    folder: Path, kills: int, seconds: float, slides: int, size_px: int, workers: int, seed: int
) -> KillReport:
    """Draws slides into a folder, tiles them undisturbed, and then over and over under fire."""
    deadline = time.monotonic() + seconds
    data, calm, disturbed = folder / "data", folder / "calm", folder / "disturbed"
    draw = ["synth", data, "--slides", slides, "--patients", slides, "--sites", 1, "--size", size_px]
    subprocess.run(_command(*draw, "--workers", workers), check=True, capture_output=True)

    def tile(cache: Path) -> list[str]:
        # Small tiles, hence many shards; little tissue is asked for, hence many tiles.
        options = ("--mpp", 0.5, "--tile-size", 64, "--min-tissue", 0.05, "--workers", workers)
        return _command("tile", data / "manifest.csv", "--cache", cache, *options)

    started = time.monotonic()
    subprocess.run(tile(calm), check=True, capture_output=True)
    calm_s = time.monotonic() - started
    expected = _contents(calm)
    rng = random.Random(seed)
    done = rounds = with_shards = 0
    different: list[str] = []
    while time.monotonic() < deadline:
        with subprocess.Popen(
            tile(disturbed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            # The last of the kills asked for is followed by a run that nobody disturbs.
            moment = rng.uniform(0, calm_s) if done < kills else None
            try:
                _, err = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                done += 1
                with_shards += any((disturbed / ".building").glob("*/progress.json"))
                continue
        rounds += 1
        if process.returncode != 0:
            different.append(f"round {rounds}: exit code {process.returncode}: {err.decode()[-300:]}")
        different += [f"round {rounds}: {line}" for line in _differences(expected, _contents(disturbed))]
        verified = subprocess.run(_command("cache", "verify", disturbed), capture_output=True, text=True)
        if verified.returncode:
            different.append(f"round {rounds}: {verified.stdout}{verified.stderr}")
        different += [f"round {rounds}: left over: {path}" for path in (disturbed / ".building").glob("*")]
        if done >= kills:
            break
        shutil.rmtree(disturbed)
    return KillReport(done, rounds, with_shards, tuple(different), calm_s)


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "slidetl", *map(str, words)]


def _contents(cache: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(cache)): file.read_bytes()
        for group in cache.glob("*.zarr")
        for file in group.rglob("*")
        if file.is_file()
    }


def _differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"too many: {name}" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return lines + [f"other bytes: {name}" for name in both if expected[name] != found[name]]


if __name__ == "__main__":
    sys.exit(main())
