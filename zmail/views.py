"""What callers are shown of the tables: rows in, the JSON that verbs answer out. Reads only.

Every function runs in a reading thread (or inside a transaction) and takes names of nodes from a `Directory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from peewee import JOIN, ModelSelect, fn

from broker_free.errors import InvalidInput
from zmail import brief, filing, times
from zmail.address import Address, Kind
from zmail.directory import Directory, Place
from zmail.errors import AmbiguousId, NotFound
from zmail.models import HEADERS, UNDELIVERED, UNREAD, Action, Brief, Delivery, Lease, Recipient
from zmail.push import Waiting
from zmail.states import ENDED, PROGRESS, QUEUED

Shape: TypeAlias = dict[str, Any]  # Any: one of the JSON objects that a verb answers

COVERAGE_MS = 30 * times.DAY_MS
_CHOICES_MAX = 10
_ROWS_A_QUERY = 500  # below what one statement may bind


# ---- one brief ----


def find(callsign: str, ident: str, *, me: str) -> tuple[Brief, Delivery | None]:
    """Find a brief that `callsign` got or sent, by its id or the end of it. The delivery is None for one it only sent.

    InvalidInput for what cannot be an id, NotFound, AmbiguousId with the choices.
    """
    wanted = ident.strip().lower()
    if len(wanted) < filing.TAIL_CHARS or not wanted.replace("-", "").isalnum():
        raise InvalidInput(
            f"{ident.strip()[:40]!r} is not an id", hint=f"at least its last {filing.TAIL_CHARS} characters"
        )
    rows = (
        Brief.select(Brief, Delivery)
        .join(
            Delivery,
            JOIN.LEFT_OUTER,
            on=((Delivery.brief == Brief.row) & (Delivery.callsign == callsign)),
            attr="delivery",
        )
        .where(
            Brief.tail == wanted[-filing.TAIL_CHARS :],
            Delivery.id.is_null(False) | ((Brief.from_callsign == callsign) & (Brief.from_node == me)),
        )
    )
    found = [(each, getattr(each, "delivery", None)) for each in rows if each.id.endswith(wanted)]
    if not found:
        raise NotFound(f"{callsign} has no brief {ident.strip()[:40]!r}", hint="see: zmail inbox --all")
    if len(found) > 1:
        choices = ", ".join(each.id for each, _ in found[:_CHOICES_MAX])
        raise AmbiguousId(f"{len(found)} briefs end in {wanted!r}", hint=f"say which: {choices}")
    return found[0]


def brief_shape(filed: Brief, delivery: Delivery | None, directory: Directory, actions: list[Shape]) -> Shape:
    """One brief without its text, as its recipient sees it, or as its sender does where there is no delivery."""
    state, door = (delivery.state, delivery.door) if delivery else sent_state(filed)
    to, cc = filing.places_of(filed)
    return {
        "id": filed.id,
        "thread": filed.thread,
        "reply_to": filed.reply_to,
        "from": directory.address(filed.from_callsign, filed.from_node),
        "to": [directory.address(*place) for place in (*to, *cc)],
        "title": filed.title,
        "date": times.format_time(filed.sent_ms),
        "priority": filed.priority,
        "project": filed.project,
        "intent": filed.intent,
        "state": state,
        "door": door,
        "starred": delivery.starred if delivery else False,
        "sender_class": filed.sender_class,
        "actions": actions,
        "attachments": [],
    }


def read_shape(filed: Brief, delivery: Delivery | None, directory: Directory, *, raw: bool) -> Shape:
    """One brief in full; `raw` adds it as a Markdown file."""
    actions = actions_of([filed.row], delivery.callsign, directory).get(filed.row, []) if delivery else []
    shape = brief_shape(filed, delivery, directory, actions) | {"body": filed.body}
    if raw:
        shape["markdown"] = markdown(filed, directory)
    return shape


def markdown(filed: Brief, directory: Directory) -> str:
    """Write a filed brief in the exchange format, with everybody's full address."""

    def addresses(places: Iterable[Place]) -> tuple[Address, ...]:
        return tuple(_address(directory, place) for place in places)

    to, cc = filing.places_of(filed)
    draft = replace(filing.draft_of(filed), to=addresses(to), cc=addresses(cc), thread=filed.thread)
    sender = _address(directory, Place(filed.from_callsign, filed.from_node))
    return brief.format(brief.Brief(id=filed.id, date_ms=filed.sent_ms, sender=sender, draft=draft))


