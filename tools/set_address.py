"""Write the public address of the project into the page and the metadata of a package index.

    python tools/set_address.py https://example.org/group/slidetl

Run it once, when the project has a public address: pyproject.toml gets its ``[project.urls]``, and each link
of README.md to a file of the repository becomes absolute, since a package index shows the page alone. A
second run replaces the first address. Paths follow GitHub and GitLab: ``ADDRESS/blob/main/PATH``, and
``ADDRESS/raw/main/PATH`` for pictures.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}


def with_urls(pyproject: str, address: str) -> str:
    """Replace or add the table ``[project.urls]`` of a pyproject.toml."""
    table = f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
    table += "".join(f'{name} = "{address}/blob/main/{path}"\n' for name, path in PAGES.items())
    rest = re.sub(r"^\[project\.urls\]\n(?:[^\[\n].*\n)*\n?", "", pyproject, flags=re.MULTILINE)
    return rest.replace("[project.scripts]\n", f"{table}\n[project.scripts]\n", 1)


def with_absolute_links(page: str, address: str) -> str:
    """Make each relative link of a Markdown page absolute, and move those that are absolute already."""
    page = re.sub(r"\]\(https?://[^)\s]+?/(?:blob|raw)/main/([^)\s]+)\)", r"](\1)", page)

    def absolute(link: re.Match[str]) -> str:
        mark, text, path = link.groups()
        return f"{mark}[{text}]({address}/{'raw' if mark else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)", absolute, page)


def main(args: list[str]) -> int:
    if len(args) != 1 or not re.fullmatch(r"https://[^\s\"]+[^\s\"/]", args[0]):
        print(
            "usage: python tools/set_address.py https://HOST/GROUP/slidetl (without a slash at the end)",
            file=sys.stderr,
        )
        return 2
    root = Path(__file__).parents[1]
    for name, change in (("pyproject.toml", with_urls), ("README.md", with_absolute_links)):
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8"), args[0]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
