"""The headers known before the first token (S2-23, D11, D15): on every first Delta and Failed."""

from shared.core.money import show_usd
from shared.wire import headers
from shared.wire.messages import Admission


def guardian_head(admission: Admission) -> dict[str, str]:
    """Status, estimated cost (`$0.03`, D12; none in mode `off`), the guardian's own wall time in milliseconds (D9), and
    what else it has to say: rate limits, a lowered output cap."""
    head = status_head(admission.status, admission.overhead_us)
    if admission.estimate >= 0:
        head[headers.BR_ESTIMATED_COST] = show_usd(admission.estimate)
    if admission.extra:
        head.update(admission.extra)
    return head


def status_head(status: str, overhead_us: int) -> dict[str, str]:
    """What is known of every request that a guardian had."""
    return {headers.BR_GUARDIAN_STATUS: status, headers.BR_GUARDIAN_OVERHEAD: f"{overhead_us / 1000:.1f}"}


def rate_limit_head(kind: str, limit: int, left: int, full_ms: int) -> dict[str, str]:
    """OpenAI's three headers for a bucket of `kind` (requests, tokens): its size, what is left, when it is full."""
    names = headers.RATE_LIMITS[kind]
    return dict(zip(names, (str(limit), str(left), show_span(full_ms)), strict=True))


def show_span(ms: int) -> str:
    """A span of time as OpenAI writes it: `20ms`, `1s`, `1.5s`, `6m0s`, `1h0m5.25s`."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest // 1000}.{rest % 1000:03d}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds
