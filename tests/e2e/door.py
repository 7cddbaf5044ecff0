"""The front door as the tests of bad input see it: a Hotpath of its own, canaries in every secret, neighbours, and the
rule that holds for every case of faults.md, section 2 ("Common rule").

A case gets exactly its status in OpenAI's shape, with an X-Request-ID, within 100 ms; no upstream is called,
no reservation stays, no process loses its connection to NATS, NATS carries no subject that is not ours, every other
stream is unharmed (I10), and neither a secret nor the prompt is echoed or written anywhere (I9).
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import nats
from msgspec import Struct

from tests.e2e.books import settled_level
from tests.e2e.drive import Client, session
from tests.e2e.echo import Echo
from tests.e2e.raw import Answer, exchange, post
from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.e2e.sinks import Sinks

#: Stands for the tenant's key in a case.
KEY = "@KEY@"
#: In every prompt that no upstream may see.
PROMPT = "canary-prompt-5d41402abc4b"
#: Set in the environment, so that they are canaries; the passwords of NATS and Redis are generated.
SECRETS = {
    "GATEWAY_API_KEY": "canary-gateway-0123456789abcdef0123456789",
    "KEY_PEPPER": "canary-pepper-0123456789abcdef0123456789",
    "ADMIN_API_KEY": "canary-admin-0123456789abcdef0123456789ab",
    "DOOR_PROVIDER_KEY": "canary-provider-0123456789abcdef01234567",
}
#: 200,000 keys (33) and 1 MiB of one field (32, 104, 114) have to fit.
MAX_BODY = 2 * 1024 * 1024
HEAD_MS, BODY_MS, IDLE_MS, STALLED_MS = 1500, 1500, 4000, 1500
SETTINGS = {
    "MAX_BODY_BYTES": str(MAX_BODY), "CLIENT_HEAD_MS": str(HEAD_MS), "CLIENT_BODY_MS": str(BODY_MS),
    "CLIENT_IDLE_MS": str(IDLE_MS), "CLIENT_STALLED_MS": str(STALLED_MS), "LEDGER_LEASE_GRACE_MS": "1000",
    "CIRCUIT_FAILURE_THRESHOLD": "1000000", "LOG_LEVEL": "debug",
}  # fmt: skip
#: Names that real catalogues hold (faults 107).
REAL_NAMES = ("anthropic/claude-sonnet-4", "ft:gpt-4o:org::id", "meta-llama/Llama-3.1-8B@v2")
#: Answered within; a machine that hiccups gets other tries.
PROMPT_S = 0.1
TRIES = 4

#: Every subject this system uses, instance ids aside (shared/wire/subjects.py is not asked: it could be wrong too).
KNOWN = re.compile(
    r"hotpath\.v1\.(admit|outcome|usage|notice\.(registry|circuit)|(guardian|routing|provider)\.[a-z0-9]+"
    r"|reply\.ingress\.[a-z0-9]+|control\.[a-z0-9]+|beat\.(ingress|guardian|routing|provider)\.[a-z0-9]+"
    r"|inbox\.(alive|ingress|guardian|routing|provider)\.[a-z0-9]+\.[a-z0-9]+"
    r"|inbox\.(guardian|provider)\.[a-z0-9]+-(js|pull)\.[a-z0-9]+)\Z"
)
LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")

_ENDPOINT = """
[[endpoints]]
id = "{name}"
provider = "openai"
base_url = "{url}/v1"
api_key_env = "DOOR_PROVIDER_KEY"
allow_private = true
"""
_MODEL = """
[[models]]
name = "{name}"
endpoints = [{{ endpoint = "{endpoint}", model = "{model}" }}]
max_output_tokens = 4096
price = {{ input = "0.15", cached_input = "0.075", output = "0.60" }}
"""


class Case(Struct, frozen=True):
    """One input. `id` is the group and the number of the list, and what makes it this one where there are several."""

    id: str
    data: bytes
    statuses: frozenset[int]  # 0: the connection may end without an answer
    closes: bool = False  # the connection ends afterwards
    half_close: bool = False  # the client ends its side, as `nc` does
    code: str = ""
    prompt: bool = True  # answered within PROMPT_S

    @property
    def covers(self) -> str:
        """`B48` of `B48 both lengths`."""
        return self.id.partition(" ")[0]


def bad(name: str, data: bytes, *statuses: int, **more: Any) -> Case:
    """A case with these statuses, 400 when none is given."""
    return Case(name, data, frozenset(statuses or (400,)), **more)


def body(**fields: Any) -> bytes:
    """A valid request with these fields set."""
    asked = {"model": "sim-fast", "messages": [{"role": "user", "content": PROMPT}], **fields}
    return json.dumps(asked).encode()


def content(raw: bytes) -> bytes:
    """A valid request whose message holds these raw bytes."""
    return b'{"model":"sim-fast","messages":[{"role":"user","content":"' + PROMPT.encode() + raw + b'"}]}'


def member(raw: bytes) -> bytes:
    """A valid request with one more raw member."""
    return body()[:-1] + b"," + raw + b"}"


def chat(raw: bytes, **more: Any) -> bytes:
    """This body as a well-formed POST with the tenant's key."""
    return post(KEY, raw, **more)


Test = TypeVar("Test", bound=Callable[..., Any])


def covers(*ids: str) -> Callable[[Test], Test]:
    """Mark a test that treats these numbers of the list outside the tables."""

    def mark(test: Test) -> Test:
        test.covered_ids = ids  # type: ignore[attr-defined]
        return test

    return mark


