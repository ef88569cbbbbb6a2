"""Durations, dates and ages as text at the edges, integers in UTC milliseconds inside. Pure; never asks a clock."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from broker_free.errors import InvalidInput

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
WEEK_MS = 7 * DAY_MS

_UNITS = {"w": WEEK_MS, "d": DAY_MS, "h": HOUR_MS, "m": MINUTE_MS, "s": SECOND_MS}  # largest first
_DURATION = re.compile(r"([0-9]{1,9}) ?([smhdw])")
_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)? ?(Z|z|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE_MS = timedelta(milliseconds=1)


def parse_duration(text: str) -> int:
    """Milliseconds of `30s 15m 2h 3d 1w`, and of nothing else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidInput(f"not a duration: {text[:40]!r}", hint="write it like 30s, 15m, 2h, 3d or 1w")
    return int(match[1]) * _UNITS[match[2]]


def format_duration(duration_ms: int) -> str:
    """The shortest text that `parse_duration` reads back; what is less than a second is cut off.

    >>> format_duration(7_200_000), format_duration(90_000)
    ('2h', '90s')
    """
    unit = next((name for name, ms in _UNITS.items() if duration_ms and duration_ms % ms == 0), "s")
    return f"{duration_ms // _UNITS[unit]}{unit}"


def parse_time(text: str) -> int:
    """UTC milliseconds of an RFC 3339 time or a YYYY-MM-DD day; without a zone it is UTC, a day is its midnight."""
    match = _TIME.fullmatch(text.strip())
    try:
        if match is not None:
            return (_moment(match) - _EPOCH) // _ONE_MS
    except (ValueError, OverflowError):  # the thirtieth of February, or a zone that leads out of the calendar
        pass
    raise InvalidInput(f"not a date: {text[:40]!r}", hint="write 2026-04-01 or 2026-04-01T10:15:00Z")


def _moment(match: re.Match[str]) -> datetime:
    year, month, day, hour, minute, second = (int(match[group] or 0) for group in range(1, 7))
    microsecond = int((match[7] or "").ljust(6, "0")[:6])
    moment = datetime(year, month, day, hour, minute, second, microsecond, tzinfo=_zone(match[8]))
    return moment.astimezone(UTC)


def _zone(text: str | None) -> timezone:
    if text is None or text in "Zz":
        return UTC
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-offset if text[0] == "-" else offset)


def format_time(time_ms: int) -> str:
    """RFC 3339 in UTC, with milliseconds only where there are any."""
    moment = _EPOCH + timedelta(milliseconds=time_ms)
    return moment.strftime(f"{moment.year:04}-%m-%dT%H:%M:%S") + (
        f".{time_ms % 1000:03}Z" if time_ms % 1000 else "Z"
    )


def format_day(time_ms: int) -> str:
    """A day alone where the time is its midnight, as `due` is mostly given; else `format_time`."""
    return format_time(time_ms).removesuffix("T00:00:00Z")


def span(duration_ms: int) -> str:
    """A duration in words, in the one unit that says most: "40 s", "5 min", "9 d"."""
    for name, ms in (("w", WEEK_MS), ("d", DAY_MS), ("h", HOUR_MS), ("min", MINUTE_MS)):
        if duration_ms >= (2 * ms if name == "w" else ms):  # "9 d" says more than "1 w"
            return f"{duration_ms // ms} {name}"
    return f"{max(duration_ms, 0) // SECOND_MS} s"


def age(*, since_ms: int, now_ms: int) -> str:
    """How long ago in words: "just now", "5 min ago", "3 d ago"."""
    gone_ms = now_ms - since_ms
    # Also for a clock of another node that runs ahead.
    return "just now" if gone_ms < 10 * SECOND_MS else f"{span(gone_ms)} ago"
