"""Policies of tenants and keys: set, known everywhere, damaged ones on the safe side (S2-15, S1-G07, D4)."""

import logging
from typing import Any

import msgspec
import pytest

from shared.state import keys, policies
from shared.state.admin import announce
from shared.state.base import Principal
from shared.state.policies import KeyChange, KeyPolicy, TenantChange, TenantPolicy
from shared.state.redis import State
from tests.state.conftest import Connect
from tests.state.rig import Money

BOOTSTRAP = b"g" * 40


async def principal(state: State, tenant: str, key: str) -> Principal | None:
    await state.registry.poll()
    return state.registry.lookup(tenant, key)


async def test_policies_reach_every_process(own_valkey: str, connect: Connect) -> None:
    """By the version that is polled each 500 ms: here the poll itself."""
    here, there = await connect(own_valkey), await connect(own_valkey)
    expires = there.clock.now() + 60_000
    change = KeyChange(rpm=10, tpm=20, expires=expires, models=["a", "b", "a"])
    made = await here.create_key("acme", change=change, key_limits={"day": 5})
    found = await principal(there, made.tenant_id, made.key_id)
    assert found is not None
    assert (found.key_rpm, found.key_tpm, found.expires, found.models) == (10, 20, expires, frozenset({"a", "b"}))
    assert (found.mode, found.pii, found.keywords, found.clamp, found.tenant_rpm) == ("observe", "off", (), True, 0)
    words = ["secret", "geheim übel"]
    await here.admin.set_policy(
        made.tenant_id, TenantChange(mode="active", pii="redact", keywords=words, clamp=False, rpm=30, tpm=40)
    )
    found = await principal(there, made.tenant_id, made.key_id)
    assert found is not None
    assert (found.mode, found.pii, found.keywords, found.clamp) == ("active", "redact", tuple(words), False)
    assert (found.tenant_rpm, found.tenant_tpm, found.key_rpm) == (30, 40, 10)
    assert await here.admin.set_key(made.key_id, KeyChange(rpm=0, models=[]))
    await here.admin.set_policy(made.tenant_id, TenantChange(keywords=[], rpm=0))
    found = await principal(there, made.tenant_id, made.key_id)
    assert found is not None
    assert (found.key_rpm, found.key_tpm, found.models, found.keywords, found.tenant_rpm) == (0, 20, frozenset(), (), 0)
    (info,) = await here.admin.list_keys(made.tenant_id)
    assert info == await here.admin.key(made.key_id)
    assert info.policy == KeyPolicy(tpm=20, expires=found.expires)
    (tenant,) = await here.admin.list_tenants(made.tenant_id)
    assert tenant.policy == TenantPolicy(mode="active", pii="redact", clamp=False, tpm=40)
    assert [each.tenant for each in await here.admin.list_tenants()] == ["acme", "default"]
    assert not await here.admin.set_key("nosuchkey000", KeyChange(rpm=1))


async def test_the_bootstrap_key_has_policies_too(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey)
    assert await state.admin.set_key("bootstrap", KeyChange(rpm=7))
    await state.admin.set_policy("default", TenantChange(pii="flag"))
    await state.registry.poll()
    found = state.registry.authenticate(BOOTSTRAP)
    assert found is not None
    assert (found.key_rpm, found.pii) == (7, "flag")
    assert found == state.registry.lookup("default", "bootstrap")
    assert not await state.revoke_key("bootstrap")
    await state.admin.set_key("bootstrap", KeyChange(expires=1))
    await state.registry.poll()
    assert state.registry.lookup("default", "bootstrap") is None


async def test_an_expired_key_is_no_pair_any_more(own_valkey: str, connect: Connect) -> None:
    """At its very millisecond, without a poll: every process has the date and the shared clock. The ingress still
    authenticates it, and says why it is refused (tests/ingress/test_policy.py)."""
    state = await connect(own_valkey)
    expires = state.clock.now() + 60_000
    made = await state.create_key("acme", change=KeyChange(expires=expires))
    await state.registry.poll()
    time = [expires - 1]
    state.registry._now = lambda: time[0]
    assert state.registry.lookup(made.tenant_id, made.key_id)
    time[0] = expires
    assert state.registry.lookup(made.tenant_id, made.key_id) is None
    assert await state.registry.find(made.tenant_id, made.key_id) is None
    known = state.registry.authenticate(made.key.encode())
    assert known is not None
    assert known.expires == expires


