"""The tables of the mail side. Knows peewee; knows no node, no wire and no rule of who may do what.

    mailbox ─┬─ lease       which process acts for it, and the number that says since how many holders
             ├─ delivery    one brief in this mailbox, as its owner sees it ──┐
             └─ action      one thing that a brief asks of this mailbox ──────┤
    brief ───┬────────────────────────────────────────────────────────────────┘
             └─ recipient   one brief at one address, as its sender sees it

Models declare no database: `broker_free.Node(models=MODELS)` binds them to its own file, so that a brief is filed
in the transaction that accepts it. Only the node's owner thread may run a query of a bound model as it is; a read
elsewhere names its database, `query.execute(db)`. Plain columns stand where a foreign key would be: a lazy look-up
through one would open a second connection from whatever thread touched it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from peewee import SQL, AutoField, BooleanField, CompositeKey, IntegerField, Model, TextField

from broker_free.schema import Migrations


class Mailbox(Model):
    """A durable address of this node. Mail belongs to it; processes come and go."""

    callsign = TextField(primary_key=True)
    kind = TextField()  # agent | human | script: who opened it
    project = TextField(null=True)
    cwd = TextField(null=True)
    session_id = TextField(null=True)  # the last one: a resumed session gets its callsign back
    created_ms = IntegerField()
    state = TextField()  # online | offline, and
    last_seen_ms = IntegerField()  # when: both as the registry has them
    action_number = IntegerField(default=0)  # of its newest action; a number is never given twice

    class Meta:
        table_name = "mailbox"


Mailbox.add_index(Mailbox.session_id, name="mailbox_by_session")


class Lease(Model):
    """The process that acts for a mailbox. The row stays when the process is gone: its number only grows."""

    callsign = TextField(primary_key=True)
    boot_id = TextField()
    pid = IntegerField()
    start_ticks = IntegerField()
    number = IntegerField()  # one more for every new holder (fencing)
    session_id = TextField(null=True)
    taken_ms = IntegerField()

    class Meta:
        table_name = "lease"


Lease.add_index(Lease.pid, Lease.start_ticks, Lease.boot_id, name="lease_by_holder")


class Brief(Model):
    """One brief as it was sent, whatever became of it."""

    row = AutoField()
    id = TextField()
    tail = TextField()  # the last six characters, which people type (an index cannot find a suffix)
    thread = TextField()
    reply_to = TextField(null=True)
    from_callsign = TextField()
    from_node = TextField()  # node id that the connection's key proved, never what the text says
    sender_class = TextField()
    title = TextField()
    body = TextField()
    sent_ms = IntegerField()  # by the sender's clock
    priority = TextField()
    project = TextField(null=True)
    intent = TextField(null=True)
    recipients = TextField()  # JSON [[callsign, node id, "to" | "cc"], ...]
    rest = TextField()  # JSON, what else the draft says: due, ttl, tags, actions, keys without a meaning

    class Meta:
        table_name = "brief"


# Everything but the text, which may be a megabyte.
HEADERS = tuple(getattr(Brief, name) for name in Brief._meta.sorted_field_names if name != "body")
# A bare id would let one node pre-empt another's brief, so the sender's node is part of the key.
Brief.add_index(Brief.from_node, Brief.id, unique=True, name="brief_by_origin")
Brief.add_index(Brief.tail, name="brief_by_tail")
Brief.add_index(Brief.thread, name="brief_by_thread")


class Delivery(Model):
    """One brief in one mailbox of this node. Its id grows in the order of arrival."""

    letter: Brief  # only of a query that joins it, under this name

    id = AutoField()
    brief = IntegerField()
    callsign = TextField()
    state = TextField()
    door = TextField(null=True)  # the one it was announced through
    lease_number = IntegerField(null=True)  # the holder it was announced to: the next one has not heard of it
    arrived_ms = IntegerField()
    announced_ms = IntegerField(null=True)
    read_ms = IntegerField(null=True)
    done_ms = IntegerField(null=True)
    expires_ms = IntegerField(null=True)
    starred = BooleanField(default=False)
    archived = BooleanField(default=False)

    class Meta:
        table_name = "delivery"


# The states are literals in the text: SQLite takes a partial index only for a term it can see, not for a parameter.
UNREAD = Delivery.state.in_([SQL("'delivered'"), SQL("'announced'")])
Delivery.add_index(Delivery.brief, Delivery.callsign, unique=True, name="delivery_by_brief")
Delivery.add_index(Delivery.callsign, Delivery.id, name="delivery_by_mailbox")
Delivery.add_index(Delivery.callsign, Delivery.id, where=UNREAD, name="delivery_unread")
Delivery.add_index(Delivery.expires_ms, where=Delivery.expires_ms.is_null(False), name="delivery_expiring")


class Recipient(Model):
    """What this node, as the sender's, knows of one brief at one address."""

    brief = IntegerField()
    callsign = TextField()
    node = TextField()  # node id
    position = IntegerField()  # in the order the sender named them
    state = TextField()
    door = TextField(null=True)
    reason = TextField(null=True)
    queued_ms = IntegerField()
    delivered_ms = IntegerField(null=True)
    announced_ms = IntegerField(null=True)
    read_ms = IntegerField(null=True)
    done_ms = IntegerField(null=True)
    ended_ms = IntegerField(null=True)  # expired, cancelled or dead

    class Meta:
        table_name = "recipient"
        primary_key = CompositeKey("brief", "callsign", "node")


UNDELIVERED = Recipient.state == SQL("'queued'")
Recipient.add_index(Recipient.brief, where=UNDELIVERED, name="recipient_undelivered")


class Action(Model):
    """One thing that a brief asks of one mailbox, taken out of the text once, on arrival."""

    id = TextField(primary_key=True)
    callsign = TextField()
    number = IntegerField()  # small, for people: "action 5"
    brief = IntegerField(null=True)
    text = TextField()
    status = TextField()  # pending | wip | done | skip
    priority = TextField()
    assignee = TextField(null=True)
    project = TextField(null=True)
    due_ms = IntegerField(null=True)
    created_ms = IntegerField()
    updated_ms = IntegerField()

    class Meta:
        table_name = "action"


Action.add_index(Action.callsign, Action.number, unique=True, name="action_by_number")
Action.add_index(Action.brief, name="action_by_brief")

MODELS: tuple[type[Model], ...] = (Mailbox, Lease, Brief, Delivery, Recipient, Action)

# How the tables of earlier releases become those above: one tuple of SQL statements (or functions of the connection)
# for each version after the first. New tables need no step: what the models have and the file lacks is created.
MIGRATIONS = Migrations(application="zmail", steps=())


def insert_rows(model: type[Model], rows: Sequence[Mapping[str, object]]) -> int:
    """Insert rows that all have the same columns; return the number of the last. Columns left out must allow it.

    For what every brief goes through: peewee builds the text of a statement anew each time, at three times the cost
    of running it.
    """
    database = model._meta.database
    statement = _insert(model._meta.table_name, tuple(rows[0]))
    for row in rows:
        cursor = database.execute_sql(statement, tuple(row.values()))
    return int(cursor.lastrowid)


@lru_cache(maxsize=64)
def _insert(table: str, columns: tuple[str, ...]) -> str:
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
