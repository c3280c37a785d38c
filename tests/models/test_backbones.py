from __future__ import annotations

import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from slidetl.errors import UsageError, WeightsError
from slidetl.models.backbones import (
    Backbone,
    local_weights,
    read_pretrained,
    weights_sha256,
    without_downloads,
)
from slidetl.models.spec import BackboneSpec, Pooling
from tests.small import SMALL, small_spec


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_embeds_uint8_tiles_with_the_normalisation_inside(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name)).eval()
    tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        embeddings = backbone(tiles)
        mean, std = (
            torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN),
            torch.tensor(timm.data.IMAGENET_DEFAULT_STD),
        )
        by_hand = backbone.net((tiles / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert embeddings.shape == (3, backbone.num_features)
    torch.testing.assert_close(embeddings, by_hand, atol=1e-4, rtol=1e-4)


def test_channels_last_changes_the_speed_alone() -> None:
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    results = []
    for channels_last in (True, False):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(Backbone(small_spec(channels_last=channels_last)).eval()(tiles))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_imagenet_weights_load_with_strict_keys_and_know_a_palace(test_data: Path) -> None:
    path = test_data / "weights" / "mobilenetv2_100.imagenet.safetensors"
    spec = BackboneSpec("mobilenetv2_100", str(path))
    weights = read_pretrained(spec).weights
    whole = timm.create_model("mobilenetv2_100").eval()
    whole.load_state_dict(weights, strict=True)
    picture = Image.fromarray(load_sample_image("china.jpg"))
    scale = 256 / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    tile = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1)[None]
    backbone = Backbone(spec).eval()
    backbone.load_pretrained()
    with torch.inference_mode():
        logits = whole.get_classifier()(backbone(tile))  # type: ignore[operator]
        probabilities = logits.softmax(1)[0]
    assert probabilities.argmax() == 698  # palace
    assert probabilities[698].item() == pytest.approx(0.81, abs=0.03)


@pytest.mark.slow
def test_weights_files_of_both_kinds_and_the_normalisation_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = timm.create_model("resnet18", num_classes=3).state_dict()  # with a classifier of its own
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors", {"mean": "[0.5, 0.6, 0.7]", "std": "[0.1, 0.2, 0.3]"})
    for name in ("w.pth", "w.safetensors"):
        backbone = Backbone(BackboneSpec("resnet18", str(tmp_path / name)))
        backbone.load_pretrained()
        torch.testing.assert_close(backbone.net.state_dict()["conv1.weight"], state["conv1.weight"])
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor([0.5, 0.6, 0.7]))
    torch.testing.assert_close(backbone.std.flatten(), torch.tensor([0.1, 0.2, 0.3]))


# Two sides of tiles, and whether gradient checkpointing exists; timm's smallest of a family where it has one.
FAMILIES = {
    "resnet18": (64, 48, True),
    "test_convnext": (64, 96, True),
    "test_vit": (80, 48, True),  # its own is 160 px
    "inception_v3": (80, 96, False),
    "swin_tiny_patch4_window7_224": (64, 96, True),
    "cbr_tiny_published": (64, 48, False),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(("inception", "swin")) else name
        for name in FAMILIES
    ],
)
def test_every_family_takes_other_tiles_and_channels_trains_and_scripts_after_it(name: str) -> None:
    side, other_side, checkpoints = FAMILIES[name]
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(name, in_channels=4, gradient_checkpointing=checkpoints)).train()
    tiles = torch.randint(0, 256, (2, 4, side, side), dtype=torch.uint8)
    kernel = next(value for value in backbone.net.parameters() if value.ndim == 4)  # the first layer's
    before = kernel.detach().clone()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    backbone(tiles).square().mean().backward()
    optimizer.step()
    assert kernel.shape[1] == 4 and not torch.equal(kernel, before)
    backbone.eval()
    scripted = torch.jit.script(backbone)
    with torch.inference_mode():
        embeddings = backbone(tiles)
        assert embeddings.shape == (2, backbone.num_features) and embeddings.isfinite().all()
        torch.testing.assert_close(scripted(tiles), embeddings, atol=1e-4, rtol=1e-4)
        other = torch.randint(0, 256, (1, 4, other_side, other_side), dtype=torch.uint8)
        torch.testing.assert_close(scripted(other), backbone(other), atol=1e-4, rtol=1e-4)
    assert len(backbone.blocks()) >= 4


