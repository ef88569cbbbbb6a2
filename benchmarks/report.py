"""Stored results as tables for a terminal and as Markdown. Pure: a result's JSON in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.figures import spread

Result = dict[str, Any]  # as suite.run() returns it; read back from a file it is plain JSON


def markdown(results: Sequence[Result]) -> str:
    """The whole of RESULTS.md."""
    parts = [
        "# Measured",
        "Written by `python -m benchmarks run`; do not edit. The ratios are the result: each is the median of\n"
        "the ratios of its interleaved rounds, with the lowest and highest. Absolute times move by a factor of\n"
        "two between runs on the same machine and are printed only to show the scale.",
    ]
    for result in results:
        parts += [
            f"## {result['title']}",
            f"{_occasion(result)}.",
            result["method"],
            _markdown_table(_ratio_table(result)),
            f"In {result['unit']}, median of the rounds:",
            _markdown_table(_row_table(result)),
            *[f"Not measured: {name}: {reason}" for name, reason in result["absent"].items()],
        ]
    return "\n\n".join(parts) + "\n"


def plain(result: Result) -> str:
    """One result for a terminal."""
    parts = [
        f"{result['title']}\n{_occasion(result)}",
        _plain_table(_ratio_table(result)),
        f"In {result['unit']}, median of the rounds:\n{_plain_table(_row_table(result))}",
        *[f"Not measured: {name}: {reason}" for name, reason in result["absent"].items()],
    ]
    return "\n\n".join(parts)


def _occasion(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rounds = len(result["rounds"])
    return (
        f"{result['date'][:10]}, commit {result['commit']}, {rounds} round{'s' if rounds != 1 else ''}. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['disk']}; other processes "
        f"took {result['bystanders']:.0%} of the processors. {versions}"
    )


def _ratio_table(result: Result) -> list[list[str]]:
    table = [["ratio", "median", "min..max", "goal", ""]]
    for ratio in result["ratios"]:
        if "median" not in ratio:
            table.append([ratio["label"], "", "", _goal(ratio["goal"]), "not measured"])
            continue
        table.append(
            [
                ratio["label"],
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f}..{ratio['high']:.2f}",
                _goal(ratio["goal"]),
                {True: "reached", False: "**not reached**", None: ""}[ratio["reached"]],
            ]
        )
    return table


def _goal(goal: dict[str, float | None] | None) -> str:
    if goal is None:
        return ""
    if goal["at_most"] is not None:
        return f"≤ {goal['at_most']:g}"
    return f"≥ {goal['at_least']:g}"


def _row_table(result: Result) -> list[list[str]]:
    table = [["", *(column["label"] for column in result["columns"])]]
    for row in result["rows"]:
        cells = [
            _cell(result["rounds"], f"{row['key']}.{column['suffix']}", column)
            for column in result["columns"]
        ]
        table.append([row["label"], *cells])
    return table


def _cell(rounds: Sequence[dict[str, float]], key: str, column: dict[str, Any]) -> str:
    values = [metrics[key] for metrics in rounds if key in metrics]
    if not values:
        return ""
    seen = spread(values)
    if column["with_spread"] and len(values) > 1:
        return f"{_number(seen.median)} ({_number(seen.low)}..{_number(seen.high)})"
    return _number(seen.median)


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:.1f}"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain_table(table: Sequence[Sequence[str]]) -> str:
    cleared = [[cell.replace("**", "") for cell in cells] for cells in table]
    widths = [max(len(cells[number]) for cells in cleared) for number in range(len(cleared[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in cleared
    )
