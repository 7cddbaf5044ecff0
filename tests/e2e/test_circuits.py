"""One probe per fleet, through real processes: two of routing, two of provider (S1-C2a..e, faults 10, 95)."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.e2e.books import entries
from tests.e2e.drive import Client, Seen, session
from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.e2e.test_upstream import ENDPOINT, MODEL

COOLDOWN_MS = 1500
HERD = 200
MODELS = {"alone": ["alone"], "pair": ["first", "second"], "killed": ["killed"]}


@pytest.fixture(scope="module")
def fleet(simulator: Sim, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Its catalogue gives each test endpoints of its own."""
    directory = tmp_path_factory.mktemp("circuits")
    parts = [ENDPOINT.format(name=name, url=simulator.url) for names in MODELS.values() for name in names]
    for model, names in MODELS.items():
        steps = ", ".join(f'{{ endpoint = "{name}", model = "sim-fast" }}' for name in names)
        parts.append(MODEL.format(name=model, endpoints=steps))
    written = directory / "catalog.toml"
    written.write_text("".join(parts))
    env = {
        "HOTPATH_CATALOG": str(written),
        "CIRCUIT_BREAKER_COOLDOWN_MS": str(COOLDOWN_MS),
        "ROUTING_RETRY_BACKOFF_MS": "10",
        "MAX_IN_FLIGHT_PER_TENANT": "1000",
        "LEDGER_LEASE_GRACE_MS": "1000",
    }
    with Up(directory / "data", "--scale", "routing=2,provider=2", env=env) as running:
        yield running


@pytest.fixture
async def client(fleet: Up, simulator: Sim) -> AsyncIterator[Client]:
    """The default tenant; a simulator that has seen nothing."""
    await asyncio.to_thread(simulator.reset)
    async with session() as http:
        yield Client(http, fleet.url, fleet.run["api_key"])


async def circuit(fleet: Up, endpoint: str) -> dict[str, Any]:
    """As `hotpath circuits` shows it."""
    rows = (await asyncio.to_thread(fleet.cli, "circuits"))["circuits"]
    return next((row for row in rows if row["endpoint"] == endpoint), {"state": "closed"})


async def until(fleet: Up, endpoint: str, state: str) -> None:
    """The circuit has come to that state."""
    async with asyncio.timeout(10):
        while (await circuit(fleet, endpoint))["state"] != state:
            await asyncio.sleep(0.1)


async def break_it(fleet: Up, simulator: Sim, client: Client, endpoint: str, model: str) -> None:
    """Its circuit opens, the endpoint is mended, the cooldown goes by."""
    await asyncio.to_thread(lambda: simulator.fault(match={"endpoint": endpoint}, times=0, status=500))
    async with asyncio.timeout(10):
        while (await circuit(fleet, endpoint))["state"] == "closed":
            await client.chat("x", model=model)
    await asyncio.to_thread(simulator.clear_faults)
    await until(fleet, endpoint, "half_open")
    await asyncio.to_thread(simulator.reset)


def herd(client: Client, model: str) -> list["asyncio.Task[Seen]"]:
    """Everybody at once."""
    return [asyncio.create_task(client.chat("[[sim chunks=3]]", model=model)) for _ in range(HERD)]