def _address(directory: Directory, place: Place) -> Address:
    return Address(kind=Kind.CALLSIGN, name=place.callsign, node=directory.label(place.node).lower())


def sent_state(filed: Brief) -> tuple[str, str | None]:
    """Where a sent brief stands: as far as the last of its recipients is. Ended ones count when nobody else is left."""
    recipients = list(Recipient.select().where(Recipient.brief == filed.row))
    living = [each for each in recipients if each.state not in ENDED]
    if living:
        last = min(living, key=lambda each: PROGRESS.index(each.state))
        return last.state, last.door
    return (recipients[0].state, None) if recipients else (QUEUED, None)


def recipients(row: int, directory: Directory, *, now_ms: int) -> list[Shape]:
    """What the sender knows of each recipient, in the order they were named."""
    return [
        {
            "address": directory.address(each.callsign, each.node),
            "state": each.state,
            "last_seen": shown(directory.last_seen_ms(Place(each.callsign, each.node), now_ms=now_ms)),
        }
        for each in Recipient.select().where(Recipient.brief == row).order_by(Recipient.position)
    ]


# ---- a mailbox ----


def check(callsign: str, directory: Directory) -> Shape:
    """Count what is unread."""
    counts = (
        Delivery.select(
            Brief.from_callsign, Brief.from_node, fn.COUNT(Delivery.id), fn.MIN(Delivery.arrived_ms)
        )
        .join(Brief, on=(Brief.row == Delivery.brief))
        .where(Delivery.callsign == callsign, UNREAD)
        .group_by(Brief.from_callsign, Brief.from_node)
        .order_by(fn.COUNT(Delivery.id).desc(), Brief.from_callsign)
    )
    rows: list[tuple[str, str, int, int]] = _tuples(counts)
    return {
        "callsign": callsign,
        "unread": sum(count for _, _, count, _ in rows),
        "oldest_at": shown(min((oldest_ms for *_, oldest_ms in rows), default=None)),
        "by_sender": {directory.address(sender, node): count for sender, node, count, _ in rows},
    }


def inbox(
    callsign: str,
    directory: Directory,
    *,
    with_read: bool,
    sender: Address | None,
    since_ms: int | None,
    limit: int,
) -> Shape:
    """List briefs, newest first. `total` counts those that fit, however many are shown."""
    query = (
        Delivery.select(Delivery, *HEADERS)
        .join(Brief, on=(Brief.row == Delivery.brief), attr="letter")
        .where(Delivery.callsign == callsign)
    )
    if not with_read:
        query = query.where(UNREAD)
    if sender is not None and sender.name is not None:
        query = query.where(Brief.from_callsign == sender.name)
    if sender is not None and sender.node is not None:
        query = query.where(Brief.from_node == directory.node(sender.node))
    if since_ms is not None:
        query = query.where(Delivery.arrived_ms >= since_ms)
    total = query.count()
    newest = query.order_by(Delivery.id.desc())
    shown_here = list(newest.limit(limit) if limit else newest)
    actions = actions_of([each.brief for each in shown_here], callsign, directory)
    return {
        "callsign": callsign,
        "total": total,
        "briefs": [
            brief_shape(each.letter, each, directory, actions.get(each.brief, [])) for each in shown_here
        ],
    }


def waiting(callsign: str, directory: Directory) -> list[Waiting]:
    """List the unread briefs that the present holder was not told of, oldest first."""
    lease = Lease.get_or_none(Lease.callsign == callsign)
    lease_number = lease.number if lease else 0
    is_untold = Delivery.lease_number.is_null() | (Delivery.lease_number != lease_number)
    columns = (
        Brief.id,
        Brief.from_callsign,
        Brief.from_node,
        Brief.sender_class,
        Brief.title,
        Brief.priority,
    )
    rows = (
        Delivery.select(Delivery.id, *columns)
        .join(Brief, on=(Brief.row == Delivery.brief))
        .where(Delivery.callsign == callsign, UNREAD, is_untold)
        .order_by(Delivery.id)
    )
    return [
        Waiting(
            delivery=delivery,
            lease_number=lease_number,
            id=ident,
            callsign=sender,
            address=directory.address(sender, node),
            sender_class=sender_class,
            title=title,
            priority=priority,
        )
        for delivery, ident, sender, node, sender_class, title, priority in _tuples(rows)
    ]


