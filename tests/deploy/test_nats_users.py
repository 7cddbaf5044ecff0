"""The generated nats.conf on a real server: what each user may publish and subscribe, subject by subject.

DESIGN 3, faults 3 ("NATS permissions"), decision 15. `RIGHTS` says who needs what; everything else must be refused.
"""

import asyncio
import inspect
import json
import socket
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Self, get_type_hints

import msgspec
import pytest

from deploy import servers
from deploy.cli import confs, credentials, fleet
from shared.bus.jetstream import JetStream, inboxes
from shared.bus.nats import NatsBus
from shared.bus.stored import StreamPlan
from shared.wire import subjects

ROLES: Final = ("ingress", "guardian", "routing", "provider")
WORKERS: Final = ROLES[1:]
LISTED: Final = (*ROLES, "loadgen")  # every user with lists


class Right(NamedTuple):
    """One kind of subject: who may publish it, who may subscribe to it, and as a member of which group only."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    group: str = ""


def worker(role: str) -> Right:
    sender = {"guardian": "ingress", "routing": "guardian", "provider": "routing"}.get(role)
    return Right((sender,), (role,)) if sender else Right()


def beat(role: str) -> Right:
    watchers = {
        "ingress": ("ingress", "provider"), "guardian": ("ingress",), "routing": ("ingress", "guardian"),
        "provider": ("ingress", "routing"), "loadgen": ("provider",),
    }  # fmt: skip
    return Right((role,), watchers[role])


#: By the name in shared/wire/subjects.py; what takes a role is a function of it.
RIGHTS: Final[dict[str, Right | Callable[[str], Right]]] = {
    "worker": worker,
    "reply": lambda role: Right(WORKERS, (role,)) if role in {"ingress", "loadgen"} else Right(),
    "beat": beat,
    "inbox": lambda role: Right((), (role,)) if role in ROLES else Right(),  # the server itself writes there
    "alive": Right(WORKERS, ("ingress",)),
    "control": Right(("ingress", "loadgen"), ROLES),
    "ADMIT": Right(("loadgen",), ("guardian",), subjects.ADMIT_GROUP),
    "OUTCOME": Right(("provider",), ("routing",), subjects.OUTCOME_GROUP),
    "USAGE": Right(("guardian", "provider")),  # who reads it pulls from JetStream
    "jetstream": Right(),  # of any other stream, or another verb
    "jetstream_consumer": Right(),
    "NOTICE_REGISTRY": Right((), ROLES),  # the operator tells
    "NOTICE_CIRCUIT": Right(("routing",), ROLES),
}


class Case(NamedTuple):
    name: str
    subject: str
    right: Right


#: Of the usage records' stream and its consumer: who may ask JetStream what.
STREAM: Final = {
    "STREAM.CREATE": ("guardian", "provider"), "STREAM.INFO": ("guardian", "provider"), "STREAM.UPDATE": ("guardian",),
    "STREAM.DELETE": (), "STREAM.PURGE": (), "STREAM.MSG.GET": (), "STREAM.MSG.DELETE": (), "STREAM.SNAPSHOT": (),
    "DIRECT.GET": (),
}  # fmt: skip
CONSUMER: Final = {
    "CONSUMER.CREATE": ("guardian",), "CONSUMER.MSG.NEXT": ("guardian",), "CONSUMER.DELETE": (), "CONSUMER.INFO": (),
    "CONSUMER.DURABLE.CREATE": (), "CONSUMER.PAUSE": (),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every subject that subjects.py can make, for every role it can be made for."""
    for name, right in RIGHTS.items():
        made = getattr(subjects, name)
        if isinstance(right, Right):
            subject = made if isinstance(made, str) else made(*["abc"] * len(inspect.signature(made).parameters))
            yield Case(name, subject, right)
            continue
        others = ["abc"] * (len(inspect.signature(made).parameters) - 1)
        for role in LISTED:
            yield Case(f"{name}-{role}", made(role, *others), right(role))


def jetstream_cases() -> Iterator[Case]:
    for verb, who in STREAM.items():
        yield Case(verb, subjects.jetstream(verb, subjects.USAGE_STREAM), Right(who))
    for verb, who in CONSUMER.items():
        name = subjects.jetstream_consumer(verb, subjects.USAGE_STREAM, subjects.USAGE_CONSUMER)
        yield Case(verb, name, Right(who))
    ack = f"$JS.ACK.{subjects.USAGE_STREAM}.{subjects.USAGE_CONSUMER}.1.2.3.4.0"
    yield Case("ack", ack, Right(("guardian",)))
    yield Case("ack-another", ack.replace(subjects.USAGE_CONSUMER, "another"), Right())


