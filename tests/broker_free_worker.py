"""A node in a process of its own, to be killed: publishes numbered messages, or files what arrives.

python -m tests.broker_free_worker HOME COMMAND …      one JSON object a line on stdout
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import peewee as pw

from broker_free import Node, Tx
from broker_free.faults import arm_from
from broker_free.message import Envelope


class Filed(pw.Model):
    """What the effect of a receiver writes: one row a message, in the order of arrival."""

    number = pw.IntegerField()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def file_it(tx: Tx, envelope: Envelope) -> None:
    Filed.create(number=int(envelope.body))


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
            case "numbers", ():
                say(
                    numbers=await node.read(
                        lambda _: [row.number for row in Filed.select().order_by(Filed.id)]
                    )
                )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
