"""The two clocks of a node: one for time-outs, one for what tables record."""

from __future__ import annotations

import time


def utc_ms() -> int:
    return time.time_ns() // 1_000_000


def mono_ms() -> int:
    return time.monotonic_ns() // 1_000_000