CASES: Final = (*cases(), *jetstream_cases())
#: What no role has to do with, or not at that width.
WIDER: Final = (
    ">", "*", "hotpath.>", "hotpath.*.>", f"{subjects.PREFIX}.>", f"{subjects.PREFIX}.*", f"{subjects.PREFIX}.*.*",
    f"{subjects.PREFIX}.*.*.*", "_INBOX.>", "_INBOX.abc", "$JS.>", "$JS.API.>", "$SYS.>", "$SYS.REQ.>", "$G.>",
    f"{subjects.PREFIX}.inbox.>", f"{subjects.PREFIX}.inbox.*.*.*", subjects.reply("*", "*"), subjects.beat("*", "*"),
    f"{subjects.PREFIX}.beat.>", f"{subjects.PREFIX}.reply.>", f"{subjects.PREFIX}.notice.>",
    f"{subjects.ADMIT}.>", f"{subjects.PREFIX}.usage", f"{subjects.PREFIX}.audit",
)  # fmt: skip
ELSEWHERE: Final = (
    "anything", "hotpath.v2.admit", "_INBOX.abc", "$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.ACK.x",
    "$JS.API.STREAM.CREATE.x",
    "$SYS.REQ.SERVER.PING",
    f"{subjects.ADMIT}.more", f"{subjects.control('abc')}.more", f"{subjects.OUTCOME}.more", f"{subjects.USAGE}.more",
    f"{subjects.PREFIX}.audit", f"{subjects.PREFIX}.notice.tenant", subjects.beat("operator", "abc"),
    subjects.inbox("ingress", "abc", "1.2"), subjects.worker("operator", "abc"),
)  # fmt: skip


class Server:
    """A server with the generated configuration."""

    def __init__(self, port: int, secrets: dict[str, str]) -> None:
        self.port = port
        self.secrets = secrets

    def login(self, user: str) -> str:
        password = self.secrets[credentials.nats_password(user)]
        return json.dumps({"user": user, "pass": password, "no_responders": True, "headers": True, "verbose": False})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """NATS as `hotpath up` starts it."""
    directory = tmp_path_factory.mktemp("users")
    port = servers.free_port()
    secrets = credentials.ensure(directory / "secrets.env", {})
    conf = confs.nats_conf(directory, "127.0.0.1", port, secrets, 1_048_576)
    assert conf.stat().st_mode & 0o777 == 0o600
    with servers.running(servers.nats_command(conf), port, directory / "log"):
        yield Server(port, secrets)


class User:
    """A connection that speaks the protocol by hand: the server's own words, no library's reading of them."""

    def __init__(self, server: Server, name: str) -> None:
        self._wire = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        self._lines = self._wire.makefile("rb")
        self._sid = 0
        assert self._lines.readline().startswith(b"INFO ")
        assert self.say(f"CONNECT {server.login(name)}") == b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._wire.close()

    def say(self, line: str) -> bytes:
        """What the server answers to this line, up to the PONG of a PING behind it."""
        self._wire.sendall(f"{line}\r\nPING\r\n".encode())
        answer = b""
        while (read := self._lines.readline()) != b"PONG\r\n":
            assert read, answer
            answer += read
        return answer

    def may_publish(self, subject: str) -> bool:
        return self._allowed(self.say(f"PUB {subject} 0\r\n"), "Publish", subject)

    def may_subscribe(self, pattern: str, group: str = "") -> bool:
        """Asked and taken back."""
        self._sid += 1
        allowed = self._allowed(self.say(f"SUB {pattern} {group} {self._sid}"), "Subscription", pattern)
        self.say(f"UNSUB {self._sid}")
        return allowed

    @staticmethod
    def _allowed(answer: bytes, what: str, subject: str) -> bool:
        if answer:
            assert answer.startswith(f'-ERR \'Permissions Violation for {what} to "{subject}"'.encode()), answer
        return not answer


@pytest.fixture(scope="module", params=LISTED)
def user(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[str, User]]:
    """Each user with lists."""
    with User(server, request.param) as user:
        yield request.param, user


