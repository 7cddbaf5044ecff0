"""Personal data and an operator's keywords in text: what is looked for, how, and a body without it (S2-28, S2-30).

    validators  check digits and ranges          patterns  the kinds, each with its longest match and its validator
    keywords    the operator's words             engine    Policy -> Scanner -> spans or counts
    body        the texts of a chat body, and the body redacted

Pure, linear in its input, and silent: what was found leaves this package as kinds and counts only (I9).
It looks for what people write by accident, not for what somebody hides on purpose (digits spelt out, other scripts).
"""

from shared.core.pii.body import Redacted, Unredactable, redact_body, scan_body
from shared.core.pii.engine import (
    ACTIONS,
    OFF_LOOP_BYTES,
    ON_LOOP_CANDIDATES,
    Action,
    Effort,
    Finding,
    Laborious,
    Policy,
    Scanner,
    Span,
    compile_policy,
)

__all__ = [
    "ACTIONS",
    "OFF_LOOP_BYTES",
    "ON_LOOP_CANDIDATES",
    "Action",
    "Effort",
    "Finding",
    "Laborious",
    "Policy",
    "Redacted",
    "Scanner",
    "Span",
    "Unredactable",
    "compile_policy",
    "redact_body",
    "scan_body",
]
