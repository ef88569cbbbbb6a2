"""Two nodes at work in one process, for the recorder: python -m tests.power_loss_worker ROOT MESSAGES SYNCHRONOUS

They say in the recorder's log what they promised: `returned NODE ID` once a publish has returned, `acked NODE ROW`
just before an ack for everything up to that inbox row leaves.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from pathlib import Path

import peewee as pw

from broker_free import Node, Tx, frames
from broker_free.frames import Frame
from broker_free.message import Envelope
from broker_free.owner import Owner


class Filed(pw.Model):
    """What the effect and the job of a message write."""

    message = pw.TextField()
    how = pw.TextField()


def mark(text: str) -> None:
    raw = text.encode()
    ctypes.CDLL(None).bf_mark(raw, ctypes.c_size_t(len(raw)))


def file_it(tx: Tx, envelope: Envelope) -> None:
    Filed.create(message=envelope.id, how="effect")


def finish(tx: Tx, message_id: str) -> None:
    Filed.create(message=message_id, how="job")


def send_inside(tx: Tx, body: bytes, peer: str) -> str:
    sent = tx.publish("mail", body, to=[peer])
    Filed.create(message=sent, how="sent")
    return sent


def body_of(number: int) -> bytes:
    return b"%d " % number + bytes(number * 7 % 251 for _ in range(number * 977 % 5_000))


async def publish(node: Node, peer: str, numbers: range) -> None:
    for first in numbers[::4]:
        some = [
            node.publish("mail" if number % 3 else "task", body_of(number), to=[peer])
            for number in numbers[first - numbers[0] : first - numbers[0] + 4]
        ]
        for receipt in await asyncio.gather(*some):
            mark(f"returned {node.name} {receipt.id}")
        sent = await node.transact(send_inside, body_of(first), peer)
        mark(f"returned {node.name} {sent}")


async def consume(node: Node) -> None:
    async with node.subscribe("task", durable="tasks") as jobs:
        async for job in jobs:
            await job.commit(finish, job.envelope.id)


def listen_in(owner: Owner, name: str) -> None:
    """Say what an ack promises, before it can have left."""
    send = owner.send

    def marked(conn: int, frame: Frame) -> bool:
        if frame.kind == frames.ACK:
            mark(f"acked {name} {frame.meta['row']}")
        return send(conn, frame)

    owner.send = marked  # type: ignore[method-assign]  # the wire, as the tick sees it


def _address(number: int) -> str:
    """Make the end of a loopback address that is this process's alone: its nodes come back to it."""
    pid = os.getpid() * 2 + number
    return f"{pid // 254 % 254}.{pid % 254 + 1}"


async def work(root: Path, synchronous: str, numbers: range) -> None:
    nodes = [
        Node(name, home=root / name, models=[Filed], listen=f"tcp://127.78.{at}:7420")
        for name, at in (("a", _address(1)), ("b", _address(2)))
    ]
    for node in nodes:
        node.effect("mail", file_it)
    async with nodes[0], nodes[1]:
        for node in nodes:
            owner = node._owner
            assert owner is not None
            listen_in(owner, node.name)
            pragma = f"PRAGMA synchronous={synchronous}"
            await owner.ask(lambda owner=owner, sql=pragma: owner._store._conn.execute(sql) and None)
        if not nodes[0].peers():
            await nodes[1].join((await nodes[0].invite()).encode())
        consumers = [asyncio.create_task(consume(node)) for node in nodes]
        await asyncio.gather(*(publish(one, other.node_id, numbers) for one, other in (nodes, nodes[::-1])))
        for node in nodes:
            await (await node.publish("mail", b"-1", to=[peer.node_id for peer in node.peers()])).delivered(
                30
            )
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)


def main(root: str, messages: str, synchronous: str) -> None:
    half = int(messages) // 2
    for numbers in (
        range(half),
        range(half, 2 * half),
    ):  # stopped in between: the log is emptied and made anew
        asyncio.run(work(Path(root), synchronous, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
