"""Who acts as whom: the callsign a caller gets, and the lease of the process that holds it. Knows the tables.

    resolution (identity.py) + hints ─► Wish ─► enter ─► Caller
                                      files      one transaction

A Claude process keeps its callsign for as long as it lives. Else it gets the one it asks for (ZMAIL_CALLSIGN), the
one its session had before, or a made one. Only a holder that is known to be dead loses a callsign; one that cannot
be judged keeps it. People and scripts act without a lease: nothing of theirs can be told of mail as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeGuard

from broker_free import Tx
from zmail import address, naming
from zmail.config import Settings
from zmail.directory import BUCKET, OFFLINE, ONLINE, SEEN_STEP_MS, Place, key_of
from zmail.errors import CallsignTaken, NoIdentity
from zmail.identity import Caller, Holder, Liveness, Resolution, SenderClass, project_of
from zmail.models import Lease, Mailbox

Kind = Literal["agent", "human", "script"]
# One look at the process table: 20 µs, so it may run inside a transaction.
Judge = Callable[[Holder], Liveness]

TEXT_CHARS_MAX = 4_096  # of a hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a caller is, and who it wants to be."""

    kind: Kind
    name: str | None  # --as NAME, or a person's user name: this or nothing
    wanted: str | None  # ZMAIL_CALLSIGN: for a session that has no callsign yet
    holder: Holder | None  # the process that will hold the lease; None: no lease
    claude: Holder | None  # the Claude process behind the caller, whoever it wants to be
    session_id: str | None
    project: str | None  # of a session
    cwd: str | None


def wish_of(resolution: Resolution, hints: Mapping[str, object]) -> Wish | None:
    """Read what a caller wants out of what it is and what it says. None: it is nobody. Looks for files of git."""
    session = resolution.session
    cwd = (session.cwd if session else None) or _hint(hints, "project_dir") or _hint(hints, "cwd")
    name, wanted = _name(hints, "as"), None
    kind, holder = resolution.sender_class, resolution.holder
    if name is not None:
        kind = "script"
        # The relay of a session that has no Claude process behind it holds the name itself, as long as it lives.
        holder = resolution.caller if hints.get("kind") == "mcp" else None
    elif kind == "human":
        name = address.callsign(resolution.user)
    elif resolution.holder is None:
        return None
    else:
        wanted = _name(hints, "callsign")
    return Wish(
        kind="agent" if kind == "subagent" else kind,
        name=name,
        wanted=wanted,
        holder=holder,
        claude=resolution.holder,
        session_id=(session.session_id if session else None) or _hint(hints, "session_id"),
        project=project_of(cwd) if kind == "agent" else None,
        cwd=cwd,
    )


def _name(hints: Mapping[str, object], key: str) -> str | None:
    """A callsign somebody asked for. One that is malformed is refused: it must not become somebody else."""
    said = hints.get(key)
    return None if said is None else address.callsign(str(said))


def _hint(hints: Mapping[str, object], key: str) -> str | None:
    value = hints.get(key)
    if isinstance(value, str) and 0 < len(value) <= TEXT_CHARS_MAX and value.isprintable():
        return value
    return None


def standing(wish: Wish, now_ms: int) -> Caller | None:
    """Return the caller if nothing has to be written for it: the usual case, without a transaction. Reads only."""
    own = lease_of(wish.holder) if wish.holder and wish.name is None else None
    callsign = own.callsign if own else wish.name
    mailbox = Mailbox.get_or_none(Mailbox.callsign == callsign)
    if callsign is None or mailbox is None or (wish.kind == "human") != (mailbox.kind == "human"):
        return None
    lease = Lease.get_or_none(Lease.callsign == callsign)
    if wish.holder is not None:
        is_known = (
            lease is not None and holder_of(lease) == wish.holder and lease.session_id == wish.session_id
        )
        return _caller(wish, callsign, lease) if is_known and mailbox.state == ONLINE else None
    if now_ms - mailbox.last_seen_ms >= SEEN_STEP_MS or (lease and holder_of(lease) != wish.claude):
        return None
    return _caller(wish, callsign, lease)


