"""Subjects: dot-separated names, and patterns over them with NATS's two wildcards. Pure.

orders.created      a subject: tokens of letters, digits and - _ $ / : @ + ~
orders.*            `*` stands for exactly one token
orders.>            `>` stands for one or more tokens, and only comes last
"""

from __future__ import annotations

import re
from functools import lru_cache

from broker_free.errors import InvalidInput

SUBJECT_CHARS_MAX = 255

_TOKEN = r"[A-Za-z0-9_$/:@+~-]+"
_SUBJECT = re.compile(rf"{_TOKEN}(?:\.{_TOKEN})*")
_PATTERN = re.compile(rf"(?:(?:{_TOKEN}|\*)(?:\.(?:{_TOKEN}|\*))*(?:\.>)?|>)")


@lru_cache(4_096)  # the same few subjects come again and again; an error is not remembered
def check_subject(subject: str) -> None:
    """Raise InvalidInput unless `subject` can be published to (no wildcards)."""
    if len(subject) > SUBJECT_CHARS_MAX or not _SUBJECT.fullmatch(subject):
        raise InvalidInput(
            f"{subject[:80]!r} is not a subject",
            hint="use dot-separated names such as orders.created, without wildcards or spaces",
        )


def check_pattern(pattern: str) -> None:
    """Raise InvalidInput unless `pattern` can be subscribed to."""
    if len(pattern) > SUBJECT_CHARS_MAX or not _PATTERN.fullmatch(pattern):
        raise InvalidInput(
            f"{pattern[:80]!r} is not a subject pattern",
            hint="use a subject, with * for one token or a final > for the rest",
        )


def matches(pattern: str, subject: str) -> bool:
    """Say whether a pattern covers a subject.

    >>> matches("orders.*", "orders.created"), matches("orders.*", "orders.eu.created")
    (True, False)
    >>> matches("orders.>", "orders.eu.created"), matches("orders.>", "orders")
    (True, False)
    """
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(
        want in ("*", have) for want, have in zip(wanted, given, strict=True)
    )
