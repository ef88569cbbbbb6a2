"""The YAML block on top of a Markdown file: read within bounds, and written so that it reads back the same.

The only importer of yaml; no key has a meaning here. It reads events, never objects: a scalar stays the text that
was written (`title: 12:30` is not 750, `project: no` is not false) until somebody asks for its value. Anchors,
aliases and tags are refused, so a small file cannot become a large tree.

ClaudeMail writes lines that only look like YAML (`title: a: b`, `to: @server2`), and `to: #ops` is a comment to YAML.
Where the block as it stands is refused, each one-line entry that is not YAML by itself is taken as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from zmail.errors import InvalidBrief

BLOCK_BYTES_MAX = 64 * 1024
DEPTH_MAX = 8  # of lists and mappings in each other; briefs need three
REPAIR_LINES_MAX = 200  # each is parsed by itself; a written header has about ten


@dataclass(frozen=True, slots=True)
class Scalar:
    text: str
    is_plain: bool  # written without quotes, so `null`, `true` and `3` are values


Node: TypeAlias = "Scalar | list[Node] | dict[str, Node]"

_CLOSING = re.compile(r"^---[ \t]*\r?$", re.MULTILINE)
_LINE_END = re.compile("[\r\n\x85\u2028\u2029]")
_NULL = re.compile(r"~|null|Null|NULL|")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # fits 64 bits
_NUMBER = re.compile(r"-?[0-9]{1,9}\.[0-9]{1,9}")

_ENTRY = re.compile(r"(\w[\w -]*:[ \t]+|[ \t]*-[ \t]+)(\S.*)")  # `key: value` at the margin, or `- value`
_BLOCK_TEXT = re.compile(r"(?:.*[:-][ \t]+)?[|>][0-9+-]{0,2}[ \t]*(?:#.*)?")  # the lines after it are text
_GROUP = re.compile(r"#[A-Za-z0-9]")
_GROUP_KEY = re.compile(r"(?:to|cc)\s*:|\s*-", re.IGNORECASE)


def split(text: str) -> tuple[str | None, str]:
    """Cut a file into its block (None when it has none) and its body, which stays as it is to the last character."""
    text = text.removeprefix("\ufeff")
    opening, _, rest = text.partition("\n")
    if opening.rstrip() != "---":
        return None, text
    closing = _CLOSING.search(rest)
    if closing is None:
        raise InvalidBrief("the frontmatter has no end", hint="close it with a line of three dashes")
    return rest[: closing.start()], rest[closing.end() :].removeprefix("\n")


def read(block: str) -> dict[str, Node]:
    """Read the block of `split` into a tree. InvalidBrief names the line."""
    if (size := len(block.encode("utf-8", "replace"))) > BLOCK_BYTES_MAX:
        raise InvalidBrief(f"frontmatter of {size} bytes, at most {BLOCK_BYTES_MAX}")
    try:
        return _parse(_rewritten(block, _is_group))
    except yaml.YAMLError as strict:
        if block.count("\n") > REPAIR_LINES_MAX:
            raise _refusal(strict) from None
        try:
            return _parse(_rewritten(block, lambda line: _is_group(line) or not _is_yaml(line)))
        except yaml.YAMLError:
            raise _refusal(strict) from None


def text_of(node: Node) -> object:
    """The tree with every scalar as the text that was written, None where nothing or `null` was."""
    if isinstance(node, Scalar):
        return None if node.is_plain and _NULL.fullmatch(node.text) else node.text
    if isinstance(node, list):
        return [text_of(each) for each in node]
    return {key: text_of(each) for key, each in node.items()}


def value_of(node: Node) -> object:
    """The tree as JSON values. A number that would lose a digit on the way (`1.10`) stays text."""
    if isinstance(node, list):
        return [value_of(each) for each in node]
    if isinstance(node, dict):
        return {key: value_of(each) for key, each in node.items()}
    text = node.text
    if not node.is_plain:
        return text
    if _NULL.fullmatch(text):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and repr(float(text)) == text:
        return float(text)
    return text


def write(values: Mapping[str, object]) -> str:
    """The lines between the dashes, in the order given, so that `read` gives these values again."""
    return yaml.dump(
        dict(values),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=2**31,  # never folded: one key, one line
    )


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any YAML reader could take for a number or a truth value, but leaves dates bare."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the shape PyYAML asks for
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # YAML folds line ends, and counts U+0085 and U+2028 among them; only escapes keep them as they are.
        style = '"' if _LINE_END.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _parse(block: str) -> dict[str, Node]:
    events = yaml.parse(block, Loader=yaml.SafeLoader)
    first = next(
        each for each in events if not isinstance(each, yaml.StreamStartEvent | yaml.DocumentStartEvent)
    )
    if isinstance(first, yaml.StreamEndEvent) or _is_nothing(first):
        return {}
    tree = _node(first, events, depth=1)
    if not isinstance(tree, dict):
        raise InvalidBrief("the frontmatter is not made of `key: value` lines")
    if not isinstance(next(events), yaml.DocumentEndEvent) or not isinstance(
        next(events), yaml.StreamEndEvent
    ):
        raise InvalidBrief("the frontmatter goes on after its end")
    return tree


def _is_nothing(event: yaml.Event) -> bool:
    return isinstance(event, yaml.ScalarEvent) and not event.value and event.style is None


def _node(event: yaml.Event, events: Iterator[yaml.Event], *, depth: int) -> Node:
    if getattr(event, "anchor", None) or getattr(event, "tag", None):  # an alias is known by its anchor
        raise InvalidBrief(
            f"frontmatter line {_line(event.start_mark)}: anchors, aliases and tags are not read",
            hint="put a text that begins with &, * or ! in quotes",
        )
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(event.value, is_plain=event.style is None)
    if depth > DEPTH_MAX:
        raise InvalidBrief(
            f"frontmatter line {_line(event.start_mark)}: nested deeper than {DEPTH_MAX} levels"
        )
    if isinstance(event, yaml.SequenceStartEvent):
        return list(_items(events, depth=depth + 1))
    return _mapping(events, depth=depth + 1)


def _items(events: Iterator[yaml.Event], *, depth: int) -> Iterator[Node]:
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        yield _node(event, events, depth=depth)


def _mapping(events: Iterator[yaml.Event], *, depth: int) -> dict[str, Node]:
    mapping: dict[str, Node] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(event, events, depth=depth)
        if not isinstance(key, Scalar):
            raise InvalidBrief(f"frontmatter line {_line(event.start_mark)}: a key must be a word")
        if key.text in mapping:
            raise InvalidBrief(
                f"frontmatter line {_line(event.start_mark)}: {key.text[:40]!r} is there twice"
            )
        mapping[key.text] = _node(next(events), events, depth=depth)
    return mapping


def _rewritten(block: str, is_text: Callable[[str], bool]) -> str:
    """The block with every one-line entry for which `is_text` holds put in quotes. Text blocks are left alone."""
    lines: list[str] = []
    margin: int | None = None  # of the entry whose text block we are in
    for line in block.split("\n"):
        indent = len(line) - len(line.lstrip())
        if margin is not None and (indent > margin or not line.strip()):
            lines.append(line)
            continue
        margin = indent if _BLOCK_TEXT.fullmatch(line) else None
        entry = _ENTRY.fullmatch(line) if margin is None else None
        lines.append(_quoted(*entry.groups()) if entry and is_text(line) else line)
    return "\n".join(lines)


def _quoted(key: str, value: str) -> str:
    return key + "'" + value.rstrip().replace("'", "''") + "'"


def _is_group(line: str) -> bool:
    entry = _ENTRY.fullmatch(line)
    return bool(entry and _GROUP.match(entry[2]) and _GROUP_KEY.match(entry[1]))


def _is_yaml(line: str) -> bool:
    try:
        for _ in yaml.parse(line, Loader=yaml.SafeLoader):
            pass
    except yaml.YAMLError:
        return False
    return True


def _refusal(error: yaml.YAMLError) -> InvalidBrief:
    mark: Any = getattr(error, "problem_mark", None)  # Any: set by PyYAML on some of its errors only
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    where = f"frontmatter line {_line(mark)}" if mark else "frontmatter"
    return InvalidBrief(f"{where}: {problem}", hint='write `key: "text"`, in quotes where the text has signs')


def _line(mark: Any) -> int:  # Any: PyYAML's Mark, which has no public type
    return int(mark.line) + 2  # counted from 1, and the dashes are a line too
