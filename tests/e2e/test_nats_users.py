"""Each role with a NATS user of its own (decision 15): nothing the fleet does is refused, no role is believed."""

import asyncio
import json
import secrets
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from redis import Redis

from deploy.cli import credentials, fleet
from shared.bus.nats import NatsBus
from shared.wire import messages, subjects
from tests.e2e.drive import Client, Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.load.callers import NatsCaller
from tests.load.nats_client import NatsClient
from tests.load.work import Job

#: Everything that travels, by what stands before the instance ids; `inbox.<role>` holds only the server's own 503s and
#: JetStream's answers.
KINDS: Final = {
    "admit", "guardian", "routing", "provider", "reply.ingress", "reply.loadgen", "control", "outcome", "usage",
    "inbox.alive", "inbox.guardian", "inbox.provider",
    "beat.ingress", "beat.guardian", "beat.routing", "beat.provider", "beat.loadgen",
    "notice.registry", "notice.circuit",
}  # fmt: skip
COOLDOWN_S: Final = 0.5
FORGER: Final = "forgerforger"


def kind(subject: str) -> str:
    """The kind of a subject."""
    words = subject.removeprefix(f"{subjects.PREFIX}.").split(".")
    return ".".join(words[:2] if words[0] in {"reply", "beat", "inbox", "notice"} else words[:1])


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One whose circuits open soon and close soon."""
    env = {"CIRCUIT_FAILURE_THRESHOLD": "3", "CIRCUIT_BREAKER_COOLDOWN_MS": str(int(COOLDOWN_S * 1000))}
    env |= {"ROUTING_RETRY_BACKOFF_MS": "1"}
    with Up(tmp_path_factory.mktemp("users"), "--scale", "guardian=2,provider=2", env=env) as running:
        yield running


def url_of(up: Up, user: str) -> str:
    """The embedded NATS as one of its users."""
    kept = credentials.read(up.data / "secrets.env")
    return fleet.embedded_nats_url(user, kept, urlsplit(up.run["nats_url"]).port or 0)


class Heard:
    """What the operator hears."""

    def __init__(self) -> None:
        self.subjects: dict[str, str] = {}  # by kind, the last one
        self.frames: list[messages.Frame] = []
        self._more = asyncio.Event()

    def __call__(self, subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        self.subjects[kind(subject)] = subject
        if subject == subjects.reply("ingress", FORGER):
            self.frames += [messages.decode_frame(raw) for raw in messages.decode_batch(payload).frames]
        self._more.set()

    async def until(self, wanted: Callable[[], bool], within: float = 5) -> bool:
        """Whether it became so."""
        try:
            async with asyncio.timeout(within):
                while not wanted():
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pass
        return wanted()


@pytest.fixture
async def heard(up: Up) -> AsyncIterator[Heard]:
    """Everything on the bus."""
    bus, heard = await NatsBus.connect(up.run["nats_url"], "observer"), Heard()
    await bus.subscribe(f"{subjects.PREFIX}.>", heard)
    yield heard
    await bus.close()


def bus_errors(up: Up) -> dict[str, float]:
    """`hotpath_bus_errors` of every role's processes."""
    found = {}
    for role, urls in up.run["metrics"].items():
        for url in urls:
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
            (line,) = [line for line in text.splitlines() if line.startswith("hotpath_bus_errors ")]
            found[f"{role} {url}"] = float(line.split()[1])
    return found


async def load(up: Up, sim: Sim, client: Client, direct: NatsCaller) -> list[Seen]:
    """Whole, streamed, long (credit), slow (liveness), left (cancel); both doors; with a fallback on the way."""
    sim.fault(match={"endpoint": "sim"}, times=8, status=500)
    asked = [client.chat("[[sim chunks=20]]", stream=bool(number % 2)) for number in range(40)]
    asked += [client.chat("[[sim chunks=3000]]", stream=True) for _ in range(4)]
    asked += [client.chat("[[sim chunks=30 pace=25]]", stream=True) for _ in range(4)]
    asked += [client.chat("[[sim chunks=500 pace=10]]", stream=True, leave_at=2000) for _ in range(4)]
    slow = {"model": "sim-fast", "messages": [{"role": "user", "content": "[[sim chunks=30 pace=25]]"}], "stream": True}
    jobs = [direct.call(Job(number, "stream", slow, leave_after=3 * (number % 2))) for number in range(4)]
    seen, results = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*jobs))
    assert {result.status for result in results} == {"ok", "left"}
    return seen


async def test_nothing_is_refused(up: Up, sim: Sim, heard: Heard, tenant: Callable[..., Any], http: Any) -> None:
    """Issue 3: under load, with fallback, cancel, credit, both notices, refusals by every role: no violation.

    Every kind of subject was seen, and no other one.
    """
    made = await asyncio.to_thread(tenant, "--synthetic")  # key creation notice
    poor = await asyncio.to_thread(tenant, "--limit-usd", "0.0001")
    client = Client(http, up.url, made["key"])
    async with NatsClient(up.run["loadgen_nats_url"]) as nats_client:
        seen = await load(up, sim, client, NatsCaller(nats_client, made["tenant_id"], made["key_id"]))
    assert all(one.ended_well or one.left for one in seen), [one.error for one in seen if not one.ended_well]
    assert (await Client(http, up.url, poor["key"]).chat("x")).status == 402  # by the guardian
    sim.fault(times=0, status=500)
    async with asyncio.timeout(10):
        while (await client.chat("x")).status != 503:  # by routing: both circuits are open
            await asyncio.sleep(0)
    sim.clear_faults()
    assert await heard.until(lambda: heard.subjects.keys() >= KINDS), KINDS - heard.subjects.keys()
    assert heard.subjects.keys() == KINDS
    errors = await asyncio.to_thread(bus_errors, up)
    assert len(errors) == 6
    assert set(errors.values()) == {0.0}, errors
    log = (up.data / "logs" / "nats.log").read_text()
    assert "iolation" not in log, log


