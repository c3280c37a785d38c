"""Published pathology backbones: their architecture, pooling, normalisation, tiles and terms, as data.

A network named here is built by this table even where the hub's configuration is at hand: that one cannot
state gated layers, may change, and is missing without a connection. Weights of another shape are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slidetl.errors import UsageError

Pooling = Literal["default", "token", "mean", "token+mean"]
Statistic = tuple[float, float, float]

IMAGENET: tuple[Statistic, Statistic] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: tuple[Statistic, Statistic] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPTIMUS: tuple[Statistic, Statistic] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
LUNIT: tuple[Statistic, Statistic] = (
    (0.70322989, 0.53606487, 0.66096631),
    (0.21716536, 0.26081574, 0.20723464),
)
HIBOU: tuple[Statistic, Statistic] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))

# The places of facts, as read in November 2026; the number after @ is a commit.
TRIDENT = "github.com/mahmoodlab/TRIDENT@a91fa84 trident/patch_encoder_models/load.py"
SLIDE2VEC = "github.com/clemsgrs/slide2vec@7cfa6bf slide2vec/encoders/models"
LAZYSLIDE = "github.com/rendeirolab/lazyslide-models@0127beb src/lazyslide_models/vision"
EVA = "github.com/kaiko-ai/eva@73b61a7 src/eva/vision/models/networks/backbones/pathology"


@dataclass(frozen=True)
class Preset:
    """A published backbone.

    Attributes:
        key: its name on the command line.
        name: the place of its weights on the Hugging Face hub, ``hf-hub:OWNER/MODEL``.
        architecture: the network of timm.
        arguments: what that network is built with.
        gated_mlp, layer_scale, pooling: fields of :class:`~slidetl.models.spec.BackboneSpec`.
        normalisation: mean and standard deviation of pixel values in 0..1; None if no source states them.
        mpp: spacings in micrometres per pixel of the tiles in its training; empty if no source states them.
        tile_px: side of a tile.
        licence: of the weights.
        is_gated: access is granted on request; None if no source states it.
        sources: the places of these facts.
        file: name of the file of weights at the hub.
    """

    key: str
    name: str
    architecture: str
    arguments: Mapping[str, int | float | bool | str]
    normalisation: tuple[Statistic, Statistic] | None
    mpp: tuple[float, ...]
    licence: str
    is_gated: bool | None
    sources: tuple[str, ...]
    gated_mlp: bool = False
    layer_scale: bool = False
    pooling: Pooling = "token"
    tile_px: int = 224
    file: str = "pytorch_model.bin"

    @property
    def configuration(self) -> dict[str, Any] | None:
        """The configuration in the form of timm's models on the hub; None if only the hub's is complete."""
        if self.normalisation is None:
            return None
        mean, std = self.normalisation
        about = {
            "mean": list(mean),
            "std": list(std),
            "input_size": [3, self.tile_px, self.tile_px],
            "num_classes": 0,
            "first_conv": "patch_embed.proj.0" if "embed_layer" in self.arguments else "patch_embed.proj",
            "classifier": "head",
        }
        return {
            "architecture": self.architecture,
            "model_args": dict(self.arguments),
            "pretrained_cfg": about,
        }

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a specification."""
        return {
            "name": self.name,
            "pretrained": "hub",
            "gated_mlp": self.gated_mlp,
            "layer_scale": self.layer_scale,
            "pooling": self.pooling,
        }


_SWIGLU = 5.33334  # two thirds of the usual width of 4, twice: values and gates are packed
_VIRCHOW_ARGUMENTS = {"img_size": 224, "mlp_ratio": 5.3375}
_OPTIMUS_ARGUMENTS = {"img_size": 224}

