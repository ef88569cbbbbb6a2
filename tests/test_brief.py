"""Briefs as files and as the arguments of send: read, checked, written, read again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_action import actions, json_values
from tests.test_address import addresses
from zmail import action, brief, frontmatter, times
from zmail.action import Action
from zmail.brief import Brief, Draft
from zmail.errors import InvalidAddress, InvalidBrief

EXAMPLE = """\
---
title: Deploy Blocker — DB Migration
date: 2026-03-24T10:15:00Z
from: alpha (server1)
to: charlie (server2)
action: Review migration script before deploying
---
The migration adds a NOT NULL column without a default value.
"""


def with_header(*lines: str, body: str = "text\n") -> str:
    return "\n".join(["---", *lines, "---", body])


def refusal(text: str) -> InvalidBrief:
    with pytest.raises(InvalidBrief) as refused:
        brief.parse(text)
    return refused.value


# ---- files ----


def test_the_example_is_read_and_written_to_the_letter() -> None:
    parsed = brief.parse(EXAMPLE)
    assert parsed.draft.title == "Deploy Blocker — DB Migration"
    assert parsed.date_ms == times.parse_time("2026-03-24T10:15:00Z")
    assert (str(parsed.sender), [str(each) for each in parsed.draft.to]) == (
        "alpha@server1",
        ["charlie@server2"],
    )
    assert parsed.draft.actions == (Action(text="Review migration script before deploying"),)
    assert brief.format(parsed) == EXAMPLE


def test_every_key_is_read_whatever_its_case() -> None:
    draft = brief.parse(
        with_header(
            "TITLE: Keys",
            "To: [bravo, '#ops']",
            "CC: charlie",
            "Thread: 0197A",
            "reply-to: 0197b",
            "Priority: URGENT",
            "Project: My Shop",
            "due: 2026-04-01",
            "ttl: 2h",
            "intent: Info",
            "tags: a, b, a",
            "actions: [one, {text: two, assignee: bravo}]",
        )
    ).draft
    assert [str(each) for each in (*draft.to, *draft.cc)] == ["bravo", "#ops", "charlie"]
    assert (draft.thread, draft.reply_to, draft.priority, draft.project) == (
        "0197a",
        "0197b",
        "urgent",
        "My Shop",
    )
    assert (draft.due_ms, draft.ttl_ms) == (times.parse_time("2026-04-01"), 7_200_000)
    assert (draft.intent, draft.tags) == ("info", ("a", "b"))
    assert draft.actions == (Action(text="one"), Action(text="two", assignee="bravo"))


def test_text_without_frontmatter_is_all_body() -> None:
    assert brief.parse("hello\n---\nworld").draft == Draft(title="hello", body="hello\n---\nworld")


def test_a_date_without_a_time_is_its_midnight() -> None:
    assert brief.parse(with_header("title: x", "date: 2026-03-24")).date_ms == times.parse_time("2026-03-24")


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("title: a: b", "a: b"),
        ("title: @bravo look", "@bravo look"),
        ("title: [WIP] lock", "[WIP] lock"),
        ('title: "Fix" the lock', '"Fix" the lock'),
        ("title: 50% off: it's `here`", "50% off: it's `here`"),
        ("title: *important* news", "*important* news"),
        ("title: 12:30", "12:30"),
        ("title: no", "no"),
        ("title: 1.10", "1.10"),
    ],
)
def test_a_title_that_only_looks_like_yaml_is_taken_as_it_is_written(line: str, title: str) -> None:
    assert brief.parse(with_header(line, "to: bravo")).draft.title == title


@pytest.mark.parametrize(
    "lines", [["to: #ops, @server2"], ["to:", "  - #ops", "  - @server2"], ["cc: x", "to: '#ops'"]]
)
def test_groups_and_nodes_need_no_quotes(lines: list[str]) -> None:
    assert str(brief.parse(with_header("title: x", *lines)).draft.to[0]) == "#ops"


def test_a_text_block_survives_the_repair_of_another_line() -> None:
    draft = brief.parse(with_header("title: a: b", "action: |", "  - do this: now", "  x: y: z")).draft
    assert (draft.title, draft.actions) == ("a: b", (Action(text="- do this: now x: y: z"),))


def test_comments_are_comments() -> None:
    assert brief.parse(with_header("title: x  # a note", "due: # nothing yet", "# alone")).draft.title == "x"


def test_windows_line_ends_and_a_byte_order_mark_are_read() -> None:
    parsed = brief.parse("\ufeff---\r\ntitle: x\r\nto: bravo\r\n---\r\nfirst\r\nsecond")
    assert (parsed.draft.title, parsed.draft.body) == ("x", "first\r\nsecond")


def test_unknown_keys_are_kept_and_written_after_the_known_ones() -> None:
    text = with_header(
        "Retries: 3", "version: '1.10'", "title: x", "ok: true", "none:", "deep:", "- a: 1.5", "  b: no"
    )
    parsed = brief.parse(text)
    deep = [{"a": 1.5, "b": "no"}]
    assert parsed.draft.extra == {"Retries": 3, "version": "1.10", "ok": True, "none": None, "deep": deep}
    written = brief.format(parsed)
    assert written.startswith("---\ntitle: x\nRetries: 3\nversion: '1.10'\nok: true\n")
    assert brief.parse(written) == parsed


# ---- the title ----


def test_the_first_line_that_says_something_is_the_title() -> None:
    assert brief.parse("\n  \n  The  lock \n is stuck").draft.title == "The lock"


def test_a_title_taken_from_the_text_has_at_most_eighty_characters() -> None:
    title = brief.parse("x" * 81).draft.title
    assert (len(title), title[-1]) == (80, "…")
    assert brief.parse("x" * 80).draft.title == "x" * 80


@pytest.mark.parametrize("line", ["title:", 'title: ""', "title: '  '", "title: null"])
def test_an_explicit_empty_title_is_refused(line: str) -> None:
    assert "title is empty" in refusal(with_header(line)).message


def test_neither_title_nor_text_is_refused() -> None:
    assert refusal("").hint
    assert refusal(with_header("to: bravo", body=" \n"))


# ---- bounds and refusals ----


def test_an_alias_bomb_is_refused() -> None:
    lines = [
        "a: &a [lol, lol]",
        *(
            f"{new}: &{new} [{', '.join(['*' + old] * 9)}]"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),
    ]
    assert "aliases" in refusal(with_header(*lines)).message


@pytest.mark.parametrize(
    "header",
    [
        "x: " + "[" * 5_000,
        "x: " + "{a: " * 5_000,
        "- " * 5_000,
        "? " * 5_000,
        "\n".join(" " * depth + "a:" for depth in range(100)),
    ],
)
def test_deep_nesting_is_refused(header: str) -> None:
    assert refusal(with_header(header))


def test_a_header_over_64_kib_is_refused() -> None:
    assert "at most 65536" in refusal(with_header("title: x", "note: " + "é" * 40_000)).message


def test_a_body_over_the_limit_is_refused_in_bytes_not_in_characters() -> None:
    assert brief.parse("x\n" + "y" * (brief.BODY_BYTES_MAX - 2)).draft.title == "x"
    assert "at most" in refusal("é" * (brief.BODY_BYTES_MAX // 2 + 1)).message
    assert "at most" in refusal("y" * 10 * brief.BODY_BYTES_MAX).message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("title: " + "x" * 201, "at most 200"),
        ("priority: asap", "asap"),
        ("intent: command", "command"),
        ("due: soon", "due"),
        ("date: 2026-02-30", "date"),
        ("ttl: forever", "ttl"),
        ("ttl: 0s", "ttl"),
        ("ttl: 999999w", "ttl"),
        ("project: " + "x" * 101, "project"),
        ("id: not an id", "id"),
        ("tags: " + ", ".join(map(str, range(51))), "tags"),
        ("priority: [high]", "priority must be text"),
        ("action: {owner: bravo}", "owner"),
        ("action: [" + ", ".join(f"do {n}" for n in range(51)) + "]", "51 actions"),
        ("Title: twice", "twice"),
        ("x: !!python/object/apply:os.system [ls]", "tags are not read"),
        ("? [a, b]\n: c", "key must be a word"),
        ("x: \x07", "not allowed"),
        ("...\nx: 1", "frontmatter"),
    ],
)
def test_an_invalid_header_is_refused_and_names_what_is_wrong(line: str, said: str) -> None:
    header = [line] if line.startswith("title") else ["title: x", line]
    assert said in refusal(with_header(*header)).message


def test_a_malformed_address_in_a_file_is_refused() -> None:
    assert isinstance(refusal(with_header("title: x", "to: br avo")), InvalidAddress)


def test_a_yaml_error_names_the_line_of_the_file() -> None:
    assert refusal(with_header("title: x", "due: 2026-04-01", "\tbroken")).message.startswith(
        "frontmatter line 4"
    )


def test_frontmatter_that_never_ends_or_has_no_keys_is_refused() -> None:
    assert "no end" in refusal("---\ntitle: x\n").message
    assert "key: value" in refusal(with_header("just some words")).message


def test_more_open_tasks_than_actions_are_allowed_is_refused() -> None:
    assert "50 actions" in refusal("todo\n" + "".join(f"- [ ] t{n}\n" for n in range(51))).message
    assert brief.parse("todo\n" + "- [ ] the same\n" * 51)


# ---- the arguments of send ----


def test_the_arguments_of_send_make_a_draft() -> None:
    draft = brief.draft_of(
        {
            "to": ["bravo@server2,charlie"],
            "cc": [],
            "title": None,
            "body": "Fix it\n- [ ] the lock",
            "actions": ["deploy !urgent"],
            "priority": "high",
            "project": None,
            "due": "2026-04-01",
            "ttl": "3d",
        }
    )
    assert [str(each) for each in draft.to] == ["bravo@server2", "charlie"]
    assert (draft.title, draft.priority, draft.ttl_ms) == ("Fix it", "high", 259_200_000)
    assert draft.due_ms == times.parse_time("2026-04-01")
    assert [each.text for each in action.extract(draft.actions, draft.body)] == ["deploy", "the lock"]


def test_arguments_beside_a_file_replace_its_keys_and_add_actions() -> None:
    draft = brief.draft_of({"markdown": EXAMPLE, "to": ["bravo"], "actions": ["deploy"], "priority": "low"})
    assert draft.title == "Deploy Blocker — DB Migration"
    assert [str(each) for each in draft.to] == ["bravo"]
    assert [each.text for each in draft.actions] == ["Review migration script before deploying", "deploy"]
    assert draft.body.startswith("The migration")
    assert draft.priority == "low"


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"body": "x", "title": ""},
        {"body": "x", "title": "  "},
        {"body": 3},
        {"markdown": 3},
        {"body": "x", "to": 3},
        {"body": "x", "to": ["br avo"]},
        {"body": "x", "to": [["bravo"]]},
        {"body": "x", "title": ["t"]},
        {"body": "half a pair \ud800"},
        {"body": "x", "project": "\ud800"},
        {"body": "x", "actions": [{"text": "x", "assignee": "\ud800"}]},
    ],
)
def test_invalid_arguments_are_an_invalid_brief(args: dict[str, object]) -> None:
    with pytest.raises(InvalidBrief):
        brief.draft_of(args)


def test_arguments_nested_without_end_are_an_invalid_brief() -> None:
    nested: list[object] = []
    for _ in range(5_000):
        nested = [nested]
    with pytest.raises(InvalidBrief):
        brief.draft_of({"body": "x", "to": nested})


def test_a_header_that_could_not_be_read_again_is_refused() -> None:
    with pytest.raises(InvalidBrief):
        brief.draft_of({"body": "x", "actions": [f"{n} " + "\x01" * 450 for n in range(50)]})
    long = [f"{n} " + "é" * 490 for n in range(50)]
    draft = brief.draft_of({"body": "x", "actions": long})
    assert brief.parse(brief.format(Brief(draft=draft))).draft == draft


# ---- properties ----

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
lines = words.map(lambda text: " ".join(text.split())).filter(bool)
extra_keys = words.filter(
    lambda key: (
        brief._SPELLINGS.get(folded := key.strip().lower().replace("-", "_"), folded) not in brief._KEYS
    )
)
extra_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
drafts = st.builds(
    Draft,
    title=lines,
    body=st.text(st.characters(exclude_categories=["Cs"])),
    to=st.lists(addresses, max_size=4, unique=True).map(tuple),
    cc=st.lists(addresses, max_size=2, unique=True).map(tuple),
    thread=st.none() | st.just("0197a-b"),
    reply_to=st.none() | st.just("0197a-c"),
    priority=st.sampled_from(action.PRIORITIES),
    project=st.none() | lines,
    due_ms=st.none() | st.integers(0, 4_000_000_000_000),
    ttl_ms=st.none() | st.integers(1, 1_000_000).map(lambda seconds: seconds * 1_000),
    intent=st.none() | st.sampled_from(brief.INTENTS),
    tags=st.lists(lines.filter(lambda tag: "," not in tag and tag[0] != "#"), max_size=3, unique=True).map(
        tuple
    ),
    actions=st.lists(actions, max_size=3).map(tuple),
    extra=st.dictionaries(extra_keys, extra_values, max_size=3),
)
briefs = st.builds(
    Brief,
    id=st.none() | st.just("01970000-0000-7000-8000-000000000001"),
    date_ms=st.none() | st.integers(0, 4_000_000_000_000),
    sender=st.none() | addresses,
    draft=drafts,
)


@settings(deadline=None)
@given(briefs)
def test_a_brief_that_is_written_reads_back_the_same(written: Brief) -> None:
    assert brief.parse(brief.format(written)) == written


FRAGMENTS = (
    "---\n|title|: |to|date|action|- |#|@|a|\n|  |[|]|{|}|'|\"|>|&a|*a|!x|? |%|"
    "\t|\r|2026-01-01|...|é|\u2028|<<|null|,|\ufeff|\x00"
)
fragments = st.lists(st.sampled_from([*FRAGMENTS.split("|"), "|"]), max_size=40).map("".join)


@settings(deadline=None, max_examples=400)
@given(st.text() | fragments | fragments.map(lambda header: f"---\ntitle: x\n{header}\n---\nbody"))
def test_any_text_is_a_brief_or_an_invalid_brief(text: str) -> None:
    try:
        parsed = brief.parse(text)
    except InvalidBrief:
        return
    assert brief.parse(brief.format(parsed)) == parsed


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*brief._ARGS, "body", "markdown", "actions"]), json_values))
def test_any_arguments_are_a_draft_or_an_invalid_brief(args: dict[str, object]) -> None:
    try:
        draft = brief.draft_of(args)
    except InvalidBrief:
        return
    assert brief.parse(brief.format(Brief(draft=draft))).draft == draft


@settings(deadline=None)
@given(st.dictionaries(words, extra_values, max_size=5))
def test_any_values_are_read_as_they_were_written(values: dict[str, object]) -> None:
    tree = frontmatter.read(frontmatter.write(values))
    assert {key: frontmatter.value_of(node) for key, node in tree.items()} == values
