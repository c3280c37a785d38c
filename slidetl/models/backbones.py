"""Backbones: tile or volume -> embedding, and the sources of their pretrained weights."""

import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from slidetl.errors import ModelFileError, UsageError, WeightsError
from slidetl.files import check_safetensors
from slidetl.library.card import WEIGHTS
from slidetl.library.local import SCHEME, pulled_card, pulled_file
from slidetl.models import conv_stem
from slidetl.models.cbr import CBR
from slidetl.models.huggingface import convert_dinov2, is_dinov2
from slidetl.models.packaged import check_packaged, packaged_weights
from slidetl.models.presets import preset_of, tile_warnings
from slidetl.models.spec import CONV3D, PUBLISHED, BackboneSpec
from slidetl.models.stored import NO_NETWORK, PREFIX, StoredFeatures
from slidetl.models.tensors import check_finite, is_state, load_tensors
from slidetl.models.volumes import Conv3dNetwork, inflate, inflate_kernel
from slidetl.text import one_line
from slidetl.tiles.grid import TileSpec

# Named here, since TorchScript would parse the comment inside a function as a type comment.
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined] # torch does not list it

# Prefix of the first backbone in the state of `slidetl.publish.export.ExportedNetwork`.
_FIRST_MEMBER = "networks.0.backbone."
_SURELY_FITS_VOXELS = 32  # five strides of two
# Prefix of the backbone in the state of a checkpoint.
_IN_CHECKPOINT = "network.backbone."


