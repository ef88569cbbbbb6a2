"""Two nodes that find each other by an invitation. The second files what arrives in a table of its own, in the very
transaction that accepts the message: each order is there exactly once, whatever is killed in between.

python examples/two_nodes.py
"""

import asyncio
import tempfile
from pathlib import Path

import peewee

from broker_free import Node, Tx
from broker_free.message import Envelope


class Order(peewee.Model):
    text = peewee.TextField()


def file_order(tx: Tx, envelope: Envelope) -> None:
    Order.create(text=envelope.body.decode())


async def main(folder: Path) -> None:
    shop = Node("shop", home=folder / "shop")
    warehouse = Node("warehouse", home=folder / "warehouse", models=[Order])
    warehouse.effect("orders.*", file_order)
    async with shop, warehouse:
        invitation = await shop.invite()
        await warehouse.join(invitation.encode())

        receipt = await shop.publish("orders.created", b"three chairs", to=[warehouse.node_id])
        print("on disk in the shop")
        await receipt.delivered(timeout=10)
        print("on disk in the warehouse")
        print("filed:", await warehouse.read(lambda db: [order.text for order in Order.select()]))


with tempfile.TemporaryDirectory() as name:
    asyncio.run(main(Path(name)))
