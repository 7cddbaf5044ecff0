"""What `hotpath ledger|circuits|trace|version` do, as plain JSON values; app.py prints them."""

import asyncio
import platform
import re
import tomllib
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any, Final, TypeVar

from deploy import servers
from deploy.cli.procfile import ROOT
from deploy.cli.where import Where
from shared.bus.base import BusUnavailable
from shared.settings import Settings
from shared.state.base import StateUnavailable
from shared.state.operations import Missing
from shared.state.redis import State
from shared.wire import subjects

NOTICE_S: Final = 0.3  # a notice is a courtesy: every process polls the registry's version anyway
BEATS_S: Final = 0.7  # a live ingress beats every 500 ms
MAX_INGRESSES: Final = 256

_LABEL: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")

T = TypeVar("T")


class Failed(Exception):
    """The command could not do it; the message says why and what helps."""


def with_state(where: Where, work: Callable[[State], Awaitable[T]]) -> T:
    """Connect to the Hotpath's Redis, work, close. Raises Failed."""
    settings = where.settings()

    async def go() -> T:
        try:
            state = await State.connect(settings)
        except StateUnavailable as exc:
            raise Failed(f"Redis does not answer ({exc}); is `hotpath up` running? else set REDIS_URL") from exc
        try:
            return await work(state)
        except StateUnavailable as exc:
            raise Failed(f"Redis refused or did not answer: {exc}") from exc
        finally:
            await state.close()

    return asyncio.run(go())


async def tell_everyone(where: Where, settings: Settings) -> None:
    """Publish that the registry changed; whoever misses it sees it within 500 ms."""
    from shared.bus.nats import NatsBus  # noqa: PLC0415 - only changes need it, and it costs 60 ms to import

    try:
        async with asyncio.timeout(NOTICE_S):
            bus = await NatsBus.connect(settings.nats_url, f"hotpath-{where.data.name}")
            bus.publish(subjects.NOTICE_REGISTRY, b"")
            await bus.flush()
            await bus.close()
    except (BusUnavailable, ValueError, TimeoutError):
        return


def show_ledger(where: Where, tenant: str, rid: str) -> dict[str, Any]:
    """{"tenant", "entries": [{"rid", "call", "state", "amount", "cost", "estimated", ...}]}, one request's or all."""

    async def work(state: State) -> dict[str, Any]:
        try:
            found = await state.operations.entries(tenant, rid)
        except Missing as exc:
            raise Failed(f"{exc}; `hotpath keys list` shows the tenants") from exc
        names = ("rid", "call", "state", "amount", "cost", "estimated", "instance", "delivery", "deadline")
        return {"tenant": tenant, "entries": [{name: getattr(entry, name) for name in names} for entry in found]}

    return with_state(where, work)


def list_circuits(where: Where) -> dict[str, Any]:
    """{"circuits": [{"endpoint", "state", "failures" (in a row), "open_ms" (since it opened), "wait_ms" (until a call
    may pass), "probe_ms" (age of the newest probe without a verdict), "calls", "failed" (in the last minute)}]}; times
    are null where there are none."""
    from shared.core import circuit  # noqa: PLC0415 - only here
    from shared.state.circuits import policy  # noqa: PLC0415 - only here

    rule = policy(where.settings())

    async def work(state: State) -> dict[str, Any]:
        now, rows = state.clock.now(), []
        for endpoint, found in sorted((await state.circuits.all()).items()):
            closed = found.open_until == 0
            opened = found.open_until - circuit.cooldown_ms(rule, found.openings)
            rows.append(
                {
                    "endpoint": endpoint,
                    "state": circuit.state(found, now),
                    "failures": found.failures,
                    "open_ms": None if closed else now - opened,
                    "wait_ms": None if closed else circuit.wait_ms(found, now),
                    "probe_ms": now - found.probe_until + rule.probe_ms if found.probes and found.probe_until else None,
                    "calls": sum(slot.calls for slot in found.window),
                    "failed": sum(slot.failures for slot in found.window),
                }
            )
        return {"circuits": rows}

    return with_state(where, work)


def trace(where: Where, rid: str) -> dict[str, Any]:
    """{"rid", "hops": [{"role", "instance", "pid", "at" (ms), "took_us"}], ...} from whichever ingress had it."""
    if not _LABEL.match(rid):
        raise ValueError(f"{rid}: not a request id")
    return asyncio.run(_trace(where, rid))


async def _trace(where: Where, rid: str) -> dict[str, Any]:
    import json  # noqa: PLC0415 - only here

    from deploy.cli.http import get  # noqa: PLC0415 - only here

    if where.run is not None:
        urls = list(where.run["metrics"].get("ingress", []))
        key = where.run["admin_key"]
    else:
        settings = where.settings()
        urls, key = await _ingresses(settings), settings.admin_api_key
    answers = await asyncio.gather(*(get(url.removesuffix("/metrics"), f"/trace/{rid}", key) for url in urls))
    for status, body in answers:
        if status == 200:
            found: dict[str, Any] = json.loads(body)
            return found
    if not urls:
        raise Failed("no ingress was heard of; is Hotpath running? name its directory: --data DIR")
    raise Failed(f"no ingress remembers {rid} (each keeps its last 10,000 requests)")


async def _ingresses(settings: Settings) -> list[str]:
    """The metrics URLs of every ingress, as their beats name them: for a Hotpath that `hotpath up` did not start."""
    from shared.bus.nats import NatsBus  # noqa: PLC0415 - only here
    from shared.wire.messages import decode_beat  # noqa: PLC0415 - only here

    found: set[str] = set()

    def on_beat(_subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        try:
            beat = decode_beat(payload)
        except ValueError:
            return
        if beat.metrics and len(found) < MAX_INGRESSES:
            found.add(beat.metrics)

    try:
        bus = await NatsBus.connect(settings.nats_url, "hotpath-trace")
        await bus.subscribe(subjects.beat("ingress", "*"), on_beat)
        await asyncio.sleep(BEATS_S)
        await bus.close()
    except (BusUnavailable, ValueError) as exc:
        raise Failed(f"{exc}; set NATS_URL, or name the directory of a running `hotpath up`: --data DIR") from exc
    return sorted(found)


def versions() -> dict[str, str]:
    """Hotpath and what it runs on."""
    import subprocess  # noqa: PLC0415 - only here

    try:
        own = metadata.version("hotpath")
    except metadata.PackageNotFoundError:  # run from the tree, without ./deploy/up
        own = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    found = {"hotpath": own, "python": platform.python_version()}
    for name, binary in (("nats-server", servers.nats_binary), ("valkey", servers.valkey_binary)):
        try:
            told = subprocess.run([binary(), "--version"], capture_output=True, text=True, timeout=5, check=False)
        except (servers.ServerMissing, OSError):
            found[name] = "not installed"
            continue
        match = re.search(r"v=?(\d[\w.-]*)", told.stdout)
        found[name] = match[1] if match else told.stdout.strip()
    return found
