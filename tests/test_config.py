"""Settings from zmail.toml and ZMAIL_* variables, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmail.config import Settings, load
from zmail.errors import InvalidConfig
from zmail.paths import Home


def settings(home: Path, text: str = "", **env: str) -> Settings:
    """Load a home whose zmail.toml holds `text`."""
    (home / "zmail.toml").write_text(text)
    env = {"ZMAIL_HOME": str(home), **env}
    return load(Home.resolve(env), env)


def test_without_file_and_variables_the_defaults_hold(home: Path) -> None:
    env = {"ZMAIL_HOME": str(home)}
    found = load(Home.resolve(env), env)
    assert (found.listen, found.naming, found.name_prefix, found.callsigns) == (
        "tcp://0.0.0.0:7420", "project", None, (),
    )  # fmt: skip
    assert found.node_name
    assert {entry["source"] for entry in found.listing()} == {"default"}


def test_every_key_of_the_file_is_read(home: Path) -> None:
    found = settings(
        home,
        'naming = "spelling"\nname_prefix = "web"\ncallsigns = ["alpha", "bravo"]\n'
        '[node]\nname = "server1"\nlisten = "tcp://127.0.0.1:7000"\n',
    )
    assert (found.naming, found.name_prefix, found.callsigns) == ("spelling", "web", ("alpha", "bravo"))
    assert (found.node_name, found.listen) == ("server1", "tcp://127.0.0.1:7000")


def test_a_variable_wins_over_the_file_and_the_listing_says_so(home: Path) -> None:
    found = settings(home, 'node.name = "a"\nnode.listen = "tcp://[::]:1"\n', ZMAIL_LISTEN="tcp://*:0")
    assert found.listen == "tcp://*:0"
    assert [entry for entry in found.listing() if entry["key"].startswith("node.")] == [
        {"key": "node.name", "value": "a", "source": f"{home}/zmail.toml:1"},
        {"key": "node.listen", "value": "tcp://*:0", "source": "ZMAIL_LISTEN"},
    ]


def test_an_empty_variable_counts_as_unset(home: Path) -> None:
    assert settings(home, ZMAIL_LISTEN="").listen == "tcp://0.0.0.0:7420"


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (
            'naming = "project"\nnamming = "x"',
            "zmail.toml:2: unknown key 'namming'",
            "did you mean 'naming'?",
        ),
        ('[node]\n\nnmae = "x"', "zmail.toml:3: unknown key 'node.nmae'", "did you mean 'node.name'?"),
        ('listen = "tcp://*:1"', "zmail.toml:1: unknown key 'listen'", "did you mean 'node.listen'?"),
        ("# nothing\n[elsewhere]", "zmail.toml:2: unknown key 'elsewhere'", "the keys are: node.name, "),
        ('[[node.zzz]]\nid = "a"', "zmail.toml:1: unknown key 'node.zzz'", "did you mean 'node.name'?"),
        (
            '[node]\nname = "x"\nlisten = "tcp://h:99999"',
            "zmail.toml:3: node.listen must look like tcp://",
            None,
        ),
        ('node.listen = "7420"', "zmail.toml:1: node.listen must look like tcp://0.0.0.0:7420", None),
        ('naming = "numbers"', "zmail.toml:1: naming must be one of: project, spelling, not 'numbers'", None),
        ('callsigns = "alpha"', "zmail.toml:1: callsigns must be a list of names", None),
        ('callsigns = ["a b"]', "zmail.toml:1: callsigns must be a name", None),
        ("name_prefix = 7", "zmail.toml:1: name_prefix must be a name", None),
        (f'node.name = "{"n" * 65}"', "zmail.toml:1: node.name must be a name of at most 64", None),
        ("naming =", "is not valid TOML: Invalid value (at end of document)", None),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_nearest_key(
    home: Path, text: str, said: str, hint: str | None
) -> None:
    with pytest.raises(InvalidConfig) as wrong:
        settings(home, text)
    assert said in wrong.value.message
    assert str(home) in wrong.value.message
    assert (wrong.value.hint or "").startswith(hint or "")


def test_an_empty_table_of_a_known_name_is_no_error(home: Path) -> None:
    assert settings(home, "[node]\n").naming == "project"


def test_a_file_that_is_not_text_is_refused(home: Path) -> None:
    (home / "zmail.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="is not UTF-8"):
        load(Home.resolve({"ZMAIL_HOME": str(home)}), {"ZMAIL_HOME": str(home)})


def test_a_wrong_variable_is_named(home: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"ZMAIL_NODE_NAME: node\.name must be a name"):
        settings(home, ZMAIL_NODE_NAME="my node")


def test_a_configuration_named_by_variable_replaces_the_one_of_the_home(home: Path) -> None:
    other = home / "other.toml"
    other.write_text('naming = "spelling"')
    assert settings(home, 'name_prefix = "web"', ZMAIL_CONFIG=str(other)).name_prefix is None
    assert settings(home, ZMAIL_CONFIG=str(other)).naming == "spelling"


def test_a_configuration_may_be_named_by_its_folder(home: Path) -> None:
    (home / "etc").mkdir()
    (home / "etc/zmail.toml").write_text('naming = "spelling"')
    assert settings(home, ZMAIL_CONFIG=f"{home}/etc").naming == "spelling"


def test_a_configuration_that_is_named_and_missing_is_an_error(home: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"there is no configuration file .*/nowhere\.toml"):
        settings(home, ZMAIL_CONFIG=f"{home}/nowhere.toml")


def test_without_zmail_home_the_users_folders_are_searched_in_order(home: Path) -> None:
    env = {"HOME": str(home)}
    for number, folder in enumerate([home / ".zmail", home / ".config/zmail"]):
        folder.mkdir(parents=True)
        (folder / "zmail.toml").write_text(f'name_prefix = "from-{number}"')
        assert load(Home.resolve(env), env).name_prefix == f"from-{number}"


def test_a_home_of_its_own_does_not_read_the_users_configuration(home: Path) -> None:
    (home / ".zmail").mkdir()
    (home / ".zmail/zmail.toml").write_text('naming = "spelling"')
    env = {"HOME": str(home), "ZMAIL_HOME": f"{home}/h"}
    assert load(Home.resolve(env), env).naming == "project"
