"""One process from boot to end (DESIGN 1, 3; S1-H5; plan of shared/service.py)."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import pytest

from shared import catalog, settings
from shared.bus import pulse
from shared.bus.base import Bus, BusUnavailable
from shared.bus.memory import Broker
from shared.bus.nats import NatsBus
from shared.service import BootError, Process, process
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.telemetry.log import Log
from shared.telemetry.metrics import MetricsServer
from shared.wire import subjects
from shared.wire.messages import Beat, Cancel, decode_beat, encode
from tests.bus.conftest import Seen
from tests.service_role import Idle, Stuck
from tests.wire.samples import NOISE

CATALOG = """
[[endpoints]]
id = "here"
provider = "openai"
base_url = "http://127.0.0.1:9/v1"
allow_private = true
[[models]]
name = "m"
endpoints = [{ endpoint = "here", model = "m" }]
max_output_tokens = 10
price = "free"
"""
SECRETS = {"GATEWAY_API_KEY": "a" * 32, "KEY_PEPPER": "b" * 32, "ADMIN_API_KEY": "c" * 32}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "catalog.toml"
    path.write_text(CATALOG)
    return {**SECRETS, "HOTPATH_CATALOG": str(path)}


class StandIn:
    """The part of State that the service touches."""

    def __init__(self) -> None:
        self.registry = self
        self.circuits = self
        self.ready = True
        self.available = True
        self.waiting = self.unknown = 0
        self.calls: list[str] = []

    def run(self) -> None:
        self.calls.append("run")

    def refresh_soon(self) -> None:
        self.calls.append("refresh")

    async def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (tmp_path / "log").open("wb") as sink:
        made = Log("debug", SECRETS.values(), sink.fileno())
        yield made
        made.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    logging.getLogger("hotpath").setLevel(logging.NOTSET)


class Rig:
    """A Process on a MemoryBus, with a stand-in for the state."""

    def __init__(self, env: dict[str, str], log: Log, *roles: Idle, broker: Broker | None = None) -> None:
        self.broker = broker or Broker()
        self.state = StandIn()
        self.roles = roles
        self.log = log
        chosen = settings.load(env)
        self.buses: list[Any] = []

        async def connect_bus(_url: str, name: str, on_change: Callable[[bool], None]) -> Bus:
            self.buses.append(self.broker.client(name, on_change))
            return cast("Bus", self.buses[-1])

        async def connect_state(_settings: settings.Settings) -> State:
            return cast("State", self.state)

        self.connect_bus: Callable[..., Awaitable[Bus]] = connect_bus
        self.connect_state: Callable[..., Awaitable[State]] = connect_state
        self.settings = chosen
        self.catalog = catalog.load(chosen.hotpath_catalog, env)
        self.process: Process | None = None

    async def run(self) -> None:
        self.process = Process(
            list(self.roles),
            self.settings,
            self.catalog,
            self.log,
            connect_bus=self.connect_bus,
            connect_state=self.connect_state,
            state_away=lambda _settings: cast("State", self.state),
            started_at=time.monotonic(),
        )
        await self.process.run()

    async def __aenter__(self) -> Self:
        self.seen = Seen()
        await self.broker.client("watcher").subscribe("hotpath.v1.beat.*.*", self.seen)
        self._task = asyncio.create_task(self.run())
        while sum(not beat.booting for beat in self.beats) < len(self.roles):
            await self.seen.count(len(self.seen.messages) + 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        if not self._task.done():
            self.process._stop.set()
        await self._task

    @property
    def beats(self) -> list[Beat]:
        return [decode_beat(payload) for payload in self.seen.payloads]


async def test_boot_beats_and_drain(env: dict[str, str], log: Log) -> None:
    role = Idle()
    async with Rig(env, log, role) as rig:
        ctx = role.ctx
        assert ctx is not None
        assert (ctx.role, ctx.pid, ctx.settings) == ("guardian", os.getpid(), rig.settings)
        assert len(ctx.instance) == 12
        assert ctx.instance.isalnum()
        assert rig.state.calls == ["run"]
        booting, first = rig.beats[0], next(beat for beat in rig.beats if not beat.booting)
        assert (booting.instance, booting.booting, booting.draining, booting.in_flight) == (ctx.instance, True, True, 0)
        assert (first.role, first.instance, first.capacity, first.draining) == ("guardian", ctx.instance, 5, False)
        assert set(ctx.rosters) == {"guardian", "routing"}
    assert role.drained
    assert rig.beats[-1].draining
    assert rig.state.calls == ["run", "close"]
    assert not rig.buses[0].connected


async def test_the_order_of_the_end(env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-H5d: no work any more, what is in flight ends, the bus goes, Redis, the metrics: nothing is recorded to what
    is closed already. (The log is last of all: test_a_real_process reads it to its end.)"""
    order: list[str] = []

    class Busy(Idle):
        async def drain(self) -> None:
            assert rig.beats[-1].draining
            order.append("drain")
            await asyncio.sleep(0.05)  # a settlement, say
            order.append("settled")

    rig = Rig(env, log, Busy())
    async with rig:
        rig.state.calls = order
        close_bus, close_server = rig.buses[0].close, MetricsServer.close

        async def bus_closed() -> None:
            order.append("bus")
            await close_bus()

        async def server_closed(server: Any) -> None:
            order.append("metrics")
            await close_server(server)

        rig.buses[0].close = bus_closed
        monkeypatch.setattr(MetricsServer, "close", server_closed)
    assert order == ["drain", "settled", "bus", "close", "metrics"]


