"""The oracle: a process that outlives every fault, writes down what the nodes meant and did, and judges.

    python -m tests.faults.oracle SOCKET LOG

Reports come over a Unix socket, one JSON object a line; every line goes to the append-only log, which is synced before
an intent is answered. So a publish is on the oracle's disk before it is made: whatever is killed, the oracle knows what
may have been sent. What came of it, the nodes' own stores say; they are read when a check is asked for.

    watched as it goes   order and doubles among arrivals, arrivals nobody meant, presence outside of faults
    at a check           I1 lost?  I2 twice?  I3 order?  I4 acked without a row?  I5 forged or changed?  I8 presence
                         I9 integrity_check  I10 every returned send accounted for   (I6, I7: measured by the fleet)

`Judge` is pure apart from reading stores, so that its own tests can feed it lies.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

Report = dict[str, Any]  # one line; its shape depends on "t"

SUBJECT: Final = "fault.stream"
OUTBOX_STATES: Final = ("queued", "delivered", "expired", "cancelled", "dead")
VIOLATIONS_MAX: Final = 50  # of one kind in an answer; the log has all


def body_of(sender: str, number: int, size: int) -> bytes:
    """The one body that this message can have: what arrives is compared with it."""
    head = f"{sender} {number} {size} ".encode()
    filler = blake2b(head, digest_size=32).hexdigest().encode()
    return (head + filler * (size // len(filler) + 1))[: max(size, len(head))]


def number_of(body: bytes) -> tuple[str, int, int] | None:
    """Sender, number and size as a body names them, or None when it is none of ours."""
    parts = bytes(body[:200]).split(b" ", 3)
    try:
        return parts[0].decode(), int(parts[1]), int(parts[2])
    except (IndexError, ValueError, UnicodeDecodeError):
        return None


class Numbers:
    """A set of numbers that come mostly in runs: a million of them fit in a few ranges."""

    def __init__(self) -> None:
        self._runs: list[list[int]] = []  # [first, end), in the order they came

    def add(self, first: int, count: int = 1) -> None:
        if self._runs and self._runs[-1][1] == first:
            self._runs[-1][1] = first + count
        else:
            self._runs.append([first, first + count])

    def __iter__(self) -> Iterable[int]:  # type: ignore[override]
        for first, end in self._runs:
            yield from range(first, end)

    def __len__(self) -> int:
        return sum(end - first for first, end in self._runs)


@dataclass(slots=True)
class _Node:
    """What one node said of itself."""

    name: str
    id: str = ""
    home: Path = Path()
    intents: dict[tuple[str, ...], Numbers] = field(default_factory=dict)  # recipients -> numbers
    sent: Numbers = field(default_factory=Numbers)  # publish returned
    refused: dict[int, str] = field(default_factory=dict)  # publish said no, before anything changed
    unknown: int = 0  # publish said that it does not know
    acked: dict[str, set[bytes]] = field(default_factory=dict)  # peer id -> message ids whose ack came back
    last_arrived: dict[str, int] = field(default_factory=dict)  # sender's name -> number
    poisoned: set[int] = field(default_factory=set)  # handled late on purpose, so out of order


@dataclass(slots=True)
class _View:
    at: float
    observer: str
    peer: str
    state: str


class Judge:
    """Takes the reports in, and says at the end what does not fit."""

    def __init__(self) -> None:
        self.nodes: dict[str, _Node] = {}
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self._views: list[_View] = []
        self._faults: list[tuple[float, str, set[str]]] = []  # (from, kind, nodes whose presence may suffer)
        self._healed: list[tuple[float, set[str]]] = []

    # -- as it goes -----------------------------------------------------------------------------------------

    def take(self, report: Report) -> None:
        match report["t"]:
            case "node":
                node = self._node(report["node"])
                node.id, node.home = report["id"], Path(report["home"])
            case "intent":
                numbers = self._node(report["node"]).intents.setdefault(tuple(report["to"]), Numbers())
                numbers.add(report["first"], report["count"])
                self.counts["intents"] += report["count"]
            case "sent":
                for number in report["numbers"]:
                    self._node(report["node"]).sent.add(number)
                self.counts["sent"] += len(report["numbers"])
            case "refused":
                self._node(report["node"]).refused[report["number"]] = report["error"]
                self.counts["refused"] += 1
            case "unknown":
                self._node(report["node"]).unknown += 1
                self.counts["unknown"] += 1
            case "acked":
                ids = self._node(report["node"]).acked.setdefault(report["peer"], set())
                ids.update(map(_raw_id, report["ids"]))
                self.counts["acked"] += len(report["ids"])
            case "poisoned":
                self._node(report["node"]).poisoned.update(report["numbers"])
            case "arrived":
                self._arrived(report)
            case "view":
                view = _View(report["at"], report["node"], report["peer"], report["state"])
                self._views.append(view)
            case "fault":
                self._faults.append((report["at"], report["kind"], set(report["nodes"])))
                self.counts["faults"] += 1
            case "healed":
                self._healed.append((report["at"], set(report["nodes"])))

    def _arrived(self, report: Report) -> None:
        """Reports of arrivals may be missing (a kill comes between commit and report), never out of order."""
        receiver = self._node(report["node"])
        for sender, number in report["messages"]:
            if number in receiver.poisoned:
                continue
            last = receiver.last_arrived.get(sender, -1)
            if number == last:
                self._blame("I2", f"{receiver.name} handled {sender}'s {number} twice")
            elif number < last:
                self._blame("I3", f"{receiver.name} handled {sender}'s {number} after {last}")
            receiver.last_arrived[sender] = number
        self.counts["arrived"] += len(report["messages"])

    def _node(self, name: str) -> _Node:
        return self.nodes.setdefault(name, _Node(name))

    def _blame(self, invariant: str, text: str) -> None:
        self.violations.append(f"{invariant}: {text}")

    # -- at a check -----------------------------------------------------------------------------------------

    def check(self, *, effects: bool = True, wants_all: bool = False) -> Report:
        """Read the stores of all nodes and return what does not fit.

        `wants_all`: the mesh has healed, so nothing may still be queued. Stores may be in use: what is read is a
        snapshot, and receivers are read after senders, so that "delivered here" is never older than "arrived there".
        """
        states: Counter[str] = Counter()
        outboxes = {name: _read_outbox(node) for name, node in self.nodes.items()}
        inboxes = {name: _read_inbox(node) for name, node in self.nodes.items()}
        by_id = {node.id: name for name, node in self.nodes.items()}
        wanted = {name: _wanted(node, by_id) for name, node in self.nodes.items()}
        for name, node in self.nodes.items():
            self._check_integrity(node)
            self._check_inbox(node, inboxes[name], wanted, effects=effects)
        for sender in self.nodes.values():
            returned = set(sender.sent)  # type: ignore[call-overload]  # iterates like any set of numbers
            for receiver, numbers in wanted[sender.name].items():
                here = {message.number: message for message in inboxes[receiver].get(sender.name, ())}
                there = outboxes[sender.name].get(self.nodes[receiver].id, {})
                self._check_pair(
                    sender,
                    receiver,
                    returned=returned & numbers,
                    here=here,
                    there=there,
                    states=states,
                    wants_all=wants_all,
                )
        return {
            "violations": self.violations[:VIOLATIONS_MAX],
            "violations_total": len(self.violations),
            "counts": dict(self.counts),
            "states": dict(states),
        }

    def _check_pair(
        self,
        sender: _Node,
        receiver: str,
        *,
        returned: set[int],
        here: Mapping[int, _Arrived],
        there: Mapping[int, tuple[int, str, bytes]],
        states: Counter[str],
        wants_all: bool,
    ) -> None:
        pair = f"{sender.name}→{receiver}"
        for number in returned:
            state = there[number][1] if number in there else None
            if number in here:
                states["delivered"] += 1
            elif state in ("queued", "expired", "cancelled", "dead"):
                states[state] += 1
            else:
                self._blame("I1, I10", f"{pair}: {number} was sent and is lost (outbox: {state})")
        for number, (_, state, _) in there.items():
            if state == "delivered" and number not in here:
                self._blame("I4", f"{pair}: {number} counts as delivered and is not there")
            if wants_all and state == "queued":
                self._blame("I6", f"{pair}: {number} is still queued")
        for number, error in sender.refused.items():
            if number in here or number in there:
                self._blame("I1", f"{pair}: {number} was refused ({error}) and sent all the same")
        held = {message.id for message in here.values()}
        for raw_id in sender.acked.get(self.nodes[receiver].id, set()) - held:
            self._blame("I4", f"{pair}: an ack was seen for {raw_id.hex()}, which has no row")

    def _check_inbox(
        self,
        node: _Node,
        inbox: Mapping[str, Sequence[_Arrived]],
        wanted: Mapping[str, Mapping[str, set[int]]],
        *,
        effects: bool,
    ) -> None:
        for sender, arrived in inbox.items():
            pair = f"{sender}→{node.name}"
            meant = wanted.get(sender, {}).get(node.name, set())
            ids: set[bytes] = set()
            last = -1
            for message in arrived:
                if message.id in ids:
                    self._blame("I2", f"{pair}: id {message.id.hex()} is there twice")
                ids.add(message.id)
                if message.number == last:
                    self._blame("I2", f"{pair}: {message.number} is there twice")
                elif message.number < last:
                    self._blame("I3", f"{pair}: {message.number} came after {last}")
                last = message.number
                if message.number not in meant:
                    self._blame("I5", f"{pair}: nobody meant to send {message.number}")
                if not message.is_true:
                    self._blame("I5", f"{pair}: {message.number} is not what was sent")
        if effects:
            self._check_effects(node, inbox)

    def _check_effects(self, node: _Node, inbox: Mapping[str, Sequence[_Arrived]]) -> None:
        """What the effect wrote and what arrived are one transaction: the same messages in the same order."""
        filed = _read_filed(node)
        for sender in {*filed, *inbox}:
            done = [message.number for message in inbox.get(sender, ()) if message.is_done]
            if filed.get(sender, []) != done:
                differing = sorted(set(filed.get(sender, [])) ^ set(done))[:5] or "in order only"
                self._blame("I2", f"{sender}→{node.name}: the effects and the inbox differ: {differing}")

    def _check_integrity(self, node: _Node) -> None:
        with _reading(node) as db:
            (answer,) = db.execute("PRAGMA integrity_check").fetchone()
        if answer != "ok":
            self._blame("I9", f"{node.name}: {answer}")

    # -- presence -------------------------------------------------------------------------------------------

    def check_presence(self, *, bound_s: float, since: float) -> Report:
        """I8: nobody is seen as suspect or down unless a fault touched it, from `since` (monotonic) on.

        A fault of a node excuses views of it, until `bound_s` after it healed; and its own views of others, unless
        it was only paused: whoever wakes up must not think that the world has died.
        """
        flaps = []
        for view in self._views:
            if view.at < since or view.state == "alive":
                continue
            if not (
                self._is_excused(view.peer, view.at, bound_s)
                or self._is_excused(view.observer, view.at, bound_s, as_observer=True)
            ):
                flaps.append(f"{view.observer} saw {view.peer} as {view.state}")
        for flap in flaps:
            self._blame("I8", f"{flap}, which no fault explains")
        return {"flaps": flaps, "violations": self.violations[:VIOLATIONS_MAX]}

    def _is_excused(self, node: str, at: float, bound_s: float, *, as_observer: bool = False) -> bool:
        for began, kind, nodes in self._faults:
            if node in nodes and at >= began and not (as_observer and kind == "pause"):
                over = min((t for t, healed in self._healed if node in healed and t >= began), default=at)
                if at <= over + bound_s:
                    return True
        return False

    def views(self, *, peer: str, since: float) -> list[tuple[float, str, str]]:
        """Return (moment, observer, state) of every change of view of a peer from `since` on."""
        return [(v.at, v.observer, v.state) for v in self._views if v.peer == peer and v.at >= since]


# -- what the stores say ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Arrived:
    number: int
    id: bytes
    is_true: bool  # the body is the one that this number can have
    is_done: bool  # its effect has been run


def _wanted(node: _Node, by_id: Mapping[str, str]) -> dict[str, set[int]]:
    """Recipient's name -> numbers that were meant for it."""
    wanted: dict[str, set[int]] = {name: set() for name in by_id.values() if name != node.name}
    for recipients, numbers in node.intents.items():
        for recipient in recipients:
            wanted[by_id[recipient]].update(numbers)  # type: ignore[arg-type]  # iterates like any set of numbers
    return wanted


