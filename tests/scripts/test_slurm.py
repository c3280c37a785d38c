"""The job files, run by bash; ``srun`` is one that starts each command once, on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slidetl.tiles.ledger import USED, Ledger
from slidetl.tiles.store import SlideCache, cache_path
from tests.cli.test_tile import Draw
from tests.conftest import PyramidTiff

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


def run(job: str, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a job file as SLURM would on a cluster of this machine alone."""
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    path = f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm" / job), *words],
        cwd=folder,
        env={**os.environ, "PATH": path, "SLURM_SUBMIT_DIR": str(folder), **more},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_bash_and_sbatch_can_read_it(job: Path) -> None:
    subprocess.run(["bash", "-n", str(job)], check=True)
    lines = job.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    # sbatch stops looking at the first command.
    assert options and max(options) < first_command
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+=\S+", lines[number]) for number in options)


@pytest.mark.slow
def test_tile_runs_a_scheduler_and_workers(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    pyramid_tiff(tissue_picture(512))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("slide_id,path,patient_id,grade\nslide,slide.tiff,p,1\n")
    done = run("tile.sbatch", tmp_path, "manifest.csv", "--cache", "cache", "--mpp", "1", "--tile-size", "32")
    assert done.returncode == 0, done.stderr
    assert "1 slides: 1 used" in done.stdout
    assert [row.status for row in Ledger(tmp_path / "cache" / "ledger.csv").rows()] == [USED]
    assert len(SlideCache.open(cache_path(tmp_path / "cache", "slide"))) == 48
    assert not list(tmp_path.glob(".slidetl-tile-*"))


@pytest.mark.slow
def test_fit_gives_lightning_the_shape_of_the_job(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "demo.yaml")
    done = run(
        "fit.sbatch",
        tmp_path,
        "--config",
        config,
        "--print_config",
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS_PER_NODE="4",
    )
    assert done.returncode == 0, done.stderr
    trainer = yaml.safe_load(done.stdout)["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"]), trainer["strategy"]) == (2, 4, "ddp")
    assert trainer["accelerator"] == "gpu"