PRESETS = (
    Preset(
        key="uni",
        name="hf-hub:MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        arguments={"img_size": 224},
        layer_scale=True,
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="CC-BY-NC-ND-4.0",
        is_gated=True,
        sources=(TRIDENT, f"{SLIDE2VEC}/uni.py", f"{LAZYSLIDE}/uni.py", "github.com/mahmoodlab/UNI"),
    ),
    Preset(
        key="uni2-h",
        name="hf-hub:MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        arguments={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": _SWIGLU,
            "no_embed_class": True,
            "reg_tokens": 8,
        },
        gated_mlp=True,
        layer_scale=True,
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="CC-BY-NC-ND-4.0",
        is_gated=True,
        sources=("github.com/mahmoodlab/UNI@42715ef README.md", f"{SLIDE2VEC}/uni.py", f"{LAZYSLIDE}/uni.py"),
    ),
    Preset(
        key="virchow",
        name="hf-hub:paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        arguments=_VIRCHOW_ARGUMENTS,
        gated_mlp=True,
        layer_scale=True,
        pooling="token+mean",
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="Apache-2.0",
        is_gated=True,
        sources=("huggingface.co/paige-ai/Virchow", TRIDENT, f"{SLIDE2VEC}/virchow.py"),
    ),
    Preset(
        key="virchow2",
        name="hf-hub:paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        arguments={**_VIRCHOW_ARGUMENTS, "reg_tokens": 4},
        gated_mlp=True,
        layer_scale=True,
        pooling="token+mean",
        normalisation=IMAGENET,
        mpp=(0.25, 0.5, 1.0, 2.0),
        licence="CC-BY-NC-ND-4.0",
        is_gated=True,
        sources=("huggingface.co/paige-ai/Virchow2", TRIDENT, f"{SLIDE2VEC}/virchow.py"),
    ),
    Preset(
        key="h-optimus-0",
        name="hf-hub:bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments=_OPTIMUS_ARGUMENTS,
        layer_scale=True,
        normalisation=OPTIMUS,
        mpp=(0.5,),
        licence="Apache-2.0",
        is_gated=None,
        sources=("huggingface.co/bioptimus/H-optimus-0", TRIDENT),
    ),
    Preset(
        key="h-optimus-1",
        name="hf-hub:bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments=_OPTIMUS_ARGUMENTS,
        layer_scale=True,
        normalisation=OPTIMUS,
        mpp=(0.5,),
        licence="CC-BY-NC-ND-4.0",
        is_gated=True,
        sources=(TRIDENT, f"{SLIDE2VEC}/hoptimus.py", f"{LAZYSLIDE}/h_optimus.py"),
    ),
    Preset(
        key="h0-mini",
        name="hf-hub:bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={"img_size": 224, "mlp_ratio": _SWIGLU},
        gated_mlp=True,
        layer_scale=True,
        pooling="token+mean",
        normalisation=OPTIMUS,
        mpp=(0.5,),
        licence="CC-BY-NC-ND-4.0",
        is_gated=True,
        file="model.safetensors",
        sources=(
            TRIDENT,
            f"{SLIDE2VEC}/hoptimus.py",
            f"{LAZYSLIDE}/h_optimus.py",
            "github.com/rendeirolab/lazyslide-models@0127beb src/lazyslide_models/segmentation/"
            "cellvit_family/histoplus.py",
        ),
    ),
    Preset(
        key="prov-gigapath",
        name="hf-hub:prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        arguments={"img_size": 224, "patch_size": 16},
        layer_scale=True,
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="Apache-2.0 with conditions",
        is_gated=True,
        sources=(
            "github.com/prov-gigapath/prov-gigapath@09d8e87 README.md",
            TRIDENT,
            f"{SLIDE2VEC}/gigapath.py",
            f"{LAZYSLIDE}/gigapath.py",
        ),
    ),
    *(
        Preset(
            key=f"kaiko-{size[0]}{patch}",
            name=f"hf-hub:1aurent/vit_{size}_patch{patch}_224.kaiko_ai_towards_large_pathology_fms",
            architecture=f"vit_{size}_patch{patch}_224",
            arguments={"img_size": 224},
            normalisation=HALVES,
            mpp=(),
            licence="kaiko-non-commercial",
            is_gated=None,
            file="model.safetensors",
            sources=(
                "github.com/kaiko-ai/towards_large_pathology_fms@bfcde17 hubconf.py, README.md",
                TRIDENT,
            ),
        )
        for size in ("small", "base")
        for patch in (16, 8)
    ),
    Preset(
        key="kaiko-l14",
        name="hf-hub:1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
        architecture="vit_large_patch14_reg4_dinov2",
        arguments={"img_size": 518},  # its positions are of 518 px, its tiles of 224
        layer_scale=True,
        normalisation=HALVES,
        mpp=(),
        licence="kaiko-non-commercial",
        is_gated=None,
        file="model.safetensors",
        sources=("github.com/kaiko-ai/towards_large_pathology_fms@bfcde17 hubconf.py, README.md", TRIDENT),
    ),
    Preset(
        key="lunit-s8",
        name="hf-hub:1aurent/vit_small_patch8_224.lunit_dino",
        architecture="vit_small_patch8_224",
        arguments={"img_size": 224},
        normalisation=LUNIT,
        mpp=(0.5,),
        licence="lunit-non-commercial",
        is_gated=None,
        file="model.safetensors",
        sources=(
            "github.com/lunit-io/benchmark-ssl-pathology@d0288de README.md",
            f"{EVA}/lunit.py",
            f"{SLIDE2VEC}/lunit.py",
        ),
    ),
    Preset(
        key="phikon",
        name="hf-hub:1aurent/vit_base_patch16_224.owkin_pancancer",
        architecture="vit_base_patch16_224",
        arguments={"img_size": 224},
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="owkin-non-commercial",
        is_gated=None,
        file="model.safetensors",
        sources=("github.com/owkin/HistoSSLscaling@73f1d19 README.md", TRIDENT, f"{SLIDE2VEC}/phikon.py"),
    ),
    Preset(
        key="ctranspath",
        name="hf-hub:1aurent/swin_tiny_patch4_window7_224.CTransPath",
        architecture="swin_tiny_patch4_window7_224",
        arguments={"embed_layer": "conv_stem"},
        pooling="default",
        normalisation=IMAGENET,
        mpp=(1.0,),  # recommended to be tried first
        licence="GPL-3.0",
        is_gated=None,
        file="model.safetensors",
        sources=(
            "github.com/Xiyue-Wang/TransPath@26c6194 ctran.py, README.md",
            "huggingface.co/1aurent/swin_tiny_patch4_window7_224.CTransPath",
            TRIDENT,
        ),
    ),
    Preset(
        key="gpfm",
        name="hf-hub:majiabo/GPFM",
        architecture="vit_large_patch14_dinov2",
        arguments={"img_size": 224},
        layer_scale=True,
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="CC-BY-NC-ND-4.0",
        is_gated=False,
        file="GPFM.pth",
        sources=(
            "github.com/birkhoffkiki/GPFM@4f8be2b LICENSE",
            TRIDENT,
            f"{SLIDE2VEC}/gpfm.py",
            f"{LAZYSLIDE}/gpfm.py",
        ),
    ),
    Preset(
        key="prost40m",
        name="hf-hub:waticlems/Prost40M",
        architecture="vit_small_patch16_224",
        arguments={"img_size": 224, "patch_size": 14},
        normalisation=None,
        mpp=(0.5,),
        licence="Apache-2.0",
        is_gated=None,
        file="model.safetensors",
        sources=("huggingface.co/waticlems/Prost40M payload_manifest.json", f"{SLIDE2VEC}/prost40m.py"),
    ),
    # Of the Hugging Face hub in the form of transformers: converted when they are loaded.
    Preset(
        key="phikon-v2",
        name="hf-hub:owkin/phikon-v2",
        architecture="vit_large_patch16_224",
        arguments={"img_size": 224},
        layer_scale=True,
        normalisation=IMAGENET,
        mpp=(0.5,),
        licence="other (LICENSE.pdf at the hub)",
        is_gated=None,
        file="model.safetensors",
        sources=("huggingface.co/owkin/phikon-v2", TRIDENT, f"{SLIDE2VEC}/phikon.py"),
    ),
    Preset(
        key="midnight",
        name="hf-hub:kaiko-ai/midnight",
        architecture="vit_giant_patch14_dinov2",
        arguments={"img_size": 224},
        layer_scale=True,
        pooling="token+mean",
        normalisation=HALVES,
        mpp=(0.25, 0.5, 1.0, 2.0),
        licence="MIT",
        is_gated=True,
        file="model.safetensors",
        sources=(TRIDENT, f"{SLIDE2VEC}/midnight.py", f"{LAZYSLIDE}/midnight.py"),
    ),
    Preset(
        key="hibou-b",
        name="hf-hub:histai/hibou-b",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={"img_size": 224, "mlp_ratio": _SWIGLU},
        gated_mlp=True,
        layer_scale=True,
        normalisation=HIBOU,
        mpp=(0.5,),
        licence="Apache-2.0",
        is_gated=True,
        file="model.safetensors",
        sources=(f"{SLIDE2VEC}/hibou.py", f"{LAZYSLIDE}/hibou.py", f"{EVA}/histai.py"),
    ),
    Preset(
        key="hibou-l",
        name="hf-hub:histai/hibou-L",
        architecture="vit_large_patch14_reg4_dinov2",
        arguments={"img_size": 224, "mlp_ratio": 5.34375},
        gated_mlp=True,
        layer_scale=True,
        normalisation=HIBOU,
        mpp=(0.5,),
        licence="Apache-2.0",
        is_gated=True,
        file="model.safetensors",
        sources=(f"{SLIDE2VEC}/hibou.py", f"{LAZYSLIDE}/hibou.py", f"{EVA}/histai.py"),
    ),
)

