"""One of two broker_free nodes: the sender measures its sends, the receiver what its transactions brought."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.workers import Answer, say
from broker_free import Node, Tx

if TYPE_CHECKING:
    from broker_free.message import Envelope

STAMPED = "bench.stamped"  # the body begins with the moment of sending
PUMPED = "bench.pumped"  # the body means nothing
OFFERED = "bench.offered"  # with a blob
BEGUN, FETCHED = "bench.begun", "bench.fetched"  # what its recipient does with it
ROUND_S = 100.0  # a node that stops delivering ends its round, before the harness loses patience

Command = Callable[..., Awaitable[Answer]]


class Sender:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._is_fetching = asyncio.Event()
        self._is_fetched = asyncio.Event()
        node.effect(BEGUN, lambda tx, envelope: tx.after_commit(self._is_fetching.set))
        node.effect(FETCHED, lambda tx, envelope: tx.after_commit(self._is_fetched.set))

    async def put(self, *, to: str, size: int) -> Answer:
        """A blob of noise that the peer may fetch."""
        blob = await self._node.put_blob(os.urandom(size))
        receipt = await self._node.publish(OFFERED, b"", to=[to], blobs=[blob.id])
        await receipt.delivered()
        self._is_fetching.clear()  # of the blob before
        self._is_fetched.clear()
        return {"blob": blob.id}

    async def send_while_fetched(self, *, to: str, gap_ms: float, body_bytes: int) -> Answer:
        """As `send`, from the moment a peer has begun to fetch a blob until it has all of it."""
        body = bytes(body_bytes)
        acked: list[int] = []
        async with asyncio.timeout(ROUND_S):
            await self._is_fetching.wait()
            turns = _paced(1_000_000, gap_ms)
            while not self._is_fetched.is_set():
                await anext(turns)
                begun = time.monotonic_ns()
                receipt = await self._node.publish(PUMPED, body, to=[to])
                await receipt.delivered()
                acked.append(time.monotonic_ns() - begun)
        return {"acked_ns": acked}

    async def join(self, *, code: str) -> Answer:
        peer = await self._node.join(code)
        return {"name": peer.name}

    async def send(self, *, to: str, count: int, gap_ms: float, body_bytes: int) -> Answer:
        """One message at a time, each until the peer has committed it and its ack is here."""
        filler = b"x" * (body_bytes - 8)
        stored: list[int] = []
        acked: list[int] = []
        async with asyncio.timeout(ROUND_S):
            async for _ in _paced(count, gap_ms):
                begun = time.monotonic_ns()
                receipt = await self._node.publish(STAMPED, begun.to_bytes(8, "big") + filler, to=[to])
                stored.append(time.monotonic_ns() - begun)
                await receipt.delivered()
                acked.append(time.monotonic_ns() - begun)
        return {"stored_ns": stored, "acked_ns": acked}

    async def pump(self, *, to: str, count: int, window: int, body_bytes: int) -> Answer:
        """As fast as it goes, with `window` messages that are not yet acknowledged."""
        body = b"x" * body_bytes
        turns = itertools.count()

        async def keep_one_under_way() -> None:
            while next(turns) < count:
                receipt = await self._node.publish(PUMPED, body, to=[to])
                await receipt.delivered()

        begun = time.monotonic_ns()
        async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as tasks:
            for _ in range(window):
                tasks.create_task(keep_one_under_way())
        return {"took_ns": time.monotonic_ns() - begun}


class Receiver:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._seen: asyncio.Queue[int] = asyncio.Queue()
        node.effect(STAMPED, self._note_arrival)
        node.effect(PUMPED, lambda tx, envelope: None)
        node.effect(OFFERED, lambda tx, envelope: None)

    async def invite(self) -> Answer:
        invitation = await self._node.invite()
        return {"code": invitation.encode()}

    async def fetch(self, *, blob: str) -> Answer:
        """Fetch a blob from the other node, telling it when that has begun and when it is over."""
        (peer,) = (view.node_id for view in self._node.peers())
        begins = asyncio.Event()
        begun = time.monotonic_ns()
        fetching = asyncio.ensure_future(
            self._node.fetch_blob(blob, peer=peer, on_progress=lambda *_: begins.set())
        )
        await begins.wait()
        await self._node.publish(BEGUN, b"", to=[peer])
        await fetching
        took_ns = time.monotonic_ns() - begun
        receipt = await self._node.publish(FETCHED, b"", to=[peer])
        await receipt.delivered()
        return {"took_ns": took_ns}

    async def watch(self, *, count: int) -> Answer:
        """How long each of the next `count` messages took until it could be seen here, committed."""
        return {"samples_ns": [await self._seen.get() for _ in range(count)]}

    def _note_arrival(self, tx: Tx, envelope: Envelope) -> None:
        sent = int.from_bytes(envelope.body[:8], "big")
        tx.after_commit(lambda: self._seen.put_nowait(time.monotonic_ns() - sent))


async def _paced(count: int, gap_ms: float) -> AsyncIterator[None]:
    """The same turns as `workers.paced`, without stopping the event loop."""
    due = time.monotonic()
    for _ in range(count):
        if gap_ms:
            due = max(due + gap_ms / 1000, time.monotonic())
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield


async def _serve(commands: Mapping[str, Command], *, ready: Answer) -> None:
    """As `workers.serve`, with the event loop running between the commands."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    say(ready)
    while line := await reader.readline():
        arguments = json.loads(line)
        say(await commands[arguments.pop("do")](**arguments))


async def _run(role: str, home: Path) -> None:
    node = Node(role, home=home)
    commands: dict[str, Command]
    if role == "sender":
        sender = Sender(node)
        commands = {
            "join": sender.join,
            "send": sender.send,
            "pump": sender.pump,
            "put": sender.put,
            "send_while_fetched": sender.send_while_fetched,
        }
    else:
        receiver = Receiver(node)
        commands = {"invite": receiver.invite, "watch": receiver.watch, "fetch": receiver.fetch}
    async with node:
        await _serve(commands, ready={"node_id": node.node_id})


def main() -> None:
    role, home = sys.argv[1:]
    asyncio.run(_run(role, Path(home)))


if __name__ == "__main__":
    main()
