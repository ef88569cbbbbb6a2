"""What nodes say to each other about mail, as bytes and back. Pure; stores and sends nothing.

    zmail.brief    one message for all remote nodes of a brief, under the brief's own id. Each files its recipients.
                   {"from": callsign, "class": ..., "sent_ms": ..., "to": [[callsign, node id, "to" | "cc"], ...],
                    "draft": {title, body, priority, ...}}
    zmail.receipt  back to the sender's node: what became of briefs there.
                   [{brief, callsign, state, at_ms, door, reason}, ...]      callsign null: everyone at that node

Which node speaks is the envelope's word, never the body's, and the id of a brief is the envelope's too. Keys that
are not known here are a newer version's and are left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from broker_free.errors import InvalidInput
from zmail import action, address, brief, times
from zmail.brief import Brief, Draft
from zmail.directory import TIME_MS_END, Place
from zmail.errors import InvalidBrief
from zmail.identity import SenderClass
from zmail.states import ANNOUNCED, DEAD, DELIVERED, DONE, EXPIRED, READ

BRIEF = "zmail.brief"
RECEIPT = "zmail.receipt"

TO, CC = "to", "cc"
REASON_CHARS_MAX = 200
_RECEIPT_STATES = frozenset({DELIVERED, ANNOUNCED, READ, DONE, EXPIRED, DEAD})
_NODE_ID = re.compile(r"[a-z2-7]{32}")
_CLASSES = frozenset(get_args(SenderClass))


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A brief with everybody it is for, as it leaves its sender's node and as it arrives at another."""

    sender: str  # callsign at the node that the envelope names
    sender_class: str
    sent_ms: int
    draft: Draft
    to: tuple[Place, ...]
    cc: tuple[Place, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        return (*self.to, *self.cc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one brief in one mailbox."""

    brief: str
    callsign: str | None  # None: for everyone at that node, when not even the names could be read
    state: str
    at_ms: int
    door: str | None = None
    reason: str | None = None


def encode_letter(letter: Letter) -> bytes:
    return _json(
        {
            "from": letter.sender,
            "class": letter.sender_class,
            "sent_ms": letter.sent_ms,
            "to": recipients_of(letter),
            "draft": args_of(letter.draft),
        }
    )


def decode_letter(body: bytes) -> Letter:
    """Read a letter. InvalidInput (or InvalidBrief) says what is wrong with it, and nothing else is raised."""
    said = _loaded(body)
    if not isinstance(said, dict) or not isinstance(draft := said.get("draft"), dict):
        raise InvalidInput("not a letter")
    sender_class = said.get("class")
    to, cc = places_from(said.get("to"))
    return Letter(
        sender=_callsign(said.get("from")),
        sender_class=str(sender_class) if sender_class in _CLASSES else "script",
        sent_ms=_time(said.get("sent_ms")),
        draft=draft_from(draft),
        to=to,
        cc=cc,
    )


def recipients_of(letter: Letter) -> list[list[str]]:
    """The recipients as rows, for the wire and for the store."""
    return [[*place, TO] for place in letter.to] + [[*place, CC] for place in letter.cc]


def places_from(rows: object) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Read `recipients_of` back: who it is to, and who gets a copy."""
    if not isinstance(rows, list) or len(rows) > address.ADDRESSES_MAX:
        raise InvalidInput("recipients of the wrong shape")
    kinds: dict[str, list[Place]] = {TO: [], CC: []}
    for row in rows:
        if not (isinstance(row, list) and len(row) >= 3 and row[2] in (TO, CC)):
            raise InvalidInput("a recipient of the wrong shape")
        kinds[row[2]].append(Place(_callsign(row[0]), _node(row[1])))
    return tuple(kinds[TO]), tuple(kinds[CC])


def args_of(draft: Draft) -> dict[str, Any]:  # Any: a JSON object
    """Say a draft as the arguments of `send` do, so that one set of checks reads it everywhere."""
    said: dict[str, Any] = {"title": draft.title, "body": draft.body}
    if draft.priority != "normal":
        said["priority"] = draft.priority
    if draft.due_ms is not None:
        said["due"] = times.format_time(draft.due_ms)
    if draft.ttl_ms is not None:
        said["ttl"] = times.format_duration(draft.ttl_ms)
    said |= {
        "thread": draft.thread,
        "reply_to": draft.reply_to,
        "project": draft.project,
        "intent": draft.intent,
        "tags": list(draft.tags),
        "actions": action.to_frontmatter(draft.actions),
        "extra": dict(draft.extra) or None,
    }
    return {key: value for key, value in said.items() if value not in (None, [])}


def draft_from(said: Mapping[str, Any]) -> Draft:  # Any: a peer's JSON
    """Read `args_of` back. InvalidBrief for what no sender of this version could have written."""
    draft = brief.draft_of({**said, "markdown": None, "to": None, "cc": None})
    if not (extra := said.get("extra")):
        return draft
    if not isinstance(extra, dict):
        raise InvalidInput("extra keys of the wrong shape")
    try:  # what a reader can write into a file and read again is bounded in depth and size
        brief.parse(brief.format(Brief(draft=replace(draft, body="", extra=extra))))
    except (RecursionError, ValueError):
        raise InvalidInput("extra keys that do not fit into frontmatter") from None
    return replace(draft, extra=extra)


def encode_receipts(receipts: Iterable[Receipt]) -> bytes:
    return _json(
        [
            {
                "brief": each.brief,
                "callsign": each.callsign,
                "state": each.state,
                "at_ms": each.at_ms,
                "door": each.door,
                "reason": each.reason,
            }
            for each in receipts
        ]
    )


def decode_receipts(body: bytes) -> Sequence[Receipt]:
    """Read receipts. InvalidInput for anything else; states that are not known here are left out."""
    said = _loaded(body)
    if not isinstance(said, list) or not all(isinstance(each, dict) for each in said):
        raise InvalidInput("not a list of receipts")
    return [_receipt(each) for each in said if each.get("state") in _RECEIPT_STATES]


def _receipt(said: Mapping[str, Any]) -> Receipt:  # Any: a peer's JSON
    callsign = said.get("callsign")
    return Receipt(
        brief=_text(said.get("brief"), "brief"),
        callsign=None if callsign is None else _callsign(callsign),
        state=said["state"],
        at_ms=_time(said.get("at_ms")),
        door=_short(said.get("door")),
        reason=_short(said.get("reason")),
    )


def _callsign(value: object) -> str:
    try:
        return address.callsign(_text(value, "callsign"))
    except InvalidBrief as error:
        raise InvalidInput(error.message) from None


def _node(value: object) -> str:
    node = _text(value, "node id")
    if not _NODE_ID.fullmatch(node):
        raise InvalidInput("not a node id")
    return node


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable():  # half a surrogate pair is not printable
        raise InvalidInput(f"{what} is not text")
    return value


def _short(value: object) -> str | None:
    return value[:REASON_CHARS_MAX] if isinstance(value, str) and value.isprintable() else None


def _time(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < TIME_MS_END:
        raise InvalidInput("not a time")
    return value


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _loaded(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("not JSON") from None
