"""Every setting, read once from zmail.toml and the ZMAIL_* variables into one frozen value that is passed down.

A wrong key or value is an InvalidConfig that names the file, the line and the nearest valid key, or the variable.
To add a setting: a field in `Settings` and a row in `_KEYS`. Nothing here opens a store or a socket.
"""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zmail.address import NAME_CHARS_MAX, node_name
from zmail.errors import InvalidAddress, InvalidConfig
from zmail.paths import Home

FILE_NAME = "zmail.toml"
NAMINGS = ("project", "spelling")

DEFAULT_SOURCE = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a node is told from outside. `sources` says for each dotted key where its value comes from."""

    node_name: str
    listen: str = "tcp://0.0.0.0:7420"  # port 0: any free one, remembered by the home
    naming: str = "project"  # how a new session's callsign is made, one of NAMINGS
    name_prefix: str | None = None  # stands in for the project's name in a made callsign
    callsigns: tuple[str, ...] = ()  # given to new sessions, the first free one, before a made one
    sources: Mapping[str, str] = field(default_factory=dict)

    def listing(
        self,
    ) -> list[dict[str, Any]]:  # Any: a value is text, a number, a truth value, a list or null
        """Every setting as {key, value, source}, in the order of the documentation."""
        return [
            {
                "key": key,
                "value": list(value) if isinstance(value := getattr(self, rule.field), tuple) else value,
                "source": self.sources.get(key, DEFAULT_SOURCE),
            }
            for key, rule in _KEYS.items()
        ]


def load(home: Home, env: Mapping[str, str]) -> Settings:
    """Read the configuration of `home`. Order: ZMAIL_* variable > file > default."""
    values: dict[str, Any] = {"node_name": _host_name()}  # Any: parsed TOML
    sources: dict[str, str] = {}
    if (file := find_file(home, env)) is not None:
        _read_file(file, values, sources)
    for key, rule in _KEYS.items():
        if rule.variable and (text := env.get(rule.variable)):
            values[rule.field] = _checked(key, rule, text, where=rule.variable)
            sources[key] = rule.variable
    return Settings(**values, sources=sources)


def find_file(home: Home, env: Mapping[str, str]) -> Path | None:
    """The first configuration file there is. One named by $ZMAIL_CONFIG (a file, or its folder) must exist."""
    if named := env.get("ZMAIL_CONFIG"):
        path = Path(named).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise InvalidConfig(
                f"there is no configuration file {path}", hint="see --config and $ZMAIL_CONFIG"
            )
        return path
    folders = [home.config]
    if not env.get("ZMAIL_HOME"):  # a home of its own has a configuration of its own
        folders += [Path(env.get("HOME") or Path.home()) / ".zmail", Path("/etc/zmail")]
    return next((file for folder in folders if (file := folder / FILE_NAME).is_file()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    field: str
    parse: Callable[
        [Any], Any
    ]  # Any: a TOML value or a variable's text, not yet checked; ValueError says why not
    variable: str | None = None


def _name(value: object) -> str:
    if isinstance(value, str):
        with suppress(InvalidAddress):
            return node_name(value)
    raise ValueError(
        f"must be a name of at most {NAME_CHARS_MAX} lower-case letters, digits, dots, dashes and underscores"
    )


def _callsigns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError('must be a list of names, as in ["alpha", "bravo"]')
    return tuple(_name(each) for each in value)


def _listen(value: object) -> str:
    if isinstance(value, str):
        parts = urlsplit(value)
        try:
            if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
                return value
        except ValueError:
            pass  # a port that is no number, or over 65535
    raise ValueError("must look like tcp://0.0.0.0:7420 (port 0 for any free one)")


def _naming(value: object) -> str:
    if value not in NAMINGS:
        raise ValueError(f"must be one of: {', '.join(NAMINGS)}")
    return str(value)


_KEYS = {
    "node.name": _Rule(field="node_name", parse=_name, variable="ZMAIL_NODE_NAME"),
    "node.listen": _Rule(field="listen", parse=_listen, variable="ZMAIL_LISTEN"),
    "naming": _Rule(field="naming", parse=_naming),
    "name_prefix": _Rule(field="name_prefix", parse=_name),
    "callsigns": _Rule(field="callsigns", parse=_callsigns),
}


def _read_file(file: Path, values: dict[str, Any], sources: dict[str, str]) -> None:  # Any: parsed TOML
    try:
        text = file.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise InvalidConfig(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{file} is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{file} is not valid TOML: {error}") from error
    for key, value in _flat(tree):
        if value == {} and any(known.startswith(f"{key}.") for known in _KEYS):
            continue  # a table with nothing in it
        where = f"{file}:{line_of(key, text)}"
        if (rule := _KEYS.get(key)) is None:
            raise InvalidConfig(f"{where}: unknown key {key!r}", hint=_nearest(key))
        values[rule.field] = _checked(key, rule, value, where=where)
        sources[key] = where


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:  # Any: parsed TOML
    """List the leaves of a TOML tree, empty tables among them, as dotted keys."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        leaves += inner or [(prefix + name, value)]
    return leaves


def line_of(key: str, text: str) -> int:
    """Find the line on which a dotted key is set; tomllib does not tell. The best guess for exotic spellings."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            if _bare(header[1]) == key:
                return number
            table = _bare(header[1]) + "."
        if (entry := re.match(r"\s*([^=#]+?)\s*=", line)) and table + _bare(entry[1]) == key:
            return number
    return 1


def _bare(key: str) -> str:
    return re.sub(r"[\"'\s]", "", key)


def _checked(key: str, rule: _Rule, value: object, *, where: str) -> Any:  # Any: the type of the rule's field
    try:
        return rule.parse(value)
    except ValueError as error:
        raise InvalidConfig(f"{where}: {key} {error}, not {value!r}") from None


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, _KEYS, n=1, cutoff=0.5) or [
        known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"did you mean {near[0]!r}?" if near else f"the keys are: {', '.join(_KEYS)}"


def _host_name() -> str:
    """Make a node name of the host's: its first label, in the characters that a name may have."""
    label = socket.gethostname().partition(".")[0].lower()
    return re.sub(r"[^a-z0-9_-]+", "-", label)[:NAME_CHARS_MAX].strip("-_") or "localhost"
