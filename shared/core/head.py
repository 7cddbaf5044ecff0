"""The X-BR headers known before the first token (S2-23, D11): on every first Delta and Failed."""

from shared.core.money import show_usd
from shared.wire import headers
from shared.wire.messages import Admission


def guardian_head(admission: Admission) -> dict[str, str]:
    """Status, estimated cost (`$0.03`, D12) and the guardian's own wall time in milliseconds (D9)."""
    return {
        headers.BR_GUARDIAN_STATUS: admission.status,
        headers.BR_ESTIMATED_COST: show_usd(admission.estimate),
        headers.BR_GUARDIAN_OVERHEAD: f"{admission.overhead_us / 1000:.1f}",
    }
