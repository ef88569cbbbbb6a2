"""Wait on a condition that nothing announces: look again and again until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(look: Callable[[], Found], *, timeout_s: float, every_s: float = 0.03) -> Found:
    """Return the first true answer of `look`, or its last one when `timeout_s` is over. Looks at least once."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(every_s)
    return found