async def test_two_hundred_at_once_are_one_call(fleet: Up, simulator: Sim, client: Client) -> None:
    """S1-C2a, S1-C2e, faults 95: the simulator sees exactly one; the others are 503 with Retry-After >= 1 s, and cost
    nothing; its success closes the circuit for all."""
    await break_it(fleet, simulator, client, "alone", "alone")
    await asyncio.to_thread(simulator.hold)
    tasks = herd(client, "alone")
    async with asyncio.timeout(4):  # while the probe is younger than 5 s
        while sum(task.done() for task in tasks) < HERD - 1:
            await asyncio.sleep(0.02)
    assert (await asyncio.to_thread(simulator.stats))["calls"] == 1
    assert (await circuit(fleet, "alone"))["state"] == "probing"
    await asyncio.to_thread(simulator.release)
    seen = await asyncio.gather(*tasks)
    assert sum(each.ended_well for each in seen) == 1
    for each in seen:
        if not each.ended_well:
            assert (each.status, each.error["code"]) == (503, "circuit_open")
            assert 1 <= int(each.headers["retry-after"]) <= 5
    assert (await asyncio.to_thread(simulator.stats))["calls"] == 1
    await until(fleet, "alone", "closed")
    shown = (await asyncio.to_thread(fleet.cli_run, "circuits")).stdout
    assert any(line.split()[:2] == ["alone", "closed"] for line in shown.splitlines()), shown
    books = (await asyncio.to_thread(entries, fleet, "default")).values()
    ours = {each.rid for each in seen}
    assert sum(entry.cost > 0 for entry in books if entry.rid in ours) == 1
    assert not [entry for entry in books if entry.state in {"reserved", "dispatched"}]
    assert all(each.ended_well for each in await asyncio.gather(*herd(client, "alone")))


async def test_with_another_endpoint_everybody_is_served(fleet: Up, simulator: Sim, client: Client) -> None:
    """S1-C2e: the probe happens though the other one is well, once, and nobody is told of it."""
    await break_it(fleet, simulator, client, "first", "pair")
    await asyncio.to_thread(lambda: simulator.fault(match={"endpoint": "first"}, times=0, delay_ms=3000))
    seen = await asyncio.gather(*herd(client, "pair"))
    assert all(each.ended_well for each in seen), {(each.status, each.body) for each in seen if not each.ended_well}
    by = [each.headers["x-br-endpoint"] for each in seen]
    assert by.count("first") == 1
    assert [line["endpoint"] for line in await asyncio.to_thread(simulator.bill)].count("first") == 1
    await asyncio.to_thread(simulator.clear_faults)
    await until(fleet, "first", "closed")


async def test_a_killed_probe_makes_room_after_five_seconds(fleet: Up, simulator: Sim, client: Client) -> None:
    """Faults 10: the provider that holds the probe is killed; not before 5 s, and then once, another call is made."""
    providers = await provider_pids(fleet, client)
    await break_it(fleet, simulator, client, "killed", "killed")
    await asyncio.to_thread(simulator.hold)
    probing = asyncio.create_task(client.chat("[[sim chunks=3]]", model="killed"))
    assert await asyncio.to_thread(simulator.wait, held=1)
    began = time.monotonic()
    (holder,) = await asyncio.to_thread(probing_instances, fleet, "killed")
    os.kill(providers[holder], signal.SIGKILL)
    await asyncio.to_thread(simulator.release)
    while (seen := await client.chat("[[sim chunks=3]]", model="killed")).status != 200:
        assert seen.error["code"] in {"circuit_open", "no_worker"}
        assert time.monotonic() - began < 8
        if time.monotonic() - began < 4.5:
            assert (await asyncio.to_thread(simulator.stats))["calls"] == 1
        await asyncio.sleep(0.1)
    assert 4.5 < time.monotonic() - began < 8
    assert (await asyncio.to_thread(simulator.stats))["calls"] == 2
    await probing
    await until(fleet, "killed", "closed")


async def provider_pids(fleet: Up, client: Client) -> dict[str, int]:
    """Instance -> process of both providers, as traces of requests name them."""
    found: dict[str, int] = {}
    async with asyncio.timeout(20):
        while len(found) < 2:
            seen = await client.chat("[[sim chunks=3]]", model="pair")
            hops = (await asyncio.to_thread(fleet.cli, "trace", seen.rid))["hops"]
            found |= {hop["instance"]: hop["pid"] for hop in hops if hop["role"] == "provider"}
    return found


def probing_instances(fleet: Up, endpoint: str) -> list[str]:
    """Who logged that it has the endpoint's probe."""
    lines = [line for path in (fleet.data / "logs").glob("provider.*.log") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines if '"a circuit is half open: probing"' in line]
    return [record["instance"] for record in records if record["endpoint"] == endpoint]