def _read_outbox(node: _Node) -> dict[str, dict[int, tuple[int, str, bytes]]]:
    """Peer id -> number -> (row, state, message id)."""
    outbox: dict[str, dict[int, tuple[int, str, bytes]]] = {}
    with _reading(node) as db:
        rows = db.execute(
            "SELECT p.node_id, o.row, o.state, o.msg_id, substr(m.body, 1, 200) FROM outbox o"
            " JOIN message m ON m.id = o.message JOIN peer p ON p.id = o.peer ORDER BY o.row"
        )
        for peer, row, state, raw_id, head in rows:
            if (found := number_of(head)) is not None:
                outbox.setdefault(peer, {})[found[1]] = (row, OUTBOX_STATES[state], raw_id)
    return outbox


def _read_inbox(node: _Node) -> dict[str, list[_Arrived]]:
    """Sender's name -> what is there of it, in the order of arrival."""
    inbox: dict[str, list[_Arrived]] = {}
    with _reading(node) as db:
        for raw_id, body, state in db.execute("SELECT msg_id, body, state FROM inbox ORDER BY row"):
            if (found := number_of(body)) is not None:
                sender, number, size = found
                message = _Arrived(number, raw_id, body == body_of(sender, number, size), state == 2)
                inbox.setdefault(sender, []).append(message)
    return inbox