def test_blocks_are_children_where_timm_lists_modules_that_are_not_there() -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneSpec("twins_svt_small"))
    assert list(backbone.blocks())[:3] == ["patch_embeds", "pos_drops", "blocks"]


def test_gradient_checkpointing_changes_memory_and_nothing_else() -> None:
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(BackboneSpec("test_vit", gradient_checkpointing=checkpointing))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, saved=saved: saved.append(value.numel()) or value,  # type: ignore[misc]
            lambda value: value,
        ):
            loss = backbone(tiles).square().mean()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([value.grad for value in backbone.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < kept[0] / 3
    with pytest.raises(UsageError, match="inception_v3 has no gradient checkpointing"):
        Backbone(BackboneSpec("inception_v3", gradient_checkpointing=True))


@pytest.mark.slow
@pytest.mark.parametrize("in_channels", [1, 2, 4])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
def test_pretrained_kernels_are_adapted_to_the_channels_as_timm_does(
    name: str, in_channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0).state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state, path, {"mean": "[0.5, 0.6, 0.7]", "std": "[0.1, 0.2, 0.3]"})
    backbone = Backbone(BackboneSpec(name, str(path), in_channels=in_channels))
    backbone.load_pretrained()
    overlay = {"file": str(path)}
    by_timm = timm.create_model(
        name, num_classes=0, in_chans=in_channels, pretrained=True, pretrained_cfg_overlay=overlay
    )
    for key, value in by_timm.state_dict().items():
        torch.testing.assert_close(backbone.net.state_dict()[key], value)
    expected = {1: [0.6], 2: [0.5, 0.6], 4: [0.5, 0.6, 0.7, 0.5]}[in_channels]
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(expected))
    # A tile whose channels all say the same gives what the same tile in RGB gives, under one normalisation.
    in_rgb = Backbone(BackboneSpec(name, str(path))).eval()
    in_rgb.load_pretrained()
    for buffer in (in_rgb.mean, in_rgb.std, backbone.eval().mean, backbone.std):
        buffer.fill_(0.5)
    if in_channels == 1:
        tile = torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8)
        with torch.inference_mode():
            in_grey = in_rgb(tile.expand(1, 3, 64, 64))
            torch.testing.assert_close(backbone(tile), in_grey, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_network_of_one_channel_sees_the_luma_of_rgb_tiles() -> None:
    tiles = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    grey = [np.asarray(Image.fromarray(tile.permute(1, 2, 0).numpy()).convert("L")) for tile in tiles]
    luma = torch.from_numpy(np.stack(grey)).unsqueeze(1)  # Pillow rounds it
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("cbr_tiny", in_channels=1)).eval()
    seen: list[torch.Tensor] = []
    backbone.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        embedded = backbone(tiles)
        backbone(luma)
        rounding = 0.51 / 255 / backbone.std.item()
        torch.testing.assert_close(seen[0], seen[1], atol=rounding, rtol=0)
        backbone.net._forward_pre_hooks.clear()
        torch.testing.assert_close(torch.jit.script(backbone)(tiles), embedded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("in_channels", "tile_channels"), [(2, 3), (4, 3), (3, 1), (1, 4)])
def test_tiles_of_other_channels_are_one_line(in_channels: int, tile_channels: int) -> None:
    backbone = Backbone(BackboneSpec("cbr_tiny", in_channels=in_channels))
    expected = f"cbr_tiny takes {in_channels} channels, the tiles have {tile_channels}; set"
    with pytest.raises(UsageError, match=expected):
        backbone(torch.zeros(1, tile_channels, 64, 64, dtype=torch.uint8))


