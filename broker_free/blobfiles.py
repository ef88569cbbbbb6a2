"""Blobs on disk: one private folder, written so that a crash at any line leaves nothing half-true.

    ID          the content, as it is: what `fetch_blob` gives the path of. Its presence means: complete and synced
    ID.map      its manifest: the root, then the pages (blob.py)
    ID.part     content that is still being fetched; which chunks are there is found out by their digests, so that
                no list of them has to be kept true through a power loss
    ID.part.map its manifest, written before the first chunk
    .*          drafts of `put`, and files on their way out; gone at the next start

Knows neither peers nor sessions. Called from the threads that do a node's slow work, never from its owner thread,
except for `is_here` and `retire`, which are a stat and renames.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from broker_free.blob import (
    CHUNK_BYTES,
    ROOT_HEAD_BYTES,
    Manifest,
    Piece,
    Root,
    check_id,
    check_size,
    digest_of,
    root_bytes,
)
from broker_free.errors import BlobFailed, DiskLow, InvalidInput, TooLarge, UnknownBlob
from broker_free.home import make_private
from broker_free.limits import MIB, Limits

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A large body that is complete on this node's disk."""

    id: str
    size: int
    path: Path  # read it, never change it; copy or link it to keep it longer than the node does


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What an earlier fetch has left: its manifest, and the indexes of the chunks that are not there."""

    manifest: Manifest
    missing: tuple[int, ...]


class BlobFiles:
    """The folder. Its methods may run in several threads at once."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._unsynced: dict[str, int] = {}  # bytes written since the last sync
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the folder and clear away what a crash left of drafts."""
        make_private(self._folder)
        for leftover in self._folder.glob(".*"):
            leftover.unlink()

    def path_of(self, blob_id: str) -> Path:
        return self._folder / check_id(blob_id)

    def is_here(self, blob_id: str) -> bool:
        return self.path_of(blob_id).exists()

    # -- a blob of this node's own --------------------------------------------------------------------------

    def put(self, source: Path | bytes) -> Blob:
        """Copy a file or bytes in, synced. Raises TooLarge, DiskLow, InvalidInput for what cannot be read."""
        with _disk_errors(), contextlib.ExitStack() as undo:
            draft = self._folder / f".{secrets.token_hex(8)}"
            undo.callback(draft.unlink, missing_ok=True)
            if isinstance(source, bytes):
                check_size(len(source), self._limits)
                self._check_room(len(source))
                manifest = self._copy(_slices(source), draft)
            else:
                with _opened(source) as file:
                    size = os.fstat(file.fileno()).st_size
                    check_size(size, self._limits)
                    self._check_room(size)
                    manifest = self._copy(iter(lambda: file.read(CHUNK_BYTES), b""), draft)
            final = self._folder / manifest.root.id
            self._write_map(final, manifest)
            draft.rename(final)  # over a copy that may have been damaged, too
            self._sync_folder()
        return Blob(id=final.name, size=manifest.root.size, path=final)

    def _copy(self, chunks: Iterator[bytes], draft: Path) -> Manifest:
        digests, size, unsynced = bytearray(), 0, 0
        with _create(draft) as file:
            for chunk in chunks:
                size += len(chunk)
                check_size(size, self._limits)  # a file may grow while it is read
                digests += digest_of("chunk", chunk)
                file.write(chunk)
                unsynced += len(chunk)
                if unsynced >= self._limits.blob_sync_bytes:
                    os.fdatasync(file.fileno())
                    unsynced = 0
            os.fsync(file.fileno())
        return Manifest.of(size, bytes(digests))

    # -- a blob that is being fetched -----------------------------------------------------------------------

    def look(self, blob_id: str) -> Blob | Unfinished | None:
        """Return what is here of a blob. Reads all of an unfinished one to see which chunks are true."""
        final = self.path_of(blob_id)
        with _disk_errors():
            if final.exists():
                os.utime(final)
                return Blob(id=blob_id, size=final.stat().st_size, path=final)
            part, part_map = _part(final), _map(_part(final))
            try:
                manifest = Manifest.decode(part_map.read_bytes())
            except (FileNotFoundError, InvalidInput):
                return None
            if manifest.root.id != blob_id:
                return None
            check_size(manifest.root.size, self._limits)
            missing = []
            with open(
                os.open(part, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb", buffering=0
            ) as file:
                for index in range(manifest.root.chunks):
                    chunk = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
                    if digest_of("chunk", chunk) != manifest.digest_of_chunk(index):
                        missing.append(index)
            self._check_room(len(missing) * CHUNK_BYTES)
            return Unfinished(manifest, tuple(missing))

    def begin(self, manifest: Manifest) -> None:
        """Make room for a blob and write its manifest. Raises DiskLow or TooLarge before anything is written."""
        part = _part(self._folder / manifest.root.id)
        with _disk_errors():
            self._check_room(manifest.root.size)
            self._write_map(part, manifest)
            with _create(part):
                pass

    def keep(self, blob_id: str, index: int, chunk: bytes) -> None:
        """Write a chunk that has been checked. It is on disk for certain only after `finish`."""
        with _disk_errors():
            fd = os.open(_part(self.path_of(blob_id)), os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_at(fd, chunk, index * CHUNK_BYTES)
                if self._is_sync_due(blob_id, len(chunk)):
                    os.fdatasync(fd)
            except OSError as error:
                if error.errno in _FULL:
                    os.ftruncate(fd, 0)  # the store lives on the same disk: mail needs the room more
                raise
            finally:
                os.close(fd)

    def _is_sync_due(self, blob_id: str, written: int) -> bool:
        with self._lock:
            unsynced = self._unsynced.get(blob_id, 0) + written
            is_due = unsynced >= self._limits.blob_sync_bytes
            self._unsynced[blob_id] = 0 if is_due else unsynced
        return is_due

    def finish(self, manifest: Manifest) -> Blob:
        """Sync a blob of which every chunk has been kept, and give it its name."""
        final = self._folder / manifest.root.id
        with _disk_errors():
            fd = os.open(_part(final), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, manifest.root.size)
                os.fsync(fd)
            finally:
                os.close(fd)
            _map(_part(final)).rename(_map(final))
            _part(final).rename(final)  # last: its presence says that all is there
            self._sync_folder()
        self._forget(final.name)
        return Blob(id=final.name, size=manifest.root.size, path=final)

    def discard_part(self, blob_id: str) -> None:
        part = _part(self.path_of(blob_id))
        for path in (_map(part), part):
            path.unlink(missing_ok=True)
        self._forget(blob_id)

    def _forget(self, blob_id: str) -> None:
        with self._lock:
            self._unsynced.pop(blob_id, None)

    # -- for others -----------------------------------------------------------------------------------------

    def read(self, blob_id: str, piece: Piece, *, is_checked: bool = False) -> bytes:
        """Read one piece. UnknownBlob when the blob is not here; InvalidInput when it has no such piece.

        `is_checked` compares it with its digest, which is otherwise left to whoever asked: BlobFailed if it is wrong.
        """
        final = self.path_of(blob_id)
        try:
            with open(_map(final), "rb", buffering=0) as file:
                fd = file.fileno()
                head = os.pread(fd, ROOT_HEAD_BYTES, 0)
                raw = os.pread(fd, root_bytes(head), 0) if len(head) == ROOT_HEAD_BYTES else head
                if piece.kind == "root":
                    return raw
                root = _decoded(raw, blob_id)
                length = root.length_of(piece)
                if piece.kind == "page":
                    return os.pread(fd, length, len(raw) + piece.at * CHUNK_BYTES)
                wanted = os.pread(fd, 32, len(raw) + piece.at * 32) if is_checked else b""
            with open(final, "rb", buffering=0) as content:
                chunk = os.pread(content.fileno(), length, piece.at * CHUNK_BYTES)
        except FileNotFoundError:
            raise UnknownBlob(f"no blob {blob_id[:12]} here") from None
        if is_checked and digest_of("chunk", chunk) != wanted:
            raise BlobFailed(f"chunk {piece.at} of {blob_id} does not match its digest")
        return chunk

    # -- house-keeping --------------------------------------------------------------------------------------

    def retire(self, blob_id: str) -> list[Path]:
        """Take a blob's name away, which is quick. Returns what `remove` is to delete, which may not be."""
        final = self.path_of(blob_id)
        retired = []
        for path in (final, _map(final)):
            hidden = self._folder / f".{secrets.token_hex(8)}"
            with contextlib.suppress(FileNotFoundError):
                path.rename(hidden)
                retired.append(hidden)
        return retired

    @staticmethod
    def remove(paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def strays(self, *, older_than_s: float) -> tuple[list[str], list[str]]:
        """Return the ids of complete and of unfinished blobs that nobody has touched since that time (UTC)."""
        complete: list[str] = []
        unfinished: list[str] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError, InvalidInput):
                blob_id = check_id(path.name.partition(".")[0])
                if path.suffix != ".map" and path.stat().st_mtime < older_than_s:
                    (unfinished if path.suffix == ".part" else complete).append(blob_id)
        return complete, unfinished

    # -- inside ---------------------------------------------------------------------------------------------

    def _check_room(self, size: int) -> None:
        with os.scandir(self._folder) as entries:
            held = sum(entry.stat().st_size for entry in entries)
        if held + size > self._limits.blobs_bytes_max:
            raise TooLarge(
                f"the blobs of this home would take {held + size} bytes; the limit is {self._limits.blobs_bytes_max}",
                hint="raise Limits.blobs_bytes_max, or wait until unused ones are dropped",
            )
        free = shutil.disk_usage(self._folder).free
        if free - size < self._limits.disk_free_bytes_min:
            raise DiskLow(
                f"a blob of {size} bytes does not fit: {free // MIB} MiB are free, and mail needs"
                f" {self._limits.disk_free_bytes_min // MIB} of them",
                hint="free some space; nothing was written",
            )

    def _write_map(self, content: Path, manifest: Manifest) -> None:
        draft = self._folder / f".{secrets.token_hex(8)}"
        try:
            with _create(draft) as file:
                file.write(manifest.encode())
                file.flush()
                os.fsync(file.fileno())
            draft.rename(_map(content))
        finally:
            draft.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _decoded(raw: bytes, blob_id: str) -> Root:
    try:
        return Root.decode(raw)
    except InvalidInput:
        raise BlobFailed(f"the manifest of {blob_id} is damaged", hint="put the blob again") from None


def _map(content: Path) -> Path:
    return content.with_name(f"{content.name}.map")


def _part(content: Path) -> Path:
    return content.with_name(f"{content.name}.part")


def _create(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return open(fd, "wb")


def _write_at(fd: int, body: bytes, offset: int) -> None:
    view = memoryview(body)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _slices(body: bytes) -> Iterator[bytes]:
    return (body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES))


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    try:
        file = open(source, "rb")  # noqa: SIM115  closed below, outside of what is translated here
    except OSError as error:
        raise InvalidInput(f"cannot read {source}: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskLow(
                f"the disk is full: {error.strerror}", hint="free some space, then try again"
            ) from error
        raise BlobFailed(
            f"the disk of the blobs failed: {error}", hint="see the disk that holds the home"
        ) from error
