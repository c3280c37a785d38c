"""OpenCV with one thread: processes and threads of our own use the cores already."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def opencv() -> Any:
    """Imports OpenCV at its first use in a process."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
