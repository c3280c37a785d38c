from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import slidetl
from slidetl.cli import main
from slidetl.errors import ManifestError


@pytest.mark.parametrize("command", ["synth", "tile", "export", "grade"])
def test_help_names_units_and_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: slidetl" in out
    if command in ("synth", "tile"):
        assert "micrometres per pixel" in " ".join(out.split()) and "default: " in out


def test_training_help_reaches_the_trainer_and_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for option in (
        "--trainer.max_epochs",
        "--data.bag_size",
        "--model.transfer",
        "--early_stopping.patience",
    ):
        assert option in out


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slidetl", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"slidetl {slidetl.__version__}\n")


_STORED = ("--data.bag_size=0", "--data.features=f", "--model.transfer=FrozenFeatures")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tile", "none.csv", "--cache", "c", "--mpp", "2"], "none.csv: expected a CSV manifest"),
        (["fit", "--config", "none.yaml"], "File does not exist"),
        (["fit"], "the following arguments are required"),
        (
            ["fit", "--data.manifest=m", "--data.cache=c", "--model.lrr=1"],
            "unrecognized arguments: --model.lrr",
        ),
        (["fit", "--data.manifest=m", "--data.cache=c", "--model.lr=x"], "model.lr"),
        (["fit", "--data.manifest=m", "--data.cache=c", "--model.lr=-1"], "model.lr > 0"),
        (["fit", "--data.manifest=m", "--data.cache=c", "--data.grades=[a]"], "two different names"),
        (["fit", "--data.manifest=m", "--data.cache=c", "--model.transfer=Nowhere"], "model.transfer"),
        (
            ["fit", "--data.manifest=m", "--data.cache=c", "--model.backbone.name=resnet19"],
            "timm knows no backbone",
        ),
        (["fit", "--data.manifest=m", "--data.cache=c"], "m: expected a CSV manifest"),
        (["fit", "--data.manifest=m", "--data.cache=c", "--data.seed=-1"], "data.seed must be at least 0"),
        (
            ["fit", "--data.manifest=m", "--data.cache=c", "--data.augmentation.contrast=2"],
            "augmentation.contrast",
        ),
        (["test", "--data.manifest=m", "--data.cache=c"], "; name a file by --ckpt_path"),
        (
            ["test", "--data.manifest=m", "--data.cache=c", "--ckpt_path=none.ckpt"],
            "none.ckpt: no such checkpoint",
        ),
        (["export", "none.ckpt", "--output", "m.pt"], "none.ckpt: no such checkpoint"),
        (["grade", "none.pt", "slide.svs"], "none.pt: no such model file"),
        (
            ["fit", "--data.manifest=m", "--data.cache=c", *_STORED, "--data.augmentation.flips=false"],
            "data.augmentation would have no effect with data.bag_size 0",
        ),
        (
            ["fit", "--data.manifest=m", "--data.cache=c", *_STORED, "--data.sampling=TissueWeighted"],
            "data.sampling would have no effect with data.bag_size 0",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.accelerator=cpu"] if words[0] in ("fit", "test") else []
    assert main([*words, *options]) == 2
    out, err = capsys.readouterr()
    *others, last = err.splitlines()
    assert last.startswith("slidetl: error:") and said in last
    # What Lightning says of the machine may stand before it; neither a traceback nor usage may.
    assert all(re.match("Seed set|GPU available|TPU available", line) for line in others), others
    assert not out
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "similarity --before pretrained --after x.ckpt --data c --output o --pretrained W",
            "--pretrained would have no effect without --backbone",
        ),
        ("federate --config configs/federated/local.yaml --output o --simulate", "--simulate would have no"),
        ("federate --config configs/federated/pooled.yaml --output o --kit k", "--kit would have no effect"),
        (
            "federate --config configs/federated/averaged.yaml --output o --simulate --kit k",
            "--kit would have no effect with --simulate",
        ),
        (
            "fit-features m --cache c --features f --output o --tile-labels l --model trees --top-k 5",
            "--model, --top-k would have no effect with --tile-labels",
        ),
        (
            "fit-features m --cache c --features f --output o --pool max --top-k 5",
            "--top-k would have no effect with --pool max",
        ),
        (
            "atlas cluster c --features f --output o --clusters 9",
            "--clusters would have no effect with --method mean-shift",
        ),
        (
            "atlas cluster c --features f --output o --method k-means --bandwidth 1 --least 5",
            "--bandwidth, --least would have no effect with --method k-means",
        ),
        (
            "atlas cluster c --features f --output o --method hdbscan --quantile 0.5",
            "--quantile would have no effect with --method hdbscan",
        ),
        (
            "atlas cluster c --features f --output o --bandwidth 1 --quantile 0.5",
            "--quantile would have no effect with --bandwidth",
        ),
        (
            "atlas similar c --features f --output o --tile s@1,1 --pretrained W",
            "--pretrained would have no effect without --image",
        ),
        (
            "export x.ckpt --output m.pt --arm warm --coverage .8",
            "--arm, --coverage would have no effect without --evidence",
        ),
        (
            "export x.ckpt --output m.pt --config c.yaml --no-training-data",
            "--config would have no effect with --no-training-data",
        ),
        (
            "compare --config c.yaml --output o --report-only --dry-run",
            "--report-only would have no effect with --dry-run",
        ),
        (
            "tile m.csv --cache c --mpp 1 --workers 77 --scheduler tcp://h:1",
            "--workers would have no effect with --scheduler",
        ),
        ("tile m.csv --cache c --mpp 1 --regions-share 0.5", "--regions-share would have no effect without"),
        ("augment c --output sheet.jpg", "--output must be a file with the ending .png, not sheet.jpg"),
    ],
)
def test_an_option_without_an_effect_is_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["mow"], ["tile"], ["tile", "m.csv", "--cache", "c", "--mpp", "x"]])
def test_usage_errors_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        main(["tile", str(tmp_path / "none.csv"), "--cache", "c", "--mpp", "2", "--debug"])


def test_help_of_the_imaging_wing_loads_no_torch() -> None:
    program = (
        "import sys\nfrom slidetl.cli import main\n"
        "try:\n    main(['tile', '--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {'torch', 'zarr', 'scipy', 'sklearn', 'matplotlib', 'openslide'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_training_command_builds_no_parser_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from slidetl.cli.training import GradingCLI

    built: list[None] = []
    add_arguments = GradingCLI.add_arguments_to_parser
    monkeypatch.setattr(
        GradingCLI, "add_arguments_to_parser", lambda *args: built.append(add_arguments(*args))
    )
    assert main(["test", "--nonsense"]) == 2
    assert len(built) == 1 and gc.isenabled()


def test_nothing_asks_the_network_for_news() -> None:
    program = (
        "import os\nfrom slidetl.cli import main\n"
        "try:\n    main(['tile', '--help'])\nexcept SystemExit:\n    pass\n"
        "for name in ('HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK'):\n"
        "    assert os.environ[name] == '1'"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_training_that_loses_the_exception_of_sigterm_is_interrupted_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops an exception within a ``__del__``, such as that of a loader whose epoch has ended."""

    class Loader:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def run(*_: object) -> int:
        loader = Loader()
        del loader
        error = RuntimeError("DataLoader worker is killed by signal: Terminated.")
        error.add_note("resume with --ckpt_path last.ckpt")
        raise error

    monkeypatch.setattr("slidetl.cli.training.run", run)
    of_children = signal.getsignal(signal.SIGCHLD)
    try:
        assert main(["fit"]) == 143
    finally:
        signal.signal(signal.SIGCHLD, of_children)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "slidetl: interrupted; resume with --ckpt_path last.ckpt"
