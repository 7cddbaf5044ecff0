"""State: connects, polls, closes, and leaves nothing behind; scripts and keys keep their own rules."""

import asyncio
import re
import time
from pathlib import Path

import msgspec
import pytest

from deploy import servers
from shared.state import keys, scripts
from shared.state.base import StateUnavailable
from shared.state.redis import State
from tests.state.conftest import Connect
from tests.state.rig import Money, new_rid, settings_for

LUA = Path(scripts.__file__).parent / "lua"


async def test_connect_run_close_leaves_no_task_and_no_connection(own_valkey: str, connect: Connect) -> None:
    """I8."""
    watcher = await connect(own_valkey)
    before = len(asyncio.all_tasks())
    state = await State.connect(settings_for(own_valkey))
    state.run()
    assert await state.ping()
    await asyncio.sleep(0.6)  # a poll
    await state.close()
    await state.close()  # again is harmless
    assert len(asyncio.all_tasks()) == before
    async with asyncio.timeout(1):
        while len((await watcher._side.execute(b"CLIENT", b"LIST", within=1.0)).splitlines()) > 2:
            await asyncio.sleep(0.01)


async def test_connect_without_a_server_fails_and_leaves_nothing() -> None:
    before = len(asyncio.all_tasks())
    with pytest.raises(StateUnavailable, match="cannot connect"):
        await State.connect(settings_for(f"redis://127.0.0.1:{servers.free_port()}/0"))
    assert len(asyncio.all_tasks()) == before


async def test_a_start_without_redis_heals_by_itself(tmp_path: Path) -> None:
    """S1-M6a: what is known is the bootstrap key, of a tenant whose limit is not known and therefore counts as hard;
    within 2 s of Redis's return the time, the tenants and the circuits are known."""
    port = servers.free_port()
    before = len(asyncio.all_tasks())
    state = State.away(settings_for(f"redis://127.0.0.1:{port}/0"))
    state.run()
    known = state.registry.authenticate(b"g" * 40)
    assert known is not None
    assert known.limited
    assert (state.registry.ready, state.registry.fresh, state.available) == (False, False, False)
    with pytest.raises(StateUnavailable):
        await state.registry.fetch(b"br_live_aaaaaaaaaaaa_" + b"A" * 43)
    with servers.running(servers.valkey_command(tmp_path / "valkey", port), port, tmp_path / "log"):
        async with asyncio.timeout(2):
            while not state.registry.ready:
                await asyncio.sleep(0.02)
        assert state.clock.ready
        known = state.registry.authenticate(b"g" * 40)
        assert known is not None
        assert not known.limited
        assert state.available
        await state.close()
    assert len(asyncio.all_tasks()) == before


@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
async def test_a_clock_that_jumped_is_followed(own_valkey: str, connect: Connect, jump_ms: int) -> None:
    """Faults 78: Redis comes back with another clock. Until the next sample (1 s) nothing runs that should not; then
    requests are served by the new time."""
    state = await connect(own_valkey)
    money = Money(state, "jumped")
    state.clock._offset -= jump_ms  # as if the server's clock had been that much behind until now
    state.clock._samples[-1] = msgspec.structs.replace(state.clock._samples[-1], offset=state.clock._offset)
    answer = await money.reserve(new_rid(), ttl=30_000)
    if jump_ms > 0:
        assert answer.status in {"late", "stale"}
    state.run()
    async with asyncio.timeout(2):
        while (await money.reserve(new_rid(), ttl=30_000)).status != "ok" or not _same_time(state):
            await asyncio.sleep(0.02)


def _same_time(state: State) -> bool:
    return abs(state.clock.now() - time.time() * 1000) < 60_000


async def test_polling_outlives_a_redis_that_goes_and_returns(tmp_path: Path, connect: Connect) -> None:
    port = servers.free_port()
    command = servers.valkey_command(tmp_path / "valkey", port)
    with servers.running(command, port, tmp_path / "log"):
        state = await connect(f"redis://127.0.0.1:{port}/0")
        state.run()
    async with asyncio.timeout(4):
        while state.registry.fresh:
            await asyncio.sleep(0.02)
    assert state.registry.authenticate(b"g" * 40)
    with servers.running(command, port, tmp_path / "log"):
        async with asyncio.timeout(2):
            while not state.registry.fresh:
                await asyncio.sleep(0.02)
        await state.close()


@pytest.mark.parametrize("name", sorted(path.stem for path in LUA.glob("[a-z]*.lua")))
def test_each_script_says_its_signature_and_is_short(name: str) -> None:
    """One verb, a header, named arguments; a shebang, so that a full Redis stops it before its first write."""
    text = (LUA / f"{name}.lua").read_text("utf-8")
    first, second = text.splitlines()[:2]
    assert first in {"#!lua", "#!lua flags=allow-oom", "#!lua flags=no-writes"}
    assert second.startswith(f"-- {name}(args=[")
    assert "-- Returns" in text
    assert len(text.splitlines()) <= 70
    assert ("allow-oom" in first) == (name in {"settle", "void", "expire", "correct", "circuit"})
    assert not re.search(r"KEYS\[|redis\.call\([^)]*ARGV", text.replace("-- KEYS", "")) or name in {
        "circuit",
        "announce",
        "look",
    }


def test_a_script_s_text_is_shebang_prelude_body() -> None:
    script = scripts.ledger_script("settle")
    lines = script.text.decode().splitlines()
    assert lines[0] == "#!lua flags=allow-oom"
    assert script.text.count(b"#!lua") == 1
    assert script.text.index(b"local function move") < script.text.index(b"local function post")
    assert script is scripts.ledger_script("settle")


def test_named_numbers_are_written_out() -> None:
    """Outside strings, and every one of them: a name that is left would be nil."""
    text = "#!lua\nlocal KEY, DUE = 7, 8 -- places\nlocal BLUR = 1e-6\nreturn {KEYS[1], entry[KEY], 'KEY', DUE, BLUR}\n"
    assert scripts._written_out(text).splitlines() == [
        "#!lua", " -- places", "", "return {KEYS[1], entry[7], 'KEY', 8, 1e-6}"
    ]  # fmt: skip
    for name in ("reserve", "dispatch", "topup", "extend", "settle", "void", "expire", "correct", "restore", "limit"):
        code = re.sub(rb"--[^\n]*|'[^'\n]*'", b"", scripts.ledger_script(name).text)
        assert set(re.findall(rb"\b[A-Z][A-Z_]+\b", code)) <= {b"KEYS", b"ARGV", b"PERIODS", b"KINDS"}


def test_keys_of_one_script_share_a_slot_and_buckets_are_dates() -> None:
    assert {re.findall(rb"\{(.*?)\}", key)[0] for key in (*keys.ledger("t1"), keys.config("t1"))} == {b"t1"}
    assert keys.bucket("day", 1_795_226_400_000) == "2026-11-21"
    assert keys.bucket("month", 1_795_226_400_000) == "2026-11"
    assert keys.bucket("lifetime", 0) == "lifetime"
