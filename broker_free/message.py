"""The envelope: what one message is, on every node and in every table. Pure; knows neither wire nor store."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from typing import Final

from broker_free.blob import check_id
from broker_free.errors import InvalidInput, TooLarge
from broker_free.limits import Limits
from broker_free.outside import load_json
from broker_free.subject import check_subject

CONFLICT: Final = "conflict: another message has this id"

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_to_json = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":")
).encode  # json.dumps would make one a call

_PLAIN = re.compile(rb'\{"id":"([0-9a-f-]{36})","subject":"([\w$/:@+~.-]+)"\}', re.ASCII)

# Ids are unique, not secret. os.urandom at each would be a system call that gives up the interpreter's lock, which a
# busy loop then gets back only after the owner thread's turn.
_RANDOM = Random(os.urandom(32))
os.register_at_fork(after_in_child=lambda: _RANDOM.seed(os.urandom(32)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message as its sender made it. `(sender node id, id)` is its key everywhere."""

    id: str  # lower-case UUIDv7, made before the first try, so that every try is the same message
    subject: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    reply_to: str | None = None
    blobs: tuple[str, ...] = ()  # ids of the large bodies that go with it; the sender serves them
    wants_receipt: bool = False  # its recipients say when they are done with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A message in this node's inbox."""

    row: int  # grows with every message accepted here; its order is the order of arrival
    sender: str  # node id that the connection's key proved
    id: str
    subject: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    reply_to: str | None = None
    ttl_ms: int | None = None  # what remained of its lifetime when it arrived, if its sender gave it one
    blobs: tuple[str, ...] = ()  # of large bodies: `fetch_blob(id, peer=sender)`
    wants_receipt: bool = False  # its sender is told when it is done with here


def new_id(now_ms: int) -> str:
    """Make a UUIDv7 (RFC 9562 §5.7): 48 bits of time, 74 random bits, so ids sort by time and never repeat.

    >>> new_id(0)[:15]
    '00000000-0000-7'
    """
    value = (now_ms & 0xFFFF_FFFF_FFFF) << 80 | _RANDOM.getrandbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def id_to_bytes(message_id: str) -> bytes:
    """Turn an id into the 16 bytes that tables hold. Raises InvalidInput for anything but a canonical UUID."""
    try:
        raw = bytes.fromhex(message_id.replace("-", ""))
    except (ValueError, AttributeError):
        raise InvalidInput(f"{message_id!r} is not a message id", hint="ids are lower-case UUIDs") from None
    if len(raw) != 16 or len(message_id) != 36:
        raise InvalidInput(f"{message_id!r} is not a message id", hint="ids are lower-case UUIDs")
    return raw


def id_from_bytes(raw: bytes) -> str:
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def metadata_of(message: Message) -> bytes:
    """Return the metadata of a checked message as it travels and is stored: JSON, absent keys left out."""
    if (
        not message.reply_to and not message.headers and not message.blobs and not message.wants_receipt
    ):  # a checked id and subject hold nothing that JSON escapes
        return f'{{"id":"{message.id}","subject":"{message.subject}"}}'.encode()
    meta: dict[str, object] = {"id": message.id, "subject": message.subject}
    if message.reply_to:
        meta["reply_to"] = message.reply_to
    if message.headers:
        meta["headers"] = dict(message.headers)
    if message.blobs:
        meta["blobs"] = message.blobs
    if message.wants_receipt:
        meta["receipt"] = True
    return _to_json(meta).encode()


def parse_metadata(raw: bytes, body: bytes, limits: Limits) -> Message:
    """Read metadata that came from outside. Raises InvalidInput; nothing in it is believed before it is checked."""
    if len(raw) > limits.metadata_bytes_max:
        raise TooLarge(f"metadata of {len(raw)} bytes; the limit is {limits.metadata_bytes_max}")
    if len(body) > limits.body_bytes_max:
        raise TooLarge(f"a body of {len(body)} bytes; the limit is {limits.body_bytes_max}")
    plain = _PLAIN.fullmatch(raw)
    if plain:  # what metadata_of writes when there is nothing but these two: a third of the time of JSON
        message_id, subject = plain[1].decode(), plain[2].decode()
        id_to_bytes(message_id)
        check_subject(subject)
        return Message(id=message_id, subject=subject, body=body)
    meta = load_json(raw, depth_max=limits.json_depth_max, bytes_max=limits.metadata_bytes_max)
    if not isinstance(meta, dict):
        raise InvalidInput("metadata is not an object")
    message_id, subject, reply_to = meta.get("id"), meta.get("subject"), meta.get("reply_to")
    headers = meta.get("headers") or _NO_HEADERS
    if not isinstance(message_id, str) or not isinstance(subject, str):
        raise InvalidInput("metadata needs an id and a subject")
    if reply_to is not None and not isinstance(reply_to, str):
        raise InvalidInput("reply_to is not text")
    if headers is not _NO_HEADERS and not (
        isinstance(headers, dict) and all(isinstance(value, str) for value in headers.values())
    ):
        raise InvalidInput("headers map text to text")
    blobs = meta.get("blobs") or ()
    if not isinstance(blobs, (list, tuple)):
        raise InvalidInput("blobs are a list of ids")
    check_blobs(blobs, limits)
    id_to_bytes(message_id)
    check_subject(subject)
    return Message(
        id=message_id,
        subject=subject,
        body=body,
        headers=headers,
        reply_to=reply_to,
        blobs=tuple(blobs),
        wants_receipt=meta.get("receipt") is True,
    )


def check_blobs(blobs: Sequence[object], limits: Limits) -> None:
    """Refuse a list of blob ids that is too long, or holds anything else."""
    if len(blobs) > limits.blobs_max:
        raise TooLarge(f"{len(blobs)} blobs in one message; the limit is {limits.blobs_max}")
    for blob_id in blobs:
        check_id(blob_id)


def check_message(message: Message, limits: Limits) -> bytes:
    """Refuse what no peer would accept, before anything is written; return the metadata."""
    check_subject(message.subject)
    id_to_bytes(message.id)
    if len(message.body) > limits.body_bytes_max:
        raise TooLarge(
            f"the body has {len(message.body)} bytes; the limit is {limits.body_bytes_max}",
            hint="publish it as a blob: blob = await node.put_blob(body), then publish(…, blobs=[blob.id])",
        )
    check_blobs(message.blobs, limits)
    meta = metadata_of(message)
    if len(meta) > limits.metadata_bytes_max:
        raise TooLarge(f"headers of {len(meta)} bytes; the limit is {limits.metadata_bytes_max}")
    return meta


def refusal_of(error: InvalidInput) -> str:
    """Say in a REJECT why a message can never be taken: a code, then what a person reads."""
    return f"{'too-large' if isinstance(error, TooLarge) else 'malformed'}: {error.message}"


def digest_of(*, sender: str, lane: int, meta: bytes, body: bytes) -> bytes:
    """Return 16 bytes over all that a message is. Stored with the row: SQLite's pages have no checksums."""
    digest = blake2b(digest_size=16, person=b"broker_free\x001")
    digest.update(b"%s\x00%d\x00%d\x00%s" % (sender.encode(), lane, len(meta), meta))
    digest.update(body)
    return digest.digest()
