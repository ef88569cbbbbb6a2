"""A durable, NATS-style message queue with no broker: ZeroMQ between nodes, SQLite under each.

Names load on first use, so that a process which only wants the local door's client imports nothing heavy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing costs 4 ms of a short command's start; type checkers know the name
if TYPE_CHECKING:
    from typing import Any

    from broker_free.blobfiles import Blob as Blob
    from broker_free.client import DoorClient as DoorClient
    from broker_free.errors import BrokerFreeError as BrokerFreeError
    from broker_free.limits import Limits as Limits
    from broker_free.node import Node as Node
    from broker_free.node import Receipt as Receipt
    from broker_free.schema import Migrations as Migrations
    from broker_free.tick import Alarm as Alarm
    from broker_free.tick import Tx as Tx

_HOME = {
    "Alarm": "tick",
    "Blob": "blobfiles",
    "BrokerFreeError": "errors",
    "DoorClient": "client",
    "Limits": "limits",
    "Migrations": "schema",
    "Node": "node",
    "Receipt": "node",
    "Tx": "tick",
}

__all__ = ["Alarm", "Blob", "BrokerFreeError", "DoorClient", "Limits", "Migrations", "Node", "Receipt", "Tx"]


def __getattr__(name: str) -> Any:  # the type depends on the name asked for
    if name not in _HOME:
        raise AttributeError(f"module 'broker_free' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"broker_free.{_HOME[name]}"), name)
