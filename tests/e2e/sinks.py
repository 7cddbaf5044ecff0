"""Everywhere a secret or a prompt could end up, searched (I9): logs, terminal, answers, metrics, traces, command lines,
what Redis and NATS keep on disk. Private files (mode 0600) hold secrets by their purpose; their mode is checked."""

import itertools
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.e2e.raw import Answer
from tests.e2e.rig import Up

#: Files in DIR that are there to hold secrets.
PRIVATE = {"secrets.env", "nats.conf", "redis.conf", "run.json"}

#: How every secret and every prompt of these tests begins that the test chose itself.
CANARY = b"canary-"


class Sinks:
    """What must not be found, and where it is looked for."""

    def __init__(self, up: Up, secrets: list[str]) -> None:
        self._up = up
        self.secrets = [secret.encode() for secret in secrets]
        self.rids: deque[str] = deque(maxlen=20)  # of answered requests

    def check_answer(self, answer: Answer) -> None:
        """No secret in what a client was sent, and nothing of its own input in an error."""
        if answer.status == 200 and "x-br-calls" in answer.headers:
            self.rids.append(answer.headers["x-br-request-id"])
        text = repr(answer).encode()
        wanted = self.secrets if answer.status == 200 else [*self.secrets, CANARY]
        for secret in wanted:
            assert secret not in text, f"an answer holds {secret[:14]!r}...: {text[:300]!r}"

    def check(self) -> int:
        """Every sink; how many. Raises AssertionError naming the first one that holds something."""
        count = 0
        for name, text in self._texts():
            count += 1
            for secret in [*self.secrets, CANARY]:
                assert secret not in text, f"{name} holds {secret[:14]!r}..."
        return count

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        yield "terminal", self._up.said().encode()
        yield from self._files()
        yield from self._command_lines()
        yield from self._pages()
        yield from self._redis()

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """Logs, and what the servers keep."""
        for path in sorted(self._up.data.rglob("*")):
            if not path.is_file():
                continue
            if path.name in PRIVATE and path.parent == self._up.data:
                assert path.stat().st_mode & 0o077 == 0, f"others can read {path.name}"
                continue
            yield str(path.relative_to(self._up.data)), path.read_bytes()

    @staticmethod
    def _command_lines() -> Iterator[tuple[str, bytes]]:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                yield str(path), path.read_bytes()
            except OSError:  # it has ended
                continue

    def _pages(self) -> Iterator[tuple[str, bytes]]:
        """/metrics of every process, what the ingress keeps of the last requests."""
        key = {"Authorization": f"Bearer {self._up.run['admin_key']}"}
        for path in ("/metrics", "/metrics/targets", "/health", "/ready"):
            with urllib.request.urlopen(urllib.request.Request(self._up.url + path, headers=key), timeout=5) as page:
                yield path, page.read()
        for target in itertools.chain(*self._up.run["metrics"].values()):
            with urllib.request.urlopen(target, timeout=5) as page:
                yield target, page.read()
        for rid in self.rids:
            request = urllib.request.Request(f"{self._up.url}/trace/{rid}", headers=key)
            with urllib.request.urlopen(request, timeout=5) as page:
                yield "/trace", page.read()

    def _redis(self) -> Iterator[tuple[str, bytes]]:
        """Every key with all it holds."""
        with redis.Redis.from_url(self._up.run["redis_url"]) as client:
            for name in client.scan_iter():
                yield "redis", name + b" " + repr(_value(client, name)).encode()


def _value(client: "redis.Redis", name: bytes) -> Any:
    match client.type(name):
        case b"hash":
            return client.hgetall(name)
        case b"stream":
            return client.xrange(name)
        case b"zset":
            return client.zrange(name, 0, -1)
        case b"set":
            return client.smembers(name)
        case b"list":
            return client.lrange(name, 0, -1)
        case _:
            return client.get(name)
