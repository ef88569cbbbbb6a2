"""The life of a brief for one recipient, as one table. Pure."""

from __future__ import annotations

QUEUED, DELIVERED, ANNOUNCED, READ, DONE = "queued", "delivered", "announced", "read", "done"
EXPIRED, CANCELLED, DEAD = "expired", "cancelled", "dead"

# The whole life of a brief for one recipient, the same on both sides. Receipts and acks travel apart and may overtake
# each other, so every later state can follow every earlier one, and nothing ever goes back: news that comes late
# ("delivered" after "read") changes nothing.
FORWARD: dict[str, frozenset[str]] = {
    QUEUED: frozenset({DELIVERED, ANNOUNCED, READ, DONE, EXPIRED, CANCELLED, DEAD}),
    DELIVERED: frozenset({ANNOUNCED, READ, DONE, EXPIRED, DEAD}),  # dead: that node has no such callsign
    ANNOUNCED: frozenset({READ, DONE, EXPIRED}),
    READ: frozenset({DONE}),
    EXPIRED: frozenset({DELIVERED, ANNOUNCED, READ, DONE}),  # what the other side saw outweighs our own clock
    DONE: frozenset(),
    CANCELLED: frozenset(),
    DEAD: frozenset(),
}
PROGRESS = (QUEUED, DELIVERED, ANNOUNCED, READ, DONE)
ENDED = frozenset({EXPIRED, CANCELLED, DEAD})


def may_move(state: str, new: str) -> bool:
    """Say whether `new` is news for something in `state`. A word outside the table is a bug and raises KeyError.

    >>> may_move("delivered", "read"), may_move("read", "announced")
    (True, False)
    """
    if new not in FORWARD:
        raise KeyError(new)
    return new in FORWARD[state]
