"""Acceptance 3: a direct publisher is a client like any other, and may do nothing else (NATS user `loadgen`)."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import nats
import pytest
from nats.aio.client import Client as Nats

from shared.wire import messages, subjects
from tests.e2e.books import entries
from tests.e2e.drive import Client
from tests.e2e.raw import exchange, post
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

MINE = "abcdefghijkl"


class Direct:
    """A direct publisher: asks on the admit subject and collects the frames of each stream."""

    def __init__(self, bus: Nats) -> None:
        self._bus = bus
        self._streams: dict[int, list[messages.Frame]] = {}
        self._ended: dict[int, asyncio.Event] = {}

    async def start(self) -> None:
        """Read our own answers."""
        await self._bus.subscribe(subjects.reply("loadgen", MINE), cb=self._read)
        await self._bus.flush()

    async def _read(self, message: Any) -> None:
        for raw in messages.decode_batch(message.data).frames:
            frame = messages.decode_frame(raw)
            self._streams.setdefault(frame.stream, []).append(frame)
            if isinstance(frame, messages.End | messages.Failed):
                self._ended[frame.stream].set()

    async def ask(self, made: dict[str, Any], body: bytes, **fields: Any) -> tuple[str, list[messages.Frame]]:
        """Ask as a key's owner; (rid, the frames up to the terminal)."""
        stream, rid = len(self._ended) + 1, secrets.token_hex(16)
        self._ended[stream] = asyncio.Event()
        ask = messages.Ask(
            rid=rid, tenant=made["tenant_id"], key=made["key_id"],
            reply=messages.ReplyTo("loadgen", MINE, stream), body=body, **fields,
        )  # fmt: skip
        await self._bus.publish(subjects.ADMIT, messages.encode(messages.Admit(ask=ask)))
        async with asyncio.timeout(10):
            await self._ended[stream].wait()
        return rid, self._streams[stream]


@pytest.fixture
async def errors() -> list[str]:
    """What NATS complained of."""
    return []


@pytest.fixture
async def loadgen(up: Up, errors: list[str]) -> AsyncIterator[Nats]:
    """A connection as `loadgen`."""

    async def note(error: Exception) -> None:
        errors.append(str(error))

    connection = await nats.connect(up.run["loadgen_nats_url"], error_cb=note, allow_reconnect=False)
    yield connection
    await connection.close()


@pytest.fixture
async def direct(loadgen: Nats) -> Direct:
    """A direct publisher that listens."""
    made = Direct(loadgen)
    await made.start()
    return made


def body(prompt: str, **fields: Any) -> bytes:
    """A chat request."""
    asked = {"model": "sim-fast", "messages": [{"role": "user", "content": prompt}], **fields}
    return json.dumps(asked).encode()


def data(frames: list[messages.Frame]) -> bytes:
    """The bytes of the deltas."""
    return b"".join(frame.data for frame in frames if isinstance(frame, messages.Delta))


def without_ids(text: bytes, rid: str) -> Any:
    """Chunks or a body, less what no two requests have in common: ids and the time the guardian took."""
    shown = text.replace(rid.encode(), b"RID")
    parts = [part.removeprefix(b"data: ") for part in shown.split(b"\n\n") if part and not part.endswith(b"[DONE]")]
    found = [json.loads(part) for part in parts]
    for part in found:
        part.pop("id", None)
        part.get("x_br", {}).pop("overhead_ms", None)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_same_frames(
    up: Up, sim: Sim, direct: Direct, tenant: Callable[..., Any], http: Any, stream: bool
) -> None:
    """The same request over HTTP and straight to NATS: the same content, the same money, the same four processes."""
    made = await asyncio.to_thread(tenant, "--synthetic")
    prompt = "same [[sim chunks=12 seed=6]]"
    rid, frames = await direct.ask(made, body(prompt, stream=stream))
    seen = await Client(http, up.url, made["key"]).chat(prompt, stream=stream)
    assert seen.ended_well

    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert isinstance(frames[0], messages.Accepted)
    end = frames[-1]
    assert isinstance(end, messages.End), frames
    assert without_ids(data(frames), rid) == without_ids(seen.body, seen.rid)
    head = next(frame.head for frame in frames if isinstance(frame, messages.Delta))
    assert head
    for name, value in head.items():
        if name != "X-BR-Guardian-Overhead-Ms":
            assert seen.headers[name.lower()] == value
    assert [hop.role for hop in end.hops] == ["guardian", "routing", "provider"]
    assert len({hop.pid for hop in end.hops}) == 3

    (line,) = await asyncio.to_thread(sim.lines, rid)
    assert end.summary.cost == line["cost_nano_usd"]
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    assert booked[f"{rid}.1"].cost == booked[f"{seen.rid}.1"].cost == line["cost_nano_usd"]


