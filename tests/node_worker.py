"""A node in a process of its own, to be killed while it publishes, files what arrives, serves or fetches a blob.

python -m tests.node_worker HOME COMMAND …      one JSON object a line on stdout
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from random import Random

import peewee as pw

from broker_free import Node, Tx
from broker_free.carrier import Carrier
from broker_free.faults import arm_from
from broker_free.frames import CHUNK_GET, Frame
from broker_free.message import Envelope

asked: list[int] = []  # indexes of the chunks that a peer has asked this node for


class Filed(pw.Model):
    """What the effect of a receiver writes: one row a message, in the order of arrival."""

    number = pw.IntegerField()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def file_it(tx: Tx, envelope: Envelope) -> None:
    Filed.create(number=int(envelope.body))


def content(seed: int, size: int) -> bytes:
    return Random(seed).randbytes(size)


def note_requests() -> None:
    """Keep count of what is asked for, beside serving it."""
    on_frame = Carrier.on_frame

    def noting(self: Carrier, peer: str, frame: Frame, now_ms: int) -> None:
        if frame.kind == CHUNK_GET and frame.meta.get("part") == "chunk":
            asked.append(frame.meta["at"])
        on_frame(self, peer, frame, now_ms)

    Carrier.on_frame = noting  # type: ignore[method-assign]


async def publish_numbers(node: Node, peer: str, first: int, count: int) -> None:
    """Say a number once its publish has returned: from then on it must arrive, whatever is killed."""
    for number in range(first, first + count):
        await node.publish("number", str(number).encode(), to=[peer])
        say(published=number)


async def main(home: str, command: str, *args: str) -> None:
    arm_from(os.environ)
    node = Node(
        command, home=Path(home), listen=os.environ.get("LISTEN", "tcp://127.0.0.1:0"), models=[Filed]
    )
    node.effect("number", file_it)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with node:
        say(node_id=node.node_id, endpoint=node.endpoints[0])
        match command, args:
            case "receiver", ():
                say(code=(await node.invite()).encode())
                await stopped.wait()
            case "again", ():
                await stopped.wait()
            case "rotate", ():
                say(code=(await node.invite()).encode())
                await asyncio.to_thread(sys.stdin.readline)
                await node.rotate_key()
            case "join", (code,):
                say(joined=(await node.join(code)).node_id)
            case "sender", (peer, first, count):
                await publish_numbers(node, peer, int(first), int(count))
                await stopped.wait()
            case "serve", (peer, seed, size):
                note_requests()
                blob = await node.put_blob(content(int(seed), int(size)))
                await node.publish("take.it", b"", to=[peer], blobs=[blob.id])
                say(blob=blob.id)
                await stopped.wait()
                say(asked=asked)
            case "fetch", (peer, blob_id):
                path = await node.fetch_blob(
                    blob_id, peer=peer, on_progress=lambda here, size: say(here=here, size=size)
                )
                say(path=str(path))
            case "numbers", ():
                say(
                    numbers=await node.read(
                        lambda _: [row.number for row in Filed.select().order_by(Filed.id)]
                    )
                )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
