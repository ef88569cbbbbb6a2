"""Who lives where, and what an address comes to. Pure: a snapshot goes in, places come out; nothing is stored here.

Every node writes its own callsigns into the replicated registry, under keys that begin with its id, and the registry
takes such a key from no other node. So a snapshot is: those entries, and the names of the nodes that wrote them.
Resolving is all or nothing: the first address that does not resolve raises, and nobody has been written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from zmail import address
from zmail.address import Address, Kind
from zmail.errors import AmbiguousAddress, InvalidBrief, UnknownAddress

BUCKET = "own.callsign"  # of the registry: `key_of` -> entry
ONLINE, OFFLINE, IDLE, BUSY = "online", "offline", "idle", "busy"
STATES = frozenset({ONLINE, OFFLINE, IDLE, BUSY})
SEEN_STEP_MS = 60_000  # last_seen is written no finer: it goes to every node of the mesh

PROJECT_CHARS_MAX = 100
TIME_MS_END = 253_402_300_800_000  # the year 10000, which no date can show

_ID_PREFIX_MIN = 6
_LABEL_CHARS = 8  # of a node id that stands in for a name


class Place(NamedTuple):
    """One mailbox on one node."""

    callsign: str
    node: str  # node id


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A callsign as its own node describes it."""

    callsign: str
    node: str  # node id
    kind: str
    project: str | None
    state: str
    last_seen_ms: int

    @property
    def place(self) -> Place:
        return Place(self.callsign, self.node)


def key_of(place: Place) -> str:
    """Name a place in the registry. Whoever is not its node cannot write there."""
    return f"{place.node}.{place.callsign}"


def resident_from(key: str, entry: Mapping[str, Any]) -> Resident | None:  # Any: a peer's JSON
    """Read a registry entry (`leases.entry_of`); None for one that makes no sense to this version."""
    node, _, callsign = key.partition(".")
    try:
        if address.callsign(callsign) != callsign:
            return None
    except InvalidBrief:
        return None
    kind, project = entry.get("kind"), entry.get("project")
    state, last_seen_ms = entry.get("state"), entry.get("last_seen_ms")
    return Resident(
        callsign=callsign,
        node=node,
        kind=kind if isinstance(kind, str) else "script",
        project=project[:PROJECT_CHARS_MAX] if isinstance(project, str) else None,
        state=state if isinstance(state, str) and state in STATES else OFFLINE,
        last_seen_ms=last_seen_ms if isinstance(last_seen_ms, int) and 0 <= last_seen_ms < TIME_MS_END else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen:
    """A node of the mesh as this one sees it."""

    name: str
    is_alive: bool
    last_seen_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Every callsign of every node of the mesh, at one moment."""

    me: str  # node id
    nodes: Mapping[str, NodeSeen]  # by node id, this node among them
    residents: Mapping[Place, Resident]

    def label(self, node: str) -> str:
        """Name a node so that `resolve` finds it again: by its name, or by its id when others share the name."""
        seen = self.nodes.get(node)
        if seen is None or sum(each.name == seen.name for each in self.nodes.values()) > 1:
            return node[:_LABEL_CHARS]
        return seen.name

    def address(self, callsign: str, node: str) -> str:
        return f"{callsign}@{self.label(node)}"

    def state(self, place: Place) -> str | None:
        """Say whether a session is there, None for a callsign nobody told of. Nobody is online at a lost node."""
        resident = self.residents.get(place)
        if resident is None:
            return None
        return resident.state if self.nodes[place.node].is_alive else OFFLINE

    def last_seen_ms(self, place: Place, *, now_ms: int) -> int | None:
        """Say when a callsign was last there. One that is online is there as long as its node is."""
        resident = self.residents.get(place)
        if resident is None:
            return None
        node = self.nodes[place.node]
        if resident.state == OFFLINE:
            return resident.last_seen_ms
        return now_ms if node.is_alive else max(resident.last_seen_ms, node.last_seen_ms or 0)

    def resolve(self, addresses: Iterable[Address], *, sender: Place) -> tuple[Place, ...]:
        """Return each place once, in the order of the addresses. Everybody (`all`, `@node`) leaves out the sender."""
        places: dict[Place, None] = {}
        for each in addresses:
            places.update(dict.fromkeys(self._places(each, sender)))
        return tuple(places)

    def _places(self, wanted: Address, sender: Place) -> list[Place]:
        match wanted.kind:
            case Kind.GROUP:
                raise InvalidBrief(f"{wanted}: groups are not available in this version")
            case Kind.ALL:
                return self._everybody(self.residents, sender, "anywhere")
            case Kind.NODE:
                node = self.node(str(wanted.node))
                there = [place for place in self.residents if place.node == node]
                return self._everybody(there, sender, f"at {self.label(node)}")
            case Kind.CALLSIGN:
                name = str(wanted.name)
                if wanted.node is not None:  # accepted whoever is known there: the node itself will say
                    return [Place(name, self.node(wanted.node))]
                return [self._bare(name)]

    def _everybody(self, there: Iterable[Place], sender: Place, where: str) -> list[Place]:
        places = [place for place in there if place != sender]
        if not places:
            raise UnknownAddress(f"nobody else is known {where}", hint="see who is there: zmail roster")
        return places

    def _bare(self, name: str) -> Place:
        homes = [place for place in self.residents if place.callsign == name]
        if not homes:
            near = address.nearest(name, dict.fromkeys(place.callsign for place in self.residents))
            raise UnknownAddress(f"nobody is called {name!r}", hint=_did_you_mean(near, "zmail roster"))
        if len(homes) > 1:
            choices = ", ".join(self.address(*each) for each in homes)
            raise AmbiguousAddress(f"{name!r} is on {len(homes)} nodes", hint=f"say which: {choices}")
        return homes[0]

    def node(self, text: str) -> str:
        """Find a node by its name, or by its id or the beginning of it."""
        found = [node for node, seen in self.nodes.items() if seen.name.lower() == text]
        if not found and len(text) >= _ID_PREFIX_MIN:
            found = [node for node in self.nodes if node.startswith(text)]
        if not found:
            near = address.nearest(text, [seen.name for seen in self.nodes.values()])
            raise UnknownAddress(f"no node is called {text!r}", hint=_did_you_mean(near, "zmail peers"))
        if len(found) > 1:
            choices = ", ".join(node[:_LABEL_CHARS] for node in found)
            raise AmbiguousAddress(f"{len(found)} nodes are called {text!r}", hint=f"use an id: {choices}")
        return found[0]


def _did_you_mean(near: Iterable[str], listing: str) -> str:
    names = " or ".join(repr(name) for name in near)
    return f"did you mean {names}? see: {listing}" if names else f"see: {listing}"