async def test_a_direct_publisher_is_parsed_as_strictly(
    up: Up, sim: Sim, direct: Direct, tenant: Callable[..., Any]
) -> None:
    """Its body is as hostile as any: the same refusal as over HTTP, and nothing upstream."""
    made = await asyncio.to_thread(tenant, "--synthetic")
    twice = b'{"model":"sim-fast","model":"x","messages":[]}'
    for raw in (b"", b"null", twice, body("x", max_tokens=True), b"[" * 9999):
        _, frames = await direct.ask(made, raw)
        answer = await exchange(up.url, post(made["key"], raw))
        (failed,) = [frame for frame in frames if isinstance(frame, messages.Failed)]
        assert (failed.error.status, failed.error.code) == (answer.status, answer.error["code"])
        assert answer.status == 400
    _, frames = await direct.ask(made, body("x", model="no-such-model"))
    assert isinstance(frames[-1], messages.Failed)
    assert frames[-1].error.code == "model_not_found"
    assert (await asyncio.to_thread(sim.stats))["calls"] == 0


async def test_a_real_tenant_is_refused(sim: Sim, direct: Direct, tenant: Callable[..., Any]) -> None:
    """Only tenants marked synthetic come in by that door: 403; an unknown one: 401."""
    real = await asyncio.to_thread(tenant)
    _, frames = await direct.ask(real, body("x"))
    assert isinstance(frames[-1], messages.Failed)
    assert frames[-1].error.status == 403
    for made in (
        {"tenant_id": "default", "key_id": "bootstrap"},
        {"tenant_id": "nobody000000", "key_id": "nobody000000"},
        {"tenant_id": "a.b >*", "key_id": "\r\nPUB x 0"},
    ):
        _, frames = await direct.ask(made, body("x"))
        assert isinstance(frames[-1], messages.Failed)
        assert frames[-1].error.status in (401, 403)
    assert (await asyncio.to_thread(sim.stats))["calls"] == 0


async def test_the_return_address_is_its_own(
    up: Up, sim: Sim, loadgen: Nats, direct: Direct, tenant: Callable[..., Any]
) -> None:
    """What it names as reply cannot make a worker publish anywhere but to `reply.loadgen.<token>`."""
    made = await asyncio.to_thread(tenant, "--synthetic")
    seen: list[str] = []
    operator = await nats.connect(up.run["nats_url"])

    async def note(message: Any) -> None:
        seen.append(message.subject)

    await operator.subscribe(">", cb=note)
    await operator.flush()
    (ingress,) = up.run["pids"]["ingress"]
    for role, instance in (
        ("ingress", "abc"), ("loadgen", "a.b"), ("loadgen", ">"), ("guardian", "x"), ("loadgen", "x y"), ("", "x"),
        ("loadgen", "a\r\nPUB b 0\r\n"), ("reply.loadgen", "x"), ("admin", "reset"),
    ):  # fmt: skip
        reply = messages.ReplyTo(role, instance, 1)
        ask = messages.Ask(
            rid=secrets.token_hex(16), tenant=made["tenant_id"], key=made["key_id"], reply=reply, body=body("x")
        )
        await loadgen.publish(subjects.ADMIT, messages.encode(messages.Admit(ask=ask)))
    for junk in (b"", b"\xc1", b"\x80", b"x" * 1000, msgspec.msgpack.encode({"kind": "admit"}), b"\x93" * 5000):
        await loadgen.publish(subjects.ADMIT, junk)
    await loadgen.flush()
    _, frames = await direct.ask(made, body("[[sim chunks=2]]"))
    assert isinstance(frames[-1], messages.End)
    await asyncio.sleep(0.3)
    await operator.close()
    replies = {subject for subject in seen if ".reply." in subject}
    assert replies == {subjects.reply("loadgen", MINE)}, replies
    assert (await asyncio.to_thread(sim.stats))["calls"] == 1
    assert up.run["pids"]["ingress"] == [ingress]


