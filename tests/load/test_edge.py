"""Acceptance 3 of the ledger: at the edge of a limit exactly what fits is admitted, whoever asks (I2, S0-22)."""

import pytest

from shared.state import ledger
from tests.load import edge


async def test_a_thousand_at_once_from_four_processes(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds; `python -m tests.load edge --rounds 200` is the same, longer."""
    monkeypatch.setattr(ledger, "POST_TIMEOUT", 10.0)
    for each in await edge.rounds(valkey_url, 3, seed=1):
        assert each.exact, each
