"""File a brief in this node: the brief itself, a delivery in each mailbox, the actions it asks for. Knows the tables.

The same for a brief that is sent here and for one that arrives: both come as a `Letter`, inside a transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from peewee import Database, IntegrityError

from broker_free import Tx
from broker_free.message import id_to_bytes, new_id
from zmail import action, wire
from zmail.brief import Draft
from zmail.directory import Place
from zmail.models import UNDELIVERED, Action, Brief, Delivery, Mailbox, Recipient, insert_rows
from zmail.receipts import NO_SUCH_CALLSIGN
from zmail.states import CANCELLED, DEAD, DELIVERED, EXPIRED, QUEUED
from zmail.wire import Letter

TAIL_CHARS = 6  # the shortest end of an id that names a brief
_IDS_A_QUERY = 500  # below what one statement may bind
# As the outbox numbers them; what is quarantined will never leave, what is being withdrawn may still arrive.
_OUTBOX_STATES = (QUEUED, DELIVERED, EXPIRED, CANCELLED, DEAD, DEAD, QUEUED)
_OUTBOX_STATE = """SELECT outbox.state, outbox.reason FROM outbox JOIN peer ON peer.id = outbox.peer
    WHERE peer.node_id = ? AND outbox.msg_id = ?"""
_COLUMNS = frozenset({"title", "body", "thread", "reply_to", "priority", "project", "intent"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Filed:
    """What became of a letter here."""

    callsigns: tuple[str, ...]  # of this node, that have it now
    missing: tuple[str, ...]  # that it was for, and that nobody here is called


def write_brief(letter: Letter, *, brief_id: str, node: str) -> Brief | None:
    """Write the brief itself down; None when it was filed before. `node` is the sender's, proved by its connection."""
    draft = letter.draft
    rest = {key: value for key, value in wire.args_of(draft).items() if key not in _COLUMNS}
    columns = {
        "id": brief_id,
        "tail": brief_id[-TAIL_CHARS:],
        "thread": draft.thread or brief_id,
        "reply_to": draft.reply_to,
        "from_callsign": letter.sender,
        "from_node": node,
        "sender_class": letter.sender_class,
        "title": draft.title,
        "body": draft.body,
        "sent_ms": letter.sent_ms,
        "priority": draft.priority,
        "project": draft.project,
        "intent": draft.intent,
        "recipients": json.dumps(wire.recipients_of(letter), separators=(",", ":")),
        "rest": json.dumps(rest, ensure_ascii=False, separators=(",", ":")),
    }
    try:
        return Brief(row=insert_rows(Brief, [columns]), **columns)
    except IntegrityError:
        return None


def draft_of(brief: Brief) -> Draft:
    """The draft that a filed brief was made of."""
    columns = {
        "title": brief.title,
        "body": brief.body,
        "thread": brief.thread if brief.thread != brief.id else None,
        "reply_to": brief.reply_to,
        "priority": brief.priority,
        "project": brief.project,
        "intent": brief.intent,
    }
    return wire.draft_from({**columns, **json.loads(brief.rest)})