def enter(tx: Tx, wish: Wish, judge: Judge, settings: Settings, elsewhere: frozenset[str]) -> Caller:
    """Give the caller its callsign and its lease. CallsignTaken when another process, alive or unknown, has it.

    `elsewhere` are the callsigns of other nodes: legal here too, but no made name should be one.
    """

    def is_free(name: str) -> bool:
        lease = Lease.get_or_none(Lease.callsign == name)
        if _is_held(lease, judge) and holder_of(lease) not in (wish.holder, wish.claude):
            return False
        mailbox = Mailbox.get_or_none(Mailbox.callsign == name)
        return mailbox is None or wish.kind != "agent" or mailbox.kind != "human"

    callsign = wish.name or _callsign(wish, settings, is_free, elsewhere)
    if wish.name is not None and not is_free(callsign):
        raise CallsignTaken(
            f"{callsign} is held by another live process",
            hint=f"act as somebody else: zmail --as {naming.free_variant(callsign, is_free)} …",
        )
    lease = _take(tx, callsign, wish) if wish.holder else Lease.get_or_none(Lease.callsign == callsign)
    _register(tx, callsign, wish, is_online=wish.holder is not None or _is_held(lease, judge))
    return _caller(wish, callsign, lease)


def _callsign(
    wish: Wish, settings: Settings, is_free: Callable[[str], bool], elsewhere: frozenset[str]
) -> str:
    """The callsign of a Claude process: its own, the wanted one, its session's last one, or a new one."""
    assert wish.holder is not None
    if lease := lease_of(wish.holder):
        return lease.callsign
    if wish.wanted is None and wish.session_id is not None:
        earlier = (
            Mailbox.select()
            .where(Mailbox.session_id == wish.session_id, Mailbox.kind == "agent")
            .order_by(Mailbox.last_seen_ms.desc())
        )
        if again := next((each.callsign for each in earlier if is_free(each.callsign)), None):
            return again
    return naming.new_callsign(
        wanted=wish.wanted,
        configured=settings.callsigns,
        naming=settings.naming,
        name_prefix=settings.name_prefix,
        project=wish.project or "claude",
        session_id=wish.session_id or str(wish.holder),
        is_free=is_free if wish.wanted else lambda name: name not in elsewhere and is_free(name),
    )


def _take(tx: Tx, callsign: str, wish: Wish) -> Lease:
    """Write the lease down. A new holder gets the next number, which tells its notices from the last one's."""
    assert wish.holder is not None
    holder = wish.holder
    found = Lease.get_or_none(Lease.callsign == callsign)
    lease = found or Lease(callsign=callsign, number=0)
    if found is None or holder_of(found) != holder:
        lease.boot_id, lease.pid, lease.start_ticks = holder.boot_id, holder.pid, holder.start_ticks
        lease.number += 1
        lease.taken_ms = tx.now_ms
    _set(lease, session_id=wish.session_id)
    if lease.dirty_fields:
        lease.save(force_insert=found is None, only=lease.dirty_fields)
    return lease


def _register(tx: Tx, callsign: str, wish: Wish, *, is_online: bool) -> None:
    """Make or freshen the mailbox, and the entry that every node sees."""
    mailbox = Mailbox.get_or_none(Mailbox.callsign == callsign)
    if mailbox is None:
        mailbox = Mailbox(
            callsign=callsign, kind=wish.kind, state="", created_ms=tx.now_ms, last_seen_ms=0, action_number=0
        )
        mailbox.save(force_insert=True)
    if wish.kind == "agent":
        _set(mailbox, project=wish.project, cwd=wish.cwd, session_id=wish.session_id)
    if wish.kind != "script":  # a script acts for whoever the mailbox belongs to
        _set(mailbox, kind=wish.kind)
    show(tx, mailbox, ONLINE if is_online else OFFLINE)


def show(tx: Tx, mailbox: Mailbox, state: str) -> None:
    """Write a mailbox that was seen just now. The registry hears of news only: each write goes to every peer.

    Who is online is seen all the time, so that alone is no news.
    """
    _set(mailbox, state=state)
    is_news = bool({"kind", "project", "state"} & set(mailbox.dirty_field_names))
    if is_news or (state != ONLINE and tx.now_ms - mailbox.last_seen_ms >= SEEN_STEP_MS):
        mailbox.last_seen_ms = tx.now_ms
        tx.registry_put(BUCKET, key_of(Place(mailbox.callsign, tx.node_id)), entry_of(mailbox))
    if mailbox.dirty_fields:
        mailbox.save(only=mailbox.dirty_fields)