def test_every_subject_has_an_entry() -> None:
    """A subject that is new in subjects.py belongs into RIGHTS, and into deploy/nats.conf for who needs it."""
    named = vars(subjects).items()
    constants = {name for name, value in named if isinstance(value, str) and value.startswith(f"{subjects.PREFIX}.")}
    functions = {name for name, value in named if inspect.isfunction(value) and get_type_hints(value)["return"] is str}
    assert constants | functions == RIGHTS.keys()
    for name in functions:
        takes_role = "role" in inspect.signature(getattr(subjects, name)).parameters
        assert takes_role is not isinstance(RIGHTS[name], Right), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_user_may_do_what_it_needs_and_nothing_else(user: tuple[str, User], case: Case) -> None:
    """Issue 3: each role's own rights, and every other role's refused, publishing and subscribing."""
    name, wire = user
    assert wire.may_publish(case.subject) is (name in case.right.publish)
    reads = name in case.right.subscribe
    group = case.right.group
    assert wire.may_subscribe(case.subject) is (reads and not group)
    if group:
        assert wire.may_subscribe(case.subject, group) is reads
        assert not wire.may_subscribe(case.subject, "another")


def test_a_user_may_do_nothing_wider(user: tuple[str, User]) -> None:
    """Nobody but the operator sees `>`, `_INBOX.>`, JetStream's API, the server's own, a whole family of subjects."""
    name, wire = user
    for pattern in WIDER:
        assert not wire.may_subscribe(pattern), (name, pattern)
        assert not wire.may_subscribe(pattern, "group"), (name, pattern)
    for subject in ELSEWHERE:
        assert not wire.may_publish(subject), (name, subject)


def test_nothing_lies_deeper_than_a_last_star(server: Server) -> None:
    """Who may read `a.*` may subscribe to `a.>` (NATS takes `>` for one more word there): nothing else is below `a`."""
    for case in CASES:
        above = case.subject.rpartition(".")[0]
        below = [other for other in CASES if other.subject.startswith(f"{above}.") and other.right != case.right]
        for name in case.right.subscribe:
            with User(server, name) as wire:
                assert not wire.may_subscribe(f"{above}.>") or not below, (name, above, below)


def test_the_operator(server: Server) -> None:
    """It runs the fleet: notices, traces, doctor."""
    with User(server, "operator") as operator:
        assert operator.may_subscribe(">")
        for case in CASES:
            assert operator.may_publish(case.subject)


def test_an_older_ingress_is_answered(server: Server) -> None:
    """Before decision 15 an ingress asked from `inbox.<instance>.<token>`: workers may answer there, nobody else."""
    for name in LISTED:
        with User(server, name) as wire:
            assert wire.may_publish(f"{subjects.PREFIX}.inbox.abc-alive.def") is (name in WORKERS)
            assert not wire.may_subscribe(f"{subjects.PREFIX}.inbox.abc-alive.def")


def test_503_comes_back_without_a_right_to_publish_it(server: Server) -> None:
    """The server's own 503 reaches the sender's inbox, and a direct publisher's reply subject."""
    for name, subject, reply in (
        ("ingress", subjects.worker("guardian", "abc"), subjects.inbox("ingress", "abc", "7")),
        ("ingress", subjects.control("abc"), subjects.alive("abc", "def")),
        ("guardian", subjects.worker("routing", "abc"), subjects.inbox("guardian", "abc", "7")),
        ("routing", subjects.worker("provider", "abc"), subjects.inbox("routing", "abc", "7")),
        ("loadgen", subjects.ADMIT, subjects.reply("loadgen", "abc-0")),
    ):
        with User(server, name) as wire:
            assert wire.say(f"SUB {reply} 1") == b""
            assert b"NATS/1.0 503" in wire.say(f"PUB {subject} {reply} 0\r\n")


