"""Exports a trained network as one TorchScript file, to be run without slidetl and timm.

TorchScript is deprecated upstream; only this module and :mod:`slidetl.publish.model_file` use it.
"""

import io
import itertools
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final, Optional

import torch
from torch import Tensor, nn
from torch.jit.frontend import FrontendError

from slidetl.analysis.novelty import Familiar
from slidetl.errors import ModelFileError
from slidetl.files import file_sha256, replaced
from slidetl.library.model_card import METADATA, Evidence, ModelCard, TrainingData
from slidetl.library.trust import trust
from slidetl.models.backbones import weights_sha256
from slidetl.models.network import GradingNetwork
from slidetl.models.precision import exact_float32, has_bfloat16
from slidetl.models.spec import BackboneSpec
from slidetl.models.volumes import unit_window
from slidetl.publish.model_file import load_model, without_deprecation
from slidetl.text import first_lines
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader
from slidetl.version import VERSION

# Greatest difference of a probability between the file and its networks. A bfloat16 has eight bits: the order
# of sums shows there.
PARITY_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class ExportedNetwork(nn.Module):
    """The networks with the interface of the file: one slide at a time, no mask, chunks inside.

    Several networks, of the folds of a cross-validation, vote by the mean of their probabilities; their
    embeddings stand side by side.

    Args:
        networks: trained, in evaluation mode.
        temperature: each network's probabilities are raised to its inverse and rescaled.
        familiar: description of the training slides, or None.
        chunk_size: tiles per pass through the backbones in :meth:`forward`.
        window_hu: of the volumes, the Hounsfield units to map to 0 and 1; None for tiles of slides.
    """

    takes_volumes: Final[bool]

    def __init__(
        self,
        networks: Sequence[GradingNetwork],
        temperature: float = 1.0,
        familiar: Familiar | None = None,
        chunk_size: int = 64,
        window_hu: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.networks: Any = nn.ModuleList(networks)
        self.widths = [network.backbone.num_features for network in networks]
        self.takes_volumes = window_hu is not None
        self.low_hu, self.high_hu = window_hu or (0.0, 1.0)
        wanted = networks[0].backbone.in_channels
        self.in_channels = 3 if wanted == 1 else wanted  # of a tile: a network of one takes the luma of RGB
        self.chunk_size = chunk_size
        self.has_one_score = len({network.head.score_unit for network in networks}) == 1
        width = sum(self.widths)
        self.temperature: Tensor
        self.mean: Tensor
        self.directions: Tensor
        self.variances: Tensor
        self.residual_variance: Tensor
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("mean", torch.from_numpy(familiar.mean) if familiar else torch.zeros(width))
        self.register_buffer(
            "directions", torch.from_numpy(familiar.directions) if familiar else torch.zeros(0, width)
        )
        self.register_buffer(
            "variances", torch.from_numpy(familiar.variances) if familiar else torch.zeros(0)
        )
        residual = familiar.residual_variance if familiar else float("nan")
        self.register_buffer("residual_variance", torch.tensor(residual))

    def forward(self, tiles: Tensor) -> Tensor:
        """Grades the tiles of one slide, as :meth:`embed` takes them: probabilities ``[K] float32``."""
        chunks = [self.embed(chunk) for chunk in torch.split(tiles, self.chunk_size)]
        return self.grade(torch.cat(chunks))[0]

    @torch.jit.export
    def embed(self, tiles: Tensor) -> Tensor:
        """Embeds tiles ``[N, 3, H, W] uint8`` as ``[N, D] float32``.

        Of volumes it takes patches ``[N, 1, S, S, S]`` in Hounsfield units, axes z, y, x, of any type, at the
        spacing on the card, and applies the window itself.
        """
        if self.takes_volumes:
            tiles = unit_window(tiles, self.low_hu, self.high_hu)
        parts: list[Tensor] = []
        for network in self.networks:
            parts.append(network.backbone(tiles).to(torch.float32))
        return torch.cat(parts, dim=1)

    @torch.jit.export
    def grade(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor, Optional[tuple[Tensor, Tensor]]]:  # noqa: UP045 (TorchScript reads it)
        """Grades embeddings ``[N, D]`` of a slide.

        Returns:
            Probabilities ``[K]``, mean grade, attention ``[N]``, and as
            :meth:`slidetl.models.network.GradingNetwork.explain` the slide's score with the contributions
            ``[N]`` of its tiles, in the unit on the card; or None.
        """
        mask = torch.ones(1, embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
        probabilities, attention, explained = self.vote(embeddings.unsqueeze(0), mask)
        if explained is not None:
            explained = (explained[0][0], explained[1][0])
        return probabilities[0], self.expected_grade(probabilities)[0], attention[0], explained

    @torch.jit.export
    def novelty(self, embeddings: Tensor) -> Tensor:
        """Measures the novelty of the mean of ``[N, D]`` embeddings; NaN if unknown.

        As :meth:`slidetl.analysis.novelty.Familiar.novelty`; the card has the limit.
        """
        centred = (embeddings.mean(0) - self.mean).to(torch.float64)
        along = self.directions.to(torch.float64) @ centred
        rest = (centred.square().sum() - along.square().sum()).clamp_min(0)
        squared = (along.square() / self.variances).sum() + rest / self.residual_variance
        return squared / centred.shape[0]

    def vote(
        self, embeddings: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Optional[tuple[Tensor, Tensor]]]:  # noqa: UP045 (TorchScript reads it)
        """Takes the mean of all networks over bags ``[B, N, D]`` with a mask ``[B, N]``.

        Returns:
            Probabilities ``[B, K]``, attention ``[B, N]``, and score ``[B]`` with contributions ``[B, N]``
            where every network has them.
        """
        parts = torch.split(embeddings, self.widths, dim=2)
        votes: list[Tensor] = []
        attentions: list[Tensor] = []
        scores: list[Tensor] = []
        contributions: list[Tensor] = []
        for index, network in enumerate(self.networks):
            logits, attention, explained = network.explain(parts[index], mask)
            log_probabilities = network.head.probabilities(logits).clamp_min(1e-12).log()
            votes.append(torch.softmax(log_probabilities / self.temperature, dim=1))
            attentions.append(attention.mean(1))
            if explained is not None:
                scores.append(explained[0])
                contributions.append(explained[1])
        together: Optional[tuple[Tensor, Tensor]] = None  # noqa: UP045
        if self.has_one_score and len(scores) == len(votes):
            together = (torch.stack(scores).mean(0), torch.stack(contributions).mean(0))
        return torch.stack(votes).mean(0), torch.stack(attentions).mean(0), together

    def expected_grade(self, probabilities: Tensor) -> Tensor:
        """Computes the mean grade ``[B]`` of probabilities ``[B, K]``."""
        grades = torch.arange(probabilities.shape[1], dtype=torch.float32, device=probabilities.device)
        return probabilities @ grades


def build_network(
    graders: Sequence[SlideGrader],
    training: TrainingData | None = None,
    familiar: Familiar | None = None,
    evidence: Evidence | None = None,
    licence: str = "",
) -> tuple[ExportedNetwork, ModelCard]:
    """Builds the network of an exported file, and its card.

    Args:
        graders: as :func:`slidetl.training.checkpoint.load_grader` returns them; several make an ensemble.
        training: their training slides.
        familiar: description of these slides' embeddings by the same graders.
        evidence: metrics on held-out slides; its temperature is built in.
        licence: of the weights.

    Raises:
        ModelFileError: a grader was never trained on tiles, or two do not fit together.
    """
    import timm

    first = graders[0]
    if any(grader.tile_spec is None for grader in graders):
        raise ModelFileError(
            "it does not say what tiles it was trained on; 'slidetl fit' makes one that does"
        )
    assert first.tile_spec is not None  # of the line above
    for grader in graders[1:]:
        if (grader.grades, grader.tile_spec) != (first.grades, first.tile_spec):
            raise ModelFileError(
                "the checkpoints of an ensemble must have the same grades and tiles; found "
                f"{first.grades} on {first.tile_spec} and {grader.grades} on {grader.tile_spec}"
            )
    for grader in graders:
        grader.transfer.merge(grader.network.backbone)
    backbone = first.network.backbone
    backbone.check_network()
    network = ExportedNetwork(
        [grader.network for grader in graders],
        evidence.temperature if evidence else 1.0,
        familiar,
        chunk_size=16 if first.tile_spec.is_volume else 64,  # a patch has five times the values of a tile
        window_hu=first.tile_spec.window_hu if first.tile_spec.is_volume else None,
    ).eval()
    with torch.inference_mode():
        is_explained = network.grade(torch.zeros(1, sum(network.widths)))[3] is not None
    return network, ModelCard(
        grades=first.grades,
        tile_spec=first.tile_spec,
        backbone=backbone.description,
        architecture=_architecture(backbone.spec),
        normalisation={"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()},
        versions={"slidetl": VERSION, "torch": str(torch.__version__), "timm": timm.__version__},
        weights_sha256=weights_sha256(network),
        members=len(graders),
        licence=licence,
        training=training,
        evidence=evidence,
        novelty_limit=familiar.limit if familiar else None,
        # Folds begin from the same weights; other networks may not.
        lineage=tuple(dict.fromkeys(sha for grader in graders for sha in grader.network.backbone.lineage)),
        score_unit=first.network.head.score_unit if is_explained else "",
    )


def _architecture(spec: BackboneSpec) -> dict[str, str | int | bool]:
    """Returns the part of a specification that determines the network, not its initial weights."""
    usual = BackboneSpec()
    values = {key: getattr(spec, key) for key in ("in_channels", "gated_mlp", "layer_scale", "pooling")}
    return {"name": spec.name} | {key: found for key, found in values.items() if found != getattr(usual, key)}


def export_model(network: ExportedNetwork, card: ModelCard, path: Path) -> dict[str, float]:
    """Writes a network as one file, compares the two, and records the file as trusted.

    They are compared on a CPU, and on a GPU where there is one; the card in the file says so.

    Args:
        network: of :func:`build_network`.
        card: of the same.
        path: of the file; it appears as a whole.

    Returns:
        The greatest difference of any probability (in float32, of any contribution too) between file and
        network, on random tiles: by device and precision, e.g. ``{"cpu float32": 0.0, "cpu bfloat16": 0.0}``.

    Raises:
        ModelFileError: the file does not compute the same; it is not written then.
    """
    covered = _covered()
    card = replace(card, precisions=tuple(covered))
    with replaced(path) as file:
        _write(network, card, file)
        file.flush()
        partial = Path(file.name)
        worst: dict[str, float] = {}
        for device, several in itertools.groupby(covered, key=lambda name: name.split()[0]):
            loaded = load_model(partial, device, trusted=True).network
            for name in several:
                precision = covered[name]
                worst[name] = _parity(network.to(device), loaded, card.tile_spec, precision)
                if not worst[name] <= PARITY_TOLERANCE[precision]:
                    raise ModelFileError(
                        f"the exported file differs from the network by {worst[name]:.1e} in a probability "
                        f"or a tile's contribution ({name}), more than {PARITY_TOLERANCE[precision]:.0e}; "
                        "it was not written"
                    )
        network.to("cpu")
        trust(file_sha256(partial), path.name)
    return worst


def _covered() -> dict[str, torch.dtype]:
    """Lists the devices and number formats of the comparison, as ``cuda bfloat16``, by device."""
    return {
        f"{device} {str(precision).removeprefix('torch.')}": precision
        for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        for precision in PARITY_TOLERANCE
        if device == "cpu" or precision is torch.float32 or has_bfloat16(torch.device(device))
    }


def _write(network: ExportedNetwork, card: ModelCard, file: IO[bytes]) -> None:
    """Writes a network without the debug records, which have the paths of source files on this machine."""
    packed = io.BytesIO()  # where a disk is full, torch ends the process
    with without_deprecation():
        torch.jit.save(_scripted(network), packed, _extra_files={METADATA: card.to_json()})
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            if not name.endswith(".debug_pkl"):
                copy.writestr(zipfile.ZipInfo(name), archive.read(name))


def check_scripts(network: GradingNetwork) -> None:
    """Compiles the aggregator and the head of a network for :func:`export_model`, without its backbone.

    Raises:
        ModelFileError: TorchScript cannot express them; the message has its reason.
    """
    with without_deprecation():
        _scripted(ExportedNetwork([GradingNetwork(_StandIn(), network.aggregator, network.head)]))  # type: ignore[arg-type] # like a backbone


class _StandIn(nn.Module):
    """Stands for a backbone, which takes seconds to compile."""

    num_features, in_channels = 1, 3

    def forward(self, tiles: Tensor) -> Tensor:
        return tiles.flatten(1)


def _scripted(network: ExportedNetwork) -> Any:
    try:
        return torch.jit.script(network)
    except (RuntimeError, FrontendError, OSError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"'slidetl export' cannot write this network, as TorchScript has no words for it: "
            f"{first_lines(str(error)):.400}"
        ) from error


def random_tiles(
    network: ExportedNetwork, spec: TileSpec, n_tiles: int, generator: torch.Generator
) -> Tensor:
    """Draws tiles as a network takes them; of volumes, Hounsfield units within and beyond the window."""
    side = spec.tile_size_px
    if spec.is_volume:
        low, high = (int(hu) for hu in spec.window_hu)
        low, high = max(low - 100, -32768), min(high + 100, 32767)
        patches = (n_tiles, 1, side, side, side)
        return torch.randint(low, high, patches, dtype=torch.int16, generator=generator)
    shape = (n_tiles, network.in_channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _parity(network: ExportedNetwork, loaded: Any, spec: TileSpec, precision: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    device = network.temperature.device
    differences = []
    for n_tiles in (1, 5):
        tiles = random_tiles(network, spec, n_tiles, generator).to(device)
        is_lower = precision is not torch.float32
        half = torch.autocast(device.type, torch.bfloat16, enabled=is_lower)
        with torch.inference_mode(), exact_float32(device), half:
            differences.append((network(tiles) - loaded(tiles)).abs().max())
            here, there = (of.grade(of.embed(tiles))[3] for of in (network, loaded))
        # As a share of the greatest, since contributions have no scale of their own.
        if here is not None and there is not None and not is_lower:
            differences.append((here[1] - there[1]).abs().max() / here[1].abs().max().clamp_min(1))
    return float(torch.stack(differences).max())  # NaN, unlike with Python's `max`
