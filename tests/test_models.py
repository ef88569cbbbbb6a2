"""The tables: which moves a brief can make, and that the queries of every call use the indexes made for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from peewee import ModelSelect, SqliteDatabase

from zmail.models import MODELS, UNDELIVERED, UNREAD, Delivery, Recipient
from zmail.states import ENDED, EXPIRED, FORWARD, PROGRESS, may_move


def test_a_brief_only_ever_moves_forward() -> None:
    for (at, state), (to, new) in product(enumerate(PROGRESS), repeat=2):
        assert may_move(state, new) == (to > at)
    for ended in ENDED - {EXPIRED}:
        assert FORWARD[ended] == frozenset()
    assert set(FORWARD) == {*PROGRESS, *ENDED}


def test_a_word_outside_the_table_is_a_bug() -> None:
    for state, new in (("delivered", "lost"), ("lost", "read")):
        with pytest.raises(KeyError):
            may_move(state, new)


@pytest.fixture
def database() -> Iterator[SqliteDatabase]:
    made = SqliteDatabase(":memory:")
    with made.bind_ctx(MODELS):
        made.create_tables(MODELS)
        yield made
    made.close()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (lambda: Delivery.select().where(Delivery.callsign == "a", UNREAD), "delivery_unread"),
        (
            lambda: Delivery.select().where(Delivery.callsign == "a").order_by(Delivery.id.desc()),
            "delivery_by_mailbox",
        ),
        (lambda: Delivery.select().where(UNREAD, Delivery.expires_ms <= 5), "delivery_expiring"),
        (lambda: Recipient.select().where(UNDELIVERED), "recipient_undelivered"),
    ],
)
def test_what_every_call_asks_for_has_an_index(database: SqliteDatabase, query: object, index: str) -> None:
    asked = query()  # type: ignore[operator]  # a lambda: models have no database before the fixture
    assert isinstance(asked, ModelSelect)
    sql, values = asked.sql()
    plan = database.execute_sql(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()  # type: ignore[no-untyped-call]
    assert index in str(plan)
