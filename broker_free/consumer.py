"""Who works on which job, and until when. Pure: time comes in as an argument, decisions go out.

    free ── reserve ──► reserved ── start ──► leased ── drop (done, given back) ──► gone or free
                            │                    │
                            └── close ──► free   └── its time is over: lapse ──► free, one attempt more

A job that is fetched ahead is reserved: nobody else gets it, and its time does not run before it is handed out.
Leases are memory only. Whoever holds one lives in the node's own process, so a crash ends both, and the jobs are free
again by construction. For the same reason their clock is the monotonic one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from broker_free.errors import LeaseLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to settle one job."""

    consumer: int  # the durable
    row: int  # of the inbox
    holder: int  # the open subscription
    number: int  # grows with every lease, so that an earlier holder of the same job is told apart

    @property
    def job(self) -> tuple[int, int]:
        return self.consumer, self.row


class Leases:
    """All leases of a node."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Lease] = {}
        self._until_ms: dict[int, int] = {}  # by number, of those that were handed out
        self._last = 0

    def held(self, consumer: int) -> set[int]:
        """Return the rows that are not free."""
        return {row for number, row in self._held if number == consumer}

    def rows(self) -> set[int]:
        """Return the inbox rows of all leased jobs."""
        return {row for _, row in self._held}

    def reserve(self, consumer: int, rows: Iterable[int], *, holder: int) -> list[Lease]:
        """Keep free jobs for one holder."""
        reserved = []
        for row in rows:
            self._last += 1
            lease = Lease(consumer=consumer, row=row, holder=holder, number=self._last)
            assert lease.job not in self._held, "a job is fetched only while it is free"
            self._held[lease.job] = lease
            reserved.append(lease)
        return reserved

    def start(self, lease: Lease, *, now_ms: int, lease_ms: int) -> None:
        """Have a lease end `lease_ms` from now, unless it has ended already."""
        if self._held.get(lease.job) == lease:
            self._until_ms[lease.number] = now_ms + lease_ms

    def check(self, lease: Lease, *, now_ms: int) -> None:
        """Raise LeaseLost unless the job is still this lease's to settle."""
        if self._held.get(lease.job) != lease:
            raise LeaseLost(
                f"job {lease.row} is not leased to this consumer any more",
                hint="it is handed out again; work that takes longer calls progress(), or asks for a longer lease_ms",
            )
        if now_ms >= self._until_ms.get(lease.number, now_ms + 1):
            raise LeaseLost(
                f"the lease of job {lease.row} is over",
                hint="it is handed out again; work that takes longer calls progress(), or asks for a longer lease_ms",
            )

    def lapse(self, consumer: int, *, now_ms: int) -> list[int]:
        """Free the jobs of a consumer whose time is over, and return their rows."""
        over = [
            lease
            for lease in self._held.values()
            if lease.consumer == consumer and now_ms >= self._until_ms.get(lease.number, now_ms + 1)
        ]
        for lease in over:
            self.drop(lease)
        return [lease.row for lease in over]

    def drop(self, lease: Lease) -> None:
        """End a lease, if it has not ended already."""
        if self._held.get(lease.job) == lease:
            del self._held[lease.job]
            self._until_ms.pop(lease.number, None)

    def close(self, holder: int) -> None:
        """End all leases of a subscription that is closed."""
        for lease in [one for one in self._held.values() if one.holder == holder]:
            self.drop(lease)
