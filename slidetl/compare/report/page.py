"""A comparison as a page: the declared comparison first, then what it rests on, then what limits it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slidetl.compare.aggregate import ComparisonResult
from slidetl.compare.report import models, study
from slidetl.compare.report.html import Drawing, Section, write_experiment, write_markdown
from slidetl.compare.report.plots import percent, spoken
from slidetl.compare.report.view import View, p_is
from slidetl.evaluation.bootstrap import Interval

PAGE, TEXT, FIGURES_FOLDER = "report.html", "report.md", "figures"


def write_report(result: ComparisonResult, output: Path, failed: Mapping[str, str] | None = None) -> None:
    """Writes ``report.html``, ``report.md``, ``figures/*.svg`` and ``*.png`` into the folder of a comparison.

    The page needs no network and no other file. It says what is missing where arms are not complete; figures
    of an earlier report that this one has not are removed.

    Args:
        result: of :func:`~slidetl.compare.aggregate.combine`.
        output: the folder.
        failed: why units failed, by their labels.

    Raises:
        OSError: something cannot be written.
    """
    view = View(result, output / FIGURES_FOLDER, failed or {})
    primary = result.comparison.primary
    sections = [
        Section("arms", "The arms", study.arms(view)),
        Section("protocol", "What was compared, and how", study.protocol(view)),
        Section("others", f"All others against {primary.against}", study.others(view)),
        Section("confusion", "Where the grades go", models.confusion(view)),
        Section("learning", "Speed of learning", models.learning(view)),
        Section("sizes", "Number of training slides", models.sizes(view)),
        Section("calibration", "Do the probabilities mean what they say?", models.calibration(view)),
        Section("referral", "Sets of grades, and what is left to a human", models.referral(view)),
        Section("readers", "The readers", study.readers(view)),
        Section("sites", "Sites and scanners", study.sites(view)),
        Section("score", "The score: repeatability, and two groups", models.score(view)),
        Section("power", "Variance and power", study.power(view)),
        Section("layers", "What training changed, layer by layer", models.layers(view)),
        Section("limits", "What this does not show", study.limits(view)),
        Section("provenance", "Seeds, versions and files", study.provenance(view)),
    ]
    title = f"{primary.arm} against {primary.against}: a comparison of {len(view.arms)} arms"
    notices, summary = _notices(view), _summary(view)
    write_experiment(output / PAGE, title, notices, summary, sections)
    write_markdown(output / TEXT, title, notices, summary, sections)
    drawn = {part.path.stem for section in sections for part in section.parts if isinstance(part, Drawing)}
    for old in view.folder.glob("*.svg"):
        if old.stem not in drawn:
            old.unlink()
            old.with_suffix(".png").unlink(missing_ok=True)


def _notices(view: View) -> list[str]:
    result = view.result
    notices = []
    if result.incomplete:
        left = "; ".join(
            f"{name} ({done} of {planned} units)" for name, (done, planned) in result.incomplete.items()
        )
        notices.append(
            f"This comparison is not finished. Not complete, and in no figure below: {left}. The same "
            "command goes on where it was ended."
        )
    known = {arm.arm for arm in result.arms}
    left_out = [
        name
        for name in view.comparison.arms
        if name not in known and not any(label.split(" (")[0] == name for label in result.incomplete)
    ]
    if left_out:
        notices.append(f"Arms of the configuration that were not asked for: {', '.join(left_out)}.")
    if view.failed:
        label, reason = next(iter(view.failed.items()))
        notices.append(f"{len(view.failed)} units failed, the first of them {label}: {reason}")
    if not view.protocol.is_nested:
        notices.append(
            "Not nested: hyper-parameters and the number of epochs were fixed before, by whoever wrote the "
            "configuration. If they were chosen on these slides, every figure here is too good."
        )
    return notices


def _summary(view: View) -> list[str]:
    primary, declared = view.comparison.primary, view.result.primary
    if declared is None:
        return [
            f"The comparison declared beforehand, {primary.arm} against {primary.against} by {view.name}, is "
            "not complete yet."
        ]
    of = {arm.arm: arm for arm in view.arms}
    one, other = of[declared.arm].figures[primary.figure], of[declared.against].figures[primary.figure]
    apart = _excludes_zero(declared.interval)
    lower = primary.figure in ("mae", "rps", "log_loss")
    verdict = (
        "The interval contains zero: these patients do not settle which is better."
        if not apart
        else f"The interval excludes zero, in favour of "
        f"{declared.arm if (declared.interval.estimate > 0) != lower else declared.against}."
    )
    tests = [f"sign-flip test over patients {p_is(declared.sign_flip.p)}"]
    if declared.corrected_t is not None:
        tests.append(f"corrected resampled t over folds {p_is(declared.corrected_t.p)}")
    return [
        f"Difference in {view.name}, {declared.arm} minus {declared.against}: "
        f"{spoken(declared.interval, signed=True)}, paired over {view.n_results}. {verdict}",
        f"{declared.arm} reaches {spoken(one)} and {declared.against} {spoken(other)}, with "
        f"{percent(one.level)} intervals. This comparison was declared before anything ran. Secondary tests "
        f"of the same difference: {'; '.join(tests)}.",
    ]


def _excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0