def places_of(brief: Brief) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Whom a filed brief is to, and who got a copy."""
    return wire.places_from(json.loads(brief.recipients))


def deliver(tx: Tx, brief: Brief, letter: Letter, *, me: str) -> Filed:
    """Put the brief into every mailbox of this node that it is for."""
    wanted = tuple(dict.fromkeys(place.callsign for place in letter.places if place.node == me))
    mailboxes = {each.callsign: each for each in Mailbox.select().where(Mailbox.callsign.in_(wanted))}
    filed = tuple(callsign for callsign in wanted if callsign in mailboxes)
    # Only what the sender gave a lifetime runs out here. It counts from now: the clocks of two nodes differ.
    expires_ms = tx.now_ms + letter.draft.ttl_ms if letter.draft.ttl_ms else None
    if filed:
        rows = [
            {
                "brief": brief.row,
                "callsign": callsign,
                "state": DELIVERED,
                "arrived_ms": tx.now_ms,
                "expires_ms": expires_ms,
                "starred": False,
                "archived": False,
            }
            for callsign in filed
        ]
        insert_rows(Delivery, rows)
    if actions := action.extract(letter.draft.actions, letter.draft.body):
        for mailbox in mailboxes.values():
            _ask(tx, mailbox, brief, letter.draft, actions)
    return Filed(callsigns=filed, missing=tuple(each for each in wanted if each not in mailboxes))


def _ask(tx: Tx, mailbox: Mailbox, brief: Brief, draft: Draft, actions: Sequence[action.Action]) -> None:
    """Give a mailbox its own copy of each action, under the next numbers."""
    rows = [
        {
            "id": new_id(tx.now_ms),
            "callsign": mailbox.callsign,
            "number": number,
            "brief": brief.row,
            "text": each.text,
            "status": action.PENDING,
            "priority": each.priority or draft.priority,
            "assignee": each.assignee,
            "project": each.project or draft.project,
            "due_ms": each.due_ms if each.due_ms is not None else draft.due_ms,
            "created_ms": tx.now_ms,
            "updated_ms": tx.now_ms,
        }
        for number, each in enumerate(actions, start=mailbox.action_number + 1)
    ]
    insert_rows(Action, rows)
    mailbox.action_number += len(rows)
    mailbox.save(only=[Mailbox.action_number])


def write_recipients(tx: Tx, brief: Brief, states: Mapping[Place, str]) -> None:
    """Write down, as the sender's node, whom a brief went to and how far it is with each."""
    rows = [
        {
            "brief": brief.row,
            "callsign": place.callsign,
            "node": place.node,
            "position": position,
            "state": state,
            "reason": NO_SUCH_CALLSIGN if state == DEAD else None,
            "queued_ms": tx.now_ms,
            "delivered_ms": tx.now_ms if state == DELIVERED else None,
            "ended_ms": tx.now_ms if state == DEAD else None,
        }
        for position, (place, state) in enumerate(states.items())
    ]
    insert_rows(Recipient, rows)


def queued_here(ids: Collection[str]) -> set[tuple[str, str]]:
    """Which of these messages are briefs of ours that still count as queued: (id, node) pairs. Reads only."""
    found: set[tuple[str, str]] = set()
    wanted = list(ids)
    for start in range(0, len(wanted), _IDS_A_QUERY):
        rows = (
            Brief.select(Brief.id, Recipient.node)
            .join(Recipient, on=(Recipient.brief == Brief.row))
            .where(Brief.id.in_(wanted[start : start + _IDS_A_QUERY]), UNDELIVERED)
            .tuples()
        )
        found.update(rows.execute())
    return found


def settled_unnoticed(db: Database) -> list[tuple[str, str, str, str | None]]:
    """Find what the outbox has settled while the recipients here still count as queued: (id, node, state, reason).

    An ack is committed a moment before `on_delivered` is told of it; a node that was killed in between never told.
    The outbox is broker_free's table; it is only read here, and only at the start.
    """
    queued = (
        Brief.select(Brief.id, Recipient.node)
        .join(Recipient, on=(Recipient.brief == Brief.row))
        .where(UNDELIVERED)
        .distinct()
        .tuples()
    )
    settled: list[tuple[str, str, str, str | None]] = []
    for brief_id, node in queued.execute():
        row = db.execute_sql(_OUTBOX_STATE, (node, id_to_bytes(brief_id))).fetchone()  # type: ignore[no-untyped-call]  # the stubs leave it out
        # Gone: settled long ago. Almost all that settles is delivered, and a later receipt still corrects it.
        state, reason = (_OUTBOX_STATES[row[0]], row[1]) if row else (DELIVERED, None)
        if state != QUEUED:
            settled.append((brief_id, node, state, reason))
    return settled
