from __future__ import annotations

import pytest
import torch
from torch import nn

from slidetl.errors import UsageError, WeightsError
from slidetl.models.backbones import Backbone
from slidetl.models.cbr import CBR, CBR_NAMES
from slidetl.models.spec import BackboneSpec

# Kernels by hand, one product per layer; batch norm adds two numbers per channel.
KERNELS = {
    "cbr_larget": 49 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 512),
    "cbr_largew": 49 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512),
    "cbr_small": 49 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256),
    "cbr_tiny": 25 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512),
    "cbr_tiny_published": 25 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256),
}
CHANNELS = {
    "cbr_larget": 32 + 64 + 128 + 256 + 512,
    "cbr_largew": 64 + 128 + 256 + 512,
    "cbr_small": 32 + 64 + 128 + 256,
    "cbr_tiny": 64 + 128 + 256 + 512,
    "cbr_tiny_published": 32 + 64 + 128 + 256,
}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", CBR_NAMES)
def test_parameters_are_those_of_hand_arithmetic(name: str) -> None:
    with torch.device("meta"):
        assert parameters(CBR(name)) == KERNELS[name] + 2 * CHANNELS[name]
        assert parameters(CBR(f"{name}_elu")) == KERNELS[name] + 2 * CHANNELS[name]
        assert parameters(CBR(f"{name}_nobn")) == KERNELS[name] + CHANNELS[name]  # biases


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "activation", "norms"),
    [
        ("cbr_tiny_published", nn.ReLU, 4),
        ("cbr_tiny_published_elu", nn.ELU, 4),
        ("cbr_small_nobn", nn.ReLU, 0),
        ("cbr_larget_elu_nobn", nn.ELU, 0),
    ],
)
def test_variants_embed_script_and_name_their_blocks(
    name: str, activation: type[nn.Module], norms: int
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name, in_channels=2)).eval()
    modules = list(backbone.modules())
    assert any(isinstance(module, activation) for module in modules)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == norms
    tiles = torch.randint(0, 256, (2, 2, 48, 40), dtype=torch.uint8)
    with torch.inference_mode():
        embeddings = backbone(tiles)
        torch.testing.assert_close(torch.jit.script(backbone)(tiles), embeddings)
    assert embeddings.shape == (2, backbone.num_features)
    assert list(backbone.blocks()) == [f"layers.{i}" for i in range(5 if "larget" in name else 4)]


def test_pools_lie_between_layers_and_after_all_but_the_tallest() -> None:
    for name, side in (("cbr_larget", 4), ("cbr_small", 4), ("cbr_tiny_published", 4)):
        network = CBR(name).eval()
        with torch.inference_mode():
            assert network.layers(torch.rand(1, 3, 64, 64)).shape[-1] == side


def test_without_batch_norm_the_signal_neither_dies_nor_explodes() -> None:
    torch.manual_seed(0)
    for name in ("cbr_tiny_published_nobn", "cbr_tiny_published_elu_nobn"):
        with torch.inference_mode():
            embeddings = CBR(name)(torch.randn(8, 3, 32, 32))
        assert 0.1 < embeddings.std() < 10


def test_unknown_variants_and_options_are_refused_in_one_line() -> None:
    with pytest.raises(WeightsError, match="no CBR network is called 'cbr_huge'; expected one of cbr_"):
        Backbone(BackboneSpec("cbr_huge"))
    with pytest.raises(WeightsError, match="no weights were published for cbr_tiny"):
        Backbone(BackboneSpec("cbr_tiny", "imagenet")).load_pretrained()
    with pytest.raises(UsageError, match="cbr_tiny has no gradient checkpointing"):
        Backbone(BackboneSpec("cbr_tiny", gradient_checkpointing=True))
