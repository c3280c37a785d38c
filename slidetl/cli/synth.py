"""``slidetl synth``."""

from __future__ import annotations

from pathlib import Path

from slidetl.cli.progress import Progress
from slidetl.processor import usable_cores
from slidetl.synthetic.cohort import SyntheticCohort

_CORES = usable_cores()


def synth(out: Path, *, cohort: SyntheticCohort, workers: int = _CORES, overwrite: bool = False) -> int:
    """Draws synthetic lung slides of known grade, and writes their manifest.

    Args:
        out: folder to write slides/, truth/ and manifest.csv into.
        cohort: the slides.
        workers: processes.
        overwrite: replace an earlier cohort in ``out``.
    """
    from slidetl.synthetic.cohort import write_cohort

    with Progress("drawing", cohort.slides) as progress:

        def report(done: int, total: int) -> None:
            progress.advance()
            if done * 10 // total > (done - 1) * 10 // total:
                progress.show("drawn")

        colours = write_cohort(cohort, out, workers=workers, overwrite=overwrite, progress=report)
    print(f"{cohort.slides} slides of {cohort.patients} patients: {out / 'manifest.csv'}")
    if cohort.slides >= 30 and cohort.patients >= 10:
        import numpy as np

        from slidetl.evaluation.baselines import fit_best
        from slidetl.synthetic.section import GRADES

        planned = cohort.plan()
        grades = [entry.grade for entry in planned]
        best = fit_best(
            [[*colour.mean_rgb, colour.stained_share] for colour in colours],
            grades,
            [entry.patient_id for entry in planned],
            GRADES,
            seed=cohort.seed,
        )
        accuracy = np.mean(best.predictions == grades)
        print(
            f"mean colour and stained area alone: {accuracy:.0%} accuracy (the best of three classifiers, "
            f"{best.grader.model}, 5 folds over patients; it should be at most 40 %)"
        )
    return 0
