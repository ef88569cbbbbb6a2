"""The rules of leases, without a node."""

from __future__ import annotations

import pytest

from broker_free.consumer import Lease, Leases
from broker_free.errors import LeaseLost

DURABLE, OTHER = 1, 2


def one(leases: Leases, row: int = 7, *, consumer: int = DURABLE, holder: int = 1) -> Lease:
    (lease,) = leases.reserve(consumer, [row], holder=holder)
    return lease


def test_a_job_that_is_fetched_ahead_stays_reserved_however_long_the_one_before_it_takes() -> None:
    leases = Leases()
    lease = one(leases)
    assert leases.lapse(DURABLE, now_ms=10**9) == []
    leases.check(lease, now_ms=10**9)


def test_a_lease_ends_with_its_time_and_not_a_moment_before() -> None:
    leases = Leases()
    lease = one(leases)
    leases.start(lease, now_ms=1_000, lease_ms=50)
    leases.check(lease, now_ms=1_049)
    assert leases.lapse(DURABLE, now_ms=1_049) == []
    with pytest.raises(LeaseLost, match="is over"):
        leases.check(lease, now_ms=1_050)
    assert leases.lapse(DURABLE, now_ms=1_050) == [7]
    assert leases.held(DURABLE) == set()


def test_a_lease_that_is_started_anew_ends_later() -> None:
    leases = Leases()
    lease = one(leases)
    leases.start(lease, now_ms=0, lease_ms=50)
    leases.start(lease, now_ms=40, lease_ms=50)
    leases.check(lease, now_ms=89)
    with pytest.raises(LeaseLost):
        leases.check(lease, now_ms=90)


def test_an_earlier_holder_of_a_job_is_told_from_the_present_one() -> None:
    leases = Leases()
    first = one(leases)
    leases.start(first, now_ms=0, lease_ms=1)
    leases.lapse(DURABLE, now_ms=1)
    second = one(leases)  # the same holder may get it again: its old job object is worth nothing
    with pytest.raises(LeaseLost, match="not leased to this consumer"):
        leases.check(first, now_ms=1)
    leases.start(first, now_ms=1, lease_ms=9_999)
    leases.drop(first)
    leases.check(second, now_ms=10**9)


def test_what_a_closed_subscription_held_is_free_and_nothing_else() -> None:
    leases = Leases()
    mine, theirs = one(leases, 7, holder=1), one(leases, 8, holder=2)
    leases.close(1)
    assert leases.held(DURABLE) == {8}
    leases.check(theirs, now_ms=0)
    with pytest.raises(LeaseLost):
        leases.check(mine, now_ms=0)


def test_durables_hold_the_same_message_apart() -> None:
    leases = Leases()
    here = one(leases, 7, consumer=DURABLE)
    there = one(leases, 7, consumer=OTHER)
    leases.drop(here)
    leases.check(there, now_ms=0)
    assert (leases.held(DURABLE), leases.held(OTHER)) == (set(), {7})