class Backbone(nn.Module):
    """A network without its classifier, with the normalisation of its weights.

    It starts from random weights; :meth:`load_pretrained` replaces them. Convolutional networks take tiles of
    any size, timm's ViT, EVA and Swin families multiples of their patch, and the few networks marked
    ``fixed_input_size`` by timm a single size. Networks for volumes take patches of any size.

    Attributes:
        num_features: length D of an embedding.
        description: the network's name and later changes.
        is_stored: True if it only stands for stored features (:mod:`slidetl.models.stored`).
        takes_volumes: True for a network of volumes.
        mean, std: buffers ``[1, C, 1, 1]``, of pixel values in 0..1, or ``[1, C, 1, 1, 1]``, of values of the
            window in 0..1; saved with the weights.
        architecture: configuration of a network of the hub or a folder, as plain values; None for others.
        lineage: SHA-256 of the initial weights and their ancestors, nearest first; see :class:`Pretrained`.
        starts_pretrained: True once :meth:`load_pretrained` has replaced all weights.
        trained_on: tiles of the training of a checkpoint or a model of a library; None for other weights.
        record: of the slides of that training (:class:`slidetl.data.record.StudyRecord`), as plain values;
            None for other weights.

    Raises:
        WeightsError: no such model, or its configuration cannot be downloaded or read.
        UsageError: the network does not support the specification.
    """

    mean: Tensor
    std: Tensor
    pools_tokens: Final[bool]  # a constant: TorchScript then leaves `_pool` out of other networks
    takes_volumes: Final[bool]

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.description = spec.name
        self.lineage: tuple[str, ...] = ()
        self.trained_on: TileSpec | None = None
        self.record: Any = None
        self.starts_pretrained = False
        self.takes_volumes = spec.takes_volumes
        self.channels_last = spec.channels_last
        self.architecture = _architecture(spec.in_plane.name)
        self.net: nn.Module = _build_network(spec.in_plane, self.architecture)
        if spec.in_plane != spec:
            inflate(self.net, spec.in_channels, spec.name)
        self.in_channels = 1 if isinstance(self.net, Conv3dNetwork) else spec.in_channels
        self.is_stored = isinstance(self.net, StoredFeatures)  # TorchScript would compile a property
        if spec.gradient_checkpointing:
            try:
                self.net.set_grad_checkpointing(True)  # type: ignore[operator] # timm is untyped
            except (
                AssertionError,
                AttributeError,
            ) as error:  # timm's refuse; CBR has no such method
                raise UsageError(
                    f"{spec.name} has no gradient checkpointing; set backbone.gradient_checkpointing to false"
                ) from error
        self.num_features: int = self.net.head_hidden_size  # type: ignore[assignment] # timm is untyped
        self.pools_class_token = "token" in spec.pooling
        self.pools_patches = "mean" in spec.pooling
        self.pools_tokens = self.pools_class_token or self.pools_patches
        self.prefix_tokens = _prefix_tokens(self.net, spec) if self.pools_tokens else 0
        if self.pools_class_token and self.pools_patches:
            self.num_features *= 2
        for key in ("mean", "std"):
            self.register_buffer(key, self._per_channel(_config(self.net)[key]))
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last_3d if self.takes_volumes else torch.channels_last)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embeds tiles, or patches of volumes.

        Args:
            tiles: ``[N, C, H, W] uint8``; three channels are RGB, and a network of one channel takes their
                luma, ``0.299 R + 0.587 G + 0.114 B`` (ITU-R BT.601), not rounded. Of volumes
                ``[N, 1, D, H, W] float``, 0..1 over the window (:func:`~slidetl.models.volumes.unit_window`).

        Returns:
            ``[N, D] float32`` (lower precision under autocast).

        Raises:
            UsageError: the tiles have another number of channels, or a size that the patch does not divide;
                or tiles came for volumes, or the reverse.
        """
        if self.takes_volumes:
            if not _is_scripting():
                self._check_volumes(tiles)
            v = (tiles.to(self.mean.dtype) - self.mean) / self.std  # grey in every channel
            if self.channels_last:
                v = v.contiguous(memory_format=torch.channels_last_3d)
            of_volumes: Tensor = self.net(v)
            return of_volumes
        if self.in_channels == 1 and tiles.shape[1] == 3:
            rgb = tiles.to(self.mean.dtype)
            tiles = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
        if not _is_scripting():  # in an exported file the convolution raises
            self._check_tiles(tiles)
        scale = 1.0 / (255.0 * self.std)
        x = torch.addcmul(-self.mean / self.std, tiles.to(self.mean.dtype), scale)  # one pass, not three
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.pools_tokens:
            return self._pool(x)
        embeddings: Tensor = self.net(x)
        return embeddings

    def _pool(self, x: Tensor) -> Tensor:
        """Pools the tokens of images ``[N, C, H, W] float32``, each part after the network's last norm."""
        tokens = self.net.forward_features(x)  # type: ignore[operator]
        parts: list[Tensor] = []
        if self.pools_class_token:
            parts.append(self.net.fc_norm(tokens[:, 0]))  # type: ignore[operator]
        if self.pools_patches:
            parts.append(self.net.fc_norm(tokens[:, self.prefix_tokens :].mean(1)))  # type: ignore[operator]
        return torch.cat(parts, 1)

    def check_tiles(self, spec: TileSpec) -> None:
        """Checks that the tiles or patches of a cache fit the network.

        Raises:
            UsageError: they do not; the message says what does.
        """
        if spec.is_volume != self.takes_volumes:
            takes, found = (
                ("volumes", "tiles of slides") if self.takes_volumes else ("tiles of slides", "volumes")
            )
            names = "conv3d_64 or inflated_resnet18" if spec.is_volume else "tf_efficientnet_lite0"
            raise UsageError(
                f"{self.spec.name} takes {takes}, the cache has {found}; use a backbone such as {names}"
            )
        if not spec.is_volume:
            self.check_tile_size(spec.tile_size_px)
        elif spec.tile_size_px < _SURELY_FITS_VOXELS:
            self._try_patch(spec.tile_size_px)

    def check_tile_size(self, side_px: int) -> None:
        """Checks that square tiles of a side fit the network.

        Raises:
            UsageError: they do not; the message has the nearest sizes that do.
        """
        from timm.layers.patch_embed import PatchEmbed

        embed = getattr(self.net, "patch_embed", None)
        if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
            return
        patch_px, below = embed.patch_size[0], side_px - side_px % embed.patch_size[0]
        sizes_px = (below, below + patch_px)
        if embed.strict_img_size and embed.img_size is not None:
            sizes_px = embed.img_size[:1]
        if side_px not in sizes_px:
            sizes = " or ".join(str(size) for size in sizes_px if size)
            raise UsageError(
                f"{self.spec.name} (patches of {patch_px} px) takes no tiles of {side_px} px; "
                f"cut tiles of {sizes} px"
            )

    def _try_patch(self, side: int) -> None:
        """Embeds one patch; raises a UsageError if it is too small for the pools."""
        training = self.training
        try:
            with torch.inference_mode():
                self.eval()(torch.zeros(1, 1, side, side, side, device=self.mean.device))
        except RuntimeError as error:
            raise UsageError(
                f"{self.spec.name} takes no patches of {side} voxels: {error}; cut patches of "
                f"{_SURELY_FITS_VOXELS} voxels"
            ) from error
        finally:
            self.train(training)

    def _check_volumes(self, tiles: Tensor) -> None:
        if tiles.ndim != 5 or tiles.shape[1] != 1 or not tiles.is_floating_point():
            raise UsageError(
                f"{self.spec.name} takes volumes [N, 1, D, H, W] of the window in 0..1, not {tiles.dtype} "
                f"{list(tiles.shape)}"
            )

    def _check_tiles(self, tiles: Tensor) -> None:
        if tiles.ndim != 4:
            raise UsageError(f"{self.spec.name} takes tiles [N, C, H, W], not {list(tiles.shape)}")
        for side_px in tiles.shape[2:]:
            self.check_tile_size(side_px)
        if tiles.shape[1] != self.in_channels:
            raise UsageError(
                f"{self.spec.name} takes {self.in_channels} channels, the tiles have {tiles.shape[1]}; "
                "set backbone.in_channels to 3 for RGB tiles, or to 1 for their luma"
            )

    def load_pretrained(self) -> None:
        """Loads the pretrained weights named by the specification.

        Raises:
            WeightsError: they cannot be found or read, or their names or shapes differ.
        """
        if self.is_stored:
            return
        found = read_pretrained(self.spec)
        config = _config(self.net)
        prefixes = tuple(f"{name}." for name in _names(config.get("classifier")))
        expected = self.net.state_dict()
        weights = {k: v for k, v in found.weights.items() if k in expected or not k.startswith(prefixes)}
        for name in _names(config.get("first_conv")):
            kernel = weights.get(f"{name}.weight")
            if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3:
                weights[f"{name}.weight"] = _adapt_kernel(kernel, self.in_channels)
        if self.takes_volumes:
            weights = {
                key: inflate_kernel(value)
                if value.ndim == 4 and key in expected and expected[key].ndim == 5
                else value
                for key, value in weights.items()
            }
        wrong = sorted(set(expected) ^ set(weights)) + sorted(
            key for key in set(expected) & set(weights) if expected[key].shape != weights[key].shape
        )
        if wrong:
            raise WeightsError(
                f"{self.spec.pretrained}: not weights of {self.spec.name}: {len(wrong)} of {len(expected)} "
                f"names or shapes differ, first {wrong[0]!r}; choose the backbone of these weights"
            )
        check_finite(weights, self.spec.pretrained)
        self.net.load_state_dict(weights)
        for key, values in found.normalisation.items():
            getattr(self, key).copy_(self._per_channel(values))
        self.lineage, self.trained_on, self.record = found.lineage, found.trained_on, found.record
        self.starts_pretrained = True

    def describe_other_tiles(self, spec: TileSpec) -> list[str]:
        """Describes differences of tiles from those of the weights' training, a line each."""
        found = tile_warnings(self.spec.name, spec.tile_size_px, spec.mpp)
        if self.trained_on is not None and self.trained_on.is_volume == spec.is_volume:
            of = ("spacing_mm", "window_hu") if spec.is_volume else ("mpp",)
            for name in of:
                then, now = getattr(self.trained_on, name), getattr(spec, name)
                if then != now:
                    found.append(
                        f"{self.spec.pretrained} was trained on tiles of {name} {then}, these have {now}"
                    )
        return found

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        """Returns mean or std with axes as the tiles; adapts three values like the kernels."""
        given = torch.tensor(values, dtype=torch.float32)
        if len(given) != self.in_channels:
            given = given.mean().view(1) if self.in_channels == 1 else given.repeat(2)[: self.in_channels]
        return given.view(1, -1, *[1] * (3 if self.takes_volumes else 2))

    def check_network(self) -> None:
        """Raises a UsageError if it only stands for stored features."""
        if self.is_stored:
            raise UsageError(NO_NETWORK)

    def blocks(self) -> dict[str, nn.Module]:
        """Returns timm's feature stages of the network, lowest first, or else its children.

        The keys are names in ``net``, e.g. ``layer1`` to ``layer4`` of a ResNet after its stem.
        """
        listed = getattr(self.net, "feature_info", None) or ()
        modules = dict(
            self.net.named_modules()
        )  # of Twins, MViT and others timm lists some that are not there
        names = dict.fromkeys(entry["module"] for entry in listed if entry["module"] in modules)
        return {name: modules[name] for name in names} or dict(self.net.named_children())


