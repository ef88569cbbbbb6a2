"""The brief: Markdown with frontmatter in and out, and every rule about what one may be. Pure; sends nothing.

    ---
    title: Deploy Blocker — DB Migration          what a sender writes is a `Draft`,
    date: 2026-03-24T10:15:00Z                    who and when around it make it a `Brief`
    from: alpha (server1)
    to: charlie (server2)
    action: Review migration script before deploying
    ---
    The migration adds a NOT NULL column without a default value.

Keys are case-insensitive; those without a meaning here are kept in `extra`. `parse(format(brief)) == brief`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from broker_free.errors import InvalidInput
from broker_free.limits import KIB, MIB
from zmail import action, address, frontmatter, times
from zmail.action import Action
from zmail.address import Address
from zmail.errors import InvalidBrief

BODY_BYTES_MAX = MIB - 64 * KIB  # what goes beside it on the wire has to fit into one message too
TITLE_CHARS_MAX = 200
DERIVED_TITLE_CHARS_MAX = 80
TAGS_MAX = 50
TAG_CHARS_MAX = 64
TTL_MS_MAX = 366 * times.DAY_MS
INTENTS = ("ask", "info", "ack")

_ID = re.compile(r"[a-z0-9][a-z0-9._:-]{0,127}")
# In the order they are written.
_KEYS = (
    "title",
    "date",
    "from",
    "to",
    "id",
    "thread",
    "reply_to",
    "cc",
    "priority",
    "project",
    "due",
    "ttl",
    "intent",
    "tags",
    "action",
)
_SPELLINGS = {"actions": "action", "tag": "tags"}
# What a caller may say beside a whole file; `actions` are added to those of the file, the rest replaces.
_ARGS = ("title", "to", "cc", "priority", "project", "due", "intent", "ttl", "tags", "thread", "reply_to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a sender writes. Made by `draft_of` and `parse`, which check every field."""

    title: str  # one line, never empty
    body: str  # Markdown, as it was written
    to: tuple[Address, ...] = ()
    cc: tuple[Address, ...] = ()
    thread: str | None = None
    reply_to: str | None = None
    priority: str = "normal"
    project: str | None = None
    due_ms: int | None = None
    ttl_ms: int | None = None
    intent: str | None = None
    tags: tuple[str, ...] = ()
    actions: tuple[Action, ...] = ()  # those of the frontmatter; `action.extract` adds the body's
    extra: Mapping[str, object] = field(default_factory=dict)  # JSON values under keys that mean nothing here


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """A draft with who, when and which; None where a file does not say."""

    id: str | None = None
    date_ms: int | None = None
    sender: Address | None = None
    draft: Draft


def parse(text: str) -> Brief:
    """Read a brief file; text without frontmatter is all body. Raises InvalidBrief and nothing else."""
    fields, extra, body = _fields(text)
    date, sender = _line(fields, "date"), _line(fields, "from")
    return Brief(
        id=_id(fields, "id"),
        date_ms=_time(date, "date") if date else None,
        sender=address.parse(sender) if sender else None,
        draft=_draft(fields, extra, body),
    )


def draft_of(args: Mapping[str, object]) -> Draft:
    """The draft that the arguments of `send` ask for: {to, title, body, actions, …} or {markdown}, or both.

    Beside a whole file, an argument replaces the file's key and `actions` are added. None and [] say nothing.
    """
    markdown = args.get("markdown")
    fields, extra, body = _fields(_text(markdown, "markdown")) if markdown else ({}, {}, "")
    fields |= {key: args[key] for key in _ARGS if args.get(key) not in (None, [], ())}
    if args.get("body") is not None:
        body = _text(args["body"], "body")
    written, added = fields.get("action"), args.get("actions")
    fields["action"] = [*_several(written), *_several(added)]
    return _draft(fields, extra, body)


def format(brief: Brief) -> str:
    """Write a brief file: the keys in their fixed order, defaults left out, the body as it is."""
    draft = brief.draft
    values = _frontmatter(draft) | {
        "id": brief.id,
        "date": times.format_time(brief.date_ms) if brief.date_ms is not None else None,
        "from": brief.sender.in_frontmatter() if brief.sender else None,
    }
    ordered = {key: values[key] for key in _KEYS if values[key] is not None}
    return f"---\n{frontmatter.write(ordered | dict(draft.extra))}---\n{draft.body}"


