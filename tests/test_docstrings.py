"""Tests of the words of docstrings: a summary is verb + object, or a noun phrase for what is no function."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import slidetl

PACKAGE = Path(slidetl.__file__).parent
FRAGMENT = re.compile(
    r"(Of|Whose|By|Over|What|Which|Whether|How|Where|As|To|Those|The same|It|With|Without|"
    r"From|In|None|Such)\b"
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_no_summary_begins_with_a_fragment_or_an_indirect_question() -> None:
    found, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            seen += text is not None
            if text is not None and FRAGMENT.match(text):
                found.append(f"{path.name}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not found and seen > 500
