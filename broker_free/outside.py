"""What comes from outside, made harmless: JSON with bounds, text for logs, and counts of what was turned away. Pure."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from typing import Any, Final

from broker_free.errors import InvalidInput

log = logging.getLogger("broker_free")

_INT_MAX: Final = 1 << 63  # what SQLite and the frames' own fields can hold
_INT_DIGITS_MAX: Final = 19  # more digits are not even read: that takes time quadratic in their number
_LOG_EVERY_MS: Final = 60_000


def load_json(raw: bytes, *, depth_max: int, bytes_max: int) -> Any:  # Any: JSON, checked by the caller
    """Read JSON that a peer sent. Raises InvalidInput for what is too long, too deep, or no value SQLite could keep.

    What comes back holds no integer beyond 63 bits, no NaN and no lone surrogate, so it can be stored and encoded.
    """
    if len(raw) > bytes_max:
        raise InvalidInput(f"JSON of {len(raw)} bytes; the limit is {bytes_max}")
    try:
        value = _DECODER.decode(raw.decode())
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for a lone surrogate
    except (ValueError, RecursionError):
        raise InvalidInput("not JSON") from None
    # Fewer brackets than that cannot nest deeper; counting them costs nothing beside the decoding.
    if raw.count(b"[") + raw.count(b"{") > depth_max and _depth(value) > depth_max:
        raise InvalidInput(f"JSON nested deeper than {depth_max}")
    return value


def _depth(value: object) -> int:
    """Say how deeply lists and objects nest."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _int(digits: str) -> int:
    if len(digits) > _INT_DIGITS_MAX + 1 or not -_INT_MAX <= (value := int(digits)) < _INT_MAX:
        raise ValueError("an integer beyond 63 bits")
    return value


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError("a number beyond all bounds")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_int=_int, parse_float=_float, parse_constant=_constant)


def printable(text: object, *, chars_max: int = 200) -> str:
    """Write what a peer said so that it cannot forge a line, move a cursor or flood a log."""
    cut = str(text)[:chars_max]
    return cut if cut.isprintable() else ascii(cut)[1:-1]


class Refusals:
    """What was turned away, counted by reason. The log hears of each reason once a minute at most."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._quiet_until_ms: dict[str, int] = {}

    def add(self, reason: str, now_ms: int, **details: object) -> None:
        """Count one; `now_ms` is monotonic. `reason` is one of ours, `details` may come from outside."""
        self.counts[reason] += 1
        if now_ms >= self._quiet_until_ms.get(reason, 0):
            self._quiet_until_ms[reason] = now_ms + _LOG_EVERY_MS
            fields = {name: printable(value) for name, value in details.items()}
            log.warning("refused", extra={"reason": reason, "count": self.counts[reason], **fields})


class Allowance:
    """How often something may happen: `burst` at once, then `a_second`. Time comes in."""

    __slots__ = ("_a_second", "_burst", "_left", "_now_ms")

    def __init__(self, *, burst: int, a_second: float, now_ms: int) -> None:
        self._burst = burst
        self._a_second = a_second
        self._left = float(burst)
        self._now_ms = now_ms

    def take(self, now_ms: int) -> bool:
        """Use one up if there is one."""
        self._left = min(self._burst, self._left + (now_ms - self._now_ms) * self._a_second / 1_000)
        self._now_ms = now_ms
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def is_full(self, now_ms: int) -> bool:
        """Say whether nothing would be lost by forgetting this one."""
        return self._left + (now_ms - self._now_ms) * self._a_second / 1_000 >= self._burst