async def test_the_usage_stream_from_end_to_end(server: Server) -> None:
    """Issue 4: a provider makes it and publishes, a guardian reads it, within their lists."""
    plan = StreamPlan(name=subjects.USAGE_STREAM, subject=subjects.USAGE, max_age_ms=60_000, max_bytes=100_000)
    buses = {}
    for name in ("provider", "guardian"):
        password = server.secrets[credentials.nats_password(name)]
        buses[name] = await NatsBus.connect(f"nats://{name}:{password}@127.0.0.1:{server.port}", name)
    provider = JetStream(buses["provider"], plan, inboxes("provider", "abc")[0], update=False)
    await provider.start()
    guardian = JetStream(
        buses["guardian"], msgspec.structs.replace(plan, max_bytes=200_000), inboxes("guardian", "def")[0]
    )
    await guardian.start()
    async with asyncio.timeout(5):
        while not (provider.there and guardian.there):
            await asyncio.sleep(0.01)
    await provider.publish(b"x", 2)
    inbox = inboxes("guardian", "def")[1]
    consumer = guardian.consumer(subjects.USAGE_CONSUMER, inbox, ack_wait_s=1, max_pending=10)
    await consumer.start()
    (stored,) = await consumer.fetch(1, 5)
    consumer.ack(stored)
    await consumer.close()
    await guardian.close()
    await provider.close()
    for bus in buses.values():
        await bus.close()
    assert not any(bus.errors for bus in buses.values())


def test_who_is_answered_that_somebody_lives() -> None:
    """Only workers answer, and only where their lists let them: a question cannot make anybody publish elsewhere."""
    good = (subjects.alive("abc", "def"), subjects.reply("loadgen", "abc-1"), f"{subjects.PREFIX}.inbox.abc-alive.def")
    bad = (
        "", "x", subjects.reply("ingress", "abc"), subjects.reply("loadgen", "a.b"), subjects.reply("loadgen", "*"),
        subjects.inbox("ingress", "abc", "1"), subjects.inbox("guardian", "abc", "1"), subjects.control("abc"),
        subjects.alive("abc", ">"), subjects.alive("abc", "d e"), subjects.alive("abc", "d\r\nPUB x 0"),
        subjects.alive("abc", "d") + "\n", subjects.alive("abc", "d.e"), f"{subjects.PREFIX}.inbox.abc",
    )  # fmt: skip
    for role in WORKERS:
        assert all(subjects.answerable(role, reply) for reply in good)
        assert not [reply for reply in bad if subjects.answerable(role, reply)]
    assert not [reply for reply in good for role in ("ingress", "loadgen") if subjects.answerable(role, reply)]


@pytest.mark.parametrize(
    "options", ["{}", '{"user": "loadgen", "pass": "x"}', '{"user": "provider", "pass": ""}', '{"user": "roles"}']
)
def test_strangers_stay_outside(server: Server, options: str) -> None:
    """No user, or a wrong password: no connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as wire, wire.makefile("rb") as lines:
        assert lines.readline().startswith(b"INFO ")
        wire.sendall(f"CONNECT {options}\r\nPING\r\n".encode())
        assert b"Authorization Violation" in lines.readline()
        assert lines.read() == b""


def test_a_process_knows_its_own_user_only() -> None:
    """`hotpath up`: what is handed to each process of the Procfile."""
    secrets = {credentials.nats_password(name): name * 8 for name in credentials.NATS_USERS}
    env = {"NATS_URL": "nats://op@h", "OPENAI_API_KEY": "sk-1", **fleet.role_nats_urls(secrets, 1)}
    for role in ROLES:
        found = fleet.own_env(role, env, (), {"OPENAI_API_KEY", "NOT_SET"})
        assert {name for name in found if name.startswith("NATS_")} == {f"NATS_URL_{role.upper()}"}
        assert (found["OPENAI_API_KEY"] == "sk-1") is (role == "provider")
        assert "NOT_SET" not in found
    combined = fleet.own_env("workers", env, ("guardian", "provider"), {"OPENAI_API_KEY"})
    assert {name for name in combined if name.startswith("NATS_")} == {"NATS_URL_GUARDIAN", "NATS_URL_PROVIDER"}
    assert combined["OPENAI_API_KEY"] == "sk-1"
    assert len([name for name in fleet.own_env("anything", env, (), ()) if name.startswith("NATS_URL_")]) == 4
    given = {"NATS_URL": "nats://one@h", "NATS_URL_ROUTING": "nats://r@h", "NATS_URL_LOADGEN": "nats://l@h"}
    assert fleet.own_env("provider", given, (), ()) == {"NATS_URL": "nats://one@h"}
    assert fleet.own_env("routing", given, (), ()) == {"NATS_URL_ROUTING": "nats://r@h"}