async def test_a_drain_has_its_bound(
    env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A role that never ends, and a Redis that does not close, hold nobody up for ever."""
    monkeypatch.setattr(process, "SETTLE_S", 0.1)
    monkeypatch.setattr(process, "CLOSE_S", 0.1)
    env |= {"SHUTDOWN_DRAIN_MS": "100", "SHUTDOWN_STREAM_DRAIN_MS": "0"}
    rig = Rig(env, log, Stuck())
    rig.state.close = asyncio.Event().wait  # type: ignore[method-assign, assignment]
    async with asyncio.timeout(5):
        async with rig:
            pass
    log.close()
    text = (tmp_path / "log").read_text()
    assert '"late":1' in text.replace(" ", "")
    assert "could not close Redis in time" in text


async def test_processes_that_boot_together_do_not_wait_for_each_other(
    env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tells that it is booting before it waits to hear the others: a cold start takes no beat longer."""
    monkeypatch.setattr(pulse, "ACQUAINT_S", 60)
    env["HOTPATH_TOGETHER"] = "true"
    broker = Broker()
    rigs = [Rig(env, log, Idle(role), broker=broker) for role in ("guardian", "routing")]
    async with asyncio.timeout(5):
        tasks = [asyncio.create_task(rig.__aenter__()) for rig in rigs]
        await asyncio.gather(*tasks)
    for rig in rigs:
        await rig.__aexit__()


async def test_several_roles_share_a_connection_and_have_their_own_instances(env: dict[str, str], log: Log) -> None:
    """WORKER_ROLES."""
    roles = Idle("guardian"), Idle("routing")
    async with Rig(env, log, *roles) as rig:
        one, two = roles[0].ctx, roles[1].ctx
        assert one is not None
        assert two is not None
        assert one.instance != two.instance
        assert one.bus is two.bus
        assert one.rosters is two.rosters
        assert one.sender is not two.sender
        await asyncio.sleep(0)
        assert {beat.role for beat in one.rosters["routing"].alive(time.monotonic())} == {"routing"}
        assert {(beat.role, beat.instance) for beat in rig.beats} >= {
            ("guardian", one.instance),
            ("routing", two.instance),
        }
    assert all(role.drained for role in roles)


async def test_a_role_with_its_own_user_gets_its_own_connection(env: dict[str, str], log: Log) -> None:
    env["NATS_URL_ROUTING"] = "nats://routing:pw@127.0.0.1:4222"
    async with Rig(env, log, Idle("guardian"), Idle("routing")) as rig:
        assert len(rig.buses) == 2


async def test_control(env: dict[str, str], log: Log) -> None:
    """An empty message asks "are you there?"; its answer goes to inboxes only; what cannot be read is counted."""
    role = Idle()
    async with Rig(env, log, role) as rig:
        assert role.ctx is not None
        asker, seen = rig.broker.client("asker"), Seen()
        await asker.subscribe("hotpath.v1.>", seen)
        subject = subjects.control(role.ctx.instance)
        cancel = Cancel(role="ingress", instance="i1", stream=3, delivery=1)
        asker.publish(subject, encode(cancel))
        asker.publish(subject, encode(Beat(role="x", instance="y")))
        for noise in NOISE:  # an empty one is a question without a reply
            asker.publish(subject, noise)
        asker.publish(subject, encode({"kind": "pause", "role": "ingress", "instance": "i1"}))  # of a newer build
        asker.publish(subject, b"", subjects.worker("provider", "p1"))
        asker.publish(subject, b"", subjects.alive("i1", "9"))
        async with asyncio.timeout(5):
            while subjects.alive("i1", "9") not in [message[0] for message in seen.messages]:
                await asyncio.sleep(0)
        assert (subjects.alive("i1", "9"), "", b"", False) in seen.messages
        assert subjects.worker("provider", "p1") not in [message[0] for message in seen.messages]
        assert role.controls == [cancel]
        assert f"hotpath_messages_ignored {len(NOISE) + 1}.0" in role.ctx.metrics.render().decode()
        assert rig.buses[0].errors == {}


async def test_notices_refresh_the_copies(env: dict[str, str], log: Log) -> None:
    async with Rig(env, log, Idle()) as rig:
        bus = rig.broker.client("other")
        bus.publish(subjects.NOTICE_REGISTRY, b"")
        bus.publish(subjects.NOTICE_CIRCUIT, b"")
        await asyncio.sleep(0)
        assert rig.state.calls == ["run", "refresh", "refresh"]


async def test_the_bus_going_and_coming_is_told_and_beats_return_at_once(env: dict[str, str], log: Log) -> None:
    role = Idle()
    async with Rig(env, log, role) as rig:
        assert role.ctx is not None
        told: list[bool] = []
        role.ctx.bus_listeners.append(told.append)
        rig.buses[0].cut()
        assert "hotpath_bus_connected 0.0" in role.ctx.metrics.render().decode()
        before = len(rig.seen.messages)
        rig.buses[0].cut(connected=True)
        await asyncio.sleep(0)
        assert len(rig.seen.messages) > before
        assert told == [False, True]


async def test_too_small_a_max_payload_is_refused(env: dict[str, str], log: Log) -> None:
    """DESIGN 3: max_payload >= body limit + 64 KiB, checked at boot."""
    rig = Rig(env, log, Idle(), broker=Broker(max_payload=1_048_576 + 65_535))
    with pytest.raises(BootError, match="max_payload"):
        await rig.run()
    async with Rig(env, log, Idle(), broker=Broker(max_payload=1_048_576 + 65_536)):
        pass


async def test_the_first_connection_is_tried_for_a_while(
    env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "CONNECT_S", 0.3)
    monkeypatch.setattr(process, "RETRY_S", 0.01)
    rig = Rig(env, log, Idle())
    tries = 0
    connect = rig.connect_bus

    async def twice_away(*args: Any) -> Bus:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BusUnavailable(f"not yet, {SECRETS['ADMIN_API_KEY']}")
        return await connect(*args)

    rig.connect_bus = twice_away
    async with rig:
        assert tries == 3

    log.close()
    text = (tmp_path / "log").read_text()
    assert "waiting for NATS" in text
    assert '"critical"' not in text
    assert SECRETS["ADMIN_API_KEY"] not in text


async def test_nats_is_tried_until_it_is_there(
    env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process without a bus can do nothing, but it is there 0.1 s after NATS, and no supervisor counts crashes; from
    CONNECT_S on it says so as CRITICAL."""
    monkeypatch.setattr(process, "CONNECT_S", 0.05)
    monkeypatch.setattr(process, "RETRY_S", 0.01)
    rig = Rig(env, log, Idle())
    there, connect = asyncio.Event(), rig.connect_bus

    async def connect_when_there(*args: Any) -> Bus:
        if not there.is_set():
            raise BusUnavailable("nobody home")
        return await connect(*args)

    rig.connect_bus = connect_when_there
    asyncio.get_running_loop().call_later(0.3, there.set)
    async with rig:
        assert there.is_set()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(line["level"] == "critical" and "is NATS_URL right?" in line["msg"] for line in lines)


async def test_a_redis_that_is_away_at_the_start(
    env: dict[str, str], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """S1-M6a: said in one CRITICAL line, and the process starts all the same; with STATE_REQUIRED it ends (exit 1)."""
    for bound in ("CONNECT_S", "GLANCE_S"):
        monkeypatch.setattr(process, bound, 0.05)
    monkeypatch.setattr(process, "RETRY_S", 0.01)

    async def away(*_: Any) -> State:
        raise StateUnavailable("nobody home")

    rig = Rig(env, log, Idle())
    rig.connect_state, rig.state.ready = away, False
    async with rig:
        assert not rig.beats[0].loaded
        rig.state.ready = True
        await rig.seen.count(len(rig.beats) + 2)
        assert rig.beats[-1].loaded
    required = Rig({**env, "STATE_REQUIRED": "true"}, log, Idle())
    required.connect_state = away
    with pytest.raises(BootError, match=r"Redis did not answer .*nobody home.*REDIS_URL"):
        await required.run()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    [line] = [line for line in lines if line["level"] == "critical"]
    assert "starting without Redis" in line["msg"]


async def test_a_failing_role_ends_the_boot(env: dict[str, str], log: Log) -> None:
    class Failing(Idle):
        async def start(self, _ctx: object) -> None:
            raise ValueError("no")

    rig = Rig(env, log, Failing())
    with pytest.raises(ValueError, match="no"):
        await rig.run()
    assert rig.state.calls[-1] == "close"
    assert not rig.buses[0].connected


async def test_a_signal_during_the_boot_ends_it(env: dict[str, str], log: Log) -> None:
    started = asyncio.Event()

    class Slow(Idle):
        async def start(self, _ctx: object) -> None:
            started.set()
            await asyncio.Event().wait()

    rig = Rig(env, log, Slow())
    running = asyncio.create_task(rig.run())
    await started.wait()
    assert rig.process is not None
    rig.process.stop()
    async with asyncio.timeout(5):
        await running
    assert rig.state.calls[-1] == "close"
    assert not rig.roles[0].drained


# ---- as processes ----------------------------------------------------------------------------------------------------


class Running:
    """`python -m tests.service_role` with its ready lines read."""

    def __init__(self, env: dict[str, str], *arguments: str) -> None:
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.service_role", *arguments],
            env={"PATH": os.environ["PATH"], **env, "HOTPATH_READY_FD": str(write)},
            pass_fds=[write],
            stderr=subprocess.PIPE,
        )
        os.close(write)
        with os.fdopen(read) as ready:  # until the process closes its end
            self.ready = [json.loads(line) for line in ready]

    def end(self) -> tuple[int, str]:
        _, text = self.process.communicate(timeout=10)
        return self.process.returncode, text.decode()


@pytest.fixture
def real(env: dict[str, str], nats_url: str, valkey_url: str) -> dict[str, str]:
    return {**env, "NATS_URL": nats_url, "REDIS_URL": valkey_url}


async def test_a_real_process(real: dict[str, str], nats_url: str) -> None:
    """Ready lines, beats on NATS, liveness answered, metrics, SIGTERM drains and ends with 0."""
    watcher, seen, inbox = await NatsBus.connect(nats_url, "watcher"), Seen(), Seen()
    await watcher.subscribe(subjects.beat("guardian", "*"), seen)
    await watcher.subscribe(subjects.alive("watcher", "*"), inbox)
    running = await asyncio.to_thread(Running, real, "guardian,routing")
    assert [line["role"] for line in running.ready] == ["guardian", "routing"]
    guardian = running.ready[0]
    assert guardian["pid"] == running.process.pid
    await seen.count(1)
    watcher.publish(subjects.control(guardian["instance"]), b"", subjects.alive("watcher", "1"))
    await inbox.count(1)
    assert inbox.messages[0][2:] == (b"", False)
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(guardian["metrics"]).read())
    assert b"hotpath_bus_connected 1.0" in text
    running.process.send_signal(signal.SIGTERM)
    code, log = await asyncio.to_thread(running.end)
    assert code == 0
    assert [json.loads(line)["msg"] for line in log.splitlines()][-2:] == ["draining", "drained"]
    await watcher.flush()
    ours = [beat for beat in map(decode_beat, seen.payloads) if beat.instance == guardian["instance"]]
    assert ours[-1].draining
    await watcher.close()


def test_a_second_signal_ends_at_once(real: dict[str, str]) -> None:
    running = Running(real, "guardian", "stuck")
    running.process.send_signal(signal.SIGINT)
    assert running.process.stderr is not None
    for line in running.process.stderr:
        if b'"draining"' in line:
            break
    running.process.send_signal(signal.SIGTERM)
    code, log = running.end()
    assert code == 1
    assert "second signal" in log


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"GATEWAY_API_KEY": "1"}, "GATEWAY_API_KEY must be at least 32 characters"),
        ({"HOTPATH_CATALOG": "/nowhere/catalog.toml"}, "/nowhere/catalog.toml"),
    ],
)
def test_bad_settings_end_with_78(real: dict[str, str], change: dict[str, str], text: str) -> None:
    """S1-C1: the process does not start; one clear line, no traceback."""
    running = Running({**real, **change}, "guardian")
    code, log = running.end()
    assert (running.ready, code) == ([], 78)
    assert text in log
    assert "Traceback" not in log


def test_a_url_that_is_none_is_said(real: dict[str, str]) -> None:
    code, log = Running({**real, "NATS_URL": "http://user:hushhush@x"}, "guardian").end()
    assert code in {1, 78}
    assert "NATS_URL" in log
    assert "Traceback" not in log
    assert "hushhush" not in log


def test_a_taken_metrics_port_is_said(real: dict[str, str]) -> None:
    taken = real["NATS_URL"].rpartition(":")[2]
    code, log = Running({**real, "METRICS_PORT": taken}, "guardian").end()
    assert code == 1
    assert "METRICS_PORT" in log
    assert "Traceback" not in log