def hub_repository(folder: Path, **model_args: Any) -> None:
    """The files of a small transformer, as timm's form on the Hugging Face hub has them."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"depth": 1, "img_size": 32, "num_classes": 0, **model_args}
    network = timm.create_model("vit_tiny_patch16_224", **arguments)
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {
        "mean": [0.7, 0.5, 0.7],
        "std": [0.2, 0.2, 0.2],
        "first_conv": "patch_embed.proj",
        "input_size": [3, 32, 32],
        "fixed_input_size": True,
        "classifier": "head",
    }
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("global_pool", ["token", ""])
def test_hub_models_come_from_the_folder_or_cache_without_a_connection(
    global_pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--lab--pathology"
    hub_repository(repository / "snapshots" / "abc", global_pool=global_pool)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tiles = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    stored = load_file(repository / "snapshots" / "abc" / "model.safetensors")
    for name in ("hf-hub:lab/pathology", f"local-dir:{repository / 'snapshots' / 'abc'}"):
        assert local_weights(name) == repository / "snapshots" / "abc" / "model.safetensors"
        backbone = Backbone(BackboneSpec(name, "hub")).eval()
        backbone.load_pretrained()
        torch.testing.assert_close(backbone.net.state_dict()["cls_token"], stored["cls_token"])
        torch.testing.assert_close(backbone.mean.flatten(), torch.tensor([0.7, 0.5, 0.7]))
        assert backbone(tiles).shape == (2, 192)


def lab_folder(folder: Path, state: dict[str, Any], file: str = "model.safetensors") -> str:
    """The name of a lab's own ResNet of five classes, in a folder with these weights."""
    folder.mkdir(parents=True)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "first_conv": "conv1.0", "classifier": "fc"}
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return f"local-dir:{folder}"


def test_weights_of_a_folder_fill_the_whole_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    for name, given, file in (
        ("whole", state, "model.safetensors"),
        ("headless", headless, "model.safetensors"),  # though its configuration states five classes
        ("training", {"state_dict": {f"module.{k}": v for k, v in state.items()}}, "pytorch_model.bin"),
        ("open", state, "open_clip_pytorch_model.bin"),
        ("own", state, "resnet-2026.safetensors"),
    ):
        backbone = Backbone(BackboneSpec(lab_folder(tmp_path / name, given, file), "hub"))
        backbone.load_pretrained()
        found = backbone.net.state_dict()
        assert found.keys() == headless.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())
    half = {key: value for key, value in state.items() if not key.startswith(("layer3", "layer4"))}
    for name, given, file in (
        ("half", half, "model.safetensors"),
        ("prefix", {f"backbone.{key}": value for key, value in state.items()}, "model.safetensors"),
        ("other", {"x": torch.zeros(2)}, "pytorch_model.bin"),
        ("shape", {**state, "fc.weight": torch.zeros(7, 256)}, "model.safetensors"),
    ):
        backbone = Backbone(BackboneSpec(lab_folder(tmp_path / name, given, file), "hub"))
        with pytest.raises(
            WeightsError, match="its weights have other names or shapes than its net"
        ) as caught:
            backbone.load_pretrained()
        assert "\n" not in str(caught.value)
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"expected weights there, model\.safetensors or .*; found none"):
        Backbone(BackboneSpec(f"local-dir:{tmp_path / 'half'}", "hub")).load_pretrained()
    save_file(state, tmp_path / "own" / "again.safetensors")
    with pytest.raises(WeightsError, match=r"; found again\.safetensors, resnet-2026\.safetensors"):
        Backbone(BackboneSpec(f"local-dir:{tmp_path / 'own'}", "hub")).load_pretrained()


def test_weights_of_a_folder_or_cache_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    lab = tmp_path / "lab"
    name = lab_folder(lab, state, "plain.bin")
    snapshot = tmp_path / "hf" / "models--timm--test_resnet.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for folder in (lab, snapshot):
        with (
            zipfile.ZipFile(lab / "plain.bin") as archive,
            zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as copy,
        ):
            for part in archive.namelist():
                copy.writestr(part, archive.read(part))
    for spec in (BackboneSpec(name, "hub"), BackboneSpec("test_resnet", "imagenet")):
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin: cannot be read .*packed"):
            Backbone(spec).load_pretrained()
    (lab / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="its header has 1099511627776 bytes"):
        Backbone(BackboneSpec(name, "hub")).load_pretrained()


@pytest.mark.slow
def test_published_weights_are_found_in_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert local_weights("resnet18") is None
    torch.manual_seed(0)
    state = timm.create_model("resnet18").state_dict()
    repository = str(timm.get_pretrained_cfg_value("resnet18", "hf_hub_id"))
    snapshot = tmp_path / "hf" / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert local_weights("resnet18") == snapshot / "model.safetensors"
    backbone = Backbone(BackboneSpec("resnet18", "imagenet"))
    backbone.load_pretrained()
    torch.testing.assert_close(backbone.net.state_dict()["conv1.weight"], state["conv1.weight"])


