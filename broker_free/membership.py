"""Who belongs to the mesh: what a member record says and what of it counts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NAME_CHARS_MAX: Final = 64
ENDPOINTS_MAX: Final = 16
ENDPOINT_CHARS_MAX: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A peer as the mesh knows it."""

    node_id: str
    name: str
    public_key: bytes
    endpoints: tuple[str, ...]
    beat_endpoint: str = ""
    interests: tuple[str, ...] = ()
    seen_ms: int = 0


def member_from(about: object, *, node_id: str, public_key: bytes) -> Member | None:
    """Read what a node says of itself. None when it is not of the right shape."""
    if not isinstance(about, Mapping):
        return None
    name, endpoints, beat = about.get("name"), about.get("endpoints"), about.get("beat", "")
    if not isinstance(name, str) or not isinstance(beat, str) or not isinstance(endpoints, list):
        return None
    if len(endpoints) > ENDPOINTS_MAX:
        return None
    if not all(isinstance(one, str) and len(one) <= ENDPOINT_CHARS_MAX for one in [*endpoints, beat]):
        return None
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        return None
    return Member(
        node_id=node_id, name=name, public_key=public_key, endpoints=tuple(endpoints), beat_endpoint=beat
    )
