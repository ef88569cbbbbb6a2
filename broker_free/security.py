"""Who a node is and how two nodes meet: key files, node ids and invitation codes.

Pure except for the key file, and free of ZeroMQ: key pairs are made by `transport.new_keypair` and handed in,
in ZeroMQ's own text form (Z85: 40 printable bytes for 32). Knows nothing of members or rights: whether a key
may do something is the owner's table.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from broker_free import faults
from broker_free.errors import InvalidInput, UnsuitableHome

KEY_BYTES: Final = 32  # a CURVE25519 key

# Z85 (ZeroMQ RFC 32): four bytes are five digits of base 85, most significant first.
_Z85: Final = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_Z85_VALUES: Final = {digit: value for value, digit in enumerate(_Z85)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A CURVE key pair in Z85. The secret stays out of `repr`, so that it never reaches a log."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKeys:
    """The keys of a node. Its id is the hash of the first it had; every other one is bound to that id by its peers."""

    current: KeyPair
    first: bytes = b""  # public half of the first key, where that is another one
    former: KeyPair | None = None  # the one before, kept for peers that were away when it was changed
    changed_ms: int = 0  # UTC, when

    @property
    def public(self) -> bytes:
        return self.current.public

    @property
    def secret(self) -> bytes:
        return self.current.secret

    @property
    def node_id(self) -> str:
        return node_id_of(self.first or self.public)

    def changed(self, to: KeyPair, *, now_ms: int) -> NodeKeys:
        """Return the keys after a change."""
        return NodeKeys(current=to, first=self.first or self.public, former=self.current, changed_ms=now_ms)

    def without_former(self) -> NodeKeys:
        return replace(self, former=None)


def z85_of(raw: bytes) -> bytes:
    """Write bytes (a multiple of four) as Z85 text."""
    text = bytearray()
    for (word,) in struct.iter_unpack(">I", raw):
        text += bytes(_Z85[word // 85**place % 85] for place in (4, 3, 2, 1, 0))
    return bytes(text)


def key_bytes_of(text: bytes) -> bytes:
    """Read the 32 bytes of a Z85 key; anything else is InvalidInput, whose message never holds the key."""
    if len(text) != KEY_BYTES * 5 // 4:
        raise InvalidInput(f"a key has 40 characters, not {len(text)}")
    raw = bytearray()
    for start in range(0, len(text), 5):
        word = 0
        for digit in text[start : start + 5]:
            if digit not in _Z85_VALUES:
                raise InvalidInput("a key holds a character that is not Z85")
            word = word * 85 + _Z85_VALUES[digit]
        if word >= 1 << 32:
            raise InvalidInput("a key holds a group that is not Z85")
        raw += word.to_bytes(4, "big")
    return bytes(raw)


def node_id_of(public: bytes) -> str:
    """Name a node after its public key (Z85): 32 characters of base32, so nobody else can claim it."""
    digest = hashlib.blake2b(key_bytes_of(public)).digest()
    return base64.b32encode(digest[:20]).decode("ascii").lower()


# ── The key file ────────────────────────────────────────────────────────────────────────────────────────────
# {"version": 1, "public": Z85, "secret": Z85, "check": hex}   one line, mode 0600, in a folder of mode 0700
# and once the key was changed, which a program that knows only version 1 must not start without:
# {"version": 2, "public", "secret", "first": Z85, "changed_ms", "former": null | {"public", "secret"}, "check"}
_KEY_FILE_VERSIONS: Final = (1, 2)
_KEY_FILE_BYTES_MAX: Final = 4096  # the real one has 200 to 500; a wrong file is not read into memory


def load_or_create_keys(path: Path, make: Callable[[], KeyPair]) -> NodeKeys:
    """Return the keys kept at `path`, made by `make` if there are none yet. Never replaces an existing file.

    The file is readable by its owner only, in a folder of the same kind; where that does not hold, or the file
    is damaged, UnsuitableHome says what to do. Two processes that start at once end up with the same keys.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent, os.stat(path.parent), wanted=0o700)
        if not os.path.lexists(path):
            _create(path, NodeKeys(current=make()))
        return _load(path)  # also what was just written: the keys of whoever was first count
    except OSError as error:
        raise UnsuitableHome(f"cannot keep the keys of this node in {path}: {error.strerror}") from error


