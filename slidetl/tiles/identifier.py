"""Turns names into identifiers of slides, safe as names of folders and files on any file system."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# File systems take 255 bytes; a cache, a report and their temporary files add endings. A longer name keeps
# its beginning and gets eight digits of a hash.
_MOST_BYTES = 150
# Windows, and a share served by it, opens a device under these names, whatever their extension.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def safe_slide_id(name: str) -> str:
    """Turns a name into a single folder name safe on any file system.

    Letters and digits of every script stay, in their composed form (NFC), and so do ``.``, ``_`` and ``-``;
    runs of other characters become ``_``. Idempotent.

    Returns:
        At most 150 bytes in UTF-8; empty if the name has neither letters nor digits.
    """
    kept = (
        letter if letter in "._-" or unicodedata.category(letter)[0] in "LNM" else " "
        for letter in unicodedata.normalize("NFC", name.strip())
    )
    safe = re.sub(" +", "_", "".join(kept)).lstrip(".-").rstrip(".")
    if not any(unicodedata.category(letter)[0] in "LN" for letter in safe):
        return ""
    if _DEVICES.fullmatch(safe):
        safe = f"_{safe}"
    data = safe.encode()
    if len(data) <= _MOST_BYTES:
        return safe
    return f"{data[: _MOST_BYTES - 9].decode(errors='ignore')}_{short_digest(safe)}"


def short_digest(name: str) -> str:
    """Computes eight hexadecimal digits to distinguish names."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]


def clash_key(slide_id: str) -> str:
    """Returns a key, equal for two identifiers if some file system treats them as one."""
    return unicodedata.normalize("NFC", slide_id.casefold())
