"""The exception tree of broker_free. Standard library only: the local door's client imports it.

BrokerFreeError
├ InvalidInput            refused before anything changed
│ ├ TooLarge              over a limit of `Limits`
│ ├ NotOwner              a registry key that belongs to another node
│ ├ Conflict              this id was used before, for another message
│ └ MalformedFrame        what a peer sent is no frame of this protocol
├ UnknownMessage          no such message in this node's outbox
├ UnknownPeer             no such member of the mesh
├ PairingRefused          an invitation that is wrong, used or over
├ MeshFull                as many members as `Limits` allows
├ UnsuitableHome          a state folder that cannot keep the promises
│ └ NodeInUse             another process holds this home
├ AddressInUse            the port to listen on is taken
├ StoreFailed             SQLite or the disk said no
│ ├ DiskLow               too little room: nothing was accepted
│ │ └ DiskFloor           refused before anything was written, because room is getting short
│ ├ StoreBroken           an I/O error or damage: the node accepts nothing more until it is started again
│ └ OutcomeUnknown        the commit failed after the wire was used: it may have happened
├ OutboxFull              a peer's queue is at its limit
├ RegistryFull            a bucket, or the registry, is at its limit
├ LeaseLost               a job is not this consumer's any more: nothing was written
├ TransactionMisused      a transaction inside another, or used after its function has ended
├ BlobFailed              a large body could not be had
│ ├ UnknownBlob           it is not there, or not for this node
│ └ BlobDamaged           what came does not match its digest
├ TimedOut                what was waited for has not happened yet; nothing is lost by that
├ NodeClosed              the node has been closed
├ NodeUnreachable         nobody answers at the local door
└ Refused                 the node's own error, carried over the local door (any code)
"""

from __future__ import annotations


class BrokerFreeError(Exception):
    """Say what happened and, where there is one, the next step. `code` is stable and kebab-case."""

    code = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidInput(BrokerFreeError, ValueError):
    code = "invalid"


class TooLarge(InvalidInput):
    code = "too-large"


class NotOwner(InvalidInput):
    code = "not-owner"


class Conflict(InvalidInput):
    code = "conflict"


class MalformedFrame(InvalidInput):
    code = "malformed-frame"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason  # kebab-case: under this it is counted


class UnknownMessage(BrokerFreeError):
    code = "unknown-message"


class UnknownPeer(BrokerFreeError):
    code = "unknown-peer"


class PairingRefused(BrokerFreeError):
    code = "pairing-refused"


class MeshFull(BrokerFreeError):
    code = "mesh-full"


class UnsuitableHome(BrokerFreeError):
    code = "unsuitable-home"


class NodeInUse(UnsuitableHome):
    code = "already-running"

    def __init__(self, message: str, *, pid: int | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.pid = pid


class AddressInUse(BrokerFreeError):
    code = "address-in-use"


class StoreFailed(BrokerFreeError):
    code = "store-failed"


class DiskLow(StoreFailed):
    code = "disk-low"


class DiskFloor(DiskLow):
    """Of one send; what else the same transaction holds is not touched by it."""


class StoreBroken(StoreFailed):
    code = "store-broken"


class OutcomeUnknown(StoreFailed):
    code = "outcome-unknown"


class OutboxFull(BrokerFreeError):
    code = "outbox-full"


class RegistryFull(BrokerFreeError):
    code = "registry-full"


class LeaseLost(BrokerFreeError):
    code = "lease-lost"


class TransactionMisused(BrokerFreeError, RuntimeError):
    code = "transaction-misused"


class BlobFailed(BrokerFreeError):
    code = "blob-failed"


class UnknownBlob(BlobFailed):
    code = "unknown-blob"


class BlobDamaged(BlobFailed):
    code = "blob-damaged"


class TimedOut(BrokerFreeError):
    code = "timed-out"


class NodeClosed(BrokerFreeError):
    code = "node-closed"


class NodeUnreachable(BrokerFreeError):
    code = "node-unreachable"


class Refused(BrokerFreeError):
    """An error that the node raised and the local door carried to this process."""

    def __init__(self, message: str, *, code: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
