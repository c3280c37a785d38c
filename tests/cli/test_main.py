from __future__ import annotations

import gc
import re
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
