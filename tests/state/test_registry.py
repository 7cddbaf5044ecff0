"""Tenants and keys: made, known everywhere, revoked everywhere within a second (D7, D16, D17, S0-04..07, faults C)."""

import asyncio
import time
from collections.abc import Callable

import pytest

from shared.state import keys
from shared.state.admin import announce
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.state.registry import AT_ONCE, MAX_TOKEN, UNKNOWN_KEPT
from tests.state.conftest import Connect
from tests.state.rig import Money


async def within_a_second(condition: Callable[[], object]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.01)


async def test_the_bootstrap_key_is_known_from_the_settings(state: State) -> None:
    """D16: tenant `default`, never synthetic, whatever Redis holds."""
    principal = state.registry.authenticate(b"g" * 40)
    assert principal is not None
    assert (principal.tenant, principal.key, principal.tenant_name) == ("default", "bootstrap", "default")
    assert (principal.synthetic, principal.limited) == (False, False)
    assert state.registry.lookup("default", "bootstrap") == principal
    assert state.registry.ready
    assert state.registry.fresh


async def test_a_new_key_is_known_to_every_process(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    there.run()
    made = await here.create_key("acme", 5_000_000_000, "day", synthetic=True)
    assert made.key.startswith("br_live_" + made.key_id + "_")
    assert len(made.key) == 64
    await within_a_second(lambda: there.registry.authenticate(made.key.encode()))
    principal = there.registry.lookup(made.tenant_id, made.key_id)
    assert principal is not None
    assert (principal.tenant_name, principal.synthetic, principal.limited) == ("acme", True, True)
    assert (await Money(there, made.tenant_id).levels())["day"].limit == 5_000_000_000


async def test_a_real_tenant_is_not_opened_to_direct_publishers(own_valkey: str, connect: Connect) -> None:
    """A slip of the operator's must not open a customer's money to load tests."""
    here = await connect(own_valkey)
    await here.create_key("acme")
    for name in ("acme", "default"):
        with pytest.raises(ValueError, match="real tenant"):
            await here.create_key(name, synthetic=True)
    await here.create_key("load", synthetic=True)
    await here.create_key("load", synthetic=True)


async def test_a_key_made_a_moment_ago_is_fetched(own_valkey: str, connect: Connect) -> None:
    """S0-07: the lazy path, so that the first request after `hotpath keys create` is no 401."""
    here, there = await connect(own_valkey), await connect(own_valkey)
    made = await here.create_key("acme")
    assert there.registry.authenticate(made.key.encode()) is None
    principal = await there.registry.fetch(made.key.encode())
    assert principal is not None
    assert there.registry.authenticate(made.key.encode()) == principal
    assert await there.registry.fetch(made.key[:-1].encode() + b"!") is None
    other = await here.create_key("acme")
    assert there.registry.lookup(other.tenant_id, other.key_id) is None
    assert await there.registry.find("nobody", other.key_id) is None
    found = await there.registry.find(other.tenant_id, other.key_id)
    assert found is not None
    assert found.key == other.key_id
    for odd in ("", "a b", "x" * 200, "ü"):
        assert await there.registry.find(other.tenant_id, odd) is None


async def test_revoked_everywhere_within_a_second(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    first, second = await here.create_key("acme"), await here.create_key("acme")
    assert first.tenant_id == second.tenant_id
    await there.registry.poll()
    assert there.registry.authenticate(first.key.encode())
    there.run()
    assert await here.revoke_key(first.key_id)
    await within_a_second(lambda: there.registry.authenticate(first.key.encode()) is None)
    assert there.registry.lookup(first.tenant_id, first.key_id) is None
    assert await there.registry.fetch(first.key.encode()) is None
    assert there.registry.authenticate(second.key.encode())
    assert not await here.revoke_key("nosuchkey000")
    assert not await here.revoke_key("a}b{")
    listed = {each.key_id: each.revoked for each in await here.list_keys()}
    assert listed[first.key_id] > 0
    assert listed[second.key_id] == 0


async def test_a_notice_makes_it_sooner(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    made = await here.create_key("acme")
    there.run()
    there.registry.refresh_soon()
    async with asyncio.timeout(0.3):
        while there.registry.authenticate(made.key.encode()) is None:
            await asyncio.sleep(0.002)


async def test_a_limit_set_or_cleared_reaches_every_process(own_valkey: str, connect: Connect) -> None:
    """D4 hangs on `limited`: also for the default tenant, and for a limit that is damaged."""
    here, there = await connect(own_valkey), await connect(own_valkey)
    bootstrap = b"g" * 40

    def limited() -> bool:
        principal = there.registry.authenticate(bootstrap)
        assert principal is not None
        return principal.limited

    await here.set_limit("default", "month", 7)
    await there.registry.poll()
    assert limited()
    await here.set_limit("default", "month", None)
    await there.registry.poll()
    assert not limited()
    await Money(here, "default").raw("HSET", keys.balances("default"), keys.limit_field(), "junk")
    await announce(here._side, "default")
    await there.registry.poll()
    assert limited()


async def test_hostile_tokens(state: State) -> None:
    """Faults C 69-76: nothing raises, nothing is slow, nothing matches."""
    made = await state.create_key("acme")
    await state.registry.poll()
    good = made.key.encode()
    hostile = [
        b"", b" ", b"\xff" * 64, b"br_live_", good[:20], good[:-1], good + b"x", good.upper(), good[:21] + b"\xff" * 43,
        b"br_live_" + b"\x00" * 12 + b"_" + b"a" * 43, b"' OR '1'='1", b"g" * 39, b"g" * 41, b"x" * 1_048_576,
        "br_live_ünïcödé".encode(), b"g" * (MAX_TOKEN + 1),
    ]  # fmt: skip
    began = time.monotonic()
    for token in hostile:
        assert state.registry.authenticate(token) is None
        assert await state.registry.fetch(token) is None
    assert time.monotonic() - began < 0.5
    assert state.registry.authenticate(good)


async def test_keys_are_stored_as_hmac_only(own_valkey: str, connect: Connect) -> None:
    """D7, I9: neither the key nor its secret part is anywhere in Redis."""
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    secret = made.key[21:].encode()
    for name in await state._side.execute(b"KEYS", b"*", within=1.0):
        kind = await state._side.execute(b"TYPE", name, within=1.0)
        if kind == b"hash":
            assert not any(secret in each for each in await state._side.execute(b"HGETALL", name, within=1.0))
    conf = await state._side.execute(b"HGET", keys.config(made.tenant_id), f"key:{made.key_id}", within=1.0)
    assert len(conf) == 64
    assert secret not in conf


async def test_unknown_ids_cost_one_look_up_a_second(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey)
    token = b"br_live_" + b"nosuchkey000" + b"_" + b"a" * 43
    await state._side.execute(b"CONFIG", b"RESETSTAT", within=1.0)
    for _ in range(20):
        assert await state.registry.fetch(token) is None
    stats = await state._side.execute(b"INFO", b"commandstats", within=1.0)
    assert b"cmdstat_hget:calls=1," in stats
    for n in range(UNKNOWN_KEPT + 10):
        state.registry._unknown[b"%012d" % n] = float("inf")
    state.registry._unknown.pop(b"nosuchkey000", None)
    assert await state.registry.fetch(token) is None
    assert len(state.registry._unknown) == 1  # bounded


async def test_while_redis_is_away_known_keys_work_and_unknown_ones_are_503(own_valkey: str, connect: Connect) -> None:
    """DESIGN 5."""
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    await state.registry.poll()
    await state._hot.close()
    await state._side.close()
    assert state.registry.authenticate(made.key.encode())
    with pytest.raises(StateUnavailable):
        await state.registry.fetch(b"br_live_" + b"nosuchkey000" + b"_" + b"a" * 43)
    with pytest.raises(StateUnavailable):
        await state.registry.poll()
    state.registry._answered -= 2
    assert not state.registry.fresh


async def test_many_tenants_are_loaded_fifty_at_a_time(own_valkey: str, connect: Connect) -> None:
    """S0-04..06; later ones one by one as they change."""
    first = await connect(own_valkey)
    made = [await first.create_key(f"tenant-{n}") for n in range(2 * AT_ONCE + 7)]
    second = await connect(own_valkey)
    assert all(second.registry.authenticate(each.key.encode()) for each in made)
    assert len(second.registry.tenants()) == len(made) + 1
    await first.create_key("tenant-3")
    await second._side.execute(b"CONFIG", b"RESETSTAT", within=1.0)
    await second.registry.poll()
    stats = await second._side.execute(b"INFO", b"commandstats", within=1.0)
    assert b"cmdstat_hgetall:calls=1," in stats


async def test_a_redis_that_lost_everything_is_read_anew(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    await state.registry.poll()
    await state._side.execute(b"FLUSHALL", within=1.0)
    await state.registry.poll()
    assert state.registry.authenticate(made.key.encode()) is None
    assert state.registry.tenants() == ["default"]
    assert state.registry.authenticate(b"g" * 40)


async def test_names_and_ids(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    assert await state.tenant_by_name("acme") == made.tenant_id
    assert await state.tenant_by_name("default") == "default"
    assert await state.tenant_by_name("nobody") is None
    assert (await state.create_key("default")).tenant_id == "default"
    assert keys.OPAQUE.fullmatch(made.tenant_id)
    both = await asyncio.gather(state.create_key("twins"), state.create_key("twins"))
    assert both[0].tenant_id == both[1].tenant_id
    for name in ("", "a b", "a{b}", "../x", "-a", "a" * 65, "ü", "a\n"):
        with pytest.raises(ValueError, match="name"):
            await state.create_key(name)
    for limit in (-1, 2**53):
        with pytest.raises(ValueError, match="limit"):
            await state.create_key("acme", limit)
