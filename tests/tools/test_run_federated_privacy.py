import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slidetl.errors import UsageError
from slidetl.federation.privacy import Privacy
from tools import run_federated_privacy

WIDTH = 12


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name, value in {
        "TILES": 4,
        "PATIENTS": 45,
        "SITE": 10,
        "POPULATION": 20,
        "ROUNDS": 1,
        "STEPS": 2,
        "SHADOWS": 20,
        "SEEDS": 1,
    }.items():
        monkeypatch.setattr(run_federated_privacy, name, value)
    return run_federated_privacy


def write_tiles(folder: Path) -> NDArray[Any]:
    """Small tiles of two classes; returns their features, which tell the class."""
    rng = np.random.default_rng(0)
    rows = []
    for name, number in (("AC", 100), ("other", 100)):
        (folder / name).mkdir(parents=True)
        for k in range(number):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name / f"{k:03}.png")
            rows.append(rng.normal(size=WIDTH) + (name == "AC"))
    return np.array(rows, np.float16)


@pytest.mark.slow  # sixty trainings, and NVFlare's import
def test_the_page_has_a_row_for_each_defence(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_tiles(tmp_path / "tiles")
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "features.npy", features)
    noisy = tool.Defence("noise on each update", update=Privacy("site", clip=1.0, noise=2.0))
    private = tool.Defence("DP-SGD", Privacy("patient", noise=1.5))
    monkeypatch.setattr(tool, "defences", lambda: [tool.Defence("none"), noisy, private])
    sizes = {"weight": WIDTH, "bias": 3}
    measured = [measure("a head", sizes) for measure in (tool.measure_packed, tool.measure_entries)]
    monkeypatch.setattr(tool, "encryption_rows", lambda *_: measured)
    words = ["--tiles", str(tmp_path / "tiles"), "--target", "AC", "--output", str(tmp_path / "out")]
    assert tool.main([*words, "--page", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| none | - | none |" in text and "| noise on each update | 2.00 |" in text
    assert "| DP-SGD | 1.50 |" in text
    for form in ("averaged.encrypted", "NVFlare's, by entry"):
        assert re.search(rf"\| a head \| {form} \| 15 \|.*\| [1-9]e-0[6-9] \|\n", text)
    kept = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.npz"))]
    monkeypatch.setattr(tool, "train_site", None)  # kept results are not computed again
    assert tool.main([*words, "--page", str(tmp_path / "page.md")]) == 0
    assert kept == [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.npz"))]
    # The encryption alone changes its own section.
    words = ["--encryption", "--output", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]
    (tmp_path / "page.md").write_text(text.replace("| a head |", "| of before |"))
    assert tool.main(words) == 0 and (tmp_path / "page.md").read_text() == text
    (tmp_path / "page.md").write_text("# Another page\n")
    with pytest.raises(UsageError, match="expected a page of this program"):
        tool.main(words)


def test_patients_share_no_tile_and_have_their_grade(tool: ModuleType, tmp_path: Path) -> None:
    write_tiles(tmp_path / "tiles")
    marked = np.zeros((200, 200), np.float16)
    np.fill_diagonal(marked, 1)
    np.save(tmp_path / "features.npy", marked)
    patients = tool.read_patients(tmp_path / "tiles", "AC", tmp_path / "features.npy")
    uses = patients.features[:, 0].numpy() > 0
    assert (uses.sum(0) <= 1).all() and (uses.sum(1) == 4).all()
    assert (uses[:, :100].sum(1) == patients.grades).all()
    with pytest.raises(UsageError, match="one of them tumour"):
        tool.read_patients(tmp_path / "tiles", "tumour", tmp_path / "features.npy")
