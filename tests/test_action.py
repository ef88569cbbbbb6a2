"""Actions out of frontmatter and task lists, and which status can follow which."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_free.errors import InvalidInput
from zmail import action, times
from zmail.action import Action
from zmail.errors import InvalidBrief

APRIL_1 = times.parse_time("2026-04-01")


def test_an_open_task_line_becomes_an_action_with_all_its_marks() -> None:
    (found,) = action.extract((), "Please:\n- [ ] @bravo fix the lock !high due:2026-04-01\n")
    assert found == Action(text="fix the lock", assignee="bravo", priority="high", due_ms=APRIL_1)


def test_closed_quoted_and_fenced_tasks_are_left_alone() -> None:
    body = """
- [x] closed
> - [ ] quoted from an older brief
```markdown
- [ ] an example
~~~
- [ ] still the example
````
1. [ ] numbered
~~~
- [ ] another example
~~~~
  * [ ] indented
```one line of code```
- [ ] after inline code
```
- [ ] in a fence that nobody closes
"""
    assert [each.text for each in action.extract((), body)] == ["numbered", "indented", "after inline code"]


def test_a_task_named_in_the_frontmatter_and_in_the_body_is_one_action() -> None:
    written = action.from_frontmatter(["Fix the lock", {"text": "deploy", "assignee": "bravo"}])
    found = action.extract(written, "- [ ] fix  the lock\n- [ ] @bravo deploy\n- [ ] @alpha deploy")
    assert [(each.text, each.assignee) for each in found] == [
        ("Fix the lock", None),
        ("deploy", "bravo"),
        ("deploy", "alpha"),
    ]


def test_words_that_are_not_quite_marks_stay_in_the_text() -> None:
    line = "ask @bravo about !important due:soon"
    assert action.from_line(line) == Action(text=line)
    assert action.from_line("@bra/vo run") == Action(text="@bra/vo run")
    assert action.from_line("!high") == Action(text="!high")
    assert action.from_line("@bravo !low") == Action(text="@bravo !low")


def test_an_action_is_written_as_text_list_or_objects() -> None:
    assert action.from_frontmatter("Review") == (Action(text="Review"),)
    assert action.from_frontmatter(["Review", "", None]) == (Action(text="Review"),)
    assert action.from_frontmatter(None) == ()
    whole = {
        "Text": "Review",
        "assignee": "@Bravo@server2",
        "priority": "HIGH",
        "due": "2026-04-01",
        "project": "shop",
    }
    assert action.from_frontmatter([whole]) == (
        Action(text="Review", assignee="bravo@server2", priority="high", due_ms=APRIL_1, project="shop"),
    )


@pytest.mark.parametrize(
    "value",
    [
        3,
        [3],
        [["nested"]],
        {},
        {"text": ""},
        {"text": 3},
        {"text": "a", "owner": "bravo"},
        {"text": "a", "priority": "asap"},
        {"text": "a", "due": "soon"},
        {"text": "a", "assignee": "#ops"},
        {"text": "a", "assignee": "not a name"},
        {"text": "a", "project": "p" * 101},
        "a" * 501,
        ["a"] * 51,
    ],
)
def test_what_is_no_action_is_refused_with_the_reason(value: object) -> None:
    with pytest.raises(InvalidBrief) as refused:
        action.from_frontmatter(value)
    assert refused.value.message


def test_a_body_full_of_tasks_gives_no_more_than_the_limit() -> None:
    body = "".join(f"- [ ] task {number}\n" for number in range(100_000))
    assert len(action.extract((), body)) == action.ACTIONS_MAX


actions = st.builds(
    Action,
    text=st.text(max_size=60).map(lambda text: " ".join(text.split())).filter(bool)
    | st.sampled_from(["@bravo run", "!high", "run !low", "due:2026-01-01 x", "- [ ] x"]),
    assignee=st.none() | st.sampled_from(["bravo", "bravo@server2"]),
    priority=st.none() | st.sampled_from(action.PRIORITIES),
    due_ms=st.none() | st.integers(min_value=0, max_value=4_000_000_000_000),
    project=st.none() | st.sampled_from(["shop", "My Shop"]),
)


@settings(deadline=None)
@given(st.lists(actions, max_size=5))
def test_written_actions_read_back_as_they_were(several: list[Action]) -> None:
    assert action.from_frontmatter(action.to_frontmatter(several)) == tuple(several)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "due", "assignee", "x"]), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(json_values)
def test_any_value_is_actions_or_an_invalid_brief(value: object) -> None:
    try:
        found = action.from_frontmatter(value)
    except InvalidBrief:
        return
    assert all(each.text for each in found)


@settings(deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["- [ ] ", "```", "~~~", "\n", "@", "!high", "due:", " x", "\r"])).map("".join)
)
def test_no_body_makes_extraction_fail(body: str) -> None:
    assert all(each.text for each in action.extract((), body))


def test_an_action_goes_through_its_life() -> None:
    assert action.move("pending", "wip") == "wip"
    assert action.move("wip", "done") == "done"
    assert action.move("done", "pending") == "pending"
    assert action.move("skip", "skip") == "skip"


@pytest.mark.parametrize(("status", "to"), [("done", "skip"), ("skip", "done"), ("pending", "finished")])
def test_a_move_that_is_not_in_the_table_is_refused_and_says_what_is(status: str, to: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        action.move(status, to)
    assert "pending" in (refused.value.hint or "")
