"""What a brief asks for: actions out of frontmatter and task lists, and the life of an action. Pure.

One line says it all, in the `action` key, on the command line and in a body's open task-list line alike:

    - [ ] @bravo fix the lock !high due:2026-04-01

The assignee comes first; `!low !normal !high !urgent` and `due:DATE` stand anywhere. What does not parse stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from broker_free.errors import InvalidInput
from zmail import address, times
from zmail.errors import InvalidBrief

PRIORITIES = ("low", "normal", "high", "urgent")
ACTIONS_MAX = 50  # of one brief: more is a list to link to, and each becomes a row at every recipient
TEXT_CHARS_MAX = 500
PROJECT_CHARS_MAX = 100

PENDING, WIP, DONE, SKIP = "pending", "wip", "done", "skip"
STATUSES = (PENDING, WIP, DONE, SKIP)
OPEN = frozenset({PENDING, WIP})

# The whole life of an action. A finished one is taken up again before it is finished otherwise, so that a
# "skip" which crosses a "done" on another node is seen and not silently swallowed.
MOVES: Mapping[str, frozenset[str]] = {
    PENDING: frozenset({WIP, DONE, SKIP}),
    WIP: frozenset({PENDING, DONE, SKIP}),
    DONE: frozenset({PENDING, WIP}),
    SKIP: frozenset({PENDING, WIP}),
}

_TASK = re.compile(r"[ \t]*(?:[-*+]|[0-9]{1,9}[.)])[ \t]+\[ \][ \t]+(\S.*)")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_KEYS = ("text", "assignee", "priority", "due", "project")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing asked for. None means: as the brief has it."""

    text: str  # one line
    assignee: str | None = None  # an address: `bravo` or `bravo@server2`
    priority: str | None = None
    due_ms: int | None = None
    project: str | None = None


def move(status: str, to: str) -> str:
    """The status after `status` is set to `to`; setting it again changes nothing. InvalidInput says what can be."""
    if to not in STATUSES:
        raise InvalidInput(f"no such status: {to[:40]!r}", hint=f"one of: {', '.join(STATUSES)}")
    if to != status and to not in MOVES[status]:
        choices = ", ".join(each for each in STATUSES if each in MOVES[status])
        raise InvalidInput(f"an action that is {status} cannot become {to}", hint=f"first one of: {choices}")
    return to


def extract(written: Sequence[Action], body: str, *, at_most: int = ACTIONS_MAX) -> tuple[Action, ...]:
    """Every action of a brief: those of its frontmatter, then the open tasks of its body, each once.

    Never raises: a body is text, whatever is in it.
    """
    seen: dict[tuple[str, str | None], Action] = {}
    for each in (*written, *open_tasks(body)):
        seen.setdefault((each.text.casefold(), each.assignee), each)
        if len(seen) >= at_most:
            break
    return tuple(seen.values())


def open_tasks(body: str) -> Iterator[Action]:
    """The open task-list lines of a Markdown body, in order; not in code fences, not in quotes."""
    for line in _lines_outside_fences(body):
        if task := _TASK.match(line):
            yield from_line(task[1][:TEXT_CHARS_MAX])


def _lines_outside_fences(body: str) -> Iterator[str]:
    fence = ""  # the run of characters that opened the fence we are in
    for line in body.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in mark[2]):  # ```x``` on one line is inline code
            fence = mark[1]
        else:
            yield line


def from_line(line: str) -> Action:
    """Read one line as a person writes it. Never raises: a word that is not quite a mark is a word."""
    words = line.split()
    assignee = _assignee(words[0]) if len(words) > 1 else None
    rest: list[str] = []
    priority: str | None = None
    due_ms: int | None = None
    for word in words[1:] if assignee else words:
        if priority is None and word[:1] == "!" and word[1:].lower() in PRIORITIES:
            priority = word[1:].lower()
        elif due_ms is None and (day := _due(word)) is not None:
            due_ms = day
        else:
            rest.append(word)
    if not rest:  # nothing but marks: then they are the text
        return Action(text=" ".join(words))
    return Action(text=" ".join(rest), assignee=assignee, priority=priority, due_ms=due_ms)