def test_without_a_connection_a_download_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="the configuration of 'hf-hub:lab/none' could not be downloaded"):
        Backbone(BackboneSpec("hf-hub:lab/none"))
    backbone = Backbone(BackboneSpec("resnet18", "imagenet"))
    with pytest.raises(WeightsError, match="give local files: pretrained: PATH") as caught:
        backbone.load_pretrained()
    assert "HF_HUB_OFFLINE" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="the configuration of 'local-dir:/none' could not be"):
        Backbone(BackboneSpec("local-dir:/none"))


class TestRefusedDownload:
    @pytest.fixture
    def no_network(self) -> None:
        """Allows connections: the hub of these tests is on this machine."""

    @pytest.mark.parametrize(
        ("status", "header", "said"),
        [
            (
                403,
                "GatedRepo",
                r"GatedRepoError: .*lab/gated.*; request access at the hub, then set HF_TOKEN",
            ),
            (407, "", r"Error: .*407.*; without a network connection give local files"),
        ],
    )
    def test_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, header: str, said: str
    ) -> None:
        class Hub(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", header)
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_: object) -> None:
                return

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "*")
        with HTTPServer(("127.0.0.1", 0), Hub) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                with pytest.raises(WeightsError, match=said) as caught:
                    Backbone(BackboneSpec("hf-hub:lab/gated"))
            finally:
                server.shutdown()
        assert "\n" not in str(caught.value)


def test_transformers_are_built_as_asked() -> None:
    weights = Backbone(BackboneSpec("test_vit", gated_mlp=True)).net.state_dict()
    wide, narrow = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
    assert wide == 2 * narrow
    assert "blocks.0.ls1.gamma" not in weights
    scaled = Backbone(BackboneSpec("test_vit", layer_scale=True)).net.state_dict()
    assert scaled["blocks.0.ls1.gamma"].shape == (64,)
    with pytest.raises(WeightsError, match="resnet18 cannot be built with act_layer, in_chans, mlp_layer"):
        Backbone(BackboneSpec("resnet18", gated_mlp=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("prefix", "arguments"),
    [
        (1 + 4, {"reg_tokens": 4}),
        (1, {"global_pool": "avg"}),  # its last norm follows the pooling
        (1, None),  # of the other family
    ],
)
def test_tokens_are_pooled_as_asked_and_it_scripts(
    prefix: int, arguments: dict[str, Any] | None, tmp_path: Path
) -> None:
    name = "eva02_tiny_patch14_224"
    if arguments is not None:
        name = f"local-dir:{tmp_path / 'model'}"
        hub_repository(tmp_path / "model", **arguments)
    side = 32 if arguments is not None else 28
    tiles = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    backbones = {}
    for pooling in get_args(Pooling):
        torch.manual_seed(0)
        backbones[pooling] = backbone = Backbone(BackboneSpec(name, pooling=pooling)).eval()
        with torch.inference_mode():
            embedded = backbone(tiles)
            assert embedded.shape == (2, backbone.num_features)
            if arguments is not None:  # twelve layers take long to compile
                torch.testing.assert_close(torch.jit.script(backbone)(tiles), embedded, atol=0, rtol=0)
    net: Any = backbones["default"].net
    with torch.inference_mode():
        found = {pooling: backbone(tiles) for pooling, backbone in backbones.items()}
        std = backbones["default"].std
        tokens = net.forward_features((tiles / 255 - backbones["default"].mean) / std)
        by_hand = {"token": net.fc_norm(tokens[:, 0]), "mean": net.fc_norm(tokens[:, prefix:].mean(1))}
    for pooling, expected in by_hand.items():
        torch.testing.assert_close(found[pooling], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["token+mean"], torch.cat([found["token"], found["mean"]], 1))
    torch.testing.assert_close(found["default"], found["token" if net.global_pool == "token" else "mean"])
    assert len({weights_sha256(backbone) for backbone in backbones.values()}) == 4


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("resnet18", "mean"),
        ("cbr_tiny", "token"),
        ("swin_tiny_patch4_window7_224", "token+mean"),
        ("vit_base_patch16_siglip_224", "token"),  # it has no class token
    ],
)
def test_networks_without_these_tokens_refuse_a_pooling(name: str, pooling: Pooling) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        Backbone(BackboneSpec(name, pooling=pooling))
    assert str(caught.value) == (
        f"backbone.pooling '{pooling}' is for vision transformers with these tokens, {name} is none; "
        "leave it at 'default'"
    )