async def test_a_limit_of_the_key_or_of_any_user_is_hard(own_valkey: str, connect: Connect) -> None:
    """D4: `limited` decides whether a request waits for the ledger or goes on without it. The key's own limit counts,
    not its neighbour's; a user's counts for all keys, since only the ledger knows which users have one."""
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    other = await state.create_key("acme")

    async def limited() -> tuple[bool, bool]:
        found = [await principal(state, made.tenant_id, each.key_id) for each in (made, other)]
        assert found[0] is not None
        assert found[1] is not None
        return found[0].limited, found[1].limited

    async def limit(level: str, amount: int | None) -> None:
        await state.set_limit(made.tenant_id, "month", amount, level)

    assert await limited() == (False, False)
    await limit(f"k:{made.key_id}", 5)
    assert await limited() == (True, False)
    await limit(f"k:{made.key_id}", None)
    assert await limited() == (False, False)
    await limit("u:0123456789abcdef", 5)
    assert await limited() == (True, True)
    await limit("u:0123456789abcdef", None)
    assert await limited() == (False, False)
    await Money(state, made.tenant_id).raw("HSET", keys.balances(made.tenant_id), keys.USERS, "some")
    await announce(state._side, made.tenant_id)
    assert await limited() == (True, True)


DAMAGED: dict[str, dict[str, Any]] = {
    "mode": {"mode": "active"},
    "pii": {"pii": "block"},
    "clamp": {"clamp": False},
    "rpm": {"tenant_rpm": 1},
    "tpm": {"tenant_tpm": 1},
    "rpm:KEY": {"key_rpm": 1},
    "tpm:KEY": {"key_tpm": 1},
    "models:KEY": {"models": policies.NO_MODELS},
}


@pytest.mark.parametrize("junk", [b"", b"-1", b"1e9", b"99999999999999999999", b"\xff", b"[]", b'[""]', b"nan", b" 1"])
async def test_what_is_damaged_is_strict(
    own_valkey: str, connect: Connect, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Each field by itself, and said in the log; setting it again repairs it."""
    state = await connect(own_valkey)
    made = await state.create_key("acme")
    conf = keys.config(made.tenant_id)
    for field, expected in DAMAGED.items():
        name = field.replace("KEY", made.key_id)
        await Money(state, made.tenant_id).raw("HSET", conf, name, junk)
        await announce(state._side, made.tenant_id)
        with caplog.at_level(logging.ERROR, "hotpath.state"):
            found = await principal(state, made.tenant_id, made.key_id)
        assert found is not None
        assert {each: getattr(found, each) for each in expected} == expected, field
        assert caplog.records[-1].__dict__["fields"] == [name]
        await Money(state, made.tenant_id).raw("HDEL", conf, name)
    for name in (f"expires:{made.key_id}", "keywords", f"key:{made.key_id}"):
        await Money(state, made.tenant_id).raw("HSET", conf, name, junk)
        await announce(state._side, made.tenant_id)
        assert await principal(state, made.tenant_id, made.key_id) is None, name
        await Money(state, made.tenant_id).raw("HDEL", conf, name)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "on"}, {"pii": 1}, {"clamp": "yes"}, {"rpm": -1}, {"tpm": 1_000_000_001}, {"rpm": True},
        {"keywords": ["a"] * 1001}, {"keywords": [""]}, {"keywords": ["x" * 129]}, {"keywords": ["a\n"]},
        {"keywords": [" a"]}, {"keywords": ["e", "de", "cde", "bcde", "abcde"]},
    ],
)  # fmt: skip
def test_policies_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        policies.tenant_fields(TenantChange(**change))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"surprise": 1}, TenantChange)


@pytest.mark.parametrize(
    "change", [{"expires": -1}, {"expires": 10**15}, {"models": ["a"] * 101}, {"models": [""]}, {"models": ["a\x00"]}]
)
def test_key_policies_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        policies.key_fields(KeyChange(**change), "abc")


async def test_a_key_with_a_bad_policy_or_limit_is_not_made(state: State) -> None:
    """Nothing is written before everything was checked."""
    for odd in (
        {"change": KeyChange(rpm=-1)}, {"key_limits": {"day": -1}}, {"key_limits": {"year": 1}}, {"period": "year"}
    ):  # fmt: skip
        with pytest.raises(ValueError):
            await state.create_key("never-made", **odd)
    assert await state.tenant_by_name("never-made") is None
