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
