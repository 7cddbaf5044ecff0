"""The environment becomes settings, or every fault of it is named."""

import re
from pathlib import Path

import pytest
from rich.pretty import pretty_repr

from shared import settings
from shared.settings import SettingsError

SECRETS = {"GATEWAY_API_KEY": "g" * 32, "KEY_PEPPER": "p" * 32, "ADMIN_API_KEY": "a" * 32}
ROOT = Path(__file__).parent.parent


def faults(**env: str) -> list[str]:
    """What is said of this environment."""
    with pytest.raises(SettingsError) as caught:
        settings.load({**SECRETS, **env})
    return caught.value.errors


def test_defaults():
    """REQUIREMENTS S1-L1, S1-L4, S1-C2b, S2-20, S0-16, D8 and the plan of the wire."""
    got = settings.load(SECRETS)
    assert (got.timeout_ms, got.timeout_streaming_ms, got.timeout_openai_ms) == (30_000, 120_000, 30_000)
    assert (got.fallback_chain_timeout_ms, got.routing_max_retries, got.routing_retry_backoff_ms) == (30_000, 2, 500)
    assert (got.circuit_failure_threshold, got.circuit_breaker_cooldown_ms) == (5, 30_000)
    assert (got.shutdown_drain_ms, got.shutdown_stream_drain_ms) == (5000, 120_000)
    assert (got.max_body_bytes, got.budget_min_reservation) == (1_048_576, 1_000_000)


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", [None, "", "1", "x" * 31])
def test_a_short_or_missing_secret_stops_the_start(name, value):
    """S1-C1a, S1-C1c, D16: the seed's message."""
    env = {key: text for key, text in {**SECRETS, name: value}.items() if text is not None}
    with pytest.raises(SettingsError) as caught:
        settings.load(env)
    assert len(caught.value.errors) == 1
    assert caught.value.errors[0].startswith(f"{name} must be at least 32 characters")


@pytest.mark.parametrize("value", ["g" * 32 + " ", "g" * 32 + "\n", "é" * 32, "g" * 31 + "$", "g\x00" * 20])
def test_a_secret_has_plain_characters(value):
    """S1-C1b."""
    assert faults(GATEWAY_API_KEY=value)[0].startswith("GATEWAY_API_KEY contains invalid characters")


def test_the_secrets_differ():
    """D16: separate secrets."""
    assert faults(KEY_PEPPER="g" * 32)[0].startswith("KEY_PEPPER must differ from GATEWAY_API_KEY")
    assert len(faults(KEY_PEPPER="g" * 32, ADMIN_API_KEY="g" * 32)) == 3


def test_every_fault_is_told_at_once():
    errors = faults(GATEWAY_API_KEY="short", GATEWAY_PORT="http", LOG_LEVEL="loud", TIMEOUT_MS="-1")
    assert [line.partition(" ")[0].rstrip(":") for line in errors] == [
        "GATEWAY_API_KEY", "GATEWAY_PORT", "LOG_LEVEL", "TIMEOUT_MS",
    ]  # fmt: skip
    assert "leave it out for 8080" in errors[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("GATEWAY_PORT", "65536"), ("GATEWAY_PORT", "80a"), ("NATS_URL", "http://x:1"), ("NATS_URL_INGRESS", "nats://"),
     ("NATS_URL", "nats://u:p@h:99999"), ("REDIS_URL", "127.0.0.1:6379"), ("BUDGET_MIN_RESERVATION_USD", "NaN"),
     ("BUDGET_MIN_RESERVATION_USD", "0"), ("WORKER_ROLES", "guardian,ingress"), ("WORKER_ROLES", "routing,routing"),
     ("TIMEOUT_MIN_MS", "600001"), ("ROUTING_MAX_RETRIES", "9"), ("MAX_IN_FLIGHT", "0"), ("TIMEOUT_MS", "1.5")],
)  # fmt: skip
def test_a_wrong_value_is_named(name, value):
    errors = faults(**{name: value})
    assert len(errors) == 1
    assert errors[0].startswith(name)


