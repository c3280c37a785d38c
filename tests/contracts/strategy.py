"""What every transfer strategy must do, whatever its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from slidetl.data.datasets import Bag
from slidetl.models.aggregators import GatedAttention
from slidetl.models.backbones import Backbone, read_pretrained
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import Seen, recorded
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import SharedWeights, TransferStrategy
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader
from tests.small import small_spec

TILE_PX = 32  # the least that the small backbone takes
BACKBONE = small_spec()


class Bags(pl.LightningDataModule):
    """Eight bags of three tiles or volumes, some padded, four to a batch of all processes."""

    def __init__(self, volumes: bool = False) -> None:
        super().__init__()
        self.tile_spec = TileSpec(mpp=4, tile_size_px=TILE_PX)
        if volumes:
            self.tile_spec = TileSpec(spacing_mm=1, tile_size_px=TILE_PX)

    def train_dataloader(self) -> DataLoader[Bag]:
        generator = torch.Generator().manual_seed(5)
        bags: list[Bag] = []
        for number in range(8):
            tiles = torch.randint(0, 256, (3, 3, TILE_PX, TILE_PX), dtype=torch.uint8, generator=generator)
            if self.tile_spec.is_volume:
                tiles = torch.rand(3, 1, *self.tile_spec.tile_shape, generator=generator)
            mask = torch.arange(3) < 1 + number % 3
            tiles[~mask] = 0
            grade = torch.tensor(number % 5)
            bags.append(
                {"tiles": tiles, "mask": mask, "grade": grade, "readers": grade.view(1), "labels": {}}
            )
        rank, size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(bags[rank::size], batch_size=4 // size)  # type: ignore[arg-type]


def batch(volumes: bool = False) -> Bag:
    bags: Bag = next(iter(Bags(volumes).train_dataloader()))
    return bags


def make_grader(strategy: TransferStrategy, backbone: BackboneSpec = BACKBONE, **options: Any) -> SlideGrader:
    torch.manual_seed(0)
    return SlideGrader(backbone, transfer=strategy, **options)


def fit(grader: SlideGrader, root: Path, ckpt_path: Path | None = None, **options: Any) -> SlideGrader:
    """Two epochs of two steps, with Lightning."""
    torch.manual_seed(1)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [ModelCheckpoint(root, "{epoch}", save_top_k=-1)],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "use_distributed_sampler": False,
            "default_root_dir": root,
            **options,
        }
    )
    volumes = grader.network.backbone.takes_volumes
    trainer.fit(grader, Bags(volumes), ckpt_path=ckpt_path, weights_only=False)
    return grader


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*have no `val_dataloader`",
    "ignore:The dirpath",
    "ignore:.*torch.jit",
)
class StrategyContract:
    """Subclass it and set ``strategy``; ``frozen`` where the backbone does not train."""

    strategy: TransferStrategy
    backbone = BACKBONE
    frozen = False
    precision = "bf16-mixed"

    def network(self) -> GradingNetwork:
        """Built and started as a training does it."""
        torch.manual_seed(0)
        backbone = Backbone(self.backbone)
        self.strategy.adapt(backbone)
        features = backbone.num_features
        network = GradingNetwork(backbone, GatedAttention(features), CumulativeLink(features, 5))
        self.strategy.start(backbone)
        network.train()
        self.strategy.set_training_mode(backbone, epoch=100)
        return network

    def penalties(self, network: GradingNetwork) -> dict[str, Tensor]:
        """Of one batch in training mode."""
        reference = self.strategy.reference(network.backbone)
        if reference is None:
            return {}
        bags = batch(self.backbone.takes_volumes)
        with recorded(network.backbone, self.strategy.watched(network.backbone)) as activations:
            network(bags["tiles"], bags["mask"])
        seen = Seen(bags["tiles"], bags["mask"], activations)
        return self.strategy.penalties(network, reference, seen, 0.0)

    def test_every_trained_parameter_is_in_one_group(self) -> None:
        network = self.network()
        groups = self.strategy.parameter_groups(network, lr=0.1, weight_decay=0.01)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        trained = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(trained)
        backbone = {id(parameter) for parameter in network.backbone.parameters()}
        assert backbone.isdisjoint(grouped) == self.frozen
        for group in groups:
            assert group["params"] and group["lr"] > 0
            ndims = {min(2, parameter.ndim) for parameter in group["params"]}
            places = {id(parameter) in backbone for parameter in group["params"]}
            assert len(ndims) == 1
            assert group["lr"] == 0.1 or places == {True}
            if isinstance(self.strategy, SharedWeights):  # what is pulled elsewhere has no decay on top
                decay = self.strategy.beta if places == {False} and self.strategy.decoupled else 0.0
            else:
                decay = 0.01
            assert group["weight_decay"] == (decay if ndims == {2} else 0.0)

    def test_a_step_changes_what_is_trained_and_nothing_else(self) -> None:
        network = self.network()
        reference = self.strategy.reference(network.backbone)
        kept = {name: value.clone() for name, value in reference.weights.items()} if reference else {}
        optimizer = torch.optim.AdamW(self.strategy.parameter_groups(network, lr=0.01, weight_decay=0.01))
        before = {name: value.clone() for name, value in network.named_parameters()}
        bags = batch(self.backbone.takes_volumes)
        with recorded(network.backbone, self.strategy.watched(network.backbone)) as activations:
            embeddings = network.embed(bags["tiles"])
        assert embeddings.requires_grad != self.frozen  # no graph is kept for a frozen backbone
        logits, _ = network.grade(embeddings, bags["mask"])
        loss = network.head.loss(logits, bags["grade"])
        if reference is not None:
            seen = Seen(bags["tiles"], bags["mask"], activations)
            for penalty in self.strategy.penalties(network, reference, seen, 0.5).values():
                assert penalty.shape == () and penalty.isfinite()
                loss = loss + penalty
        loss.backward()
        optimizer.step()
        if reference is not None:
            self.strategy.after_step(network, reference, optimizer.param_groups, 0.5)
            for name, value in reference.weights.items():
                assert torch.equal(value, kept[name]), name
        for name, value in network.named_parameters():
            assert value.isfinite().all()
            if name != "aggregator.score.bias":  # the softmax does not see it: its gradient is rounding
                assert torch.equal(value, before[name]) != value.requires_grad, name

    def test_pretrained_weights_cost_nothing_in_training_mode(self) -> None:
        network = self.network()
        if self.strategy.reference(network.backbone) is None:
            assert self.penalties(network) == {}
            return
        network.backbone.load_pretrained()
        found = self.penalties(network)
        assert all(value.item() == 0 for name, value in found.items() if name != "new_layers")
        with torch.no_grad():
            for parameter in network.backbone.parameters():
                parameter.add_(0.01)
        found = self.penalties(network)
        assert all(value.item() > 0 for value in found.values())

    @pytest.mark.slow  # a minute over all strategies
    def test_saved_and_loaded_it_goes_on_alike(self, tmp_path: Path) -> None:
        at_once = fit(make_grader(self.strategy, self.backbone), tmp_path)
        first = tmp_path / "epoch=0.ckpt"
        # Written a moment ago, with the strategy as an object: a command's own holds plain values only.
        checkpoint = torch.load(first, weights_only=False)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"network"}
        assert ("reference" in checkpoint) == (at_once.reference is not None)
        resumed = fit(make_grader(self.strategy, self.backbone), tmp_path / "resumed", ckpt_path=first)
        moved = 0
        for (name, value), (_, there) in zip(
            at_once.state_dict().items(), resumed.state_dict().items(), strict=True
        ):
            assert torch.equal(value, there), name
            moved += not torch.equal(value, checkpoint["state_dict"][name])
        assert moved > 3

    @pytest.mark.slow  # a minute over all strategies
    def test_mixed_precision_accumulation_and_clipping_and_it_scripts(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {
            "precision": self.precision,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
        }
        grader = make_grader(self.strategy, self.backbone)
        before = {name: value.clone() for name, value in grader.network.head.named_parameters()}
        fit(grader, tmp_path, max_epochs=1, **options)
        assert all(value.isfinite().all() for value in grader.state_dict().values())
        assert all(value.dtype == torch.float32 for value in grader.parameters())
        head = dict(grader.network.head.named_parameters())
        assert any(not torch.equal(value, before[name]) for name, value in head.items())
        network = grader.network.eval()
        scripted = torch.jit.script(network)
        assert scripted.state_dict().keys() == network.state_dict().keys()  # no reference inside
        bags = batch(self.backbone.takes_volumes)
        with torch.inference_mode():
            here, there = (one(bags["tiles"], bags["mask"])[0] for one in (network, scripted))
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


def is_pretrained(backbone: Backbone, keys: list[str] | None = None) -> dict[str, bool]:
    """Whether each entry of the state is that of the pretrained weights."""
    weights = read_pretrained(backbone.spec).weights
    state = backbone.net.state_dict()
    return {
        key: state[key].shape == weights[key].shape and torch.equal(state[key], weights[key]) for key in state
    }
