from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slidetl.errors import UsageError, WeightsError
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import GaborInit, MeanVarInit, SlimHybrid
from slidetl.models.volumes import Conv3dNetwork, unit_window
from slidetl.tiles.grid import TileSpec

VOLUMES = torch.rand(3, 1, 17, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_window_goes_from_zero_to_one() -> None:
    hu = torch.tensor([-2000, -1000, -300, 400, 3000], dtype=torch.int16)
    assert unit_window(hu, -1000, 400).tolist() == [0, 0, 0.5, 1, 1]


def test_the_network_of_the_talk_has_512_features_of_a_patch_of_64_voxels() -> None:
    network = Conv3dNetwork("conv3d_64").eval()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    assert [module.out_channels for module in convolutions] == [8, 16, 32, 64, 64]
    patch = torch.rand(1, 1, 64, 64, 64)
    with torch.inference_mode():
        last = network.layers(patch)
        assert last.shape == (1, 64, 2, 2, 2)
        assert torch.equal(network(patch), last.flatten(1))  # the adaptive mean changes nothing here
    assert network.head_hidden_size == 512


@pytest.mark.parametrize("name", ["conv3d_8", "inflated_resnet10t", "inflated_tf_efficientnet_lite0"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_networks_embed_script_and_name_their_blocks(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name)).eval()
    with torch.inference_mode():
        embeddings = backbone(VOLUMES)
        torch.testing.assert_close(torch.jit.script(backbone)(VOLUMES), embeddings)
    assert embeddings.shape == (3, backbone.num_features) and embeddings.std() > 0
    assert len(backbone.blocks()) >= 4
    assert not any(isinstance(module, nn.Conv2d) for module in backbone.modules())


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0"])
def test_a_volume_that_is_constant_in_depth_has_the_activations_of_its_slice(
    name: str, in_channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    plane = Backbone(BackboneSpec(name)).train()
    for _ in range(3):  # statistics of batch norm that are not those of a fresh network
        plane(torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8))
    weights = tmp_path / "w.pth"
    torch.save(plane.net.state_dict(), weights)
    inflated = Backbone(BackboneSpec(f"inflated_{name}", str(weights), in_channels=in_channels)).eval()
    plane = Backbone(BackboneSpec(name, str(weights), in_channels=in_channels)).eval()
    found: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for backbone, kept in ((inflated, found), (plane, expected)):
        backbone.load_pretrained()
        for block, module in backbone.blocks().items():

            def keep(
                module: nn.Module,
                inputs: object,
                output: torch.Tensor,
                of: str = block,
                kept: dict[str, torch.Tensor] = kept,
            ) -> None:
                kept[of] = output

            module.register_forward_hook(keep)
    grey = torch.randint(0, 256, (1, 1, 48, 64), dtype=torch.uint8)
    with torch.inference_mode():
        here = inflated((grey.float() / 255).unsqueeze(2).expand(-1, -1, 17, -1, -1))
        # Each colour is the grey value, with its own mean and standard deviation.
        torch.testing.assert_close(here, plane(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert len(found) >= 4
    for block, activation in found.items():
        for depth in range(activation.shape[2]):  # the first and the last slice too
            torch.testing.assert_close(activation[:, :, depth], expected[block], rtol=1e-3, atol=1e-3)


def test_a_fresh_inflated_network_is_random_in_depth() -> None:
    torch.manual_seed(0)
    kernel = next(Backbone(BackboneSpec("inflated_resnet10t")).net.parameters())
    assert not torch.equal(kernel[:, :, 0], kernel[:, :, 1])
    assert kernel.shape[2:] == (3, 3, 3)


def test_networks_that_mix_positions_otherwise_are_refused() -> None:
    for name in ("inflated_test_vit", "inflated_mobilenetv3_small_050", "inflated_convnext_atto"):
        with pytest.raises(UsageError, match=f"{name} cannot be inflated: not only convolutions"):
            Backbone(BackboneSpec(name))
    with pytest.raises(WeightsError, match="'conv3d_6': expected the channels at the end, a multiple of 8"):
        Backbone(BackboneSpec("conv3d_6"))
    with pytest.raises(WeightsError, match="no weights were published for conv3d_8"):
        Backbone(BackboneSpec("conv3d_8")).load_pretrained()
    backbone = Backbone(BackboneSpec("conv3d_8"))
    with pytest.raises(UsageError, match="has no first convolution"):
        GaborInit().start(backbone)
    with pytest.raises(UsageError, match=r"cannot be narrowed above 'layers\.1'"):
        SlimHybrid("layers.1").adapt(backbone)


def test_tiles_and_volumes_are_not_mixed() -> None:
    of_volumes, of_tiles = Backbone(BackboneSpec("conv3d_8")), Backbone(BackboneSpec("cbr_tiny"))
    with pytest.raises(UsageError, match="conv3d_8 takes volumes"):
        of_volumes(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UsageError, match="conv3d_8 takes volumes"):
        of_volumes(torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16))  # Hounsfield units without the window
    with pytest.raises(UsageError, match=r"cbr_tiny takes tiles \[N, C, H, W\]"):
        of_tiles(VOLUMES)
    of_volumes.check_tiles(TileSpec(spacing_mm=1.0))
    of_volumes.check_tiles(TileSpec(spacing_mm=1.0, tile_size_px=8))
    with pytest.raises(UsageError, match="inflated_test_resnet takes no patches of 8 voxels: input image"):
        Backbone(BackboneSpec("inflated_test_resnet")).check_tiles(TileSpec(spacing_mm=1.0, tile_size_px=8))
    of_tiles.check_tiles(TileSpec(mpp=1.0))
    with pytest.raises(UsageError, match="conv3d_8 takes volumes, the cache has tiles of slides"):
        of_volumes.check_tiles(TileSpec(mpp=1.0))
    with pytest.raises(
        UsageError, match=r"cbr_tiny takes tiles of slides, the cache has volumes; use .*conv3d"
    ):
        of_tiles.check_tiles(TileSpec(spacing_mm=1.0))


def test_own_weights_of_an_inflated_network_load_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Backbone(BackboneSpec("inflated_resnet10t"))
    torch.save(first.net.state_dict(), tmp_path / "w.pth")
    second = Backbone(BackboneSpec("inflated_resnet10t", str(tmp_path / "w.pth")))
    second.load_pretrained()
    assert weights_sha256(first) == weights_sha256(second)


def test_a_checkpoint_gives_its_backbone_and_says_what_it_was_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, path = Backbone(BackboneSpec("conv3d_8")), tmp_path / "best.ckpt"
    trained.mean.fill_(0.25)
    state = {f"network.backbone.{key}": value for key, value in trained.state_dict().items()}
    spec = TileSpec(spacing_mm=1.0, tile_size_px=16)
    record = {"slides": [["s", "P", "f" * 64, "train"]], "config": ""}
    kept = {"state_dict": {**state, "network.head.first": torch.zeros(1)}, "lineage": ["ab"]}
    torch.save({**kept, "tile_spec": spec.to_dict()}, path)
    loaded = Backbone(BackboneSpec("conv3d_8", str(path)))
    with pytest.warns(UserWarning, match="no record of the slides that it was trained on"):
        loaded.load_pretrained()
    kept["record"] = record
    torch.save({**kept, "tile_spec": spec.to_dict()}, path)
    loaded.load_pretrained()
    drawn = Backbone(BackboneSpec("conv3d_8", str(path)))
    MeanVarInit().start(drawn)
    assert loaded.record == drawn.record == record
    assert weights_sha256(loaded) == weights_sha256(trained) and loaded.lineage[1:] == ("ab",)
    assert loaded.describe_other_tiles(spec) == []
    (line,) = loaded.describe_other_tiles(TileSpec(spacing_mm=1.0, tile_size_px=16, window_hu=(-160, 240)))
    assert line.endswith("was trained on tiles of window_hu (-1000.0, 400.0), these have (-160.0, 240.0)")
    with pytest.raises(WeightsError, match="not weights of conv3d_16"):
        Backbone(BackboneSpec("conv3d_16", str(path))).load_pretrained()
    broken: object
    for broken in ({"state_dict": {}}, {"state_dict": 1}, [1], {**kept, "tile_spec": {"mpp": -1}}):
        torch.save(broken, path)
        with pytest.raises(WeightsError, match="expected a checkpoint of 'slidetl fit', with a backbone"):
            Backbone(BackboneSpec("conv3d_8", str(path))).load_pretrained()
