from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser

from slidetl.cli import main
from slidetl.errors import UsageError
from slidetl.training.grader import SlideGrader
from slidetl.training.slots import SLOTS, check_name, parse, permit


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(SlideGrader, "model")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    return parser


OURS = "slidetl.models.aggregators.GatedAttention"
REFUSED: dict[str, dict[str, Any]] = {
    "function": {"model": {"aggregator": {"class_path": "os.system", "init_args": {"command": "true"}}}},
    "function by its name": {"model": {"aggregator": "os._exit"}},
    "through a module of ours": {"model": {"aggregator": {"class_path": "slidetl.models.heads.torch.load"}}},
    "a program of ours": {"model": {"head": {"class_path": "slidetl.cli.main"}}},
    "a class of another slot": {"model": {"head": {"class_path": OURS}}},
    "the base of another library": {"model": {"transfer": {"class_path": "torch.nn.Linear"}}},
    "a callback that calls": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "pytorch_lightning.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "os.abort"},
                }
            ]
        }
    },
    "a function in an argument": {
        "trainer": {
            "strategy": {
                "class_path": "pytorch_lightning.strategies.DDPStrategy",
                "init_args": {"ddp_comm_hook": "os.abort"},
            }
        }
    },
    "nothing": {"model": {"transfer": None}},
    "no network": {"model": {"backbone": None}},
    "a logger with a server": {
        "trainer": {"logger": {"class_path": "pytorch_lightning.loggers.MLFlowLogger"}}
    },
}


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED.keys())
def test_nothing_outside_the_slots_passes(values: dict[str, Any], parser: LightningArgumentParser) -> None:
    with pytest.raises((UsageError, ArgumentError)):
        parse(parser, values)


def test_the_class_of_a_slot_passes(parser: LightningArgumentParser) -> None:
    for key, values in {
        "model": {
            "aggregator": {"class_path": OURS},
            "transfer": {"class_path": "slidetl.models.transfer.Scratch"},
        },
        "trainer": {
            "callbacks": [{"class_path": "pytorch_lightning.callbacks.Timer"}],
            "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "x"}},
        },
    }.items():
        assert parse(parser, {key: values})[key]
    with pytest.raises((UsageError, ArgumentError)):
        parse(parser, {"model": {"transfer": {"class_path": "slidetl.open_slide"}}})


def test_an_allowed_class_must_fit_its_slot(
    parser: LightningArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fitlab.py").write_text(
        "from slidetl.models.aggregators import MeanPooling\n"
        "class Mine(MeanPooling): pass\n"
        "class Other: pass\n"
        "def built(width: int) -> MeanPooling: return MeanPooling(width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"model": {"aggregator": {"class_path": "fitlab.Mine"}}}
    with pytest.raises(UsageError, match=r"would import 'fitlab\.Mine'.*add --allow fitlab\.Mine"):
        parse(parser, mine)
    assert "fitlab" not in sys.modules
    assert parse(parser, mine, ["fitlab"])
    for wrong in ("fitlab.Other", "fitlab.os"):
        with pytest.raises((UsageError, ArgumentError)):
            parse(parser, {"model": {"aggregator": {"class_path": wrong}}}, ["fitlab"])
    with pytest.raises(UsageError, match="would import"):  # what one call allows, the next does not
        parse(parser, mine)
    away = {"model": {"aggregator": {"class_path": "awaylab.pool.Mine"}}}
    with pytest.raises(UsageError, match="no Python module 'awaylab'; install it, or set PYTHONPATH to"):
        parse(parser, away, ["awaylab"])


def test_a_slot_names_what_it_takes() -> None:
    for place, slot in SLOTS.items():
        assert check_name(place, f"{slot.homes[0]}.Thing")
        with pytest.raises(UsageError, match=r"expected a class of .*--allow mylab\.Thing"):
            check_name(place, "mylab.Thing")
    with pytest.raises(UsageError, match="expected no class"):
        check_name("model.lr", "mylab.Thing")
    for name in ("jsonargparse", "a b", ""):
        with pytest.raises(UsageError, match="--allow"):
            permit([name])


def test_a_configuration_does_not_allow_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    Path("evil.yaml").write_text(
        "allow: [os]\n"
        "data: {manifest: m.csv, cache: c}\n"
        f"model: {{aggregator: {{class_path: os.system, init_args: {{command: touch {ran}}}}}}}\n"
    )
    assert main(["fit", "--config", "evil.yaml"]) == 2
    assert "it would import 'os.system'" in capsys.readouterr().err
    assert not ran.exists()
