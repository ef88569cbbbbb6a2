"""Every move of a brief's state: made in this node's own rows, and told to the sender's node. Knows the tables.

A brief has two rows for each recipient: the delivery, in the mailbox's node, and the recipient, in the sender's.
Where both are here, both move in one transaction; where the sender is elsewhere, a receipt travels. `Moves` collects
what one transaction does, so that each node is told once. Nothing here decides who may do what.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from broker_free import Tx
from broker_free.errors import OutboxFull, UnknownPeer
from zmail import wire
from zmail.models import Brief, Delivery, Recipient
from zmail.states import ANNOUNCED, DEAD, DELIVERED, DONE, FORWARD, READ, may_move
from zmail.wire import Receipt

log = logging.getLogger(__name__)

NO_SUCH_CALLSIGN = "no-such-callsign"
UNREADABLE = "unreadable"

# When a state was reached; for the others, when it ended.
_TIME_OF = {DELIVERED: "delivered_ms", ANNOUNCED: "announced_ms", READ: "read_ms", DONE: "done_ms"}
_RECEIPTS_A_MESSAGE = 1_000  # of at most 600 bytes each: inside the limit of one message


class Moves:
    """The moves of one transaction. `tell()` comes last, once, inside it."""

    def __init__(self, tx: Tx, *, me: str, changed: Callable[[str], None]) -> None:
        self._tx = tx
        self._me = me
        self._changed = changed  # told the brief's id on the loop, once its sender's view is on disk
        self._receipts: defaultdict[str, list[Receipt]] = defaultdict(list)

    def move(
        self,
        brief: Brief,
        delivery: Delivery,
        state: str,
        *,
        door: str | None = None,
        lease_number: int | None = None,
    ) -> bool:
        """Move a delivery of this node to `state`, if that is news, and let its sender know."""
        if lease_number is not None:
            delivery.lease_number = lease_number
        is_news = may_move(delivery.state, state)
        if is_news:
            delivery.state = state
            if state == ANNOUNCED:
                delivery.announced_ms, delivery.door = self._tx.now_ms, door
            elif state == READ:
                delivery.read_ms = self._tx.now_ms
            elif state == DONE:
                delivery.done_ms = self._tx.now_ms
        if delivery.dirty_fields:
            delivery.save(only=delivery.dirty_fields)
        if is_news:
            self._note(
                brief,
                Receipt(
                    brief=brief.id, callsign=delivery.callsign, state=state, at_ms=self._tx.now_ms, door=door
                ),
            )
        return is_news

    def dead(self, *, brief: str, sender: str, callsign: str | None, reason: str) -> None:
        """Nobody here will ever get this brief, which another node sent."""
        self._receipts[sender].append(
            Receipt(brief=brief, callsign=callsign, state=DEAD, at_ms=self._tx.now_ms, reason=reason)
        )

    def hear(self, node: str, receipts: Iterable[Receipt]) -> None:
        """Take in what another node says of briefs that were sent from here."""
        for receipt in receipts:
            if brief := own_brief(receipt.brief, self._me):
                self._apply(brief, node, receipt)
            else:
                log.info("receipt for an unknown brief", extra={"id": receipt.brief, "peer": node})

    def tell(self) -> None:
        """Send each node the receipts for it."""
        for node, receipts in self._receipts.items():
            try:
                for start in range(0, len(receipts), _RECEIPTS_A_MESSAGE):
                    some = receipts[start : start + _RECEIPTS_A_MESSAGE]
                    self._tx.publish(wire.RECEIPT, wire.encode_receipts(some), to=[node], settles=True)
            except (UnknownPeer, OutboxFull) as error:
                # The mail itself is safe here; a sender that has left, or been away for long, learns no more of it.
                log.warning("receipts dropped", extra={"peer": node, "why": error.message})
        self._receipts.clear()

    def _note(self, brief: Brief, receipt: Receipt) -> None:
        if brief.from_node == self._me:
            self._apply(brief, self._me, receipt)
        else:
            self._receipts[brief.from_node].append(receipt)

    def _apply(self, brief: Brief, node: str, receipt: Receipt) -> None:
        """Move the sender's view of one recipient, or of all of them at that node, where that is news."""
        before = [state for state, after in FORWARD.items() if receipt.state in after]
        wanted = (Recipient.brief == brief.row) & (Recipient.node == node) & Recipient.state.in_(before)
        if receipt.callsign is not None:
            wanted &= Recipient.callsign == receipt.callsign
        values = {
            "state": receipt.state,
            "reason": receipt.reason,
            _TIME_OF.get(receipt.state, "ended_ms"): receipt.at_ms,
        }
        if receipt.door is not None:
            values["door"] = receipt.door
        if Recipient.update(**values).where(wanted).execute():
            self._tx.after_commit(lambda: self._changed(brief.id))


def own_brief(brief_id: str, me: str) -> Brief | None:
    """Find a brief that was sent from this node. Another node's may have the same id."""
    return Brief.get_or_none(Brief.from_node == me, Brief.id == brief_id)
