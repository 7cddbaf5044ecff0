"""What a tenant's policy says of a prompt's personal data and keywords: let it pass, pass it redacted, or refuse it.

For `admit.py`, before the tokens are counted (a redacted body has other tokens) and before anything is reserved:

    screened = screen(ask, principal.pii, principal.keywords)     # raises ContentBlocked (400), ScanDown (503)
    ask = screened.ask                                            # the very same object unless something was redacted
    if screened.status == "degraded": the Admission's status too  # X-BR-Guardian-Status; log `screened.fault`
    if screened.findings: log/count `describe(screened.findings)` # kinds and counts: safe to log (I9)

About 6 us a KiB of clean text, so it runs on the event loop, with an `effort` that bounds what a text full of
candidates takes there: it raises Laborious, and is done again in a thread, without one. A text that `is_large` goes
there at once.

When the scan itself fails: `flag` is advice and fails open, marked degraded (D4). `redact` and `block` are a promise
about what leaves the house, which must not be skipped: they fail closed with 503. So does a policy that this build does
not know, which a newer one may have written.
"""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec
from msgspec import Struct

from shared.core import pii
from shared.wire.errors import ContentBlocked, ScanDown
from shared.wire.messages import Ask

#: What the engines, the parser and our own code over them may raise.
_FAULTS: Final = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


#: Backslashes of a body: JSON within JSON is read escape by escape.
MOST_ESCAPES: Final = 2000


class Screened(Struct, frozen=True, kw_only=True):
    """A prompt that may go on."""

    ask: Ask
    findings: tuple[pii.Finding, ...] = ()
    redacted: bool = False
    status: Literal["on", "degraded"] = "on"
    fault: str = ""  # degraded: the name of what was raised, safe to log


def is_large(ask: Ask, policy: str) -> bool:
    """Whether `screen` would hold the event loop for too long whatever is found."""
    return policy != "off" and (len(ask.body) > pii.OFF_LOOP_BYTES or ask.body.count(b"\\") > MOST_ESCAPES)


def screen(ask: Ask, policy: str, keywords: tuple[str, ...] = (), effort: pii.Effort | None = None) -> Screened:
    """Apply a tenant's policy (`Principal.pii`, `Principal.keywords`) to a request whose body has been checked.

    With `off` neither personal data nor keywords are looked for. Pure, and may run in any thread. Raises ContentBlocked
    (found, and the policy is block; or made so that it cannot be redacted), ScanDown (see above) and pii.Laborious.
    """
    if policy == "off":
        return Screened(ask=ask)
    try:
        return _screen(ask, policy, keywords, effort)
    except _FAULTS as exc:
        if policy == "flag":
            return Screened(ask=ask, status="degraded", fault=type(exc).__name__)
        raise ScanDown from exc


def describe(findings: Iterable[pii.Finding]) -> str:
    """For a log line or a message: `credit_card, email`. Kinds only."""
    return ", ".join(finding.kind for finding in findings)


def _screen(ask: Ask, policy: str, keywords: tuple[str, ...], effort: pii.Effort | None) -> Screened:
    action = msgspec.convert(policy, pii.Action)  # a ValidationError is a ValueError: an unknown policy fails closed
    scanner = pii.compile_policy(pii.Policy(pii=action, keywords=keywords))
    if action == "redact":
        return _redact(ask, scanner, effort)
    findings = pii.scan_body(ask.body, scanner, effort)
    if findings and action == "block":
        raise ContentBlocked(f"This tenant's policy does not let the request pass: it contains {describe(findings)}.")
    return Screened(ask=ask, findings=findings)


def _redact(ask: Ask, scanner: pii.Scanner, effort: pii.Effort | None) -> Screened:
    try:
        redacted = pii.redact_body(ask.body, scanner, effort)
    except pii.Unredactable as exc:
        raise ContentBlocked("The request could not be redacted as this tenant's policy asks.") from exc
    if not redacted.findings:
        return Screened(ask=ask)
    return Screened(ask=msgspec.structs.replace(ask, body=redacted.body), findings=redacted.findings, redacted=True)
