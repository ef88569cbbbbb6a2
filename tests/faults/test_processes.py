"""Processes that are killed, paused, starved, slow, or careless: F4, F16, F17, F18, F21, F24."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Measured, Scenario, side_by_side

Record = Callable[[str, object], None]
SOAK = [1, pytest.param(10, marks=[pytest.mark.soak, pytest.mark.timeout(1_800)])]


@pytest.mark.parametrize("times", SOAK)
def test_nothing_is_lost_doubled_or_reordered_when_nodes_are_killed(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    measured = scenarios.kills(tmp_path, times=60 * times)
    record_property("faults", 60 * times)
    assert measured["states"]["delivered"] > 1_000


@pytest.mark.parametrize("times", SOAK)
def test_a_node_that_is_paused_makes_nobody_else_flap(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    for number in range(times):
        runs = side_by_side(scenarios.pause, tmp_path / str(number), times=5)
    record_property("faults", 5 * times)
    assert all(run["states"]["delivered"] > 50 for run in runs)


@pytest.mark.parametrize("times", SOAK)
@pytest.mark.parametrize("scenario", [scenarios.slow_consumer, scenarios.poison])
def test_a_slow_or_failing_handler_holds_up_nobody_else(
    tmp_path: Path, record_property: Record, scenario: Scenario, times: int
) -> None:
    _repeat(scenario, tmp_path, times)
    record_property("faults", times)


@pytest.mark.parametrize("times", SOAK)
@pytest.mark.parametrize(
    "scenario", [scenarios.blocked_loop, scenarios.cancelled, scenarios.forked, scenarios.terminated]
)
def test_a_careless_host_application_neither_hangs_nor_loses_anything(
    tmp_path: Path, record_property: Record, scenario: Scenario, times: int
) -> None:
    _repeat(scenario, tmp_path, times)
    record_property("faults", times)


@pytest.mark.parametrize("times", SOAK)
def test_a_jump_of_the_clock_changes_no_lifetime(tmp_path: Path, record_property: Record, times: int) -> None:
    for number in range(times):
        scenarios.clock_jumps(tmp_path / str(number), times=10)
    record_property("faults", 10 * times)


@pytest.mark.parametrize("times", SOAK)
def test_a_node_without_descriptors_survives_and_recovers(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    scenarios.few_descriptors(tmp_path, times=3 * times)
    record_property("faults", 3 * times)


def _repeat(scenario: Scenario, folder: Path, times: int) -> list[Measured]:
    return [scenario(folder / str(number)) for number in range(times)]
