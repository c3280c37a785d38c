"""Tests of the public API: its names are there, typed and documented, and load nothing before their use."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import slidetl


def test_every_public_name_is_imported_for_type_checkers_from_the_same_module() -> None:
    tree = ast.parse(Path(slidetl.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"slidetl.{module}" for name, module in slidetl._HOME.items()}


@pytest.mark.parametrize("name", [name for name in slidetl.__all__ if name != "__version__"])
def test_a_public_name_is_documented_and_at_home_in_the_package(name: str) -> None:
    found = getattr(slidetl, name)
    assert found.__module__.startswith("slidetl.") and inspect.getdoc(found)
    assert name in dir(slidetl)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SlideSource", "slide_id path mpp_override mpp_replace"),
        (
            "TileSpec",
            "mpp tile_size_px stride_px min_tissue mpp_tolerance codec jpeg_quality edge icc min_focus "
            "max_pen max_fold max_air channels",
        ),
        ("accuracy", "true predicted weights"),
        ("confusion_matrix", "true predicted n_grades"),
        (
            "grade_slide",
            "model path mpp_override batch_size threads force profile runner readers mpp_replace "
            "mpp_tolerance channels",
        ),
        ("load_grader", "path allow"),
        ("load_model", "path device trusted"),
        ("log_loss", "true probabilities weights"),
        ("mae", "true predicted weights"),
        ("open_cache", "path spec"),
        ("open_slide", "path mpp_override icc mpp_replace channels"),
        ("qwk", "true predicted n_grades weights"),
        ("read_features", "cache name weights_sha256"),
        ("read_study", "manifest cache n_grades tasks"),
        ("rps", "true probabilities weights"),
        ("tile_slide", "source cache_dir spec overwrite threads preview"),
    ],
)
def test_a_public_name_takes_the_arguments_of_release_0_1_0(name: str, arguments: str) -> None:
    names = arguments.split()
    assert list(inspect.signature(getattr(slidetl, name)).parameters)[: len(names)] == names


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_slides'"):
        slidetl.open_slides  # noqa: B018


def test_importing_the_package_imports_none_of_its_parts() -> None:
    code = "import sys, slidetl; print([m for m in sys.modules if m.split('.')[0] in ('slidetl', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['slidetl.version', 'slidetl']"


def test_what_a_class_path_names_has_one_name() -> None:
    """Else jsonargparse writes the shorter into configurations and checkpoints, where it is refused."""
    assert not [name for name in slidetl._HOME if slidetl._HOME[name].startswith(("models.", "training.sch"))]