def entry_of(mailbox: Mailbox) -> dict[str, str | int | None]:
    """What the registry says of a mailbox; `directory.resident_from` reads it."""
    return {
        "kind": mailbox.kind,
        "project": mailbox.project,
        "state": mailbox.state,
        "last_seen_ms": mailbox.last_seen_ms,
    }


def astray(told: Mapping[str, Mapping[str, object]]) -> list[str]:
    """List the callsigns of which the registry tells something else than their mailbox. Reads only."""
    true = {mailbox.callsign: entry_of(mailbox) for mailbox in Mailbox.select()}
    return sorted(callsign for callsign in true.keys() | told if true.get(callsign) != told.get(callsign))


def set_right(tx: Tx, callsigns: list[str]) -> None:
    """Have the registry tell what the mailboxes say, if it does not by now.

    It tells something else after the store was put back from a backup: what this node wrote since comes back from
    the others, without the mailboxes. Or when another member lied in this node's name while it was away.
    """
    for callsign in callsigns:
        mailbox = Mailbox.get_or_none(Mailbox.callsign == callsign)
        true = entry_of(mailbox) if mailbox else None
        key = key_of(Place(callsign, tx.node_id))
        if tx.registry_get(BUCKET, key) != true:
            tx.registry_put(BUCKET, key, true)


def _set(row: Mailbox | Lease, **values: str | None) -> None:
    """Set what differs, so that an unchanged row is not written."""
    for name, value in values.items():
        if getattr(row, name) != value:
            setattr(row, name, value)


def still_holds(who: Caller) -> None:
    """Refuse a caller whose callsign has gone to another process since it entered."""
    if who.holder is None:
        return
    lease = Lease.get_or_none(Lease.callsign == who.callsign)
    if lease is None or holder_of(lease) != who.holder:
        raise CallsignTaken(
            f"{who.callsign} is now held by another process", hint="start zmail in this session anew"
        )


def fallen(judge: Judge) -> list[str]:
    """List the callsigns that are shown as online and whose holder is known to be dead. Reads only."""
    online = (
        Lease.select().join(Mailbox, on=(Mailbox.callsign == Lease.callsign)).where(Mailbox.state == ONLINE)
    )
    return [lease.callsign for lease in online if judge(holder_of(lease)) is Liveness.DEAD]


def take_offline(tx: Tx, callsigns: list[str], judge: Judge) -> None:
    """Show as offline those of `fallen` that nobody has taken since."""
    for callsign in callsigns:
        lease = Lease.get_or_none(Lease.callsign == callsign)
        if not _is_held(lease, judge):
            show(tx, Mailbox.get_by_id(callsign), OFFLINE)


def need(who: Caller | None) -> Caller:
    """Return the caller; NoIdentity when it is nobody."""
    if who is None:
        raise NoIdentity("no mailbox is known for this process", hint="say who you are: zmail --as NAME …")
    return who


def lease_of(holder: Holder) -> Lease | None:
    """The lease that a process holds, its latest if it ever took two."""
    found: Lease | None = (
        Lease.select()
        .where(
            Lease.pid == holder.pid, Lease.start_ticks == holder.start_ticks, Lease.boot_id == holder.boot_id
        )
        .order_by(Lease.taken_ms.desc())
        .first()
    )
    return found


def holder_of(lease: Lease) -> Holder:
    return Holder(boot_id=lease.boot_id, pid=lease.pid, start_ticks=lease.start_ticks)


def _is_held(lease: Lease | None, judge: Judge) -> TypeGuard[Lease]:
    return lease is not None and judge(holder_of(lease)) is not Liveness.DEAD


def _caller(wish: Wish, callsign: str, lease: Lease | None) -> Caller:
    is_own = lease is not None and wish.claude is not None and holder_of(lease) == wish.claude
    sender_class: SenderClass = "agent" if is_own else wish.kind  # --as the session's own name is the session
    return Caller(
        callsign=callsign,
        sender_class=sender_class,
        holder=wish.claude if is_own else wish.holder,
        session_id=wish.session_id,
        project=wish.project,
    )
