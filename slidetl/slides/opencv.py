"""OpenCV with one thread: processes and threads of our own use the cores already."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def opencv() -> Any:
    """Imports OpenCV once in a process, when it is first needed."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
