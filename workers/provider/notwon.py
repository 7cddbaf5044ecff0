"""What the client is told when a delivery did not win its dispatch and nobody else holds the stream. Pure."""

from typing import Final

from shared.wire import errors
from shared.wire.errors import HotpathError

_NOT_WON: Final[dict[str, type[HotpathError]]] = {
    "denied": errors.InsufficientBudget,
    "exhausted": errors.UpstreamError,
    "late": errors.DeadlineExceeded,
    "stale": errors.LedgerDown,
    "voided": errors.DeadlineExceeded,
    "closed": errors.DeadlineExceeded,
    "missing": errors.DeadlineExceeded,
}


def not_won(status: str, lost: str) -> HotpathError:
    """Why this delivery makes no call. Whose worker was lost is told that, not that a budget it was admitted under is
    too small for a call more (faults 13)."""
    if lost and status in ("denied", "exhausted"):
        why = "the budget does not cover another call" if status == "denied" else "no further call is allowed"
        return errors.WorkerLost(f"The worker that served this request was lost, and {why}.")
    return _NOT_WON.get(status, errors.LedgerDown)()