def inbox_counts(callsign: str) -> Shape:
    mine = Delivery.select().where(Delivery.callsign == callsign)
    return {
        "unread": mine.where(UNREAD).count(),
        "read": mine.where(Delivery.read_ms.is_null(False)).count(),
        "starred": mine.where(Delivery.starred).count(),
        "archived": mine.where(Delivery.archived).count(),
    }


def action_counts(callsign: str) -> Shape:
    by_status = (
        Action.select(Action.status, fn.COUNT(Action.id))
        .where(Action.callsign == callsign)
        .group_by(Action.status)
    )
    counts = dict(_tuples(by_status))
    return {"pending": counts.get("pending", 0), "wip": counts.get("wip", 0)}


def actions_of(rows: Sequence[int], callsign: str, directory: Directory) -> dict[int, list[Shape]]:
    """The actions that briefs ask of one mailbox, by the brief's row."""
    found: dict[int, list[Shape]] = {}
    for some in _slices(rows):
        wanted = (
            Action.select().where(Action.brief.in_(some), Action.callsign == callsign).order_by(Action.number)
        )
        ids = dict(_tuples(Brief.select(Brief.row, Brief.id).where(Brief.row.in_(some))))
        for each in wanted:
            assert each.brief is not None  # the query asked for it
            found.setdefault(each.brief, []).append(_action_shape(each, ids[each.brief]))
    return found


def _action_shape(each: Action, brief_id: str) -> Shape:
    return {
        "id": each.id,
        "number": each.number,
        "text": each.text,
        "status": each.status,
        "priority": each.priority,
        "assignee": each.assignee,
        "project": each.project,
        "due": times.format_day(each.due_ms) if each.due_ms is not None else None,
        "brief": brief_id,
        "created_at": times.format_time(each.created_ms),
        "updated_at": times.format_time(each.updated_ms),
    }


# ---- the node ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a roster counts."""

    unread: Mapping[str, int]  # by mailbox of this node
    coverage: Mapping[str, float]  # read ÷ delivered, by mailbox of this node
    pending: Mapping[Place, int]  # unread for the caller, by sender


def roster_counts(callsign: str | None, *, now_ms: int) -> Counts:
    """Count what a roster shows, for the caller `callsign`."""
    unread = (
        Delivery.select(Delivery.callsign, fn.COUNT(Delivery.id)).where(UNREAD).group_by(Delivery.callsign)
    )
    recent = (
        Delivery.select(Delivery.callsign, fn.COUNT(Delivery.id), fn.COUNT(Delivery.read_ms))
        .where(Delivery.arrived_ms >= now_ms - COVERAGE_MS)
        .group_by(Delivery.callsign)
    )
    pending = (
        Delivery.select(Brief.from_callsign, Brief.from_node, fn.COUNT(Delivery.id))
        .join(Brief, on=(Brief.row == Delivery.brief))
        .where(Delivery.callsign == callsign, UNREAD)
        .group_by(Brief.from_callsign, Brief.from_node)
    )
    return Counts(
        unread=dict(_tuples(unread)),
        coverage={name: read / delivered for name, delivered, read in _tuples(recent)},
        pending={Place(sender, node): count for sender, node, count in _tuples(pending)},
    )


def store_counts() -> Shape:
    return {
        "briefs": Brief.select().count(),
        "outbox": Recipient.select().where(UNDELIVERED).count(),
        "dead": Recipient.select().where(Recipient.state == "dead").count(),
    }


def roster_row(
    place: Place, directory: Directory, counted: Counts, *, now_ms: int, door: str | None
) -> Shape:
    """One callsign. What only its own node knows is null for the others."""
    is_here = place.node == directory.me
    return {
        "callsign": place.callsign,
        "node": directory.label(place.node),
        "project": directory.residents[place].project,
        "state": directory.state(place),
        "last_seen": shown(directory.last_seen_ms(place, now_ms=now_ms)),
        "unread": counted.unread.get(place.callsign, 0) if is_here else None,
        "read_coverage": counted.coverage.get(place.callsign) if is_here else None,
        "door": door,
        "pending_for_you": counted.pending.get(place, 0),
    }


def shown(time_ms: int | None) -> str | None:
    return None if time_ms is None else times.format_time(time_ms)


def _tuples(query: ModelSelect[Any]) -> list[Any]:  # Any: as many columns as the query names
    return list(query.tuples().execute())


def _slices(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), _ROWS_A_QUERY):
        yield rows[start : start + _ROWS_A_QUERY]
