"""What is decided about a request before and after the ledger is asked. Pure: `admit.py` is the shell around it.

    accept      who asks, for what, until when
    weigh       what it may cost, and what it probably costs
    seatbelt    whether the client wants it at that price (S2-12)
    rates       what the ledger is to count besides the money
    granted     the admission that goes on, once it is reserved

Modes (S2-15) are about advice alone: `off` gives none, `observe` shows it, `active` lets it refuse. Budgets, rate
limits, expiry and allowed models hold in every mode.
"""

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from shared.catalog import Catalog, Model
from shared.core.head import rate_limit_head
from shared.settings import Settings
from shared.state.base import Bucket, Counted, Principal, Rates, Reserved
from shared.wire import headers
from shared.wire.errors import (
    ClientError,
    DeadlineExceeded,
    EstimateExceeded,
    Forbidden,
    GatewayFault,
    HotpathError,
    ModelNotFound,
    quote,
)
from shared.wire.messages import Admission, Ask, Hop
from workers.guardian import envelope, refusals
from workers.guardian.assess import assess, assess_blind, clamp, least_amount

#: What reading and counting a body may raise: the request is then weighed without (D4).
UNCOUNTABLE: Final = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class House(Struct, frozen=True, kw_only=True):
    """What is the same for every request."""

    models: Mapping[str, Model]
    epoch: int  # of the catalogue
    floor: int  # least reservation, nano-USD (S0-16)
    max_body: int
    pepper: bytes
    times: envelope.Times

    @classmethod
    def of(cls, settings: Settings, catalog: Catalog) -> "House":
        """From the settings and the catalogue of this boot."""
        return cls(
            models=catalog.models,
            epoch=catalog.epoch,
            floor=settings.budget_min_reservation,
            max_body=settings.max_body_bytes,
            pepper=settings.key_pepper.encode(),
            times=envelope.Times.of(settings),
        )


class Pending(Struct, kw_only=True):
    """One request between its message and its forward."""

    ask: Ask
    admission: Admission
    principal: Principal
    ratio: int  # output/input in millionths, as it was estimated with
    least: int  # nano-USD the ledger may hold instead of all; 0: all or nothing
    tokens: int  # taken of the rate limits until the settlement
    at: int  # shared-clock ms it came at
    began: float  # perf_counter at the same moment
    hops: tuple[Hop, ...]  # of those before


def accept(house: House, ask: Ask, principal: Principal, at: int, *, direct: bool) -> Ask:
    """The request as it may go on, its deadline set. Raises HotpathError."""
    if envelope.RID.match(ask.rid) is None:
        raise ClientError("rid must be 32 lower-case hex digits", param="rid")
    if direct:
        if not principal.synthetic:
            raise Forbidden("Only tenants created with --synthetic may be used on the admit subject.")
        ask = envelope.complete(ask, house.max_body, house.pepper)
    if ask.model not in house.models or (principal.models and ask.model not in principal.models):
        raise ModelNotFound(
            f"The model {quote(ask.model)} does not exist here, or this key may not use it."
            " GET /v1/models lists those it may."
        )
    deadline = envelope.deadline(ask, at, house.times)
    if deadline <= at:
        raise DeadlineExceeded
    return ask if deadline == ask.deadline else msgspec.structs.replace(ask, deadline=deadline)


def weigh(house: House, ask: Ask, principal: Principal, ratio: int, status: str = "on") -> tuple[Admission, str]:
    """The admission as advice has it, and why tokens could not be counted ("" when they could).

    `status` degraded: other advice failed already.
    """
    model, fault = house.models[ask.model], ""
    try:
        admission = assess(ask, model, house.floor, house.epoch, ratio)
    except UNCOUNTABLE as exc:
        fault = repr(exc)[:200]
        admission = assess_blind(ask, model, house.floor, house.epoch, ratio)
    if status == "degraded":
        admission = msgspec.structs.replace(admission, status=status)
    if principal.mode == "off":
        shown = "off" if admission.status == "on" else admission.status
        return msgspec.structs.replace(admission, estimate=-1, status=shown), fault
    return admission, fault


def refusal_status(error: HotpathError, principal: Principal | None) -> str:
    """The guardian's status, as told to who was refused before the request was weighed."""
    if isinstance(error, GatewayFault):
        return "degraded"
    return "off" if principal is not None and principal.mode == "off" else "on"


def seatbelt(ask: Ask, principal: Principal, admission: Admission) -> EstimateExceeded | None:
    """S2-12, in mode `active`: the refusal when it is dearer than X-BR-Max-Estimated-Cost allows. Degraded advice never
    refuses (D4)."""
    if principal.mode == "active" and admission.status == "on" and 0 <= ask.max_estimate < admission.estimate:
        return refusals.over_estimate(admission.estimate, ask.max_estimate)
    return None


def least(house: House, ask: Ask, principal: Principal, admission: Admission) -> int:
    """Pending.least."""
    amount = least_amount(admission, ask.n, house.floor) if principal.clamp else 0
    return amount if amount < admission.amount else 0


def taken(likely: int, prompt: int, who: Principal) -> int:
    """The tokens that `rates` takes of `likely` ones. How long an answer will be is a guess: where the prompt fits
    under the limits it takes a whole bucket at most, so that no guess keeps a request out for good."""
    smallest = min((limit for limit in (who.tenant_tpm, who.key_tpm) if limit), default=likely)
    return min(likely, max(smallest, prompt))


def rates(pending: Pending) -> Rates | None:
    """What `reserve` is to count. Without limits still the key's velocity (S2-13), which is advice: not in mode off."""
    who = pending.principal
    if who.mode == "off" and not (who.tenant_rpm or who.tenant_tpm or who.key_rpm or who.key_tpm):
        return None
    return Rates(
        tokens=pending.tokens,
        tenant_requests=who.tenant_rpm,
        tenant_tokens=who.tenant_tpm,
        key_requests=who.key_rpm,
        key_tokens=who.key_tpm,
    )


def granted(house: House, pending: Pending, answer: Reserved) -> Admission:
    """The admission once the ledger said ok.

    Held in full, it goes on with its own amount: a further call opens with that, also where nothing is held any more
    (I2). Where less is held the output cap is lowered to it, and that is the amount of further calls too.
    """
    admission, extra = pending.admission, rate_limits(answer.counted)
    if pending.least and 0 < answer.amount < admission.amount:
        clamped = clamp(admission, answer.amount, pending.ask.n, house.floor, pending.ratio)
        if clamped is not None and clamped.output_cap < admission.output_cap:
            admission = clamped
            extra[headers.BR_CLAMPED] = str(clamped.output_cap)
    return msgspec.structs.replace(
        admission,
        reserved=True,
        user=pending.ask.user if answer.user else "",
        day=answer.day,
        hard=pending.principal.limited or answer.user,
        extra=extra,
    )


def rate_limits(counted: Counted | None) -> dict[str, str]:
    """The x-ratelimit headers of the buckets that have a limit."""
    if counted is None:
        return {}
    return {**_bucket("requests", counted.requests), **_bucket("tokens", counted.tokens)}


def _bucket(kind: str, bucket: Bucket | None) -> dict[str, str]:
    return {} if bucket is None else rate_limit_head(kind, bucket.limit, bucket.left, bucket.full_ms)
