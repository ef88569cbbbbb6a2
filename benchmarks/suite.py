"""What a suite is and how it is run: contenders in turn, round after round. Knows no particular system."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.figures import spread
from benchmarks.lab import Lab

Metrics = dict[str, float]


class Absent(Exception):
    """A contender that this machine does not have; its column stays empty and the report says why."""


class Contender(Protocol):
    """One system under test. It lives through all rounds, idle while the others are measured."""

    @property
    def name(self) -> str: ...

    def start(self, lab: Lab) -> None:
        """Start its processes and warm them up. Raises Absent."""

    def measure(self) -> Metrics:
        """One round, named by metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure that every row of the suite may have, found under `<row key>.<suffix>`."""

    suffix: str
    label: str
    with_spread: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    key: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a ratio is wanted to be: exactly one of the two bounds is set."""

    at_most: float | None = None
    at_least: float | None = None

    def is_reached_by(self, ratio: float) -> bool:
        return (self.at_most is None or ratio <= self.at_most) and (
            self.at_least is None or ratio >= self.at_least
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One result: `of` divided by `to` in each round."""

    label: str
    of: str
    to: str
    goal: Goal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    name: str
    title: str
    method: str  # for the reader of the report: what was sent, how often, between what
    unit: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    ratios: Sequence[Ratio]
    contenders: Callable[[], Sequence[Contender]]


def run(suite: Suite, *, rounds: int, lab: Lab, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure a suite and return its result, ready to be stored as JSON."""
    present, absent = _start(suite.contenders(), lab, progress)
    bystanders = machine.Bystanders(lab.cpu_s())
    measured: list[Metrics] = []
    for number in range(rounds):
        metrics: Metrics = {}
        for contender in _in_turn(present, number):
            progress(f"{suite.name}: round {number + 1} of {rounds}, {contender.name}")
            metrics.update(contender.measure())
        measured.append(metrics)
    return {
        "suite": suite.name,
        "title": suite.title,
        "method": suite.method,
        "unit": suite.unit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "commit": machine.describe_commit(),
        "machine": machine.describe_machine(lab.folder),
        "bystanders": bystanders.share(lab.cpu_s()),
        "versions": machine.describe_versions(),
        "absent": absent,
        "columns": [asdict(column) for column in suite.columns],
        "rows": [asdict(row) for row in suite.rows],
        "ratios": [_judge(ratio, measured) for ratio in suite.ratios],
        "rounds": measured,
    }


def _start(
    contenders: Sequence[Contender], lab: Lab, progress: Callable[[str], None]
) -> tuple[list[Contender], dict[str, str]]:
    present: list[Contender] = []
    absent: dict[str, str] = {}
    for contender in contenders:
        progress(f"starting {contender.name}")
        try:
            contender.start(lab)
            present.append(contender)
        except Absent as reason:
            absent[contender.name] = str(reason)
    return present, absent


def _in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """Another order each round, so that nobody always runs in the wake of the same neighbour."""
    shift = number % len(contenders) if contenders else 0
    turned = [*contenders[shift:], *contenders[:shift]]
    return turned[::-1] if number % 2 else turned


def _judge(ratio: Ratio, measured: Sequence[Metrics]) -> dict[str, Any]:
    """The ratio of every round, their median and spread, and whether the goal is reached."""
    judged: dict[str, Any] = {
        "label": ratio.label,
        "of": ratio.of,
        "to": ratio.to,
        "goal": asdict(ratio.goal) if ratio.goal else None,
    }
    per_round = [
        metrics[ratio.of] / metrics[ratio.to]
        for metrics in measured
        if ratio.of in metrics and ratio.to in metrics
    ]
    if per_round:
        judged["rounds"] = per_round
        judged.update(asdict(spread(per_round)))
        judged["reached"] = ratio.goal.is_reached_by(judged["median"]) if ratio.goal else None
    return judged
