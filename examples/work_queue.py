"""A durable work queue in one process: jobs survive a crash, and one that is not acked comes back.

python examples/work_queue.py
"""

import asyncio
import tempfile
from pathlib import Path

from broker_free import Node


async def main(home: Path) -> None:
    async with Node("shop", home=home) as node, node.subscribe("orders.*", durable="billing") as jobs:
        for number in range(3):
            await node.publish("orders.created", f"order {number}".encode())

        first = await anext(jobs)
        print("not now:", first.body.decode())
        await first.nak(delay_ms=100)

        for _ in range(3):
            job = await anext(jobs)
            await job.ack()
            print("billed:", job.body.decode(), f"(try {job.attempts + 1})")


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder) / "shop"))