def _check_private(path: Path, found: os.stat_result, *, wanted: int) -> None:
    if found.st_uid != os.geteuid():
        raise UnsuitableHome(
            f"{path} belongs to another user (uid {found.st_uid}); a secret key is kept there",
            hint="use a folder of your own",
        )
    if found.st_mode & 0o077:
        raise UnsuitableHome(
            f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}); a secret key is kept there",
            hint=f"chmod {wanted:o} {shlex.quote(str(path))}",
        )


def replace_keys(path: Path, keys: NodeKeys) -> None:
    """Put other keys in the place of those at `path`; a crash leaves the one or the other, whole and synced."""
    try:
        draft = _write_draft(path, keys)
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UnsuitableHome(f"cannot keep the keys of this node in {path}: {error.strerror}") from error


def _create(path: Path, keys: NodeKeys) -> None:
    """Write the file whole or not at all: a synced draft gets the name by a link, which fails if it is taken."""
    draft = _write_draft(path, keys)
    try:
        faults.reach("key-draft-written")
        with contextlib.suppress(FileExistsError):  # another process was first: its keys are the node's
            os.link(draft, path)
        faults.reach("key-file-named")
    finally:
        os.unlink(draft)
    _sync_folder(path.parent)


def _write_draft(path: Path, keys: NodeKeys) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(_key_file_of(keys))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(draft)
        raise
    return draft


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _load(path: Path) -> NodeKeys:
    # O_NOFOLLOW: a link could point at a file that others may write. O_NONBLOCK: opening a FIFO would wait.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _damaged(path, "it is a symbolic link") from None
        raise
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(path, "it is not a regular file")
        _check_private(path, found, wanted=0o600)
        return _keys_of(path, file.read(_KEY_FILE_BYTES_MAX))


def _key_file_of(keys: NodeKeys) -> bytes:
    fields: dict[str, object] = {"version": 1, **_pair_to_json(keys.current)}
    if keys.first:
        former = _pair_to_json(keys.former) if keys.former else None
        fields |= {
            "version": 2,
            "first": keys.first.decode("ascii"),
            "changed_ms": keys.changed_ms,
            "former": former,
        }
    return json.dumps({**fields, "check": _check_of(keys)}).encode("ascii") + b"\n"


def _pair_to_json(keys: KeyPair) -> dict[str, str]:
    return {"public": keys.public.decode("ascii"), "secret": keys.secret.decode("ascii")}


def _pair_from_json(fields: dict[str, str]) -> KeyPair:
    return KeyPair(public=fields["public"].encode("ascii"), secret=fields["secret"].encode("ascii"))


def _keys_of(path: Path, text: bytes) -> NodeKeys:
    try:
        fields = json.loads(text)
        version = fields["version"]
        if version not in _KEY_FILE_VERSIONS:
            raise _damaged(
                path, f"it has version {version!r}, this program reads up to {_KEY_FILE_VERSIONS[-1]}"
            )
        keys = NodeKeys(current=_pair_from_json(fields))
        if version == 2:
            former = fields["former"]
            keys = NodeKeys(
                current=keys.current,
                first=fields["first"].encode("ascii"),
                former=_pair_from_json(former) if former else None,
                changed_ms=int(fields["changed_ms"]),
            )
        check = fields["check"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, "it is no key file") from None  # the cause would quote the secret
    try:
        for pair in filter(None, (keys.current, keys.former)):
            key_bytes_of(pair.public)
            key_bytes_of(pair.secret)
        key_bytes_of(keys.first or keys.public)
    except InvalidInput as error:
        raise _damaged(path, error.message) from None
    if check != _check_of(keys):
        raise _damaged(path, "its checksum does not match")
    return keys


def _check_of(keys: NodeKeys) -> str:
    """A checksum against damage, and against halves of two key pairs; not a signature."""
    text = keys.public + keys.secret + keys.first
    if keys.first:
        text += str(keys.changed_ms).encode()
    if keys.former:
        text += keys.former.public + keys.former.secret
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _damaged(path: Path, why: str) -> UnsuitableHome:
    return UnsuitableHome(
        f"the key file {path} cannot be used: {why}",
        hint=f"restore {path} from a backup; or move it away and start as a new node, to be paired again",
    )


