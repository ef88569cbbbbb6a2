"""Callsigns of new sessions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmail import address, naming
from zmail.errors import CallsignTaken, InvalidAddress

SESSION = "0469CD76-1111-4222-8333-444444444444"


def free_but(*taken: str) -> Callable[[str], bool]:
    return lambda name: name not in taken


def test_a_session_is_named_after_its_project_and_its_id() -> None:
    assert (
        naming.new_callsign(project="my-shop", session_id=SESSION, is_free=free_but()) == "my-shop-0469cd76"
    )


def test_the_prefix_stands_in_for_the_project() -> None:
    name = naming.new_callsign(
        name_prefix="Build Box", project="my-shop", session_id=SESSION, is_free=free_but()
    )
    assert name == "build-box-0469cd76"


def test_two_processes_with_one_session_id_get_two_names() -> None:
    name = naming.new_callsign(project="shop", session_id=SESSION, is_free=free_but("shop-0469cd76"))
    assert name == "shop-0469cd76-2"


def test_a_session_id_that_is_no_uuid_still_gives_eight_hex_digits() -> None:
    name = naming.new_callsign(project="shop", session_id="resumed\ud800", is_free=free_but())
    assert len(name) == len("shop-") + 8
    assert address.callsign(name) == name


def test_the_configured_names_come_first_in_their_order() -> None:
    def name(*taken: str) -> str:
        return naming.new_callsign(
            configured=["Front", "back"], project="shop", session_id=SESSION, is_free=free_but(*taken)
        )

    assert (name(), name("front"), name("front", "back")) == ("front", "back", "shop-0469cd76")


def test_spelling_gives_the_next_free_word_and_never_runs_out() -> None:
    def name(*taken: str) -> str:
        return naming.new_callsign(
            naming="spelling", project="x", session_id=SESSION, is_free=free_but(*taken)
        )

    assert (name(), name("alpha", "bravo"), name(*naming.SPELLING)) == ("alpha", "charlie", "alpha-2")
    assert len(naming.SPELLING) == 26


def test_a_wanted_name_is_taken_as_it_is() -> None:
    wanted = naming.new_callsign(wanted="Alpha", project="x", session_id=SESSION, is_free=free_but())
    assert wanted == "alpha"


def test_a_wanted_name_that_another_holds_is_refused_with_a_free_one() -> None:
    with pytest.raises(CallsignTaken) as refused:
        naming.new_callsign(
            wanted="alpha", project="x", session_id=SESSION, is_free=free_but("alpha", "alpha-2")
        )
    assert "alpha-3" in (refused.value.hint or "")


def test_a_wanted_name_outside_the_grammar_is_refused() -> None:
    with pytest.raises(InvalidAddress):
        naming.new_callsign(wanted="no name", project="x", session_id=SESSION, is_free=free_but())


@pytest.mark.parametrize(
    ("git_root", "cwd", "expected"),
    [
        ("/src/My Shop", "/src/My Shop/api", "my-shop"),
        (None, "/src/API_v1.2", "api-v1-2"),
        (None, "/", "claude"),
        (None, None, "claude"),
        ("/src/店", "/src/店/web", "web"),
        (None, "/src/" + "long-" * 20, "long-" * 7 + "long"),
    ],
)
def test_the_project_is_the_git_root_else_the_folder_else_claude(
    git_root: str | None, cwd: str | None, expected: str
) -> None:
    assert naming.project_name(git_root=git_root, cwd=cwd) == expected


@given(st.text(), st.text(), st.text() | st.none())
def test_every_made_name_is_a_callsign(project: str, session_id: str, prefix: str | None) -> None:
    first = naming.new_callsign(
        name_prefix=prefix, project=project, session_id=session_id, is_free=free_but()
    )
    second = naming.new_callsign(
        name_prefix=prefix, project=project, session_id=session_id, is_free=free_but(first)
    )
    assert [address.callsign(name) for name in (first, second)] == [first, second]
    assert first != second
