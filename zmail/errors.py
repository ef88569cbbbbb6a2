"""The exception tree of zmail, and the exit code of every error of both trees. Standard library only.

BrokerFreeError             broker_free/errors.py draws the lower tree
└ ZmailError
  ├ InvalidBrief            a brief that cannot be read or sent as it stands
  │ └ InvalidAddress        a name outside the grammar of address.py
  ├ InvalidConfig           a wrong key or value: names the file, the line and the nearest valid key
  ├ UnknownAddress          nobody of that name is known; the hint has the nearest names
  ├ AmbiguousAddress        one name on several nodes; the hint has the choices
  ├ NotFound                no such brief, action, ...
  ├ AmbiguousId             an id suffix that fits several; the hint has the choices
  ├ NoIdentity              the caller acts for no mailbox
  └ CallsignTaken           another live process holds the callsign
"""

from __future__ import annotations

from broker_free.errors import BrokerFreeError


class ZmailError(BrokerFreeError):
    code = "failed"


class InvalidBrief(ZmailError, ValueError):
    code = "invalid-brief"


class InvalidAddress(InvalidBrief):
    code = "invalid-address"


class InvalidConfig(ZmailError, ValueError):
    code = "invalid-config"


class UnknownAddress(ZmailError):
    code = "unknown-address"


class AmbiguousAddress(ZmailError):
    code = "ambiguous-address"


class NotFound(ZmailError):
    code = "not-found"


class AmbiguousId(ZmailError):
    code = "ambiguous-id"


class NoIdentity(ZmailError):
    code = "no-identity"


class CallsignTaken(ZmailError):
    code = "callsign-taken"


# 0 done or queued · 1 failed · 2 usage or invalid · 3 not found · 4 timed out · 5 no identity, or held by another
EXIT_CODES: dict[str, int] = {
    "failed": 1,
    "internal": 1,  # what the local door answers for an unexpected exception
    "already-running": 1,
    "unsuitable-home": 1,
    "address-in-use": 1,
    "pairing-refused": 1,
    "store-failed": 1,
    "disk-low": 1,
    "store-broken": 1,
    "outcome-unknown": 1,
    "outbox-full": 1,
    "mesh-full": 1,
    "registry-full": 1,
    "lease-lost": 1,
    "transaction-misused": 1,
    "blob-failed": 1,
    "blob-damaged": 1,
    "node-closed": 1,
    "node-unreachable": 1,
    "invalid": 2,
    "too-large": 2,
    "conflict": 2,
    "malformed-frame": 2,
    "not-owner": 2,
    "invalid-brief": 2,
    "invalid-address": 2,
    "invalid-config": 2,
    "ambiguous-address": 2,
    "ambiguous-id": 2,
    "unknown-peer": 3,
    "unknown-message": 3,
    "unknown-address": 3,
    "unknown-blob": 3,
    "not-found": 3,
    "timed-out": 4,
    "no-identity": 5,
    "callsign-taken": 5,
    "interrupted": 130,
}


def exit_code(code: str) -> int:
    """Exit status for an error code; a code this version does not know is a plain failure."""
    return EXIT_CODES.get(code, 1)