def _assignee(word: str) -> str | None:
    if not word.startswith("@"):
        return None
    try:
        parsed = address.parse(word[1:].rstrip(":,"))
    except InvalidBrief:
        return None
    return str(parsed) if parsed.kind is address.Kind.CALLSIGN else None


def _due(word: str) -> int | None:
    if not word.lower().startswith("due:"):
        return None
    try:
        return times.parse_time(word[4:])
    except InvalidInput:
        return None


def from_frontmatter(value: object) -> tuple[Action, ...]:
    """Read the `action` key (and `--action`, and the tools' `actions`): a line, an object, or a list of either.

    Empty ones are left out, as in a template. InvalidBrief for anything else and for more than ACTIONS_MAX.
    """
    several = value if isinstance(value, list | tuple) else [value]
    wanted = [each for each in several if each is not None and each != ""]
    if len(wanted) > ACTIONS_MAX:
        raise InvalidBrief(f"{len(wanted)} actions, at most {ACTIONS_MAX} in one brief")
    return tuple(action for each in wanted if (action := _action(each)) is not None)


def _action(value: object) -> Action | None:
    if isinstance(value, Mapping):
        return _from_object({str(key).lower(): each for key, each in value.items()})
    if not isinstance(value, str):
        raise InvalidBrief(
            "an action is a text, or an object with a text", hint="action: Review the migration"
        )
    if not value.strip():
        return None
    _check_text(value)
    return from_line(value)


def _from_object(value: Mapping[str, object]) -> Action:
    if unknown := [key for key in value if key not in _KEYS]:
        raise InvalidBrief(f"an action has no {unknown[0][:40]!r}", hint=f"its keys are: {', '.join(_KEYS)}")
    texts: dict[str, str | None] = {}
    for key, each in value.items():
        if each is not None and not isinstance(each, str):
            raise InvalidBrief(f"the {key} of an action must be text")
        texts[key] = " ".join(each.split()) or None if each else None
    text = texts.get("text")
    if text is None:
        raise InvalidBrief("an action without a text")
    _check_text(text)
    due, project, assignee = texts.get("due"), texts.get("project"), texts.get("assignee")
    if project and len(project) > PROJECT_CHARS_MAX:
        raise InvalidBrief(f"a project's name of {len(project)} characters, at most {PROJECT_CHARS_MAX}")
    return Action(
        text=text,
        assignee=_written_assignee(assignee) if assignee else None,
        priority=check_priority(texts.get("priority")),
        due_ms=parse_due(due) if due else None,
        project=project,
    )


def _check_text(text: str) -> None:
    if len(text) > TEXT_CHARS_MAX:
        raise InvalidBrief(f"an action of {len(text)} characters, at most {TEXT_CHARS_MAX}")


def _written_assignee(text: str) -> str:
    parsed = address.parse(text.removeprefix("@"))
    if parsed.kind is not address.Kind.CALLSIGN:
        raise InvalidBrief(f"{text[:80]!r} cannot be an assignee", hint="name one callsign, like bravo")
    return str(parsed)


def check_priority(text: str | None) -> str | None:
    """A priority in lower case, None for none."""
    if not text:
        return None
    if text.lower() not in PRIORITIES:
        raise InvalidBrief(f"no such priority: {text[:40]!r}", hint=f"one of: {', '.join(PRIORITIES)}")
    return text.lower()


def parse_due(text: str) -> int:
    """UTC milliseconds of a due date."""
    try:
        return times.parse_time(text)
    except InvalidInput as error:
        raise InvalidBrief(f"due: {error.message}", hint=error.hint) from None


def to_frontmatter(actions: Sequence[Action]) -> list[str | dict[str, str]]:
    """The shortest values that `from_frontmatter` reads back as `actions`."""
    return [each.text if from_line(each.text) == each else _as_object(each) for each in actions]


def _as_object(action: Action) -> dict[str, str]:
    due = times.format_day(action.due_ms) if action.due_ms is not None else None
    values = zip(_KEYS, (action.text, action.assignee, action.priority, due, action.project), strict=True)
    return {key: each for key, each in values if each is not None}
