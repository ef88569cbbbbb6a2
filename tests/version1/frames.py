# As released with protocol version 1; only the imports differ. Not to be changed: it is what other nodes run.
"""Frames of the mesh protocol <-> bytes. Pure; every byte that leaves or enters a node is described here.

After the routing frame, always exactly four frames:

    F0   4 bytes   "BF"  version:u8  type:u8
    F1  24 bytes   session:u64  seq:u64  lane:u8  flags:u8  credit_msgs:u16  credit_kib:u32      (big endian)
    F2             metadata: a JSON object, at most `Limits.metadata_bytes_max`; empty stands for {}
    F3             body: opaque

A DATA frame with flag PACK carries the messages of one tick, `seq` being the first one's number. F2 is then
empty, and F3 is one record after another:

    meta_bytes:u32  body_bytes:u32  meta  body

A DATA frame without it carries one message: F2 is its metadata, F3 its body.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from broker_free.errors import InvalidInput
from broker_free.limits import Limits

VERSION: Final = 1

HELLO: Final = 1
HELLO_OK: Final = 2
DATA: Final = 3
ACK: Final = 4
REJECT: Final = 5
PING: Final = 7
PONG: Final = 8
BYE: Final = 9
JOIN: Final = 15
JOIN_OK: Final = 16
READY: Final = 17
INTEREST: Final = 18
REGISTRY: Final = 19

NAMES: Final = {
    HELLO: "HELLO",
    HELLO_OK: "HELLO_OK",
    DATA: "DATA",
    ACK: "ACK",
    REJECT: "REJECT",
    PING: "PING",
    PONG: "PONG",
    BYE: "BYE",
    JOIN: "JOIN",
    JOIN_OK: "JOIN_OK",
    READY: "READY",
    INTEREST: "INTEREST",
    REGISTRY: "REGISTRY",
}

FLAG_PACK: Final = 1

_HEAD = {kind: b"BF" + bytes((VERSION, kind)) for kind in range(256)}
_FIELDS = struct.Struct(">QQBBHI")
_RECORD = struct.Struct(">II")
_NO_META: Mapping[str, Any] = MappingProxyType({})  # Any: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    kind: int
    session: int = 0
    seq: int = 0
    lane: int = 0
    flags: int = 0
    credit_messages: int = 0
    credit_kib: int = 0
    meta: Mapping[str, Any] = field(
        default_factory=lambda: _NO_META
    )  # Any: JSON from outside, checked where it is used
    raw_meta: bytes = b""  # of DATA: the sender's bytes, kept as they are because the digest covers them
    body: bytes = b""

    def __str__(self) -> str:
        name = NAMES.get(self.kind, str(self.kind))
        return f"{name} session={self.session:016x} seq={self.seq} {dict(self.meta) or ''}"


def encode(frame: Frame) -> list[bytes]:
    fields = _FIELDS.pack(
        frame.session,
        frame.seq,
        frame.lane,
        frame.flags,
        min(frame.credit_messages, 0xFFFF),
        frame.credit_kib,
    )
    meta = frame.raw_meta or (_dump(frame.meta) if frame.meta else b"")
    return [_HEAD[frame.kind], fields, meta, frame.body]


def decode(parts: Sequence[bytes], limits: Limits) -> Frame:
    """Read what a peer sent. Raises InvalidInput for anything that is not a frame of this version."""
    if len(parts) != 4:
        raise InvalidInput(f"{len(parts)} frames instead of 4")
    head, fields, meta, body = parts
    if len(head) != 4 or head[:2] != b"BF":
        raise InvalidInput("not a broker_free frame")
    if head[2] != VERSION:
        raise InvalidInput(f"protocol version {head[2]}; this node speaks {VERSION}")
    if len(fields) != _FIELDS.size:
        raise InvalidInput("a header of the wrong size")
    if len(meta) > limits.metadata_bytes_max:
        raise InvalidInput("metadata over the limit")
    session, seq, lane, flags, credit_messages, credit_kib = _FIELDS.unpack(fields)
    kind = head[3]
    return Frame(
        kind=kind,
        session=session,
        seq=seq,
        lane=lane,
        flags=flags,
        credit_messages=credit_messages,
        credit_kib=credit_kib,
        meta=_NO_META if kind == DATA or not meta else _load(meta),
        raw_meta=meta if kind == DATA else b"",
        body=body,
    )


def data_frame(*, session: int, seq: int, lane: int, records: Sequence[tuple[bytes, bytes]]) -> Frame:
    """Build the DATA frame of `(metadata, body)` records, numbered from `seq` on."""
    if len(records) == 1:
        meta, body = records[0]
        return Frame(kind=DATA, session=session, seq=seq, lane=lane, raw_meta=meta, body=body)
    pieces: list[bytes] = []
    for meta, body in records:
        pieces += (_RECORD.pack(len(meta), len(body)), meta, body)
    return Frame(kind=DATA, session=session, seq=seq, lane=lane, flags=FLAG_PACK, body=b"".join(pieces))


def records_of(frame: Frame) -> Iterator[tuple[bytes, bytes]]:
    """Yield the `(metadata, body)` records of a DATA frame. Raises InvalidInput when it is cut short."""
    if not frame.flags & FLAG_PACK:
        yield frame.raw_meta, frame.body
        return
    view, at = frame.body, 0
    while at < len(view):
        if len(view) - at < _RECORD.size:
            raise InvalidInput("a pack that ends inside a record")
        meta_bytes, body_bytes = _RECORD.unpack_from(view, at)
        at += _RECORD.size
        end = at + meta_bytes + body_bytes
        if end > len(view):
            raise InvalidInput("a pack that ends inside a record")
        yield view[at : at + meta_bytes], view[at + meta_bytes : end]
        at = end


def _dump(meta: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(meta), ensure_ascii=False, separators=(",", ":")).encode()


def _load(raw: bytes) -> Mapping[str, Any]:
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidInput("metadata is not JSON") from None
    if not isinstance(meta, dict):
        raise InvalidInput("metadata is not an object")
    return meta
