"""GET /metrics/costs: what tenants' calls cost, by model and day (S1-G12), for the admin key.

    /metrics/costs                  a page of tenants in the order of their ids; `next` is where the next one begins
    /metrics/costs?after=<next>
    /metrics/costs?tenant=<id>      one tenant, with its models of each day

Money is integer nano-USD, and beside it in USD as it is read. Learned from the usage stream, so it is a moment behind.
"""

import asyncio
from typing import Any, Final, Protocol

import msgspec

from ingress.auth import Auth
from ingress.limiter import Limiter
from ingress.middleware import Visit
from ingress.protocol import Reply
from shared.core.money import show_usd
from shared.state.base import StateUnavailable
from shared.state.costs import Costs, Spent
from shared.wire import errors

PAGE: Final = 50

_json: Final = msgspec.json.Encoder().encode


class Tenants(Protocol):
    """What of the registry is needed here."""

    def tenants(self) -> list[str]:
        """The ids of all."""

    def name_of(self, tenant: str) -> str:
        """Its name."""


class Tracker(Protocol):
    """Where the costs are."""

    async def costs(self, tenant: str) -> Costs:
        """Of one tenant. Raises StateUnavailable."""


class CostsPage:
    """The route."""

    def __init__(self, auth: Auth, limiter: Limiter, tenants: Tenants, tracker: Tracker) -> None:
        self._auth = auth
        self._limiter = limiter
        self._tenants = tenants
        self._tracker = tracker

    async def __call__(self, visit: Visit) -> Reply:
        """200 with JSON. Raises Unauthorized, RateLimited, NotFound, LedgerDown."""
        self._auth.admin(visit.request, visit.label)
        self._limiter.take(visit.request.remote or "")
        query = visit.request.query
        known = sorted(self._tenants.tenants())
        if (wanted := query.get("tenant")) is not None:
            if wanted not in known:
                raise errors.NotFound("There is no tenant of this id.")
            chosen, following = [wanted], ""
        else:
            after = query.get("after", "")
            rest = [tenant for tenant in known if tenant > after]
            chosen, following = rest[:PAGE], rest[PAGE - 1] if len(rest) > PAGE else ""
        try:
            found = await asyncio.gather(*map(self._tracker.costs, chosen))
        except StateUnavailable as error:
            raise errors.LedgerDown("The costs are kept in Redis, which does not answer.") from error
        rows = [
            {"tenant": tenant, "name": self._tenants.name_of(tenant), **_shown(costs, whole=wanted is not None)}
            for tenant, costs in zip(chosen, found, strict=True)
        ]
        return visit.json(_json({"tenants": rows, "next": following}))


def _shown(costs: Costs, *, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "since": costs.since,
        "total": _spent(costs.total),
        "models": {name: _spent(spent) for name, spent in costs.models.items()},
        "days": {date: _spent(spent) for date, spent in costs.days.items()},
        "alerts": costs.alerts,
    }
    if whole:
        found["models_by_day"] = {
            date: {name: _spent(spent) for name, spent in models.items()} for date, models in costs.by_day.items()
        }
    return found


def _spent(spent: Spent) -> dict[str, Any]:
    return {
        "requests": spent.requests, "cost_usd": show_usd(spent.cost), "cost_nano_usd": spent.cost,
        "input_tokens": spent.input_tokens, "output_tokens": spent.output_tokens,
    }  # fmt: skip