def _frontmatter(draft: Draft) -> dict[str, object]:
    actions = action.to_frontmatter(draft.actions)
    return {
        "title": draft.title,
        "to": _addresses(draft.to),
        "thread": draft.thread,
        "reply_to": draft.reply_to,
        "cc": _addresses(draft.cc),
        "priority": draft.priority if draft.priority != "normal" else None,
        "project": draft.project,
        "due": times.format_day(draft.due_ms) if draft.due_ms is not None else None,
        "ttl": times.format_duration(draft.ttl_ms) if draft.ttl_ms is not None else None,
        "intent": draft.intent,
        "tags": list(draft.tags) or None,
        "action": (actions[0] if len(actions) == 1 else actions) or None,
    }


def _addresses(addresses: Sequence[Address]) -> str | None:
    return ", ".join(each.in_frontmatter() for each in addresses) or None


def _fields(text: str) -> tuple[dict[str, object], dict[str, object], str]:
    """Known keys as text, unknown ones as values, and the body."""
    if len(text) > BODY_BYTES_MAX + frontmatter.BLOCK_BYTES_MAX:
        raise InvalidBrief(f"a brief of {len(text)} characters, at most {BODY_BYTES_MAX} bytes of text")
    block, body = frontmatter.split(text)
    fields: dict[str, object] = {}
    extra: dict[str, object] = {}
    for key, node in (frontmatter.read(block) if block is not None else {}).items():
        known = key.strip().lower().replace("-", "_")
        known = _SPELLINGS.get(known, known)
        if known not in _KEYS:
            extra[key] = frontmatter.value_of(node)
        elif known in fields:
            raise InvalidBrief(f"the frontmatter has {known!r} twice")
        else:
            fields[known] = frontmatter.text_of(node)
    if "title" in fields and fields["title"] is None:
        fields["title"] = ""  # `title:` with nothing behind it is said, and empty
    return fields, extra, body


def _draft(fields: Mapping[str, object], extra: Mapping[str, object], body: str) -> Draft:
    _check_unicode([fields, extra, body])
    if (size := len(body.encode())) > BODY_BYTES_MAX:
        raise InvalidBrief(
            f"a text of {size} bytes, at most {BODY_BYTES_MAX}", hint="send a file's path instead"
        )
    due, ttl, intent = _line(fields, "due"), _line(fields, "ttl"), _line(fields, "intent")
    if intent and intent.lower() not in INTENTS:
        raise InvalidBrief(f"no such intent: {intent[:40]!r}", hint=f"one of: {', '.join(INTENTS)}")
    draft = Draft(
        title=_title(fields, body),
        body=body,
        to=_address_list(fields, "to"),
        cc=_address_list(fields, "cc"),
        thread=_id(fields, "thread"),
        reply_to=_id(fields, "reply_to"),
        priority=action.check_priority(_line(fields, "priority")) or "normal",
        project=_line(fields, "project", chars_max=action.PROJECT_CHARS_MAX),
        due_ms=action.parse_due(due) if due else None,
        ttl_ms=_ttl(ttl) if ttl else None,
        intent=intent.lower() if intent else None,
        tags=_tags(fields),
        actions=action.from_frontmatter(fields.get("action")),
        extra=extra,
    )
    if len(action.extract(draft.actions, body, at_most=action.ACTIONS_MAX + 1)) > action.ACTIONS_MAX:
        raise InvalidBrief(
            f"more than {action.ACTIONS_MAX} actions in one brief", hint="link to the list instead"
        )
    _check_header_size(draft)
    return draft


