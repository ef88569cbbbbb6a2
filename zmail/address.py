"""Who a brief is for: the grammar of callsigns, nodes and addresses. Pure; knows no directory of who exists.

bravo            a callsign wherever it lives          @server2    everybody on that node
bravo@server2    that callsign on that node            #ops        the members of a group
bravo (server2)  the same, as ClaudeMail writes it     all         everybody on every node
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

from zmail.errors import InvalidAddress

NAME_CHARS_MAX = 64
ADDRESSES_MAX = 1_000  # of one brief: what one publish may address

_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")
_IN_BRACKETS = re.compile(r"([^()]*?)\s*\(([^()]*)\)")
_GRAMMAR = (
    f"lower-case letters, digits, dots, dashes and underscores, a letter or digit first, "
    f"at most {NAME_CHARS_MAX} characters"
)


class Kind(StrEnum):
    CALLSIGN = "callsign"
    NODE = "node"
    GROUP = "group"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One place a brief can go to. `str()` is the form that `parse` reads and the JSON shapes carry."""

    kind: Kind
    name: str | None = None  # the callsign or the group
    node: str | None = None  # of a callsign: None = wherever it lives

    def __str__(self) -> str:
        match self.kind:
            case Kind.ALL:
                return "all"
            case Kind.GROUP:
                return f"#{self.name}"
            case Kind.NODE:
                return f"@{self.node}"
            case Kind.CALLSIGN:
                return f"{self.name}@{self.node}" if self.node else f"{self.name}"

    def in_frontmatter(self) -> str:
        """The form of the exchange format: `alpha (server1)`."""
        if self.kind is Kind.CALLSIGN and self.node:
            return f"{self.name} ({self.node})"
        return str(self)


def parse(text: str) -> Address:
    """Read one address, folding its case. A malformed one is an InvalidAddress that says why."""
    word = text.strip()
    if word.startswith("#"):
        return Address(kind=Kind.GROUP, name=_name(word[1:], "group", text))
    if word.lower() == "all":
        return Address(kind=Kind.ALL)
    if in_brackets := _IN_BRACKETS.fullmatch(word):
        name, node = in_brackets[1], in_brackets[2]
    else:
        name, at, node = word.partition("@")
        if not at:
            return Address(kind=Kind.CALLSIGN, name=callsign(word))
    if not name.strip():
        return Address(kind=Kind.NODE, node=_name(node, "node", text))
    return Address(kind=Kind.CALLSIGN, name=callsign(name), node=_name(node, "node", text))


def parse_list(texts: str | Iterable[str]) -> tuple[Address, ...]:
    """Read comma-separated addresses, or several such texts, in order and without repeats."""
    whole = [texts] if isinstance(texts, str) else texts
    words = (word for text in whole for word in text.split(","))
    addresses = tuple(dict.fromkeys(parse(word) for word in words if word.strip()))
    if len(addresses) > ADDRESSES_MAX:
        raise InvalidAddress(f"{len(addresses)} addresses, at most {ADDRESSES_MAX} in one brief")
    return addresses


def callsign(text: str) -> str:
    """Check a callsign and fold its case."""
    name = _name(text, "callsign", text)
    if name == "all":
        raise InvalidAddress("'all' is not a callsign", hint="it means everybody; @NODE is everybody there")
    return name


def node_name(text: str) -> str:
    """Check a node's name (or id) and fold its case."""
    return _name(text, "node", text)


def _name(word: str, what: str, text: str) -> str:
    name = word.strip()
    # Only ASCII is folded: the Kelvin sign lower-cases to a k, and a look-alike must not become a real name.
    if not name.isascii() or not _NAME.fullmatch(name := name.lower()):
        shown = text.strip()[: 2 * NAME_CHARS_MAX]
        raise InvalidAddress(f"{shown!r}: malformed {what} name", hint=f"a name has {_GRAMMAR}")
    return name


def nearest(name: str, candidates: Iterable[str], *, at_most: int = 3) -> Sequence[str]:
    """The most similar of `candidates`, best first, for "did you mean"; none that is far off."""
    return get_close_matches(name.strip().lower(), list(candidates), n=at_most, cutoff=0.6)