# ── Invitations ─────────────────────────────────────────────────────────────────────────────────────────────
#   "zm1-" base64url( expires_ms:u64  server_key:32  secret:32  count:u8  { length:u8  endpoint:utf-8 } × count
#                     check:6 = BLAKE2b("zm1-" and all before) )
# One token without spaces or padding, about 160 characters for one endpoint.
_PREFIX: Final = "zm1-"
_HEAD: Final = struct.Struct(f">Q{KEY_BYTES}s{KEY_BYTES}sB")
_CHECK_BYTES: Final = 6
_CODE_CHARACTERS_MAX: Final = 8192  # a few endpoints need some hundreds


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What one node tells another, once and out of band, so that it may ask to join."""

    endpoints: tuple[str, ...]  # where the inviter listens; the joiner tries them in this order
    server_key: bytes  # the inviter's public key, Z85
    secret: bytes = field(repr=False)  # secret half of the one-time client key, Z85
    expires_ms: int  # UTC; the inviter's clock decides

    def encode(self) -> str:
        """Write the code: one token of letters, digits, `-` and `_`."""
        encoded = [endpoint.encode("utf-8") for endpoint in self.endpoints]
        if not 1 <= len(encoded) <= 255 or not all(1 <= len(endpoint) <= 255 for endpoint in encoded):
            raise InvalidInput("an invitation names 1 to 255 endpoints of 1 to 255 bytes")
        if not 0 <= self.expires_ms < 1 << 64:
            raise InvalidInput(f"{self.expires_ms} is no time in UTC milliseconds")
        head = _HEAD.pack(
            self.expires_ms, key_bytes_of(self.server_key), key_bytes_of(self.secret), len(encoded)
        )
        body = head + b"".join(bytes([len(endpoint)]) + endpoint for endpoint in encoded)
        return _PREFIX + base64.urlsafe_b64encode(body + _invitation_check(body)).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """Read a code; InvalidInput says what is wrong with it. Whether it is over is for the inviter to say.

        Spaces and line ends are skipped, because a terminal wraps long codes. No message quotes the code.
        """
        code = "".join(text.split())
        if not code.startswith(_PREFIX):
            if re.match(r"zm[0-9]+-", code):
                raise InvalidInput(
                    "this invitation was made by another version of the mesh",
                    hint="run the same version on both sides",
                )
            raise InvalidInput(f"this is no invitation: a code starts with {_PREFIX}", hint=_COPY_AGAIN)
        digits = code.removeprefix(_PREFIX)
        strange = re.search(r"[^A-Za-z0-9_-]", digits)
        if strange:
            raise InvalidInput(
                f"an invitation has no {strange.group()!r}: it is letters, digits, - and _", hint=_COPY_AGAIN
            )
        raw = _unpadded_base64(digits)
        if raw is None or raw[-_CHECK_BYTES:] != _invitation_check(raw[:-_CHECK_BYTES]):
            raise InvalidInput("this invitation is mistyped or cut short", hint=_COPY_AGAIN)
        return cls._of(raw[:-_CHECK_BYTES])

    @classmethod
    def _of(cls, body: bytes) -> Invitation:
        """Read what the checksum vouches for; it can still be a forgery, so nothing is taken for granted."""
        try:
            expires_ms, server_key, secret, count = _HEAD.unpack_from(body)
            endpoints, at = [], _HEAD.size
            for _ in range(count):
                end = at + 1 + body[at]
                endpoints.append(body[at + 1 : end].decode("utf-8"))
                at = end
        except (struct.error, IndexError, UnicodeDecodeError):
            raise InvalidInput("this invitation cannot be read", hint=_COPY_AGAIN) from None
        if not endpoints or at != len(body):
            raise InvalidInput("this invitation cannot be read", hint=_COPY_AGAIN)
        return cls(
            endpoints=tuple(endpoints),
            server_key=z85_of(server_key),
            secret=z85_of(secret),
            expires_ms=expires_ms,
        )


_COPY_AGAIN: Final = "copy the whole code again, as the inviter's node printed it"


def _invitation_check(body: bytes) -> bytes:
    return hashlib.blake2b(_PREFIX.encode("ascii") + body, digest_size=_CHECK_BYTES).digest()


def _unpadded_base64(digits: str) -> bytes | None:
    """The bytes, or None. Only the canonical text counts: a last digit has spare bits, where a typo would hide."""
    if len(digits) % 4 == 1 or len(digits) > _CODE_CHARACTERS_MAX:
        return None
    raw = base64.urlsafe_b64decode(digits + "=" * (-len(digits) % 4))
    return raw if base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=") == digits else None