@pytest.mark.parametrize(
    ("name", "side", "said"),
    [
        ("test_vit", 100, "patches of 16 px) takes no tiles of 100 px; cut tiles of 96 or 112 px"),
        ("eva02_tiny_patch14_224", 8, "patches of 14 px) takes no tiles of 8 px; cut tiles of 14 px"),
        ("swin_tiny_patch4_window7_224", 66, "takes no tiles of 66 px; cut tiles of 64 or 68 px"),
        ("beit_base_patch16_224", 240, "takes no tiles of 240 px; cut tiles of 224 px"),
    ],
)
def test_tiles_that_the_patch_does_not_divide_are_one_line(name: str, side: int, said: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneSpec(name))
        with pytest.raises(UsageError, match=re.escape(said)):
            backbone(torch.zeros(1, 3, side, side, dtype=torch.uint8))


@pytest.mark.parametrize("in_channels", [0, 5])
def test_a_tile_has_one_to_four_channels(in_channels: int) -> None:
    with pytest.raises(UsageError, match=f"in_channels must be 1 to 4, not {in_channels}"):
        small_spec(in_channels=in_channels)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_unfit_weights_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0")
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "weights.h5").touch()
    for pretrained, said in (
        ("nowhere.safetensors", "which is no file"),
        (str(tmp_path / "evil.pth"), "cannot be read as weights only"),
        (str(tmp_path / "torn.safetensors"), "not a readable safetensors file"),
        (str(tmp_path / "other.safetensors"), "not weights of mobilenetv3_small_050"),
        (str(tmp_path / "weights.h5"), "expected a .safetensors, .pth or .ckpt file"),
    ):
        with pytest.raises(WeightsError, match=said) as caught:
            Backbone(BackboneSpec(SMALL, pretrained)).load_pretrained()
        assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(WeightsError, match="timm knows no backbone 'resnet19'; names like it: "):
        Backbone(BackboneSpec("resnet19"))


def test_a_checkpoint_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> str:
        raise AssertionError("the network was asked")

    hub_repository(tmp_path / "model")
    trained = Backbone(BackboneSpec(f"local-dir:{tmp_path / 'model'}"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    spec = BackboneSpec("hf-hub:lab/pathology", "hub")
    with without_downloads({}), pytest.raises(WeightsError, match="a checkpoint downloads nothing"):
        Backbone(spec)
    with without_downloads({"architecture": trained.architecture}):
        again = Backbone(spec)
        assert again.state_dict().keys() == trained.state_dict().keys()
        assert torch.equal(again.mean, trained.mean)
        with pytest.raises(WeightsError, match="a checkpoint downloads nothing"):
            again.load_pretrained()
    with pytest.raises(AssertionError, match="the network was asked"):
        Backbone(spec)
    for key, value in (
        ("architecture", "os.system"),
        ("architecture", 1),
        ("model_args", {"checkpoint_path": "x.pth"}),
        ("model_args", {"pretrained": True}),
        ("model_args", {"depth": torch.zeros(1)}),
        ("pretrained_cfg", {"file": "x.pth"}),
        ("more", 1),
    ):
        changed = {"architecture": {**(trained.architecture or {}), key: value}}
        with without_downloads(changed), pytest.raises(WeightsError, match="with plain arguments"):
            Backbone(spec)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_scripted_backbone_names_no_patient() -> None:
    backbone = Backbone(BackboneSpec("cbr_tiny")).eval()
    backbone.record = {"slides": [["s", "Jane Doe", "f", "train"]], "config": "", "before": []}
    backbone.lineage = ("told",)
    saved = torch.jit.script(backbone).save_to_buffer()
    assert b"told" in saved and b"Jane Doe" not in saved
