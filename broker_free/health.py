"""How a node is: sound, low on disk, or with a store that failed. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HealthState = Literal["ok", "disk-low", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of a node's store.

    ok         everything is accepted
    disk-low   nothing new is accepted; reading, settling and deleting go on; it passes by itself
    failed     nothing is accepted or acknowledged, reading goes on as far as the disk allows; only a restart helps
    """

    state: HealthState = "ok"
    why: str = ""
    hint: str = ""
    since_ms: int = 0  # UTC
    quarantined: int = 0  # messages whose digest no longer fits, in both directions
