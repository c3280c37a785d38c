"""``slidetl federate``."""

from __future__ import annotations

import sys
from pathlib import Path


def federate(*, config: Path, output: Path, simulate: bool = False, kit: Path | None = None) -> int:
    """Trains one grader over several sites: the slides stay, the network travels.

    Exit code 1 if a site did not get its checkpoint. The same command resumes after the last finished round.

    Args:
        config: the federation (YAML); configs/federated/averaged.yaml and others come with slidetl.
        output: folder for the rounds, the logs and the checkpoints.
        simulate: run server and sites in NVFlare's simulator on this machine, a process each.
        kit: an administrator's folder of 'python -m slidetl.federation.provision', to run on its server and
            sites; the output is then an absolute path on the server.
    """
    from slidetl.cli.shipped import find_config
    from slidetl.errors import UsageError, refuse_unused
    from slidetl.federation.config import BASELINES, read_federation
    from slidetl.federation.engine import check_engine, run_baseline
    from slidetl.federation.engine import simulate as run_simulator
    from slidetl.status import show_stage

    federation = read_federation(find_config(config))

    def report(name: str, account: dict[str, object]) -> None:
        from slidetl.federation.coordinator import describe

        print(f"{name}: " * bool(name) + describe(account, federation.rounds), flush=True)
        show_stage("training", int(str(account["round"])), federation.rounds, "rounds")

    if federation.scheme in BASELINES:
        places = {"simulate": simulate, "kit": kit}
        refuse_unused(federate, places, f"with scheme {federation.scheme}, which runs on this machine")
        outcomes = run_baseline(federation, output, report)
    elif simulate:
        refuse_unused(federate, {"kit": kit}, "with --simulate")
        outcomes = {"": run_simulator(federation, output, report)}
    elif kit is not None:
        check_engine(federation)
        from slidetl.federation.nvflare_job import submit

        outcomes = {"": submit(federation, output, kit, lambda line: print(line, flush=True))}
    else:
        raise UsageError(
            f"{federation.scheme} needs the engine: add --simulate for this machine, or --kit for several "
            "(docs/howto/federated.md)"
        )
    for name, outcome in outcomes.items():
        score = ", ".join(f"{key} {outcome['score'][key]:.4f}" for key in ("rps", "accuracy"))
        print(f"{name}: " * bool(name) + f"best round {outcome['best']}: {score}")
        for site, reason in sorted(outcome["lost"].items()):
            print(f"{site} has no checkpoint: {reason}", file=sys.stderr)
    print(f"written to {output}")
    return 1 if any(outcome["lost"] for outcome in outcomes.values()) else 0