def _config(network: nn.Module) -> dict[str, Any]:
    """Returns timm's description of the weights published for a network."""
    return network.pretrained_cfg  # type: ignore[return-value] # timm is untyped


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names in an entry of timm's configuration: one, several or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _prefix_tokens(network: Any, spec: BackboneSpec) -> int:
    """Counts the class and register tokens of a transformer with a pooling of its own.

    Raises:
        UsageError: the network has no tokens to pool so.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    families: Any = (VisionTransformer, Eva)  # timm is untyped
    if (
        not isinstance(network, families)
        or network.attn_pool is not None
        or ("token" in spec.pooling and network.cls_token is None)
    ):
        raise UsageError(
            f"backbone.pooling {spec.pooling!r} is for vision transformers with these tokens, "
            f"{spec.name} is none; leave it at 'default'"
        )
    return int(network.num_prefix_tokens)


def _adapt_kernel(kernel: Tensor, in_channels: int) -> Tensor:
    """Adapts a first layer's kernel ``[O, 3, h, w]`` to another number of channels, as timm does."""
    if in_channels == 3:
        return kernel
    if in_channels == 1:
        return kernel.sum(1, keepdim=True)
    return kernel.repeat(1, 2, 1, 1)[:, :in_channels] * (3 / in_channels)


