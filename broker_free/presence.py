"""Who is there: alive, suspect or down, by when each peer was last heard. Pure.

Presence decides when to dial and what to show, never whether something is delivered. Times are monotonic. A node
that was itself suspended (a closed laptop, a debugger) has heard nobody for a while, which says nothing about the
others: its own lag stretches its time-outs.
"""

from __future__ import annotations

from typing import Final, Literal

from broker_free.limits import Limits

State = Literal["alive", "suspect", "down"]

_LAG_MS: Final = 1_000  # a loop that is late by more than this was not running


class Presence:
    """What this node believes of each peer. A peer never heard is down."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heard_ms: dict[str, int] = {}
        self._states: dict[str, State] = {}
        self._stretch = 1
        self._stretch_until_ms = 0

    def heard(self, peer: str, now_ms: int) -> None:
        """Any frame or beat of a peer is a sign of life."""
        self._heard_ms[peer] = now_ms

    def lagged(self, lag_ms: int, now_ms: int) -> None:
        """This node's own loop was late by `lag_ms`."""
        if lag_ms >= _LAG_MS:
            self._stretch = min(self._limits.lag_stretch_max, 1 + lag_ms // _LAG_MS)
            self._stretch_until_ms = now_ms + self._limits.down_after_ms * self._stretch

    def changes(self, now_ms: int) -> list[tuple[str, State]]:
        """Return the peers whose state is another than at the last call."""
        if now_ms >= self._stretch_until_ms:
            self._stretch = 1
        changed: list[tuple[str, State]] = []
        for peer, heard_ms in self._heard_ms.items():
            state = self._judge(now_ms - heard_ms)
            if self._states.get(peer, "down") != state:
                self._states[peer] = state
                changed.append((peer, state))
        return changed

    def state(self, peer: str) -> State:
        return self._states.get(peer, "down")

    def _judge(self, silence_ms: int) -> State:
        if silence_ms >= self._limits.down_after_ms * self._stretch:
            return "down"
        if silence_ms >= self._limits.suspect_after_ms * self._stretch:
            return "suspect"
        return "alive"
