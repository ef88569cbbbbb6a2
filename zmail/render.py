"""Text for people and models out of the JSON that verbs answer. Pure: no clock, no terminal, nothing asked.

Every word in a shape may come from another agent on another machine, so every one passes `clean` or `one_line`
before it is shown: no escape sequence, no control character, nothing invisible, no turned direction. A brief is shown
as one line that the node vouches for, then the sender's words between two lines with a random mark that the words
cannot contain. What stands around them states facts and asks for nothing.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from broker_free.errors import InvalidInput
from zmail import times

Shape: TypeAlias = Mapping[str, Any]  # Any: one of the JSON objects that a verb answers

TITLE_CHARS_MAX = 60  # in a table
CELL_CHARS_MAX = 40
NOTICE_TITLE_CHARS_MAX = 100
NOTICE_BRIEFS_MAX = 10  # more are counted
SHORT_ID_CHARS = 8  # of the end: ids begin alike, and any six characters of the end are taken as the id

# ---- words from elsewhere ----

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\x9d]*(?:\x07|\x1b\\|\x9c)"  # OSC: titles, links, the clipboard
    r"|\x1b[PX^_][^\x1b]*\x1b\\"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]"
)
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")  # a bare return would write over the line
_UNSEEN = (
    (0x00, 0x08), (0x0E, 0x1F), (0x7F, 0x9F),  # control characters, but tab and line feed
    (0x061C, 0x061C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x206F),  # turn the direction of the text
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200B),
    (0x2060, 0x2065), (0x3164, 0x3164), (0xFE00, 0xFE0D), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF9, 0xFFFB),
    (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),  # not seen by people, but read by models
)  # fmt: skip
_DROPPED = {code: None for first, last in _UNSEEN for code in range(first, last + 1)}


def clean(text: str) -> str:
    """Text as it is safe in a terminal and before a model: several lines, nothing that acts or hides."""
    whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written anywhere
    return _LINE_ENDS.sub("\n", _ESCAPES.sub("", whole)).translate(_DROPPED)


def one_line(value: object, chars_max: int = CELL_CHARS_MAX) -> str:
    """The same in one line of at most `chars_max` characters. None is empty."""
    if value is None:
        return ""
    # Ten times what is shown is enough to clean: a title of a megabyte costs nothing.
    line = " ".join(clean(str(value)[: 10 * chars_max]).split())
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"


# ---- verbs ----


def send_text(answer: Shape, *, now_ms: int, colour: bool = False) -> str:
    """What became of a brief at each recipient: `bravo@server2 was last seen 3 d ago, queued`."""
    return _sent("sent", answer, now_ms=now_ms, colour=colour)


def reply_text(answer: Shape, *, now_ms: int, colour: bool = False) -> str:
    return _sent("replied with", answer, now_ms=now_ms, colour=colour)


def _sent(verb: str, answer: Shape, *, now_ms: int, colour: bool) -> str:
    recipients = answer.get("recipients") or []
    lines = [f"{verb} {one_line(answer.get('id'))}"]
    lines += [f"  {_recipient(each, now_ms=now_ms, colour=colour)}" for each in recipients]
    if not recipients:
        lines.append("  nobody is there to get it yet")
    lines += [f"warning: {one_line(each, 300)}" for each in answer.get("warnings") or []]
    return "\n".join(lines)


def _recipient(recipient: Shape, *, now_ms: int, colour: bool) -> str:
    who = one_line(recipient.get("address"), 130)
    state = _state(recipient.get("state"), colour=colour)
    seen = _age(recipient.get("last_seen"), now_ms=now_ms)
    if recipient.get("state") == "queued" and seen:
        return f"{who} was last seen {seen}, {state}"
    return f"{who}: {state}"


def check_text(answer: Shape, *, now_ms: int, colour: bool = False) -> str:
    who, unread = one_line(answer.get("callsign")), int(answer.get("unread") or 0)
    if not unread:
        return f"{who}: nothing unread"
    oldest = _age(answer.get("oldest_at"), now_ms=now_ms)
    senders = ", ".join(
        f"{count} from {one_line(sender, 130)}" for sender, count in (answer.get("by_sender") or {}).items()
    )
    since = f", the oldest {oldest}" if oldest else ""
    return f"{who}: {_bold(f'{unread} unread', colour)}{since}" + (f" ({senders})" if senders else "")


def inbox_text(answer: Shape, *, now_ms: int, colour: bool = False) -> str:
    """A table, newest first. The ids in it are as short as commands take them."""
    who, briefs = one_line(answer.get("callsign")), answer.get("briefs") or []
    if not briefs:
        return f"{who}: no briefs to show"
    total = int(answer.get("total") or len(briefs))
    head = f"{who}: {_briefs(total)}" + (f", {len(briefs)} shown" if total > len(briefs) else "")
    rows = [
        (
            one_line(each.get("id"))[-SHORT_ID_CHARS:],
            one_line(each.get("from"), 60),
            _marks(each) + one_line(each.get("title"), TITLE_CHARS_MAX),
            _state(each.get("state"), colour=colour),
            _age(each.get("date"), now_ms=now_ms),
        )
        for each in briefs
    ]
    return f"{head}\n{_table(('ID', 'FROM', 'TITLE', 'STATE', 'SENT'), rows, colour=colour)}"


def read_text(brief: Shape, *, now_ms: int, colour: bool = False, marker: str | None = None) -> str:
    """One brief in full, for a person or a model: the line the node vouches for, then the fenced words.

    `marker` is for tests; a random one is made that the words do not contain.
    """
    words = "\n".join(
        [*_headers(brief, now_ms=now_ms), "", clean(str(brief.get("body") or "")).rstrip()]
    ).rstrip()
    while marker is None or marker in words:
        marker = secrets.token_hex(8)
    ident, sender = one_line(brief.get("id")), one_line(brief.get("from"), 130)
    trusted = (
        f"brief {ident} from {sender} ({_class(brief)}), in the sender's words between the marks {marker}"
    )
    return f"{_bold(trusted, colour)}\n--- {marker} ---\n{words}\n--- {marker} ---"


def _headers(brief: Shape, *, now_ms: int) -> list[str]:
    """The rest of the frontmatter as lines. Inside the fence: the sender wrote all of it."""
    sent = _age(brief.get("date"), now_ms=now_ms)
    values = {
        "title": one_line(brief.get("title"), 300),
        "date": one_line(brief.get("date")) + (f" ({sent})" if sent else ""),
        "to": one_line(", ".join(map(str, brief.get("to") or [])), 500),
        "thread": one_line(brief.get("thread")) if brief.get("thread") != brief.get("id") else "",
        "reply to": one_line(brief.get("reply_to")),
        "priority": one_line(brief.get("priority")) if brief.get("priority") != "normal" else "",
        "project": one_line(brief.get("project"), 100),
        "intent": one_line(brief.get("intent")),
    }
    lines = [f"{key}: {value}" for key, value in values.items() if value]
    lines += [f"action: {_action(each)}" for each in brief.get("actions") or []]
    lines += [
        f"attachment: {one_line(each.get('path') or each.get('name'), 300)} ({one_line(each.get('bytes'))} bytes)"
        for each in brief.get("attachments") or []
    ]
    return lines


def _action(action: Shape) -> str:
    about = [
        f"number {one_line(action.get('number'))}" if action.get("number") is not None else "",
        one_line(action.get("status")),
        f"for {one_line(action.get('assignee'), 130)}" if action.get("assignee") else "",
        one_line(action.get("priority")) if action.get("priority") not in (None, "normal") else "",
        f"due {one_line(action.get('due'))}" if action.get("due") else "",
    ]
    told = ", ".join(each for each in about if each)
    return one_line(action.get("text"), 500) + (f" ({told})" if told else "")


def roster_text(answer: Shape, *, now_ms: int, colour: bool = False) -> str:
    """Who is where, and which nodes can be reached."""
    callsigns, nodes = answer.get("callsigns") or [], answer.get("nodes") or []
    head = ("CALLSIGN", "NODE", "PROJECT", "STATE", "LAST SEEN", "UNREAD", "READ", "PUSH")
    rows = [
        (
            one_line(each.get("callsign")),
            one_line(each.get("node")),
            one_line(each.get("project")),
            _state(each.get("state"), colour=colour),
            _age(each.get("last_seen"), now_ms=now_ms),
            one_line(each.get("unread")),
            _percent(each.get("read_coverage")),
            one_line(each.get("door")),
        )
        for each in callsigns
    ]
    people = (
        _table(head, rows, colour=colour)
        if rows
        else "no callsigns yet: one appears when a session first calls"
    )
    return f"{people}\n\n{_nodes(nodes, now_ms=now_ms, colour=colour)}" if nodes else people


def _nodes(nodes: Iterable[Shape], *, now_ms: int, colour: bool) -> str:
    rows = [
        (
            one_line(each.get("name")),
            _peer_state(each, colour=colour),
            _round_trip(each.get("rtt_ms")),
            _age(each.get("last_seen"), now_ms=now_ms),
        )
        for each in nodes
    ]
    return _table(("NODE", "STATE", "RTT", "LAST SEEN"), rows, colour=colour)


def peers_text(answer: Shape, *, colour: bool = False) -> str:
    """The other members of the mesh."""
    peers = answer.get("peers") or []
    if not peers:
        return "no other nodes: pair one with `zmail invite` here and `zmail join CODE` there"
    rows = [
        (
            one_line(each.get("name")),
            _state(each.get("state"), colour=colour),
            _round_trip(each.get("rtt_ms")),
            one_line(", ".join(map(str, each.get("endpoints") or [])), 80),
            one_line(each.get("id")),
        )
        for each in peers
    ]
    return _table(("NODE", "STATE", "RTT", "ADDRESS", "ID"), rows, colour=colour)


def _removed(by: object) -> str:
    return f"removed from the mesh by {one_line(by)}: join again with a new code" if by else ""


def _peer_state(peer: Shape, *, colour: bool) -> str:
    """Say how a node is, and of one that cannot be reached why, where that helps."""
    if peer.get("pending"):
        return "pending"  # introduced, and nobody has met it yet
    if peer.get("why") == "refused":
        return "refuses us"
    return _state(peer.get("state"), colour=colour)


def removed_text(answer: Shape) -> str:
    """What a removal changes."""
    removed = answer.get("removed") or {}
    if removed.get("is_this"):
        return (
            "this node has left the mesh: the others refuse its key as soon as they hear of it\n"
            "to come back: zmail invite on another node, zmail join CODE here"
        )
    name = one_line(removed.get("name"))
    return (
        f"removed {name} ({one_line(removed.get('id'))})\n"
        "its key is refused here from now on, and at every other node as soon as that is reached\n"
        "mail that waits for it is dead and kept; its callsigns have left the roster\n"
        f"to let it in again: zmail invite here, zmail join CODE on {name}"
    )


def rotated_text(answer: Shape) -> str:
    """Who knows the new key of this node."""
    aware, unaware = (
        ", ".join(one_line(name) for name in answer.get(key) or []) for key in ("aware", "unaware")
    )
    lines = [
        "this node has another key; its id and its mail stay",
        f"known to {aware or 'no other node yet'}",
    ]
    if unaware:
        lines.append(f"not there now, told when they are back: {unaware}")
    lines.append("invitations that were open are void: make new ones with zmail invite")
    return "\n".join(lines)


def status_text(answer: Shape, *, colour: bool = False) -> str:
    """The dashboard: this node, the mailbox, the store, the mesh, and where each setting comes from."""
    node, inbox, actions = (answer.get(key) or {} for key in ("node", "inbox", "actions"))
    store, peers, config = answer.get("store") or {}, answer.get("peers") or [], answer.get("config") or []
    endpoints = one_line(", ".join(map(str, node.get("endpoints") or [])), 200)
    facts = [
        ("zmail", one_line(answer.get("version"))),
        ("node", f"{one_line(node.get('name'))} ({one_line(node.get('id'))})"),
        ("", _removed(node.get("removed_by"))),
        ("process", f"pid {one_line(node.get('pid'))}, up {_span(node.get('uptime_s'))}"),
        ("listens", endpoints or "nowhere"),
        ("inbox", _counts(inbox, ("unread", "read", "starred", "archived"))),
        ("actions", _counts(actions, ("pending", "wip"))),
        ("store", f"{one_line(store.get('path'), 200)}, {_size(store.get('bytes'))}"),
        ("", _counts(store, ("briefs", "outbox", "dead"))),
        ("", _trouble(store)),
        (
            "refused",
            ", ".join(f"{one_line(why)}: {n}" for why, n in (answer.get("refused") or {}).items())
            or "nothing",
        ),
    ]
    parts = ["\n".join(f"{name:<8} {fact}".rstrip() for name, fact in facts if fact)]
    parts.append(peers_text({"peers": peers}, colour=colour))
    if config:
        rows = [tuple(one_line(each.get(key), 80) for key in ("key", "value", "source")) for each in config]
        parts.append(_table(("SETTING", "VALUE", "FROM"), rows, colour=colour))
    return "\n\n".join(parts)


def _trouble(store: Shape) -> str:
    """What is wrong with the store, and the last that happened to it; nothing when all is well."""
    said = []
    if store.get("state") not in (None, "ok"):
        said.append(f"{one_line(store['state'])}: {one_line(store.get('why'), 300)}")
    if store.get("quarantined"):
        said.append(f"{store['quarantined']} damaged messages in quarantine")
    if events := store.get("events"):
        last = events[0]
        said.append(
            f"last event: {one_line(last['kind'])} ({one_line(last['at'])}) {one_line(last['detail'], 200)}"
        )
    return "; ".join(said)


# ---- the notice pushed into a session ----


def notice_text(briefs: Sequence[Shape], tool_prefix: str = "mcp__zmail__") -> str:
    """What a session is told of briefs that arrived: who, titles, ids, and which tools know more. No body, no orders.

    Raises InvalidInput for no briefs at all: then there is nothing to tell.
    """
    if not briefs:
        raise InvalidInput("a notice of no briefs")
    listed = [
        f"{_quoted(each)}, id {_inert(one_line(each.get('id')))}" for each in briefs[:NOTICE_BRIEFS_MAX]
    ]
    tools = f"{tool_prefix}read (id) returns the text of a brief, {tool_prefix}reply (id, body) answers it."
    if len(briefs) == 1:
        return f"1 unread brief from {_sender(briefs[0])}: {listed[0]}\n{tools}"
    senders = ", ".join(
        f"{count} from {sender}" for sender, count in Counter(map(_sender, briefs)).most_common(5)
    )
    lines = [f"{len(briefs)} unread briefs: {senders}"]
    lines += [f"- {_sender(each)}: {line}" for each, line in zip(briefs, listed, strict=False)]
    if len(briefs) > len(listed):
        lines.append(f"- and {len(briefs) - len(listed)} more: {tool_prefix}check counts them")
    return "\n".join([*lines, tools])


def _sender(brief: Shape) -> str:
    return f"{_inert(one_line(brief.get('from'), 130))} ({_class(brief)})"


def _quoted(brief: Shape) -> str:
    urgency = brief.get("priority")
    mark = f"[{urgency}] " if urgency in ("high", "urgent") else ""
    return f'{mark}"{_inert(one_line(brief.get("title"), NOTICE_TITLE_CHARS_MAX))}"'


def _inert(words: str) -> str:
    """Words that can neither end the quotes they stand in nor close or forge the envelope around a notice."""
    return words.translate({ord("<"): "‹", ord(">"): "›", ord('"'): "'"})


# ---- pieces ----


def _class(brief: Shape) -> str:
    return one_line(brief.get("sender_class") or "unknown", 20)


def _marks(brief: Shape) -> str:
    urgency = brief.get("priority")
    star = "★ " if brief.get("starred") else ""
    return star + (f"[{urgency}] " if urgency in ("high", "urgent") else "")


def _briefs(count: int) -> str:
    return "1 brief" if count == 1 else f"{count} briefs"


def _age(date: object, *, now_ms: int) -> str:
    """A date of a shape as an age; empty for none, the words themselves for no date."""
    if date is None:
        return ""
    try:
        return times.age(since_ms=times.parse_time(str(date)), now_ms=now_ms)
    except InvalidInput:
        return one_line(date)


def _span(seconds: object) -> str:
    return times.span(int(seconds * 1000)) if isinstance(seconds, int | float) else "?"


def _round_trip(rtt_ms: object) -> str:
    return f"{rtt_ms:.1f} ms" if isinstance(rtt_ms, int | float) else ""


def _percent(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, int | float) else ""


def _size(count: object) -> str:
    if not isinstance(count, int | float):
        return "? bytes"
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _counts(counts: Shape, keys: Iterable[str]) -> str:
    return ", ".join(f"{one_line(counts.get(key, 0))} {key}" for key in keys)


_COLOURS = {
    **dict.fromkeys(("online", "busy", "alive", "delivered", "announced", "read", "done"), "32"),
    **dict.fromkeys(("idle", "suspect", "queued"), "33"),
    **dict.fromkeys(("offline", "down", "dead", "expired", "cancelled"), "31"),
}


def _state(value: object, *, colour: bool) -> str:
    word = one_line(value)
    code = _COLOURS.get(word)
    return f"\x1b[{code}m{word}\x1b[0m" if colour and code else word


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, colour: bool) -> str:
    """Columns as wide as their widest cell. A column without a word in any row is left out."""
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    wide = [max(_width(line[column]) for line in (head, *rows)) for column in kept]
    lines = [
        "  ".join(
            line[column] + " " * (width - _width(line[column]))
            for column, width in zip(kept, wide, strict=True)
        )
        for line in (head, *rows)
    ]
    return "\n".join([_bold(lines[0].rstrip(), colour), *(line.rstrip() for line in lines[1:])])


def _width(text: str) -> int:
    """Columns a text takes in a terminal, our own colour codes not counted."""
    shown = _ESCAPES.sub("", text)
    if shown.isascii():
        return len(shown)
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in shown
    )
