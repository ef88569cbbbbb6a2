"""Steady time goes on through restarts and does not care what UTC is set to."""

from __future__ import annotations

from broker_free.clock import Anchor, SteadyClock, since_boot_ms

HOUR_MS = 3_600_000
UTC = 1_700_000_000_000


def kept(clock: SteadyClock, utc_ms: int) -> Anchor:
    anchor = clock.anchor(utc_ms=utc_ms)
    assert anchor is not None
    return anchor


def clock(anchor: Anchor | None, *, boot: str = "one", utc_ms: int = UTC, up_ms: int = 1_000) -> SteadyClock:
    return SteadyClock(anchor, boot=boot, since_boot_ms=up_ms, utc_ms=utc_ms)


def test_a_new_store_s_clock_starts_as_utc() -> None:
    assert clock(None).offset_ms == UTC - 1_000
    assert abs(clock(None, up_ms=since_boot_ms()).ms() - UTC) < 5_000


def test_a_restart_of_the_node_goes_on_where_the_machine_says_it_is() -> None:
    first = clock(None)
    again = clock(kept(first, UTC), utc_ms=UTC + 9 * HOUR_MS, up_ms=61_000)
    assert again.offset_ms == first.offset_ms, "a minute has passed, whatever UTC is set to by now"


def test_a_restart_of_the_machine_takes_utc_s_word_for_the_time_that_passed() -> None:
    first = clock(None, up_ms=since_boot_ms())
    anchor = kept(first, UTC)
    later = clock(anchor, boot="two", utc_ms=UTC + HOUR_MS, up_ms=10)
    assert abs(later.offset_ms + 10 - anchor.at_ms - HOUR_MS) < 5_000
    earlier = clock(anchor, boot="two", utc_ms=UTC - HOUR_MS, up_ms=10)
    assert earlier.offset_ms + 10 == anchor.at_ms, "never back"


def test_utc_that_was_set_is_written_down_and_small_steps_are_not() -> None:
    one = clock(None, up_ms=since_boot_ms())
    kept(one, UTC)
    assert one.anchor(utc_ms=UTC + 100) is None
    assert kept(one, UTC + HOUR_MS).ahead_ms > HOUR_MS - 5_000
    set_after = clock(kept(one, UTC), boot="two", utc_ms=UTC + HOUR_MS, up_ms=0)
    assert set_after.offset_ms > 0


def test_a_system_that_cannot_name_its_start_asks_utc() -> None:
    anchor = kept(clock(None, boot="", up_ms=since_boot_ms()), UTC)
    assert clock(anchor, boot="", utc_ms=UTC + HOUR_MS, up_ms=0).offset_ms > anchor.at_ms + HOUR_MS - 5_000
