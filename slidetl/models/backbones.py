"""Backbones: tile -> embedding, and where their pretrained weights come from."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slidetl.errors import WeightsError

BUNDLED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class BackboneSpec:
    """Which network embeds a tile, and which weights count as its pretrained ones.

    Attributes:
        name: any model name that timm knows, e.g. ``resnet18``.
        pretrained: ``procedural`` (bundled, no network needed), ``imagenet`` (timm downloads it), or
            the path of a ``.safetensors`` or ``.pth`` file. Whether a training starts from them is the
            transfer strategy's choice.
        channels_last: keep tiles and kernels in that memory layout; faster for most convolutional
            networks, on a CPU too.
    """

    name: str = "mobilenetv3_small_050"
    pretrained: str = "procedural"
    channels_last: bool = True

    def __post_init__(self) -> None:
        if not self.name or not self.pretrained:
            raise WeightsError(
                f"backbone needs a name and pretrained weights, not {self.name!r}, {self.pretrained!r}"
            )


class Backbone(nn.Module):
    """A timm network without its classifier, with the normalisation that its weights expect.

    It starts from random weights; :meth:`load_pretrained` replaces them.

    Attributes:
        num_features: length D of an embedding.
        mean, std: buffers ``[1, 3, 1, 1]``, of pixel values in 0..1. They travel with the weights.

    Raises:
        WeightsError: timm knows no such model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: BackboneSpec) -> None:
        import timm

        super().__init__()
        if not timm.is_model(spec.name):
            close = timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]
            raise WeightsError(
                f"timm knows no backbone {spec.name!r}; names like it: {', '.join(close) or 'none'}"
            )
        self.spec = spec
        self.channels_last = spec.channels_last
        self.net: nn.Module = timm.create_model(spec.name, pretrained=False, num_classes=0)
        self.num_features: int = self.net.head_hidden_size  # type: ignore[assignment] # timm is untyped
        for key in ("mean", "std"):
            values = torch.tensor(self.net.pretrained_cfg[key], dtype=torch.float32)  # type: ignore[index]
            self.register_buffer(key, values.view(1, 3, 1, 1))
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embeds tiles.

        Args:
            tiles: ``[N, 3, H, W] uint8`` RGB.

        Returns:
            ``[N, D] float32`` (lower precision under autocast).
        """
        scale = 1.0 / (255.0 * self.std)
        x = torch.addcmul(-self.mean / self.std, tiles.to(self.mean.dtype), scale)  # one pass, not three
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.net(x)
        return embeddings

    def load_pretrained(self) -> None:
        """Replaces the weights by the pretrained ones that the specification names.

        Raises:
            WeightsError: they cannot be found or read, or their names or shapes differ.
        """
        weights, normalisation = find_weights(self.spec)
        classifier = self.net.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        prefixes = tuple(f"{name}." for name in names)
        expected = self.net.state_dict()
        weights = {
            key: value for key, value in weights.items() if key in expected or not key.startswith(prefixes)
        }
        wrong = sorted(set(expected) ^ set(weights)) + sorted(
            key for key in set(expected) & set(weights) if expected[key].shape != weights[key].shape
        )
        if wrong:
            raise WeightsError(
                f"{self.spec.pretrained}: not weights of {self.spec.name}: {len(wrong)} of {len(expected)} "
                f"names or shapes differ, first {wrong[0]!r}; choose the backbone of these weights"
            )
        self.net.load_state_dict(weights)
        for key, values in normalisation.items():
            getattr(self, key).copy_(torch.tensor(values).view(1, 3, 1, 1))


def find_weights(spec: BackboneSpec) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Finds the pretrained weights that a specification names.

    Returns:
        The state dict on the CPU, and ``mean`` and ``std`` where the file states them (else empty:
        timm's own for this model hold).

    Raises:
        WeightsError: nothing there, or not readable without unpickling objects.
    """
    if spec.pretrained == "imagenet":
        return _timm_weights(spec.name), {}
    if spec.pretrained == "procedural":
        path = BUNDLED / f"procedural_{spec.name}.safetensors"
        if not path.is_file():
            have = ", ".join(
                sorted(file.stem.removeprefix("procedural_") for file in BUNDLED.glob("*.safetensors"))
            )
            raise WeightsError(f"no bundled weights for {spec.name!r}; they exist for: {have}")
    else:
        path = Path(spec.pretrained)
        if not path.is_file():
            raise WeightsError(
                f"pretrained: expected 'procedural', 'imagenet' or the path of a .safetensors or .pth file, "
                f"found {spec.pretrained!r}, which is no file"
            )
    return _file_weights(path)


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm

    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"timm could not download the ImageNet weights of {name!r} ({type(error).__name__}); "
            "without a network give a file: pretrained: PATH.safetensors"
        ) from error
    return state


def _file_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a readable safetensors file: {error}") from error
        return weights, {key: json.loads(metadata[key]) for key in ("mean", "std") if key in metadata}
    if path.suffix in (".pth", ".pt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its unpickler meets in a foreign file
            raise WeightsError(f"{path}: cannot be read as weights only: {error}".splitlines()[0]) from error
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(f"{path}: expected a dictionary of tensors; save the model's state_dict()")
        return state, {}
    raise WeightsError(f"{path}: expected a .safetensors or .pth file")


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over a module's state: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
