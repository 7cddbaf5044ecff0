"""Hostile bytes never make a 500, a traceback, a hang or a leak (more: `python -m tests.ingress.fuzz`)."""

import uvloop

from tests.ingress import fuzz


def test_hostile_bytes() -> None:
    """On uvloop, as in production."""
    findings = uvloop.run(fuzz.run(1000))
    assert findings.wrong == []
    assert {"200", "400", "404", "405"} <= set(findings.answers)
