"""A node in a process of its own that serves a blob, or fetches one, to be killed on the way.

python -m tests.blob_worker HOME COMMAND …      one JSON object a line on stdout
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from random import Random

from broker_free import Node
from broker_free.carrier import Carrier
from broker_free.frames import CHUNK_GET, Frame

asked: list[int] = []  # indexes of the chunks that a peer has asked this node for


def content(seed: int, size: int) -> bytes:
    return Random(seed).randbytes(size)


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def note_requests() -> None:
    """Keep count of what is asked for, beside serving it."""
    on_frame = Carrier.on_frame

    def noting(self: Carrier, peer: str, frame: Frame, now_ms: int) -> None:
        if frame.kind == CHUNK_GET and frame.meta.get("part") == "chunk":
            asked.append(frame.meta["at"])
        on_frame(self, peer, frame, now_ms)

    Carrier.on_frame = noting  # type: ignore[method-assign]


async def main(home: str, command: str, *args: str) -> None:
    note_requests()
    node = Node(command, home=Path(home), listen=os.environ.get("LISTEN", "tcp://127.0.0.1:0"))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with node:
        say(node_id=node.node_id, endpoint=node.endpoints[0])
        match command, args:
            case "invite", ():
                say(code=(await node.invite()).encode())
                await stopped.wait()
            case "join", (code,):
                say(joined=(await node.join(code)).node_id)
            case "serve", (peer, seed, size):
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


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
