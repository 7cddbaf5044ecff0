"""The admin API (issue 4): the same operations as the command line, on its own port, for its own key; its OpenAPI file
is what it does (test_admin_openapi.py). The registry, the ledger and the connections are the real ones."""

import json
import logging
import secrets
import socket
from typing import Any

import httpx2 as httpx
import pytest

from ingress.admin import openapi
from shared.core.users import user_id
from shared.settings import load
from tests.ingress.admin_api import ADMIN, PEPPER, AdminApi, serving

NAMES = [f"/v1/tenants/{name}" for name in ("nobody", "a%2Fb", "..", "a" * 65)]


@pytest.fixture(scope="module")
def api(valkey_url: str) -> Any:
    with serving(valkey_url) as found:
        yield found


@pytest.fixture(scope="module")
def client(api: AdminApi) -> Any:
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {ADMIN}"}) as made:
        yield made


@pytest.fixture
def name() -> str:
    return f"t{secrets.token_hex(4)}"


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and code; the shape is the gateway's."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return answer.status_code, body["error"]["code"]


def test_the_life_of_a_tenant(api: AdminApi, client: httpx.Client, name: str) -> None:
    made = client.post(
        "/v1/keys",
        json={
            "tenant": name, "tenant_limits": {"day": 5_000_000_000}, "limits": {"month": 7}, "models": ["m"], "rpm": 60,
        },
    )  # fmt: skip
    assert made.status_code == 201
    key = made.json()
    assert set(key) == {"key", "key_id", "tenant_id"}
    principal = api.principal(key["key"])
    assert principal is not None
    assert (principal.limited, principal.key_rpm, principal.models) == (True, 60, frozenset({"m"}))
    (listed,) = client.get("/v1/keys", params={"tenant": name}).json()["keys"]
    assert key["key"] not in json.dumps(listed)
    assert client.get(f"/v1/keys/{key['key_id']}").json() == listed
    changed = client.patch(f"/v1/keys/{key['key_id']}", json={"models": [], "tpm": 5, "expires": 4_000_000_000_000})
    assert changed.json() == listed | {"models": [], "tpm": 5, "expires": 4_000_000_000_000}
    tenant = client.patch(f"/v1/tenants/{name}", json={"mode": "active", "keywords": ["geheim"]}).json()
    assert (tenant["mode"], tenant["keywords"], tenant["pii"]) == ("active", ["geheim"], "off")
    assert tenant in client.get("/v1/tenants").json()["tenants"]
    assert client.post(f"/v1/keys/{key['key_id']}/revoke").json() == {"key_id": key["key_id"], "revoked": True}
    assert api.principal(key["key"]) is None


def test_budgets(client: httpx.Client, name: str) -> None:
    key = client.post("/v1/keys", json={"tenant": name}).json()
    path = f"/v1/tenants/{name}/budget"
    for query, level in (({}, "tenant"), ({"key": key["key_id"]}, "key"), ({"user": "ann/é"}, "user")):
        set_ = client.patch(path, params=query, json={"day": 3, "lifetime": 2**53 - 1}).json()
        assert [(row["level"], row["limit"]) for row in set_["levels"]] == [
            (level, 3),
            (level, None),
            (level, 2**53 - 1),
        ]
        assert client.get(path, params=query).json() == set_
        cleared = client.patch(path, params=query, json={"day": None}).json()
        assert [row["limit"] for row in cleared["levels"]] == [None, None, 2**53 - 1]
    assert client.get(path, params={"user": "ann/é"}).json()["user"] == user_id(PEPPER, key["tenant_id"], "ann/é")
    assert error(client.get(path, params={"key": "bootstrap"})) == (404, "not_found")
    assert error(client.get(path, params={"key": "a", "user": "b"})) == (409, "conflict")
    assert error(client.post("/v1/keys", json={"tenant": name, "synthetic": True})) == (409, "conflict")


def test_spend_and_entries(api: AdminApi, client: httpx.Client, name: str) -> None:
    key = client.post("/v1/keys", json={"tenant": name}).json()
    rid = api.spend(key["tenant_id"], key["key_id"], 60)
    found = client.get(f"/v1/tenants/{name}/spend", params={"by": "key", "days": 1}).json()
    assert found["rows"] == [{"name": key["key_id"], "settled": 60, "pending": 0, "unconfirmed": 0}]
    (entry,) = client.get(f"/v1/tenants/{name}/entries/{rid}").json()["entries"]
    assert (entry["rid"], entry["state"], entry["cost"]) == (rid, "settled", 60)
    costs = client.get(f"/v1/tenants/{name}/costs").json()
    assert (costs["total"]["requests"], costs["models"], costs["since"]) == (0, {}, 0)
    assert error(client.get(f"/v1/tenants/{name}/entries/{'0' * 32}")) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", path, 404) for path in NAMES]
    + [("POST", "/v1/tenants", 405), ("GET", "/", 404), ("GET", "/v1/tenants/", 404), ("GET", "/v1/keys?x=1", 400)]
    + [("GET", f"/v1/tenants/default/spend?{text}", 400) for text in ("days=63", "days=", "by=user", "days=1&days=1")]
    + [("GET", f"/v1/tenants/default/budget?{query}", 400) for query in ("user=", "%", "user=%ff", "key=a%2Fb")],
)  # fmt: skip
def test_refused(client: httpx.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert error(answer)[0] == status
    assert "chat/completions" not in answer.text  # that is another port


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b'{"mode":"on"}', 400), (b'{"rpm":-1}', 400), (b'{"rpm":1.5}', 400),
        (b'{"rpm":true}', 400), (b'{"surprise":1}', 400), (b'{"rpm":1,"rpm":2}', 400),
        (b'{"keywords":["\\ud800"]}', 400), (b'{"keywords":["a\\n"]}', 400), (b'{"rpm":1e400}', 400),
        (b" " * 800_000, 413),
    ],
)  # fmt: skip
def test_bodies_are_strict_and_bounded(client: httpx.Client, body: bytes, status: int) -> None:
    before = client.get("/v1/tenants/default").json()
    answer = client.patch("/v1/tenants/default", content=body, headers={"Content-Type": "application/json"})
    assert error(answer)[0] == status
    assert client.get("/v1/tenants/default").json() == before
    plain = client.patch("/v1/tenants/default", content=b"{}", headers={"Content-Type": "text/plain"})
    assert error(plain) == (415, "unsupported_media_type")


@pytest.mark.parametrize("header", ["", "Bearer", f"Bearer {ADMIN[:-1]}", f"Basic {ADMIN}", "Bearer " + "g" * 40])
def test_nobody_else_gets_in(api: AdminApi, header: str, caplog: pytest.LogCaptureFixture) -> None:
    """S1-G01, D7: not a tenant's key, whatever is asked for; each failure is told to the SIEM (S1-R3)."""
    api.events._lines.clear()  # a flood costs at most ten lines a second
    with caplog.at_level(logging.WARNING, "hotpath.ingress"), httpx.Client(base_url=api.url) as client:
        for method, path in (("GET", "/openapi.json"), ("GET", "/v1/keys"), ("PATCH", "/v1/tenants/default")):
            answer = client.request(method, path, headers={"Authorization": header} if header else {}, content=b"{")
            assert error(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    told = [record for record in caplog.records if record.__dict__.get("event") == "auth_failure"]
    assert len(told) == 3
    assert all(record.__dict__["security"] is True for record in told)
    assert ADMIN[:-1] not in caplog.text


def test_there_is_no_way_to_switch_it_off() -> None:
    """S1-C1: without ADMIN_API_KEY no process starts, and no other setting has to do with it."""
    from shared.settings import SettingsError, describe  # noqa: PLC0415

    with pytest.raises(SettingsError, match="ADMIN_API_KEY"):
        load({"GATEWAY_API_KEY": "g" * 40, "KEY_PEPPER": "p" * 40})
    ours = {name for name, *_ in describe() if "ADMIN" in name}
    assert ours == {"ADMIN_API_KEY", "ADMIN_HOST", "ADMIN_PORT", "HOTPATH_ADMIN_FD"}


def test_redis_away_is_503(api: AdminApi, client: httpx.Client) -> None:
    with api.without_redis():
        answer = client.get("/v1/tenants")
    assert error(answer) == (503, "registry_unavailable")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_port_that_is_taken_costs_no_process(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving(valkey_url, ADMIN_PORT=str(port)) as api:
            assert not api.server.listening
            assert "its port cannot be had" in caplog.text
            taken.close()
            assert api.run(api.server._listen(again=True))
            assert api.server.port == port


def test_a_descriptor_that_is_another_ones_is_left_alone(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    here, there = socket.socketpair()
    with here, there, serving(valkey_url, HOTPATH_ADMIN_FD=str(here.fileno())) as api:
        assert not api.server.listening
        assert "its port cannot be had" in caplog.text
        here.send(b"x")
        assert there.recv(1) == b"x"


def test_processes_share_the_port(api: AdminApi, valkey_url: str) -> None:
    with serving(valkey_url, ADMIN_PORT=str(api.server.port)) as other:
        assert other.server.listening
        assert other.server.port == api.server.port
        (own := socket.socket()).bind(("127.0.0.1", 0))
        own.listen()
        with serving(valkey_url, HOTPATH_ADMIN_FD=str(own.detach())) as handed_down:
            answer = httpx.get(f"{handed_down.url}/v1/tenants", headers={"Authorization": f"Bearer {ADMIN}"})
            assert answer.status_code == 200
    assert httpx.get(f"{api.url}/v1/tenants").status_code == 401


def test_the_file_in_the_repository_is_what_is_served(client: httpx.Client) -> None:
    """`python -m ingress.admin.openapi > ingress/admin/openapi.json`."""
    served = client.get("/openapi.json")
    with open(openapi.__file__.replace("openapi.py", "openapi.json"), "rb") as file:  # noqa: PTH123
        assert served.content == file.read()
    assert served.json()["openapi"] == "3.1.0"