def _check_header_size(draft: Draft) -> None:
    """What is accepted must be readable once it is written out. Only a header that could be too long is written."""
    values = _frontmatter(draft) | dict(draft.extra)
    chars = sum(len(each) + 32 for each in _strings(values))  # 32: indentation, quotes, a number
    if 10 * chars > frontmatter.BLOCK_BYTES_MAX:  # a character is at most ten bytes, as an escape
        size = len(frontmatter.write(values).encode()) + KIB  # date, sender and id come on top
        if size > frontmatter.BLOCK_BYTES_MAX:
            raise InvalidBrief(f"a header of {size} bytes, at most {frontmatter.BLOCK_BYTES_MAX}")


def _title(fields: Mapping[str, object], body: str) -> str:
    """The title that was given, else the first line of the body that says something."""
    if fields.get("title") is not None:
        title = " ".join(_text(fields["title"], "title").split())
        if not title:
            raise InvalidBrief("the title is empty", hint="leave it out to take the first line of the text")
        if len(title) > TITLE_CHARS_MAX:
            raise InvalidBrief(f"a title of {len(title)} characters, at most {TITLE_CHARS_MAX}")
        return title
    first = next((line for line in body.split("\n") if line.strip()), None)
    if first is None:
        raise InvalidBrief("neither a title nor a text", hint="give a title with -s or a text with -m")
    title = " ".join(first.split())
    return title if len(title) <= DERIVED_TITLE_CHARS_MAX else title[: DERIVED_TITLE_CHARS_MAX - 1] + "…"


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise InvalidBrief(f"{key} must be text")
    return value


def _line(fields: Mapping[str, object], key: str, *, chars_max: int = TITLE_CHARS_MAX) -> str | None:
    """One line of text, None where there is nothing."""
    if (value := fields.get(key)) is None:
        return None
    line = " ".join(_text(value, key).split())
    if len(line) > chars_max:
        raise InvalidBrief(f"{key} has {len(line)} characters, at most {chars_max}")
    return line or None


def _several(value: object) -> Sequence[object]:
    """A list as it is, one value as a list of it, nothing as an empty list."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _texts(fields: Mapping[str, object], key: str) -> list[str]:
    return [_text(each, key) for each in _several(fields.get(key)) if each is not None]


def _address_list(fields: Mapping[str, object], key: str) -> tuple[Address, ...]:
    return address.parse_list(_texts(fields, key))


def _id(fields: Mapping[str, object], key: str) -> str | None:
    line = _line(fields, key)
    if line is not None and not _ID.fullmatch(line := line.lower()):
        raise InvalidBrief(f"{key}: {line[:80]!r} is not an id")
    return line


def _time(text: str, key: str) -> int:
    try:
        return times.parse_time(text)
    except InvalidInput as error:
        raise InvalidBrief(f"{key}: {error.message}", hint=error.hint) from None


def _ttl(text: str) -> int:
    try:
        ttl_ms = times.parse_duration(text)
    except InvalidInput as error:
        raise InvalidBrief(f"ttl: {error.message}", hint=error.hint) from None
    if not 0 < ttl_ms <= TTL_MS_MAX:
        raise InvalidBrief(f"a ttl of {text!r}", hint=f"between 1s and {times.format_duration(TTL_MS_MAX)}")
    return ttl_ms


def _tags(fields: Mapping[str, object]) -> tuple[str, ...]:
    words = (
        " ".join(word.split()).lstrip("#") for text in _texts(fields, "tags") for word in text.split(",")
    )
    tags = tuple(dict.fromkeys(word for word in words if word))
    if len(tags) > TAGS_MAX or any(len(tag) > TAG_CHARS_MAX for tag in tags):
        raise InvalidBrief(f"at most {TAGS_MAX} tags of {TAG_CHARS_MAX} characters")
    return tags


def _check_unicode(value: object) -> None:
    """Half a surrogate pair, as JSON can carry it, has no place in a file or a database."""
    try:
        for text in _strings(value):
            text.encode()
    except UnicodeEncodeError as error:
        raise InvalidBrief(f"not valid Unicode at character {error.start}") from None


def _strings(value: object, *, depth: int = 0) -> Iterator[str]:
    """Every text inside. What is nested deeper than a header can be is no text to anybody here, and refused later."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth <= frontmatter.DEPTH_MAX + 2:
        if isinstance(value, Mapping):
            yield from (str(key) for key in value)
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each, depth=depth + 1)
