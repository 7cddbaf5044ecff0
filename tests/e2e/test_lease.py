"""I3: no reservation outlives its lease + 5 s, whoever made it and whatever became of them.

The test plays a worker that dies: it reserves (and dispatches) in the ledger by the project's own library and does no
more. The guardians' idle sweep must do the rest; no request of that tenant ever comes.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from deploy.cli.where import find
from shared.state.redis import State
from tests.e2e.books import entries, level
from tests.e2e.rig import Up

AMOUNT = 7_000_000
DEADLINE_S, GRACE_S = 0.5, 1.0  # the request's own, and LEDGER_LEASE_GRACE_MS of the fixture `up`


@pytest.fixture
async def state(up: Up) -> AsyncIterator[State]:
    """The ledger as a worker of this Hotpath has it."""
    made = await State.connect(find(str(up.data), up.env).settings())
    yield made
    await made.close()


@pytest.mark.parametrize("dispatched", [False, True], ids=["reserved", "dispatched"])
async def test_an_abandoned_call(up: Up, state: State, tenant: Callable[..., Any], dispatched: bool) -> None:
    """Only reserved: given back. Dispatched: unconfirmed, still held against the limit, and no longer pending."""
    made = await asyncio.to_thread(tenant, "--limit-usd", "1", "--period", "lifetime")
    who, rid, now = made["tenant_id"], secrets.token_hex(16), state.clock.now()
    deadline = now + int(DEADLINE_S * 1000)
    reserved = await state.ledger.reserve(
        tenant=who, rid=rid, delivery=1, amount=AMOUNT, deadline=deadline, not_after=now + 400, key="k"
    )
    assert reserved.status == "ok"
    if dispatched:
        won = await state.ledger.dispatch(
            tenant=who, rid=rid, delivery=1, instance="gone00000000", lost="", amount=AMOUNT, max_calls=3,
            not_after=now + 400,
        )  # fmt: skip
        assert won.status == "won"
    began = time.monotonic()
    row = await asyncio.to_thread(level, up, made["tenant"])
    assert (row["pending"], row["unconfirmed"]) == (AMOUNT, 0)
    while row["pending"]:
        assert time.monotonic() - began < DEADLINE_S + GRACE_S + 5
        row = await asyncio.to_thread(level, up, made["tenant"])
    assert time.monotonic() - began > DEADLINE_S + GRACE_S - 0.5, "the lease ended early"
    assert (row["settled"], row["unconfirmed"]) == (0, AMOUNT if dispatched else 0)
    (entry,) = (await asyncio.to_thread(entries, up, made["tenant"])).values()
    assert entry.state == ("unconfirmed" if dispatched else "voided")
