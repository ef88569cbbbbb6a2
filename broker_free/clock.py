"""The clocks of a node: one for time-outs, one for people, and one for deadlines that are on disk.

The third, *steady* time, is what lifetimes count in. It starts as UTC when a store is made, and from then on goes as
fast as time itself: nobody can set it. While a machine is up, it is the time since that machine's start plus a number
that never changes, over any number of restarts of the node, sleep of the machine included. Only over a restart of the
machine UTC must say how long that took; there a wrong UTC makes deadlines wrong by as much.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_SINCE_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_DRIFT_MS: Final = 500  # UTC against steady time; from here on it was set, and that is written down


def utc_ms() -> int:
    return time.time_ns() // 1_000_000


def mono_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def since_boot_ms() -> int:
    """Return the time since the machine was started, sleep included where the system can say."""
    return time.clock_gettime_ns(_SINCE_BOOT) // 1_000_000


def machine_boot() -> str:
    """Name the present start of this machine; empty where the system cannot say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """What a store keeps of its steady clock."""

    machine_boot: str
    offset_ms: int  # steady time less the time since that start of the machine
    ahead_ms: int  # UTC less steady time
    at_ms: int  # steady time when this was written


class SteadyClock:
    """Steady time, going on from where a store's anchor says it was."""

    def __init__(self, anchor: Anchor | None, *, boot: str, since_boot_ms: int, utc_ms: int) -> None:
        self._boot = boot
        self._anchor = anchor
        if anchor is None:
            self.offset_ms = utc_ms - since_boot_ms
        elif boot and anchor.machine_boot == boot:
            self.offset_ms = anchor.offset_ms
        else:  # never back before what was written last
            self.offset_ms = max(anchor.at_ms, utc_ms - anchor.ahead_ms) - since_boot_ms

    def ms(self) -> int:
        return since_boot_ms() + self.offset_ms

    def anchor(self, *, utc_ms: int) -> Anchor | None:
        """Return what is to be written down now, or None when what was written still says all."""
        now_ms = self.ms()
        kept = self._anchor
        if (
            kept is not None
            and (kept.machine_boot, kept.offset_ms) == (self._boot, self.offset_ms)
            and abs(utc_ms - now_ms - kept.ahead_ms) < _DRIFT_MS
        ):
            return None
        self._anchor = Anchor(
            machine_boot=self._boot, offset_ms=self.offset_ms, ahead_ms=utc_ms - now_ms, at_ms=now_ms
        )
        return self._anchor