def _read_filed(node: _Node) -> dict[str, list[int]]:
    filed: dict[str, list[int]] = {}
    with _reading(node) as db:
        for sender, number in db.execute("SELECT sender, number FROM filed ORDER BY id"):
            filed.setdefault(sender, []).append(number)
    return filed


class _reading:
    """A read-only connection that is closed at the end of the block."""

    def __init__(self, node: _Node) -> None:
        path = quote(str(node.home / "store.db"))
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)

    def __enter__(self) -> sqlite3.Connection:
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


def _raw_id(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


# -- the process --------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, log: Path) -> None:
        self._fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._judge = Judge()
        self._done = asyncio.Event()

    async def serve(self, socket_path: str) -> None:
        server = await asyncio.start_unix_server(self._on_connection, socket_path, limit=1 << 22)
        async with server:
            print("ready", flush=True)
            await self._done.wait()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                if not line.endswith(b"\n"):
                    break  # its writer was killed in the middle of a line
                report = json.loads(line)
                report.setdefault("at", time.monotonic())
                os.write(self._fd, json.dumps(report).encode() + b"\n")
                answer = self._answer(report)
                if answer is not None:
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
        except (ConnectionError, BrokenPipeError):
            pass  # a node that was killed
        finally:
            writer.close()

    def _answer(self, report: Report) -> Report | None:
        match report["t"]:
            case "check":
                return self._judge.check(effects=report["effects"], wants_all=report["wants_all"])
            case "presence":
                return self._judge.check_presence(bound_s=report["bound_s"], since=report["since"])
            case "views":
                return {"views": self._judge.views(peer=report["peer"], since=report["since"])}
            case "counts":
                return {"counts": dict(self._judge.counts), "violations": self._judge.violations[:5]}
            case "end":
                self._done.set()
                return {}
        self._judge.take(report)
        if report["t"] == "intent":
            os.fdatasync(self._fd)
            return {}
        return None


if __name__ == "__main__":
    asyncio.run(_Server(Path(sys.argv[2])).serve(sys.argv[1]))
