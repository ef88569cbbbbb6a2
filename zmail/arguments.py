"""Read the arguments of a verb: the caller's JSON, checked once, at the edge. Pure. InvalidInput names the argument."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from broker_free.errors import InvalidInput
from zmail import times

Args: TypeAlias = Mapping[str, Any]  # Any: the caller's JSON

IDS_MAX = 100  # of one call, which is one transaction


def text(args: Args, key: str) -> str | None:
    value = args.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{key} must be text")
    return value or None


def needed(args: Args, key: str) -> str:
    if (said := text(args, key)) is None or not said.strip():
        raise InvalidInput(f"{key} is missing")
    return said


def texts(args: Args, key: str) -> list[str]:
    value = args.get(key)
    if (
        not isinstance(value, list)
        or not all(isinstance(each, str) for each in value)
        or len(value) > IDS_MAX
    ):
        raise InvalidInput(f"{key} must be a list of at most {IDS_MAX} texts")
    return value


def flag(args: Args, key: str) -> bool:
    value = args.get(key, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{key} must be true or false")
    return value


def number(args: Args, key: str, *, default: int) -> int:
    value = args.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"{key} must be a whole number, not below 0")
    return value


def time_ms(said: str, *, now_ms: int) -> int:
    """Read `2h`, a day or a time."""
    with suppress(InvalidInput):
        return now_ms - times.parse_duration(said)
    try:
        return times.parse_time(said)
    except InvalidInput:
        raise InvalidInput(f"not a time: {said[:40]!r}", hint="write it like 2h, 3d or 2026-04-01") from None
