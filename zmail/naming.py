"""What a new session is called. Pure: which names are free is asked of the caller, who holds the leases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, count
from pathlib import PurePath

from zmail import address
from zmail.errors import CallsignTaken

STEM_CHARS_MAX = 40
_WORDS = """
alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike
november oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu
"""
SPELLING = tuple(_WORDS.split())

_EIGHT_HEX = re.compile(r"[0-9a-f]{8}")


def new_callsign(
    *,
    wanted: str | None = None,  # ZMAIL_CALLSIGN
    configured: Sequence[str] = (),  # the project's own list
    naming: str = "project",  # or "spelling"
    name_prefix: str | None = None,  # stands in for the project's name
    project: str,
    session_id: str,
    is_free: Callable[[str], bool],
) -> str:
    """The callsign of a new session. CallsignTaken when it asks for one that is not free; else there always is one."""
    if wanted is not None:
        name = address.callsign(wanted)
        if not is_free(name):
            raise CallsignTaken(
                f"{name} is held by another live process", hint=f"free: {free_variant(name, is_free)}"
            )
        return name
    made = (
        _spelled()
        if naming == "spelling"
        else variants(f"{_stem(name_prefix or project)}-{eight_hex(session_id)}")
    )
    return next(name for name in chain(map(address.callsign, configured), made) if is_free(name))


def free_variant(name: str, is_free: Callable[[str], bool]) -> str:
    """The first free of `name-2`, `name-3` …, to suggest where `name` is taken."""
    return next(each for each in variants(name) if each != name and is_free(each))


def variants(name: str) -> Iterator[str]:
    """`name`, `name-2`, `name-3` … without end, each short enough for a callsign."""
    yield name
    for number in count(2):
        yield f"{name[: address.NAME_CHARS_MAX - 8]}-{number}"


def _spelled() -> Iterator[str]:
    """alpha … zulu, then alpha-2 … zulu-2, without end."""
    yield from SPELLING
    for number in count(2):
        yield from (f"{word}-{number}" for word in SPELLING)


def project_name(*, git_root: str | None, cwd: str | None) -> str:
    """The git root's name, else the folder's, else `claude`; as a name.

    >>> project_name(git_root="/src/My Shop", cwd="/src/My Shop/api")
    'my-shop'
    """
    return next((name for path in (git_root, cwd) if path and (name := slug(PurePath(path).name))), "claude")


def slug(text: str) -> str:
    """Lower-case letters and digits, everything else a dash; empty where nothing is left.

    >>> slug("My Shop (v1.2)")
    'my-shop-v1-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:STEM_CHARS_MAX].rstrip("-")


def _stem(text: str) -> str:
    return slug(text) or "claude"


def eight_hex(session_id: str) -> str:
    """Eight hex digits that stand for a session: those it begins with, or of a hash where it is no UUID."""
    head = session_id.strip().lower()[:8]
    return (
        head
        if _EIGHT_HEX.fullmatch(head)
        else blake2b(session_id.encode(errors="replace"), digest_size=4).hexdigest()
    )
