"""ARCHITECTURE.md, PROTOCOL.md and MATRIX.md say what is so: files, names, layers, numbers."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from broker_free.limits import Limits
from tests.conftest import ROOT
from tests.faults import matrix

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", ARCHITECTURE.partition(f"\n## {title}")[2], flags=re.MULTILINE)[0]


def rows_of_the_map() -> list[tuple[str, list[str], list[str]]]:
    """Return (question, files, what to search for in them)."""
    rows = [line.strip("|").split("|") for line in section("Map").splitlines() if line.startswith("| ")][1:]
    return [
        (question.strip(), re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", terms))
        for question, files, terms in rows
    ]


@pytest.mark.parametrize(("question", "files", "terms"), rows_of_the_map())
def test_a_row_of_the_map_leads_somewhere(question: str, files: list[str], terms: list[str]) -> None:
    text = ""
    for path in map(ROOT.joinpath, files):
        assert path.exists(), path
        each = sorted(path.glob("*.py")) if path.is_dir() else [path]
        text += "".join(one.name + "\n" + one.read_text() for one in each)
    assert files
    assert [term for term in terms if term not in text] == []


@pytest.mark.parametrize("package", ["broker_free", "zmail"])
def test_the_drawing_of_the_layers_is_the_contract(package: str) -> None:
    drawn = section("Layers").partition("```\n")[2].partition("```")[0]
    found = re.search(rf"^{package} (.*(?:\n .*)*)", drawn, re.MULTILINE)
    assert found
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == [package]]
    assert " ".join(found.group(1).split()).split(" → ") == layers


def test_decisions_are_numbered_in_order() -> None:
    numbers = [int(number) for number in re.findall(r"^\*\*D(\d+) · ", section("Decisions"), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(re.findall(r"^\*\*D", section("Decisions"), re.MULTILINE)) == len(numbers) > 0


def test_the_limits_that_the_protocol_names_exist() -> None:
    protocol = (ROOT / "broker_free/PROTOCOL.md").read_text()
    named = set(re.findall(r"`Limits\.(\w+)`|`(\w+_max)`", protocol))
    assert len(named) > 5
    assert {one or other for one, other in named} <= {field.name for field in fields(Limits)}


def test_the_matrix_is_the_table_of_what_is_kept() -> None:
    assert matrix.TABLE.read_text() == matrix.table(json.loads(matrix.KEPT.read_text()))


@pytest.mark.parametrize("row", [row for row in matrix.ROWS if row.pytest], ids=lambda row: row.key)
def test_a_row_of_the_matrix_names_tests_that_exist(row: matrix.Row) -> None:
    path, *chosen = row.pytest
    names = re.findall(r"^def (test_\w+)", Path(ROOT / path).read_text(), re.MULTILINE)
    words = chosen[1].split(" or ") if chosen else [""]
    assert all(any(word in name for name in names) for word in words)