FORBIDDEN = [
    "x", "hotpath.v1.guardian.abc", "hotpath.v1.routing.abc", "hotpath.v1.provider.abc", "hotpath.v1.reply.ingress.abc",
    "hotpath.v1.reply.loadgen.abc", "hotpath.v1.outcome", "hotpath.v1.notice.registry", "hotpath.v1.notice.circuit",
    "hotpath.v1.beat.guardian.abc", "hotpath.v1.beat.ingress.abc", "hotpath.v1.admit.x", "hotpath.v1.usage",
    "hotpath.v1.inbox.abc.def", "$JS.API.INFO", "$SYS.REQ.SERVER.PING", "_INBOX.abc", "hotpath.v1.control.a.b",
]  # fmt: skip


async def complaint(errors: list[str], loadgen: Nats) -> str:
    """What NATS said of the last thing; empty when nothing."""
    await loadgen.flush()
    for _ in range(20):
        if errors:
            break
        await asyncio.sleep(0.005)
    said = " ".join(errors)
    errors.clear()
    return said


async def test_it_publishes_nowhere_else(loadgen: Nats, errors: list[str]) -> None:
    """The allow-list of its user, subject by subject."""
    for subject in FORBIDDEN:
        await loadgen.publish(subject, b"")
        assert "permissions violation" in (await complaint(errors, loadgen)).lower(), subject
    for subject in ("hotpath.v1.admit", "hotpath.v1.control.abc", "hotpath.v1.beat.loadgen.abc"):
        await loadgen.publish(subject, b"")
        assert await complaint(errors, loadgen) == "", subject


async def test_it_subscribes_nowhere_else(loadgen: Nats, errors: list[str]) -> None:
    """Nor does it read anybody else's answers."""
    wider = [">", "hotpath.>", "hotpath.v1.>", "hotpath.v1.admit", "hotpath.v1.*.*", "hotpath.v1.reply.>",
             "hotpath.v1.reply.*.*", "hotpath.v1.control.abc", "$SYS.>", "_INBOX.>"]  # fmt: skip
    for subject in [*(each for each in FORBIDDEN if each != "hotpath.v1.reply.loadgen.abc"), *wider]:
        subscription = await loadgen.subscribe(subject)
        assert "permissions violation" in (await complaint(errors, loadgen)).lower(), subject
        await subscription.unsubscribe()
        errors.clear()
    await loadgen.subscribe("hotpath.v1.reply.loadgen.abc")
    assert await complaint(errors, loadgen) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"user": "loadgen", "pass": "wrong"},
        {"user": "operator", "pass": ""},
        {"user": "roles"},
        {"auth_token": "x"},
    ],
)
async def test_nobody_comes_in_without_a_user(up: Up, fields: dict[str, str]) -> None:
    """No anonymous access, no other password (by hand: the library leaks its socket when it is refused)."""
    where = urlsplit(up.run["nats_url"])
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    assert (await reader.readline()).startswith(b"INFO ")
    options = {"verbose": False, "pedantic": False, "lang": "test", "version": "0", **fields}
    writer.write(f"CONNECT {json.dumps(options)}\r\nSUB > 1\r\nPING\r\n".encode())
    async with asyncio.timeout(8):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"-ERR 'Authorization Violation'")
    assert b"PONG" not in answer