def test_no_fault_repeats_a_credential():
    """I9."""
    errors = faults(NATS_URL="nats://user:hunter22@", REDIS_URL="http://:hunter22@h", KEY_PEPPER="hunter22")
    assert len(errors) >= 1
    assert "hunter22" not in "\n".join(errors)
    assert "hunter22" not in "\n".join(faults(NATS_URL="nats://user:hunter22@", REDIS_URL="http://:hunter22@h"))


def test_no_secret_shows():
    """I9: neither in repr nor in what rich prints."""
    got = settings.load({**SECRETS, "NATS_URL": "nats://user:hunter22@host:4222"})
    for shown in (repr(got), str(got), f"{got}", pretty_repr(got)):
        assert "ggg" not in shown
        assert "hunter22" not in shown
        assert "host:4222" in shown


def test_empty_means_not_set():
    assert settings.load({**SECRETS, "GATEWAY_PORT": "", "NATS_URL": ""}) == settings.load(SECRETS)


def test_a_roles_own_url():
    got = settings.load({**SECRETS, "NATS_URL_GUARDIAN": "nats://g:x@h:1"})
    assert got.nats_url_for("guardian") == "nats://g:x@h:1"
    assert got.nats_url_for("provider") == got.nats_url_for("loadgen") == got.nats_url


def test_worker_roles():
    assert settings.load({**SECRETS, "WORKER_ROLES": "guardian, routing,provider"}).roles() == settings.ROLES


def test_describe_names_every_setting():
    """What env.example is made from."""
    rows = settings.describe()
    assert [name.lower() for name, *_ in rows] == list(settings.Settings.__struct_fields__)
    assert {name for name, default, _, secret in rows if secret or default is None} == set(SECRETS)
    assert all(doc.endswith(".") for _, _, doc, _ in rows)


def test_env_example_is_in_step():
    """S1-L4, S1-G16: every name with its default, none that does not exist."""
    path = ROOT / "deploy" / "env.example"
    found = dict(re.findall(r"^#?\s?([A-Z][A-Z0-9_]+)=(.*)$", path.read_text(), re.MULTILINE))
    for name, default, _, secret in settings.describe():
        assert name in found, f"{name} is missing in {path.name}"
        if not secret:
            assert found[name].strip("'\"") == default, name
    others = found.keys() - {name for name, *_ in settings.describe()}
    read = "".join(file.read_text() for file in [*ROOT.glob("deploy/**/*.py"), ROOT / "deploy" / "catalog.toml"])
    assert not [name for name in others if name not in read], "nothing reads these"


def test_the_alert_webhook():
    """https to the world, http and private addresses only when it is said; its path is a secret."""
    assert faults(ALERT_WEBHOOK_URL="http://hooks.example/a")[0].startswith("ALERT_WEBHOOK_URL: expected https://")
    assert faults(ALERT_WEBHOOK_URL="ftp://hooks.example/a", ALERT_WEBHOOK_PRIVATE="true")
    for odd in ("https://ann:pw@hooks.example/a", "https://hooks.example/a b", "https://hooks.example/é"):
        assert faults(ALERT_WEBHOOK_URL=odd)[0].startswith("ALERT_WEBHOOK_URL: expected https://"), odd
    got = settings.load({**SECRETS, "ALERT_WEBHOOK_URL": "https://hooks.example:444/s3cr3t?k=v"})
    assert "s3cr3t" not in repr(got)
    assert "hooks.example:444" in repr(got)
    assert settings.load({**SECRETS, "ALERT_WEBHOOK_URL": "http://10.0.0.1/a", "ALERT_WEBHOOK_PRIVATE": "true"})


def test_the_spool_lies_in_the_data_folder_unless_it_is_said():
    assert settings.load({**SECRETS, "HOTPATH_DATA": "/d"}).spool == Path("/d/spool")
    assert settings.load({**SECRETS, "HOTPATH_DATA": "/d", "SPOOL_DIR": "/s"}).spool == Path("/s")
