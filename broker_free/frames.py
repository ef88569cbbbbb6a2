"""Frames of the mesh protocol <-> bytes. Pure; every byte that leaves or enters a node is described here.

After the routing frame, always exactly four frames:

    F0   4 bytes   "BF"  version:u8  type:u8
    F1  24 bytes   session:u64  seq:u64  lane:u8  flags:u8  credit_msgs:u16  credit_kib:u32      (big endian)
    F2             metadata: a JSON object, at most 16 KiB; empty stands for {}
    F3             body: opaque

A DATA frame with flag PACK carries the messages of one tick, `seq` being the first one's number. F2 is then
empty, and F3 is one record after another:

    meta_bytes:u32  body_bytes:u32  meta  body                 flags PACK
    meta_bytes:u32  body_bytes:u32  ttl_ms:u32  meta  body     flags PACK and TTL; ttl_ms 0: none

A DATA frame without PACK carries one message: F2 is its metadata, F3 its body and, with flag TTL, the place of
credit_kib holds its ttl_ms. A lifetime is what remains when the message leaves; it changes while the message waits,
so it stands beside the metadata, which the digest covers.

HELLO, HELLO_OK and BYE leave with the lowest version that this node speaks, so that any node it can talk to can read
them; BYE has the same layout in every version, for ever. All other frames carry the session's version.
`PROTOCOL.md` says what each type means and what its metadata holds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from broker_free.errors import InvalidInput, MalformedFrame
from broker_free.limits import KIB, Limits
from broker_free.outside import load_json

VERSION: Final = 2
VERSION_MIN: Final = 1  # the one before: a mesh is upgraded node by node
META_BYTES_MAX: Final = 16 * KIB  # of every frame but DATA, whatever a node's Limits say of messages
IDS_MAX: Final = 256  # message ids in the metadata of one frame
TTL_MS_MAX: Final = 0xFFFF_FFFF  # 49 days; a longer lifetime travels as this

HELLO: Final = 1
HELLO_OK: Final = 2
DATA: Final = 3
ACK: Final = 4
REJECT: Final = 5
CREDIT: Final = 6
PING: Final = 7
PONG: Final = 8
BYE: Final = 9
EPHEMERAL: Final = 10
RECEIPT: Final = 11
PROBE: Final = 12
REVOKE: Final = 14
JOIN: Final = 15
JOIN_OK: Final = 16
READY: Final = 17
INTEREST: Final = 18
REGISTRY: Final = 19
CHUNK_GET: Final = 20  # large bodies: blob.py
CHUNK: Final = 21
ALARM: Final = 22
KEY: Final = 24
KEY_OK: Final = 25

NAMES: Final = {
    HELLO: "HELLO",
    HELLO_OK: "HELLO_OK",
    DATA: "DATA",
    ACK: "ACK",
    REJECT: "REJECT",
    CREDIT: "CREDIT",
    PING: "PING",
    PONG: "PONG",
    BYE: "BYE",
    EPHEMERAL: "EPHEMERAL",
    RECEIPT: "RECEIPT",
    PROBE: "PROBE",
    REVOKE: "REVOKE",
    JOIN: "JOIN",
    JOIN_OK: "JOIN_OK",
    READY: "READY",
    INTEREST: "INTEREST",
    REGISTRY: "REGISTRY",
    CHUNK_GET: "CHUNK_GET",
    CHUNK: "CHUNK",
    ALARM: "ALARM",
    KEY: "KEY",
    KEY_OK: "KEY_OK",
}

FLAG_PACK: Final = 1  # DATA: several records
FLAG_TTL: Final = 2  # DATA: with lifetimes
FLAG_ANSWER: Final = 1  # RECEIPT, REVOKE: the answer to one
FLAG_EPHEMERAL: Final = 1  # INTEREST: in EPHEMERAL, not in DATA

# What a node can do beyond version 1, named in its greeting. A session uses what both sides name.
TTL: Final = "ttl"
CREDITS: Final = "credit"
REVOCATION: Final = "revoke"
EPHEMERALS: Final = "ephemeral"
RECEIPTS: Final = "receipt"
BLOBS: Final = "blob"
FEATURES: Final = frozenset({TTL, CREDITS, REVOCATION, EPHEMERALS, RECEIPTS, BLOBS})

# Frames of an open session that the link hands on as they are; `Tick` has a handler for each.
CONTROLS: Final = frozenset({EPHEMERAL, RECEIPT, PROBE, REVOKE, INTEREST, REGISTRY, CHUNK_GET, CHUNK, ALARM})

_HEAD = {
    version: [b"BF" + bytes((version, kind)) for kind in range(256)]
    for version in range(VERSION_MIN, VERSION + 1)
}
_FIELDS = struct.Struct(">QQBBHI")
_RECORD = struct.Struct(">II")
_RECORD_TTL = struct.Struct(">III")
_NO_META: Mapping[str, Any] = MappingProxyType({})  # Any: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    kind: int
    version: int = VERSION_MIN
    session: int = 0
    seq: int = 0
    lane: int = 0
    flags: int = 0
    credit_messages: int = 0
    credit_kib: int = 0  # of DATA with flag TTL: ttl_ms
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
    heads = _HEAD.get(frame.version)
    head = heads[frame.kind] if heads else b"BF" + bytes((frame.version, frame.kind))
    return [head, fields, meta, frame.body]


def decode(parts: Sequence[bytes], limits: Limits) -> Frame:
    """Read what a peer sent. Raises MalformedFrame for anything that is not a frame of a version spoken here."""
    if len(parts) != 4:
        raise MalformedFrame(f"{len(parts)} frames instead of 4", reason="frame-parts")
    head, fields, meta, body = parts
    if len(head) != 4 or head[:2] != b"BF":
        raise MalformedFrame("not a broker_free frame", reason="frame-magic")
    version, kind = head[2], head[3]
    if not VERSION_MIN <= version <= VERSION and kind != BYE:
        raise MalformedFrame(
            f"protocol version {version}; this node speaks {VERSION_MIN} to {VERSION}", reason="frame-version"
        )
    if len(fields) != _FIELDS.size:
        raise MalformedFrame("a header of the wrong size", reason="frame-header")
    has_message = kind in (DATA, EPHEMERAL)
    if len(meta) > META_BYTES_MAX and not (has_message and len(meta) <= limits.metadata_bytes_max):
        raise MalformedFrame("metadata over the limit", reason="frame-metadata-size")
    session, seq, lane, flags, credit_messages, credit_kib = _FIELDS.unpack(fields)
    return Frame(
        kind=kind,
        version=version,
        session=session,
        seq=seq,
        lane=lane,
        flags=flags,
        credit_messages=credit_messages,
        credit_kib=credit_kib,
        meta=_NO_META if has_message or not meta else _load(meta, limits),
        raw_meta=meta if has_message else b"",
        body=body,
    )


def foreign_version(parts: Sequence[bytes]) -> int | None:
    """Return the version of a frame that is of this protocol but cannot be read here; None for anything else."""
    if len(parts) != 4 or len(parts[0]) != 4 or parts[0][:2] != b"BF":
        return None
    version = parts[0][2]
    return None if VERSION_MIN <= version <= VERSION else version


def data_frame(
    *,
    session: int,
    seq: int,
    lane: int,
    records: Sequence[tuple[bytes, bytes]],
    ttls: Sequence[int] = (),
    version: int = VERSION_MIN,
) -> Frame:
    """Build the DATA frame of `(metadata, body)` records, numbered from `seq` on; `ttls` is one for each, or none."""
    flags = FLAG_TTL if ttls else 0
    if len(records) == 1:
        meta, body = records[0]
        return Frame(
            kind=DATA,
            version=version,
            session=session,
            seq=seq,
            lane=lane,
            flags=flags,
            credit_kib=ttls[0] if ttls else 0,
            raw_meta=meta,
            body=body,
        )
    pieces: list[bytes] = []
    if ttls:
        for (meta, body), ttl_ms in zip(records, ttls, strict=True):
            pieces += (_RECORD_TTL.pack(len(meta), len(body), ttl_ms), meta, body)
    else:
        for meta, body in records:
            pieces += (_RECORD.pack(len(meta), len(body)), meta, body)
    return Frame(
        kind=DATA,
        version=version,
        session=session,
        seq=seq,
        lane=lane,
        flags=flags | FLAG_PACK,
        body=b"".join(pieces),
    )


def records_of(frame: Frame) -> Iterator[tuple[bytes, bytes]]:
    """Yield the `(metadata, body)` records of a DATA frame. Raises MalformedFrame when it is cut short."""
    if not frame.flags & FLAG_PACK:
        yield frame.raw_meta, frame.body
        return
    view, at = frame.body, 0
    head = _RECORD_TTL if frame.flags & FLAG_TTL else _RECORD
    while at < len(view):
        if len(view) - at < head.size:
            raise MalformedFrame("a pack that ends inside a record", reason="frame-pack")
        meta_bytes, body_bytes = _RECORD.unpack_from(view, at)
        at += head.size
        end = at + meta_bytes + body_bytes
        if end > len(view):
            raise MalformedFrame("a pack that ends inside a record", reason="frame-pack")
        yield view[at : at + meta_bytes], view[at + meta_bytes : end]
        at = end


def ttls_of(frame: Frame) -> tuple[int, ...]:
    """Return the lifetime of each record of a DATA frame that `records_of` could read, 0 for none; () without any."""
    if not frame.flags & FLAG_TTL:
        return ()
    if not frame.flags & FLAG_PACK:
        return (frame.credit_kib,)
    ttls: list[int] = []
    at = 0
    while at < len(frame.body):
        meta_bytes, body_bytes, ttl_ms = _RECORD_TTL.unpack_from(frame.body, at)
        ttls.append(ttl_ms)
        at += _RECORD_TTL.size + meta_bytes + body_bytes
    return tuple(ttls)


def _dump(meta: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(meta), ensure_ascii=False, separators=(",", ":")).encode()


def _load(raw: bytes, limits: Limits) -> Mapping[str, Any]:
    try:
        meta = load_json(raw, depth_max=limits.json_depth_max, bytes_max=META_BYTES_MAX)
    except InvalidInput as error:
        raise MalformedFrame(error.message, reason="frame-metadata") from None
    if not isinstance(meta, dict):
        raise MalformedFrame("metadata is not an object", reason="frame-metadata")
    return meta