# ---- forged envelopes ------------------------------------------------------------------------------------------------


async def forged(up: Up, tenant: Callable[..., Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Real ones, and (tenant id, key id) that must not pass: unknown ones, a key of somebody else, a revoked one."""
    mine, other = await asyncio.to_thread(tenant), await asyncio.to_thread(tenant)
    gone = await asyncio.to_thread(tenant)
    await asyncio.to_thread(up.cli, "keys", "revoke", gone["key_id"])
    await asyncio.sleep(1.0)  # a revocation is everywhere within 1 s
    real = [(made["tenant_id"], made["key_id"]) for made in (mine, other, gone)]
    return real, [
        ("nobody000000", "nobody000000"), (mine["tenant_id"], "nobody000000"), (mine["tenant_id"], other["key_id"]),
        ("nobody000000", mine["key_id"]), (gone["tenant_id"], gone["key_id"]), (mine["tenant_id"], "bootstrap"),
        ("", ""), ("*", ">"), ("a b\r\nPUB x 0", "x" * 5000),
    ]  # fmt: skip


def ask(number: int, tenant_id: str, key_id: str) -> messages.Ask:
    """An envelope as the ingress makes it."""
    body = {"model": "sim-fast", "messages": [{"role": "user", "content": "x"}]}
    return messages.Ask(
        rid=secrets.token_hex(16), tenant=tenant_id, key=key_id, model="sim-fast", timeout_ms=5000,
        reply=messages.ReplyTo("ingress", FORGER, number), body=json.dumps(body).encode(),
    )  # fmt: skip


def call(asked: messages.Ask, *, reserved: bool) -> messages.Call:
    """What routing would send to a provider."""
    admission = messages.Admission(
        reserved=reserved, amount=10_000_000, estimate=1, input_tokens=10, output_cap=16,
        price=messages.Price(150_000_000, 75_000_000, 600_000_000),
    )  # fmt: skip
    plan = messages.Plan(steps=(messages.Step("sim", "sim-fast"),), max_calls=3)
    return messages.Call(ask=asked, admission=admission, plan=plan)


@pytest.fixture(params=["ingress", "routing"])
async def forger(up: Up, request: pytest.FixtureRequest) -> AsyncIterator[NatsBus]:
    """A connection as this role's user."""
    bus = await NatsBus.connect(url_of(up, request.param), request.param)
    yield bus
    await bus.close()


async def test_an_envelope_is_not_believed(
    up: Up, sim: Sim, heard: Heard, tenant: Callable[..., Any], forger: NatsBus
) -> None:
    """Guardian and provider check tenant and key against their own registry copy: 401, no reservation, no call."""
    target = {"ingress": "guardian", "routing": "provider"}[forger._name]
    real, cases = await forged(up, tenant)
    before = await asyncio.to_thread(redis_keys, up)
    assert await heard.until(lambda: f"beat.{target}" in heard.subjects)
    subject = subjects.worker(target, heard.subjects[f"beat.{target}"].rpartition(".")[2])
    for number, (tenant_id, key_id) in enumerate(cases):
        asked = ask(number, tenant_id, key_id)
        if target == "guardian":
            forger.publish(subject, messages.encode(messages.Admit(ask=asked)))
        else:
            forger.publish(subject, messages.encode(call(asked, reserved=bool(number % 2))))
    await forger.flush()
    assert await heard.until(lambda: len(heard.frames) >= len(cases)), heard.frames
    assert forger.errors == {}
    assert {frame.stream for frame in heard.frames} == set(range(len(cases)))
    for frame in heard.frames:
        assert isinstance(frame, messages.Failed), frame
        assert (frame.error.status, frame.error.code) == (401, "invalid_api_key")
    assert (await asyncio.to_thread(sim.stats))["calls"] == 0
    # Nothing of it in Redis: no reservation, and no key of a tenant that is none. What was "reserved" for a real
    # one is given back, which leaves a tombstone.
    new = set(await asyncio.to_thread(redis_keys, up)) - set(before)
    assert {name.partition("}")[0] for name in new} <= {f"hp:{{{tenant_id}" for tenant_id, _ in real}, new
    with Redis.from_url(up.run["redis_url"], decode_responses=True) as redis:
        for tenant_id, _ in real:
            assert not [text for text in redis.hvals(f"hp:{{{tenant_id}}}:bal") if text != "0"]


def redis_keys(up: Up) -> list[str]:
    """Every key."""
    with Redis.from_url(up.run["redis_url"], decode_responses=True) as redis:
        return [*redis.scan_iter()]


def test_several_roles_in_one_process(tmp_path: Path) -> None:
    """WORKER_ROLES: one connection per user, each watching what only its own user may; nothing is refused."""
    procfile = tmp_path / "Procfile"
    procfile.write_text("ingress: python -m ingress\nworkers: python -m workers\n")
    env = {"WORKER_ROLES": "guardian,routing,provider"}
    with Up(tmp_path / "data", "--procfile", str(procfile), env=env) as one:
        asked = {"model": "sim-fast", "messages": [{"role": "user", "content": "x"}], "stream": True}
        headers = {"Authorization": f"Bearer {one.run['api_key']}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{one.url}/v1/chat/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        one.cli("keys", "create", "--tenant", "somebody")
        errors = bus_errors(one)
        assert len(set(errors)) == 4  # four roles, two processes
        assert set(errors.values()) == {0.0}, errors
        assert "iolation" not in (one.data / "logs" / "nats.log").read_text()
