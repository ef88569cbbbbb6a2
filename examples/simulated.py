"""Test an application's effect under chaos: five nodes, crashes, cuts, failing commits, clocks, all from one seed.

Four shops order chairs. Whatever is killed in between, the warehouse confirms each order exactly once.

python examples/simulated.py
"""

import logging

from broker_free.message import Envelope
from broker_free.testing import Cluster, Faults
from broker_free.tick import Tx

logging.getLogger("broker_free").setLevel(logging.CRITICAL)  # failing commits are what this is about
SHOPS = ("n1", "n2", "n3", "n4")


def confirm(tx: Tx, envelope: Envelope) -> None:
    """The effect under test: plain, and in the transaction that accepts the order."""
    tx.publish("orders.confirmed", envelope.body, to=[envelope.sender])


def confirmations(seed: int) -> dict[str, list[bytes]]:
    """Run one seed. The same seed always does the same; `trace=print` tells all that happens."""
    cluster = Cluster(seed, nodes=5, faults=Faults(crash=0.3, commit=0.2))
    cluster.effect("orders.created", confirm)
    cluster.run(1_000)
    for number, shop in enumerate(SHOPS):
        cluster.publish(shop, "orders.created", b"%d chairs" % number, to=["n0"])
    cluster.run(20)  # on disk at the shops, by now
    cluster.chaos(ms=3_000, operations=10)
    cluster.heal()
    cluster.check()  # the library's own promises: nothing lost, nothing twice, in order
    return {
        shop: [row.body for row in cluster.inbox(shop) if row.subject == "orders.confirmed"] for shop in SHOPS
    }


for seed in range(20):
    told = confirmations(seed)
    assert told == {shop: [b"%d chairs" % number] for number, shop in enumerate(SHOPS)}, (seed, told)
print("20 schedules: every order confirmed once")
