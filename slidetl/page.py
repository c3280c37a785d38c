"""Self-contained pages: no network, no other files, no scripts but ours."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidetl.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

_OPENSEADRAGON = "openseadragon/openseadragon.min.js"


def write_page(
    path: Path, package: str, template: str, style: str, scripts: tuple[str, ...], **values: Any
) -> None:
    """Fills a template and writes it, whole or not at all.

    Template, style sheet and scripts are files in the folder ``templates`` of the package, or of slidetl if
    pages share them; ``values`` are the template's variables, and are escaped. The page's policy allows only
    these scripts and this style, by their hashes, and images inside the page.

    Raises:
        OutputError: the page cannot be written.
    """
    from markupsafe import Markup

    css = _asset(package, style)
    code = [_asset(package, script) for script in scripts]
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in code) or "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_sha256(css)}'; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'"
    )
    # Style and scripts are files of this package.
    own = {"policy": policy, "style": Markup(css), "scripts": [Markup(text) for text in code]}
    write_whole(path, environment(package).get_template(template).render(**own, **values))


def data_uri(kind: str, content: bytes) -> str:
    """Encodes an image as a data URI; ``kind`` is e.g. ``jpeg``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def script_json(values: Any) -> Any:
    """Dumps values as JSON for a ``<script>``; they cannot end it or begin a comment."""
    from markupsafe import Markup

    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


@functools.cache
def environment(package: str) -> Environment:
    """Returns the templates of a package and the shared ones; values are escaped, none may be missing."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader, strict = ChoiceLoader([PackageLoader(package), PackageLoader("slidetl")]), StrictUndefined
    return Environment(loader=loader, undefined=strict, autoescape=True, trim_blocks=True, lstrip_blocks=True)


@functools.cache
def _asset(package: str, name: str) -> str:
    shared = resources.files("slidetl") / "templates"
    own = resources.files(package) / "templates"
    folder = own if (own / name).is_file() else shared
    text = (folder / name).read_text(encoding="utf-8")
    if name != _OPENSEADRAGON:
        return text
    # With open developer tools a browser would request the source map.
    code = text[: text.index("//# sourceMappingURL")]
    licence = (folder / "openseadragon" / "LICENSE.txt").read_text(encoding="utf-8")
    return f"/*\n{licence}*/\n{code}"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