def _build_network(spec: BackboneSpec, architecture: Mapping[str, Any] | None) -> nn.Module:
    if spec.name.startswith("cbr_"):
        return CBR(spec.name, spec.in_channels)
    if spec.name.startswith(CONV3D):
        return Conv3dNetwork(spec.name)
    if spec.name.startswith(PREFIX):
        return StoredFeatures(spec.name)
    if architecture is None:
        return _timm_network(spec.name, spec, in_chans=spec.in_channels)
    about = dict(architecture["pretrained_cfg"])
    options = {**architecture["model_args"], "pretrained_cfg": about, "in_chans": spec.in_channels}
    return _timm_network(architecture["architecture"], spec, **options)


# The architecture recorded in a checkpoint, {} if it has none; None asks the hub.
_recorded: ContextVar[Mapping[str, Any] | None] = ContextVar("_recorded", default=None)


@contextmanager
def without_downloads(checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Takes architectures from a checkpoint while the context is open, and downloads nothing."""
    before = _recorded.set(checkpoint.get("architecture") or {})
    try:
        yield
    finally:
        _recorded.reset(before)


def _architecture(name: str) -> dict[str, Any] | None:
    """Returns the configuration of a network of the hub or a folder; None for timm's own names."""
    if ":" not in name:
        return None
    recorded = _recorded.get()
    if recorded:
        return _checked(recorded, name)
    if (preset := preset_of(name)) and (known := preset.configuration):
        return _checked(known, name)
    from timm.models._hub import load_model_config_from_path

    try:
        folder = _hub_folder(name, "config.json")
        if folder is None and name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
        if folder is None and recorded is not None:
            raise WeightsError(
                f"{name}: a checkpoint downloads nothing, and this one does not record the architecture; "
                "train it again"
            )
        if folder is None:
            from huggingface_hub import hf_hub_download

            repository, _, revision = name.removeprefix("hf-hub:").partition("@")
            folder = Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
        about, architecture, arguments = load_model_config_from_path(folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise _not_found(name, "the configuration", error) from error
    about = {key: value for key, value in about.items() if key not in _SOURCES}
    found = {"architecture": architecture, "model_args": arguments or {}, "pretrained_cfg": about}
    return _checked(json.loads(json.dumps(found)), name)


_SOURCES = ("file", "hf_hub_id", "source", "url")


def _checked(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks the configuration of a network: some of timm's arguments load files."""
    import timm

    arguments = found.get("model_args")
    if (
        found.keys() != {"architecture", "model_args", "pretrained_cfg"}
        or not isinstance(found["architecture"], str)
        or not timm.is_model(found["architecture"])
        or not isinstance(arguments, dict)
        or not isinstance(found["pretrained_cfg"], dict)
        or not all(map(_is_json, (arguments, found["pretrained_cfg"])))
        or found["pretrained_cfg"].keys() & set(_SOURCES)
        or arguments.keys() & (inspect.signature(timm.create_model).parameters.keys() - {"kwargs"})
    ):
        raise WeightsError(
            f"{name}: expected an architecture of timm with plain arguments, found {found!r:.200}"
        )
    return dict(found)


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _not_found(name: str, wanted: str, error: Exception) -> WeightsError:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None  # it only names its own
    found = cause or error
    reason = f"{type(found).__name__}: {one_line(str(found))[:200]}"
    remedy = (
        "request access at the hub, then set HF_TOKEN to a token of that account"
        if isinstance(error, GatedRepoError)
        else "without a network connection give local files: pretrained: PATH.safetensors, "
        "name: local-dir:FOLDER"
    )
    return WeightsError(f"{wanted} of {name!r} could not be downloaded or read ({reason}); {remedy}")


def _timm_network(name: str, spec: BackboneSpec, classes: int = 0, **options: Any) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise WeightsError(f"timm knows no backbone {name!r}; names like it: {', '.join(close) or 'none'}")
    if spec.gated_mlp:
        from timm.layers.mlp import SwiGLUPacked

        options.update(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    if spec.layer_scale:
        options.update(init_values=1e-5)  # at the start; loaded weights replace it
    if options.get("embed_layer") == conv_stem.NAME:
        options["embed_layer"] = conv_stem.ConvStem
    # Options for tiles of any size: of the ViT and EVA families, of the Swin family, of the rest.
    any_size: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for number, size in enumerate(any_size):
        try:
            network: nn.Module = timm.create_model(name, **{**options, "num_classes": classes, **size})
        except TypeError as error:
            if number + 1 < len(any_size):
                continue
            raise WeightsError(
                f"{spec.name} cannot be built with {', '.join(sorted(options))}: {error}"
            ) from error
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if "loading state_dict" in str(error):
                differences = " ".join(str(error).partition(":")[2].split())
                raise WeightsError(
                    f"{spec.name}: its weights have other names or shapes than its network: "
                    f"{differences:.200}; choose the backbone of these weights"
                ) from error
            wanted = "the published weights" if options.get("pretrained") else "the configuration"
            raise _not_found(spec.name, wanted, error) from error
        break
    if getattr(network, "global_pool", None) == "":  # returns every token; a tile needs one vector
        network.reset_classifier(0, "token")  # type: ignore[operator]
    return network


def local_weights(name: str) -> Path | None:
    """Finds the published weights of a model on this machine, without a connection.

    Args:
        name: a timm name, ``hf-hub:OWNER/MODEL`` or ``local-dir:FOLDER``.

    Returns:
        A file of an installed package, in the cache of the Hugging Face hub or of torch's hub, or in the
        folder; or None.
    """
    import timm

    path = packaged_weights(name)
    if path is not None:
        return path
    if name.startswith("local-dir:"):
        found = _weights_in(Path(name.removeprefix("local-dir:")))
        return found[0] if found and (len(found) == 1 or found[0].name in _HUB_FILES) else None
    preset = preset_of(name)
    config = None if ":" in name or not timm.is_model(name) else timm.get_pretrained_cfg(name)
    repository = name if config is None else f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else ""
    for file in (*_HUB_FILES, preset.file) if preset else _HUB_FILES:
        folder = _hub_folder(repository, file)
        if folder is not None:
            return folder / file
    url = config.url if config is not None else None
    if isinstance(url, str) and url.endswith((".pth", ".safetensors")):
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        return path if path.is_file() else None
    return None


# timm's names for weights, in its order, and the endings of others
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".bin")


def _weights_in(folder: Path) -> list[Path]:
    """Lists the files of weights in a folder, those of timm's names first."""
    usual = [folder / file for file in _HUB_FILES if (folder / file).is_file()]
    others = sorted(path for path in folder.glob("*") if path.name.endswith(_WEIGHTS_ENDINGS))
    return usual + [path for path in others if path not in usual and path.is_file()]


def _hub_folder(name: str, file: str) -> Path | None:
    """Finds the Hugging Face cache's folder with this file of ``hf-hub:OWNER/MODEL[@REVISION]``, or None."""
    if not name.startswith("hf-hub:"):
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    found = try_to_load_from_cache(repository, file, revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True)
class Pretrained:
    """The pretrained weights of a specification.

    Attributes:
        weights: a state dict on the CPU.
        normalisation: ``mean`` and ``std`` if the file states them, else empty: timm's own hold.
        lineage: SHA-256 of the weights and their ancestors, nearest first. For a model exported by slidetl,
            its card's ``weights_sha256`` and ``lineage``; for other weights, of unknown ancestors, their own
            hash (:func:`state_sha256`).
        trained_on: tiles of their training, of a checkpoint or of a model of a library.
        record: of the slides of their training, likewise, as plain values.
    """

    weights: dict[str, Tensor]
    normalisation: dict[str, list[float]]
    lineage: tuple[str, ...]
    trained_on: TileSpec | None = None
    record: Any = None


def read_pretrained(spec: BackboneSpec) -> Pretrained:
    """Reads the pretrained weights of a specification.

    Raises:
        WeightsError: they are missing, or unreadable without unpickling objects.
    """
    spec = spec.in_plane
    if spec.pretrained in PUBLISHED:
        weights = _published_weights(spec)
        return Pretrained(weights, {}, (state_sha256(weights),))
    if spec.pretrained.startswith(SCHEME):
        try:
            name = spec.pretrained.removeprefix(SCHEME)
            path, card = pulled_file(name, WEIGHTS), pulled_card(name).model
        except (ModelFileError, UsageError) as error:
            raise WeightsError(f"pretrained: {spec.pretrained}: {error}") from error
        found = _file_weights(path)
        if found.lineage[0] != card.weights_sha256:
            raise WeightsError(
                f"pretrained: {spec.pretrained}: its weights have SHA-256 {found.lineage[0]}, its card says "
                f"{card.weights_sha256}; they are of another network: remove {path.parent} and pull it again"
            )
        return replace(found, trained_on=card.tile_spec)
    path = Path(spec.pretrained)
    if not path.is_file():
        raise WeightsError(
            f"pretrained: expected 'imagenet', 'hub', 'zoo://NAME' or the path of a "
            f".safetensors, .pth or .ckpt file, found {spec.pretrained!r}, which is no file"
        )
    return _file_weights(path)


def _published_weights(spec: BackboneSpec) -> dict[str, Tensor]:
    if spec.name.startswith(("cbr_", CONV3D)):
        raise WeightsError(
            f"no weights were published for {spec.name}; give a file: pretrained: PATH.safetensors"
        )
    name = spec.name
    path = packaged_weights(name)
    if path is not None:
        return _packaged_state(path, name)
    path = local_weights(name)
    if path is None and _recorded.get() is not None:
        raise WeightsError(
            f"a checkpoint downloads nothing, and {spec.pretrained} weights of {name} are not on this "
            "machine; name the backbone and its weights"
        )
    if preset := preset_of(name):
        return _file_weights(path or _downloaded(name, (preset.file,))).weights
    if path is None and name.startswith("hf-hub:"):
        path = _downloaded(name, _HUB_FILES)
    if path is None and ":" in name:
        found = [file.name for file in _weights_in(Path(name.removeprefix("local-dir:")))]
        raise WeightsError(
            f"{name}: expected weights there, {_HUB_FILES[0]} or one file that ends in "
            f"{', '.join(_WEIGHTS_ENDINGS)}; found {', '.join(found) or 'none'}"
        )
    return _timm_state(spec, path)


def _timm_state(spec: BackboneSpec, path: Path | None) -> dict[str, Tensor]:
    """Reads weights under the names of timm's network; from no file it downloads timm's own.

    timm converts their names and shapes. It does so strictly only for the number of classes that the
    configuration states: for any other one it leaves what the file lacks as drawn at random.
    """
    import timm

    name, options = spec.name, {}
    if about := _architecture(name):
        name = about["architecture"]
        options = {**about["model_args"], "pretrained_cfg": about["pretrained_cfg"]}
        stated = options.get("num_classes", about["pretrained_cfg"].get("num_classes", 1000))
    else:
        stated = timm.get_pretrained_cfg_value(name, "num_classes") or 0
    given = {} if path is None else {"state_dict": _foreign_state(path)}
    for classes in dict.fromkeys((stated, 0)):  # a file may lack the classifier that is stated
        options["pretrained_cfg_overlay"] = {**given, "num_classes": classes}
        try:
            network = _timm_network(name, spec, classes, pretrained=True, **options)
        except WeightsError as error:
            if classes and isinstance(error.__cause__, RuntimeError):
                continue
            raise
        network.reset_classifier(0)  # type: ignore[operator] # timm is untyped
        return dict(network.state_dict())
    raise AssertionError("without classes it returns or raises")


def _foreign_state(path: Path) -> dict[str, Any]:
    """Reads the tensors of a file that timm converts, with the weights that its training would evaluate."""
    from timm.models import clean_state_dict

    found = _safetensors(path)[0] if path.suffix == ".safetensors" else _torch_file(path)
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors; save the model's state_dict()")
    parts: list[Any] = [found.get(key) for key in ("state_dict_ema", "model_ema", "state_dict", "model")]
    return dict(clean_state_dict(next((part for part in parts if part is not None), found)))


def _downloaded(name: str, files: Sequence[str]) -> Path:
    """Downloads weights from the Hugging Face hub: the first of these files that the repository has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    for file in files:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except (EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            is_offline = isinstance(error, LocalEntryNotFoundError)
            if file == files[-1] or is_offline or not isinstance(error, EntryNotFoundError):
                raise _not_found(name, "the published weights", error) from error
    raise AssertionError("files are named")


def _packaged_state(path: Path, name: str) -> dict[str, Tensor]:
    """Reads the tensors of the installed package under timm's names: their order and shapes are the same."""
    import timm

    check_packaged(path)
    state = load_tensors(path)
    with torch.device("meta"):
        expected: dict[str, Tensor] = timm.create_model(name).state_dict()
    kinds = [[(key.rpartition(".")[2], value.shape) for key, value in of.items()] for of in (state, expected)]
    if kinds[0] != kinds[1]:
        raise WeightsError(
            f"{path}: its tensors are not in the order of {name} in timm {timm.__version__}; "
            "install the version of timm that constraints.txt names"
        )
    return dict(zip(expected, state.values(), strict=True))


def _file_weights(path: Path) -> Pretrained:
    if path.suffix == ".safetensors":
        weights, metadata = _safetensors(path)
        if any(key.startswith(_FIRST_MEMBER) for key in weights):
            return _backbone_of(weights, metadata, path)
        if is_dinov2(weights):
            try:
                weights = convert_dinov2(weights)
            except WeightsError as error:
                raise WeightsError(f"{path}: {error}") from None
        normalisation = {
            key: _statistic(path, key, metadata[key]) for key in ("mean", "std") & metadata.keys()
        }
        return Pretrained(weights, normalisation, (state_sha256(weights),))
    if path.suffix in (".pth", ".pt", ".bin"):
        state = _torch_file(path)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not is_state(state):
            raise WeightsError(f"{path}: expected a dictionary of tensors; save the model's state_dict()")
        if is_dinov2(state):
            raise WeightsError(f"{path}: expected the model.safetensors of these weights of transformers")
        return Pretrained(state, {}, (state_sha256(state),))
    if path.suffix == ".ckpt":
        return _backbone_of_checkpoint(path)
    raise WeightsError(f"{path}: expected a .safetensors, .pth or .ckpt file")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a safetensors file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return weights, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error


def _torch_file(path: Path) -> Any:
    """Reads the plain values and tensors of a file of ``torch.save``."""
    try:
        return load_tensors(path)
    except ValueError as error:
        raise WeightsError(f"{path}: cannot be read as weights only: {error}") from error


def _statistic(path: Path, key: str, text: str) -> list[float]:
    """Reads the mean or standard deviation of the three channels from the metadata of a file."""
    try:
        found = [float(value) for value in json.loads(text)]
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its {key} is no list of numbers: {text!r:.100}") from error
    if len(found) != 3 or not all(map(math.isfinite, found)) or (key == "std" and min(found) <= 0):
        raise WeightsError(f"{path}: expected its {key} to have three numbers, found {text!r:.100}")
    return found


def _backbone_of_checkpoint(path: Path) -> Pretrained:
    """Extracts the backbone from a checkpoint of ``slidetl fit``; its own hash comes first in the lineage."""
    try:
        checkpoint = load_tensors(path)
        state = checkpoint["state_dict"]
        if not is_state(state):
            raise ValueError("its state_dict has more than tensors")
        inside = {
            key.removeprefix(_IN_CHECKPOINT): value
            for key, value in state.items()
            if key.startswith(_IN_CHECKPOINT)
        }
        normalisation: dict[str, list[float]] = {
            key: inside.pop(key).flatten().tolist() for key in ("mean", "std")
        }
        before = tuple(str(sha256) for sha256 in checkpoint.get("lineage", ()))
        trained_on = TileSpec.from_dict(checkpoint["tile_spec"]) if checkpoint.get("tile_spec") else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path}: expected a checkpoint of 'slidetl fit', with a backbone: {error!r}"
        ) from error
    record = checkpoint.get("record")
    if not record:
        warnings.warn(
            f"{path}: no record of the slides that it was trained on: nothing shows that your val and test "
            "slides were kept from it",
            stacklevel=2,
        )
    weights = {key.removeprefix("net."): value for key, value in inside.items()}
    return Pretrained(weights, normalisation, (state_sha256(weights), *before), trained_on, record)


def _backbone_of(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Pretrained:
    """Extracts the backbone from the state of an exported network, the first one of an ensemble."""
    own = state_sha256(state)
    try:
        lineage = tuple(str(sha256) for sha256 in json.loads(metadata["lineage"]))
        normalisation: dict[str, list[float]] = {
            key: state[_FIRST_MEMBER + key].flatten().tolist() for key in ("mean", "std")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: not the weights of a model that slidetl published: {error!r}") from error
    if lineage[:1] != (own,):
        raise WeightsError(f"{path}: its weights have SHA-256 {own}, it says {lineage[:1]}; it was changed")
    prefix = f"{_FIRST_MEMBER}net."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return Pretrained(weights, normalisation, lineage)


def weights_sha256(module: nn.Module) -> str:
    """Computes the SHA-256 of a module's state, :func:`state_sha256`; of a backbone with its pooling.

    Equal weights with another pooling are another network to stored features.
    """
    sha256 = state_sha256(module.state_dict())
    if not isinstance(module, Backbone) or not module.pools_tokens:
        return sha256
    return hashlib.sha256(f"{sha256} {module.spec.pooling}".encode()).hexdigest()


def architecture_sha256(backbone: Backbone) -> str:
    """Computes the SHA-256 of the configuration of a network of the hub or a folder; empty for others.

    It covers what decides on the network alone, so that copies with other remarks agree.
    """
    if backbone.architecture is None:
        return ""
    found = backbone.architecture
    decides = [found["architecture"], found["model_args"], found["pretrained_cfg"].get("global_pool")]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 of named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