class Watch:
    """Every subject NATS carries, as the operator sees them."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @property
    def strange(self) -> set[str]:
        """Those that are none of ours."""
        return {subject for subject in self.seen if not KNOWN.match(subject) and not subject.startswith("$")}


@asynccontextmanager
async def watching(up: Up) -> AsyncIterator[Watch]:
    """A subscription to `>` with the operator's user."""
    found = Watch()
    connection = await nats.connect(up.run["nats_url"])

    async def note(message: Any) -> None:
        found.seen.add(message.subject)

    await connection.subscribe(">", cb=note)
    await connection.flush()
    try:
        yield found
    finally:
        await connection.close()


class Door:
    """A running Hotpath with one of each role, a simulator and an echo behind it."""

    def __init__(self, up: Up, sim: Sim, echo: Echo) -> None:
        self.up = up
        self.sim = sim
        self.echo = echo
        self.url = up.url
        self.tenant = "door"
        self.key: str = up.cli("keys", "create", "--tenant", self.tenant)["key"]
        self.sinks = Sinks(up, [self.key, *SECRETS.values(), *_generated(up.data)])

    async def send(self, data: bytes, **how: Any) -> Answer:
        """These bytes, the key put in; what comes back holds no secret."""
        answer = await exchange(self.url, data.replace(KEY.encode(), self.key.encode()), **how)
        self.sinks.check_answer(answer)
        return answer

    async def check(self, case: Case) -> None:
        """Send it, and look at the answer. A late one may be the machine: then it is tried again."""
        for _ in range(TRIES):
            answer = await self.send(case.data, half_close=case.half_close)
            if not case.prompt or answer.took < PROMPT_S:
                break
        else:
            raise AssertionError(f"{case.id}: {TRIES} times slower than {PROMPT_S} s, {answer.took:.3f} s at last")
        try:
            if answer.status or 0 not in case.statuses:
                check_error(answer, case.statuses)
                if case.code:
                    assert answer.error["code"] == case.code
                assert PROMPT not in answer.body.decode()
            assert not case.closes or (answer.closed and not answer.rest), "the connection stayed open"
            assert b"HTTP/1.1" not in answer.rest
        except AssertionError as error:
            raise AssertionError(f"{case.id}: {answer}") from error

    @asynccontextmanager
    async def unharmed(self, calls: int = 0) -> AsyncIterator["Client"]:
        """What holds around every group: the common rule at the top. `calls`: upstream calls the group makes itself."""
        self.sim.reset()
        before = connections(self.up)
        async with watching(self.up) as watch, session() as http:
            client = Client(http, self.url, self.key)
            neighbours = Neighbours(client)
            async with neighbours:
                yield client
            assert (await client.chat("[[sim chunks=2]]")).ended_well
            made = (await asyncio.to_thread(self.sim.stats))["calls"]
            assert made == neighbours.begun + 1 + calls, f"{made} upstream calls, not {neighbours.begun + 1 + calls}"
            pending = (await asyncio.to_thread(settled_level, self.up, self.tenant, 3))["pending"]
            assert pending == 0, "a reservation is left"
            assert watch.seen, "the watcher saw nothing at all"
            assert not watch.strange, watch.strange
            assert before <= connections(self.up), "a connection to NATS was lost"
        await asyncio.to_thread(self.sinks.check)


class Neighbours:
    """Two long paced streams, open all the time, that must not notice anything (I10)."""

    PROMPT = "[[sim chunks=150 pace=10 seed=7]]"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._over = asyncio.Event()
        self._texts: set[str] = set()
        self.begun = 0

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.create_task(self._read()) for _ in range(2)]

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)
        assert len(self._texts) == 1, "the text of a neighbour is not what it was"
        assert all(text.count(" ") >= 100 for text in self._texts)

    async def _read(self) -> None:
        while not self._over.is_set():
            self.begun += 1
            seen = await self._client.chat(self.PROMPT, stream=True)
            assert seen.ended_well, (seen.status, seen.body[-300:])
            assert seen.terminals == 1
            self._texts.add(seen.text)


def check_error(answer: Answer, statuses: Iterable[int]) -> None:
    """OpenAI's shape, with a request id, and one of the statuses."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["message"]
    assert answer.headers["content-type"].startswith("application/json")
    assert LABEL.match(answer.headers["x-request-id"])


def connections(up: Up) -> set[tuple[int, int]]:
    """(pid, local port) of every connection that the fleet has with NATS: a new one is a connection that was lost."""
    port = urlsplit(up.run["nats_url"]).port
    inodes = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        if state == "01" and int(remote.split(":")[1], 16) == port:
            inodes[f"socket:[{rest[5]}]"] = int(local.split(":")[1], 16)
    found = set()
    for pid in up.pids():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            target = str(link.readlink()) if link.is_symlink() else ""
            if target in inodes:
                found.add((pid, inodes[target]))
    assert found, "nobody is connected to NATS"
    return found


def catalogue(sim_url: str, echo_url: str) -> str:
    """The TOML: the simulator's models and an echo under names that real catalogues hold."""
    parts = [_ENDPOINT.format(name="sim", url=sim_url), _ENDPOINT.format(name="echo", url=echo_url)]
    parts.append(_MODEL.format(name="sim-fast", endpoint="sim", model="sim-fast"))
    parts += [_MODEL.format(name=name, endpoint="echo", model=name) for name in ("echo", *REAL_NAMES)]
    return "".join(parts)


def _generated(data: Path) -> list[str]:
    """The secrets that `hotpath up` made: the passwords of NATS and Redis."""
    lines = [line for line in (data / "secrets.env").read_text().splitlines() if line and not line.startswith("#")]
    return [line.partition("=")[2] for line in lines]
