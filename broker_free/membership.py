"""Who belongs to the mesh: what member records say, and what of it counts. Pure.

A record is one node's word about another: "in" introduces it, "out" removes it. Records travel in the registry, in an
owned bucket, so a word is its writer's alone and nobody overwrites another's. Every node folds the same set of records
in the order of their stamps, and so comes to the same roll:

- any member may introduce and remove; of two words about a node the later counts;
- what a node says after its own removal does not count, so it cannot bring in itself, a friend, or a friend's friend.
  It could still unsay what it had said before; so whoever removes a node says again, in its own name, whom that node
  had introduced (`taken_over`);
- a member stays bound to the key of its introduction. Another key counts from its own word (a rotation), or after a
  removal and a new introduction.

Where a member listens is another record, written by that member alone. It says nothing about who belongs, so however
new it is, it brings nobody back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from broker_free.errors import InvalidInput
from broker_free.registry import Entry
from broker_free.security import node_id_of

MEMBERS: Final = "own.bf.member"  # key: writer.subject
WHEREABOUTS: Final = "own.bf.whereabouts"  # key: node id

NAME_CHARS_MAX: Final = 64
ENDPOINTS_MAX: Final = 16
ENDPOINT_CHARS_MAX: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A peer as the mesh knows it."""

    node_id: str
    name: str
    public_key: bytes
    endpoints: tuple[str, ...]
    first_key: bytes = b""  # whose hash the node id is, where that is not `public_key`
    beat_endpoint: str = ""
    interests: tuple[str, ...] = ()
    seen_ms: int = 0
    introduced_by: str = ""  # node id
    introduced: int = 0  # stamp of the introduction that counts


def member_from(about: object, *, node_id: str, public_key: bytes, first_key: bytes = b"") -> Member | None:
    """Read what a node says of itself. None when it is not of the right shape."""
    if not isinstance(about, Mapping):
        return None
    name, endpoints, beat = about.get("name"), about.get("endpoints"), about.get("beat", "")
    if not isinstance(name, str) or not isinstance(beat, str) or not isinstance(endpoints, list):
        return None
    if len(endpoints) > ENDPOINTS_MAX:
        return None
    if not all(isinstance(one, str) and len(one) <= ENDPOINT_CHARS_MAX for one in [*endpoints, beat]):
        return None
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        return None
    return Member(
        node_id=node_id,
        name=name,
        public_key=public_key,
        first_key=first_key,
        endpoints=tuple(endpoints),
        beat_endpoint=beat,
    )


def about_of(member: Member) -> dict[str, Any]:
    """Write what `member_from` reads."""
    return {"name": member.name, "endpoints": list(member.endpoints), "beat": member.beat_endpoint}


def keys_from(said: Mapping[str, Any], *, node_id: object) -> tuple[bytes, bytes] | None:
    """Read the key of a node and the first it had, if another. None when the first one is not that of the id."""
    texts = said.get("key"), said.get("first_key", "")
    if not all(isinstance(text, str) and text.isascii() for text in texts):
        return None
    public_key, first_key = (str(text).encode() for text in texts)
    try:
        node_id_of(public_key)
        return (public_key, first_key) if node_id_of(first_key or public_key) == node_id else None
    except InvalidInput:
        return None


def keys_of(member: Member) -> dict[str, Any]:
    """Write what `keys_from` reads."""
    return {"key": member.public_key.decode(), "first_key": member.first_key.decode()}


# Records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One record: what `writer` says about `subject`."""

    writer: str
    subject: str
    stamp: int
    member: Member | None = None  # as introduced; None for a removal

    @property
    def order(self) -> tuple[int, str, str]:
        return self.stamp, self.writer, self.subject


def word_key(writer: str, subject: str) -> str:
    return f"{writer}.{subject}"


def introduction(member: Member) -> dict[str, Any]:
    """Make the value of a record that introduces."""
    return {"is": "in", **keys_of(member), "about": about_of(member)}


def removal() -> dict[str, Any]:
    """Make the value of a record that removes."""
    return {"is": "out"}


def word_of(entry: Entry) -> Word | None:
    """Read a record. None for what is no word, such as one that a node wrote in another's name."""
    writer, dot, subject = entry.key.partition(".")
    value = entry.value
    if writer != entry.origin or not dot or not subject or value is None:
        return None
    if value.get("is") == "out":
        return Word(writer=writer, subject=subject, stamp=entry.stamp)
    keys = keys_from(value, node_id=subject)
    if value.get("is") != "in" or keys is None:
        return None
    member = member_from(value.get("about"), node_id=subject, public_key=keys[0], first_key=keys[1])
    if member is None:
        return None
    return Word(writer=writer, subject=subject, stamp=entry.stamp, member=member)


@dataclass(slots=True)
class Roll:
    """Who is in, who was removed by whom, and who was brought by those alone who have no say."""

    members: dict[str, Member] = field(default_factory=dict)
    removed: dict[str, Word] = field(default_factory=dict)
    strangers: set[str] = field(default_factory=set)  # introduced by nobody whose word counts


def roll_of(words: Iterable[Word]) -> Roll:
    """Fold all records into who belongs. The same records give the same roll, in whatever order they came."""
    roll = Roll()
    strangers = roll.strangers
    for word in sorted(words, key=lambda one: one.order):
        if word.writer in roll.removed or word.writer in strangers:
            if word.subject not in roll.members and word.subject not in roll.removed:
                strangers.add(word.subject)
            continue
        strangers.discard(word.subject)
        known = roll.members.get(word.subject)
        if word.member is None:
            roll.members.pop(word.subject, None)
            roll.removed[word.subject] = word
        elif known is None:
            roll.removed.pop(word.subject, None)
            roll.members[word.subject] = replace(
                word.member, introduced_by=word.writer, introduced=word.stamp
            )
        elif word.writer == word.subject:
            roll.members[word.subject] = replace(
                word.member, introduced_by=known.introduced_by, introduced=known.introduced
            )
    return roll


def taken_over(roll: Roll, *, remover: Member, removed: str) -> list[Member]:
    """Say whom the remover of a node must introduce anew: itself, and the members that rest on that node's word."""
    rest = [one for one in roll.members.values() if one.introduced_by == removed]
    return [remover, *(one for one in rest if one.node_id not in (removed, remover.node_id))]
