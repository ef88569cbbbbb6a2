"""Networks that are late, cut, half there, or one-way: F12, F13, F15, and peers that can only dial out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import cannot
from tests.faults import netns, scenarios
from tests.faults.scenarios import side_by_side

Record = Callable[[str, object], None]
SOAK = [1, pytest.param(10, marks=[pytest.mark.soak, pytest.mark.timeout(1_800)])]


@pytest.fixture
def namespaces() -> None:
    if not netns.can_be_made():
        cannot("network namespaces need root and iproute2 on Linux")


@pytest.mark.parametrize("times", SOAK)
def test_latency_resets_half_closes_and_wrong_bytes_lose_nothing(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    measured = scenarios.bad_network(tmp_path, times=10 * times)
    record_property("faults", 40 * times)
    assert measured["states"]["delivered"] > 1_000


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("times", SOAK)
def test_a_partition_is_seen_by_all_and_loses_nothing(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    for number in range(times):
        runs = side_by_side(scenarios.partition, tmp_path / str(number), times=3)
        print(runs)
    record_property("faults", 3 * times)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("times", SOAK)
def test_a_one_way_partition_makes_nobody_flap(tmp_path: Path, record_property: Record, times: int) -> None:
    for number in range(times):
        runs = side_by_side(scenarios.one_way, tmp_path / str(number), times=2)
        print(runs)
    record_property("faults", 2 * times)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("times", SOAK)
def test_a_peer_that_can_only_dial_out_is_delivered_to(
    tmp_path: Path, record_property: Record, times: int
) -> None:
    for number in range(times):
        scenarios.dial_only(tmp_path / str(number))
    record_property("faults", times)
