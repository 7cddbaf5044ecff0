"""/metrics: the process's own numbers, open on loopback, else for the admin key (S1-G01)."""

import aiohttp
import pytest
from aiohttp import web

from shared.telemetry.metrics import Metrics, MetricsServer, loopback

KEY = "admin-key-of-at-least-32-characters"


async def get(url: str, key: str | None = None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": key}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def test_own_numbers_only() -> None:
    one, two = Metrics(), Metrics()
    one.counter("things", "Things", ("kind",)).labels("a").inc(2)
    one.gauge("now", "Now").set_function(lambda: 7.0)
    one.histogram("took_ms", "Took", buckets=(1, 5)).observe(3)
    text = one.render().decode()
    assert 'hotpath_things_total{kind="a"} 2.0' in text
    assert "hotpath_now 7.0" in text
    assert 'hotpath_took_ms_bucket{le="5.0"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert "hotpath_things" not in two.render().decode()


async def test_open_on_loopback_and_started_by_the_first_connection() -> None:
    metrics = Metrics()
    metrics.gauge("now", "Now").set(3)
    server = MetricsServer(metrics, "127.0.0.1", 0, KEY)
    server.start()
    assert server._app is None
    for _ in range(2):
        status, text = await get(server.url)
        assert status == 200
        assert "hotpath_now 3.0" in text
    assert (await get(server.url.replace("/metrics", "/other")))[0] == 404
    await server.close()


@pytest.mark.parametrize("key", [None, "", KEY, "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"bearer {KEY}"])
async def test_open_to_others_it_asks_for_the_admin_key(key: str | None) -> None:
    """S1-G01, D7: also on the routes that a role adds, and on paths that do not exist."""

    async def secret(_request: web.Request) -> web.Response:
        return web.Response(text="secret")

    server = MetricsServer(Metrics(), "0.0.0.0", 0, KEY)
    server.app.router.add_get("/trace", secret)
    server.start()
    here = f"http://127.0.0.1:{server._socket.getsockname()[1]}"
    for path in ("/metrics", "/trace", "/nothing"):
        status, text = await get(here + path, key)
        assert status == 401
        assert KEY not in text
    assert await get(here + "/trace", f"Bearer {KEY}") == (200, "secret")
    await server.close()


async def test_closed_before_anybody_came() -> None:
    server = MetricsServer(Metrics(), "127.0.0.1", 0, KEY)
    server.start()
    await server.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(server.url)


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, alone: bool) -> None:
    assert loopback(host) is alone
