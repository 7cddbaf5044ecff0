"""A tenant's policy on personal data and keywords (S2-28, S2-30, D4, I9)."""

import logging
import threading
import time

import orjson
import pytest

from shared.core import pii
from shared.state.base import Principal
from shared.telemetry.metrics import Metrics
from shared.wire.errors import ContentBlocked, ScanDown, render
from shared.wire.messages import Ask, ReplyTo
from workers.guardian.scan import describe, is_large, screen
from workers.guardian.screening import Screening

KEYWORDS = ("acme",)


def ask(text: str) -> Ask:
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    return Ask(rid="0" * 32, tenant="t", key="k", reply=ReplyTo("ingress", "i", 1), body=body)


@pytest.mark.parametrize("policy", ["off", "flag", "redact", "block"])
def test_clean_text_passes_untouched(policy):
    sent = ask("nothing of interest, 1764123072")
    screened = screen(sent, policy, KEYWORDS)
    assert screened.ask is sent
    assert (screened.findings, screened.redacted, screened.status) == ((), False, "on")


def test_off_and_flag_let_everything_pass():
    sent = ask("a@b.co, ACME")
    assert screen(sent, "off", KEYWORDS).findings == ()
    flagged = screen(sent, "flag", KEYWORDS)
    assert flagged.ask is sent
    assert describe(flagged.findings) == "email, keyword"


def test_redact_changes_the_body_only():
    sent = ask("a@b.co, ACME")
    screened = screen(sent, "redact", KEYWORDS)
    assert screened.redacted
    assert screened.ask.body == ask("[REDACTED:email], [REDACTED:keyword]").body
    assert screened.ask.rid == sent.rid


def test_block_is_told_in_openais_shape_without_the_text():
    """I9."""
    with pytest.raises(ContentBlocked) as caught:
        screen(ask("a@b.co, ACME"), "block", KEYWORDS)
    error = orjson.loads(render(caught.value.body()))["error"]
    assert (caught.value.status, error["type"], error["code"], error["param"]) == (
        400, "invalid_request_error", "content_policy_violation", "messages",
    )  # fmt: skip
    assert "email, keyword" in error["message"]
    assert "a@b.co" not in repr(error)
    assert "ACME" not in repr(error)


def test_what_cannot_be_scanned_is_advice_or_a_promise():
    """D4: flag fails open and says so; redact and block fail closed, as does a policy of a newer build."""
    broken = Ask(rid="0" * 32, tenant="t", key="k", reply=ReplyTo("ingress", "i", 1), body=b"{")
    passed = screen(broken, "flag")
    assert (passed.ask, passed.status, passed.fault) == (broken, "degraded", "JSONDecodeError")
    for policy in ("redact", "block", "mask"):
        with pytest.raises(ScanDown) as caught:
            screen(broken, policy)
        assert caught.value.status == 503
    with pytest.raises(ScanDown):
        screen(ask("hello"), "block", ("x" * 129,))  # an operator's keyword out of bounds


def test_what_cannot_be_redacted_is_refused(monkeypatch):
    monkeypatch.setattr("shared.core.pii.body.ROUNDS", 1)
    with pytest.raises(ContentBlocked):
        screen(ask("a@b.co"), "redact")


def test_large_prompts_are_for_a_thread():
    assert not is_large(ask("x" * 32_768), "block")
    assert is_large(ask("x" * pii.OFF_LOOP_BYTES), "block")
    assert not is_large(ask("x" * pii.OFF_LOOP_BYTES), "off")
    assert is_large(ask("[" + '"a",' * 2000), "redact")


async def test_a_prompt_made_of_candidates_is_scanned_in_a_thread(monkeypatch):
    """S2-03: nobody else's request waits for it, and it is redacted all the same."""
    on_loop = []

    def noting(*words):
        on_loop.append(threading.current_thread() is threading.main_thread())
        return screen(*words)

    monkeypatch.setattr("workers.guardian.screening.screen", noting)
    apply = Screening(Metrics(), logging.getLogger("test"), time.monotonic)
    principal = Principal(tenant="t", key="k", tenant_name="t", pii="redact")
    for text, where in (("a@b.co " * 9, [True]), ("a@b.co " * 4000, [True, False]), ("x" * 50_000, [False])):
        on_loop.clear()
        passed, status = await apply(ask(text), principal)
        assert (status, on_loop) == ("on", where)
        assert b"a@b.co" not in passed.body
