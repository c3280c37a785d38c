"""Gradient checkpointing in a training: less memory, the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from slidetl.cli import main
from slidetl.data.datasets import Bag
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import WarmRestart
from slidetl.training.checkpoint import load_grader
from slidetl.training.grader import SlideGrader
from slidetl.training.room import describe_others
from slidetl.training.schedules import OneCycle
from tests.conftest import Study


def step(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
    """Bytes of the activations that a training step keeps, and its gradients."""
    torch.manual_seed(0)
    spec = BackboneSpec(gradient_checkpointing=checkpointing)
    grader = SlideGrader(spec, transfer=WarmRestart(), schedule=OneCycle()).train()
    grader.transfer.set_training_mode(grader.network.backbone)
    weights = {parameter.data_ptr() for parameter in grader.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
        return tensor

    bag: Bag = {
        "tiles": torch.randint(0, 256, (1, 16, 3, 64, 64), dtype=torch.uint8),
        "mask": torch.ones(1, 16, dtype=torch.bool),
        "grade": torch.tensor([3]),
        "readers": torch.zeros(1, 0, dtype=torch.long),
        "labels": {},
    }
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = grader.training_step(bag, 0)
    loss.backward()
    gradients = {n: weight.grad for n, weight in grader.named_parameters() if weight.grad is not None}
    return sum(kept.values()), gradients


@pytest.mark.slow
def test_a_step_keeps_less_and_has_the_same_gradients() -> None:
    plain, gradients = step(False)
    checkpointed, again = step(True)
    assert checkpointed < plain / 2
    assert gradients.keys() == again.keys() and len(gradients) > 100
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_configuration_switches_it_on(study: Study, tmp_path: Path) -> None:
    states = []
    for on in (False, True):
        config = tmp_path / f"{on}.yaml"
        config.write_text(yaml.safe_dump({"model": {"backbone": {"gradient_checkpointing": on}}}))
        root = tmp_path / str(on)
        assert main(["fit", "--config", str(config), *study.options(root), "--trainer.max_epochs=1"]) == 0
        grader = load_grader(root / "logs" / "version_0" / "checkpoints" / "last.ckpt")
        assert grader.network.backbone.spec.gradient_checkpointing is on
        states.append(grader.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "says"),
    [
        (17, "this fits: --data.batch_size 2\n"),
        (3, "this fits: --data.batch_size 1 --data.bag_size 2\n"),
        (
            0,
            "not even one tile fits, or the card cannot run the network: use a smaller --model.backbone.name "
            "(GET was unable to find an engine to execute this computation)\n",
        ),
    ],
)
def test_a_card_without_room_names_the_batch_that_fits(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: int,
    says: str,
) -> None:
    embed = Backbone.forward
    no_engine = RuntimeError("GET was unable to find an engine to execute this computation")
    full = torch.OutOfMemoryError("CUDA out of memory") if room else no_engine

    def forward(self: Backbone, tiles: Tensor) -> Tensor:
        if len(tiles) > room:
            raise full
        return embed(self, tiles)

    monkeypatch.setattr(Backbone, "forward", forward)
    assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=1"]) == 2
    last = capsys.readouterr().err.splitlines(keepends=True)[-1]
    start = "slidetl: error: cpu has no room for --data.batch_size 4 with --data.bag_size 8; "
    assert last == start + says


def test_memory_that_others_use_is_named_if_it_is_a_large_part() -> None:
    gib = 2**30
    assert describe_others(2 * gib, 80 * gib, 16 * gib) == " (other processes use 62 of its 80 GiB)"
    assert describe_others(2 * gib, 80 * gib, 77 * gib) == ""
