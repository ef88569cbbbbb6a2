"""What a disk may hold after the power went: the log of `tests/faults/recorder.c`, replayed up to a moment. Pure.

What was synced is there. Of what was written since, any part may be: each write whole, torn between sectors, or not at
all, in order or not. The same holds for names: those of a folder that was not synced since may be there up to some
change, and not after it (file systems keep that order in their journal).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from random import Random
from typing import Literal, NamedTuple

_HEAD = struct.Struct("<c3xIQQ")

How = Literal["nothing", "everything", "prefix", "any"]


class Record(NamedTuple):
    kind: str
    path: str
    number: int
    data: bytes


def read_log(raw: bytes) -> Iterator[Record]:
    at = 0
    while at < len(raw):
        kind, path_bytes, number, data_bytes = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        path = raw[at : at + path_bytes].decode()
        at += path_bytes
        yield Record(kind.decode(), path, number, raw[at : at + data_bytes])
        at += data_bytes


@dataclass(slots=True, eq=False)
class _File:
    """One file, whatever its names: what is safe, and what was done to it since."""

    safe: bytearray = field(default_factory=bytearray)
    since: list[Record] = field(default_factory=list)

    def sync(self) -> None:
        for record in self.since:
            _apply(self.safe, record)
        self.since.clear()

    def after(self, how: How, random: Random) -> bytes:
        content = bytearray(self.safe)
        last = {"nothing": 0, "prefix": random.randint(0, len(self.since))}.get(how, len(self.since))
        for number, record in enumerate(self.since[:last]):
            is_torn = random.random() < 0.4 if how == "any" else how == "prefix" and number == last - 1
            if how == "any" and random.random() < 0.3:
                continue
            if record.kind == "W" and is_torn:
                for piece in _sectors(record, size=random.choice((512, 4096))):
                    if random.random() < 0.5:
                        _apply(content, piece)
            else:
                _apply(content, record)
        return bytes(content)


def _sectors(record: Record, *, size: int) -> Iterator[Record]:
    """Cut a write at the sectors' borders on the disk."""
    at, end = record.number, record.number + len(record.data)
    while at < end:
        border = min(end, (at // size + 1) * size)
        yield Record("W", record.path, at, record.data[at - record.number : border - record.number])
        at = border


def _apply(content: bytearray, record: Record) -> None:
    if record.kind == "T":
        del content[record.number :]
        content.extend(bytes(record.number - len(content)))
    else:
        content.extend(bytes(max(0, record.number - len(content))))
        content[record.number : record.number + len(record.data)] = record.data


class Disk:
    """The files below a folder, as the records so far left them."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self._names: dict[str, _File] = {}  # as programs see them
        self._safe_names: dict[str, _File] = {}
        self._changes: list[tuple[str, _File | None]] = []  # of names, since their folder was synced

    def take(self, record: Record) -> None:
        match record:
            case Record("M", _, _, data):
                self.marks.append(data.decode())
            case Record("C", path, _, _):
                self._name(path, _File())
            case Record("W" | "T", path, _, _) if path in self._names:
                self._names[path].since.append(record)
            case Record("S", path, _, _) if path in self._names:
                self._names[path].sync()
            case Record("D", folder, _, _):
                self._sync_folder(folder)
            case Record("U", path, _, _):
                self._name(path, None)
            case Record("L", path, _, new):
                self._name(new.decode(), self._names[path])
            case Record("R", path, _, new):
                self._name(new.decode(), self._names[path])
                self._name(path, None)

    def _name(self, path: str, file: _File | None) -> None:
        _rename(self._names, path, file)
        self._changes.append((path, file))

    def _sync_folder(self, folder: str) -> None:
        for path, file in self._changes:
            if str(PurePosixPath(path).parent) == folder:
                _rename(self._safe_names, path, file)
        self._changes = [one for one in self._changes if str(PurePosixPath(one[0]).parent) != folder]

    def after_power_loss(self, how: How, random: Random) -> dict[str, bytes]:
        """Make up one possible content of every file."""
        names = dict(self._safe_names)
        kept = {"nothing": 0, "everything": len(self._changes)}.get(
            how, random.randint(0, len(self._changes))
        )
        for path, file in self._changes[:kept]:
            _rename(names, path, file)
        # A file with two names has one content.
        contents = {id(file): file.after(how, random) for file in names.values()}
        return {path: contents[id(file)] for path, file in names.items()}


def _rename(names: dict[str, _File], path: str, file: _File | None) -> None:
    if file is None:
        names.pop(path, None)
    else:
        names[path] = file