_BY_KEY = {preset.key: preset for preset in PRESETS}
_BY_NAME = {preset.name.lower(): preset for preset in PRESETS}


def find_preset(key: str) -> Preset:
    """Returns the preset of a key.

    Raises:
        UsageError: there is none; the message lists all.
    """
    if key.lower() not in _BY_KEY:
        raise UsageError(f"backbone.preset: expected one of {', '.join(_BY_KEY)}, found {key!r}")
    return _BY_KEY[key.lower()]


def preset_of(name: str) -> Preset | None:
    """Returns the preset of a backbone's name at the hub, or None."""
    return _BY_NAME.get(name.lower())


def tile_warnings(name: str, tile_px: int, mpp: float) -> list[str]:
    """Describes differences of tiles from those in the training of a published backbone.

    Args:
        name: of the backbone, at the hub.
        tile_px: side of the tiles.
        mpp: their spacing in micrometres per pixel; a tenth of difference passes.
    """
    preset = preset_of(name)
    if preset is None:
        return []
    found = []
    if preset.mpp and not any(abs(mpp / known - 1) <= 0.1 for known in preset.mpp):
        spacings = " or ".join(f"{known:g}" for known in preset.mpp)
        found.append(
            f"{preset.key} was trained at {spacings} micrometres per pixel, these tiles have {mpp:g}"
        )
    if tile_px != preset.tile_px:
        found.append(f"{preset.key} was trained on tiles of {preset.tile_px} px, these have {tile_px}")
    return found
