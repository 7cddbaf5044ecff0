"""Spend alerts (S1-M1): a line in the log, and a POST to ALERT_WEBHOOK_URL.

    {"id": "<tenant>:2026-11-21:20", "event": "daily_limit_exceeded", "tenant": "<id>", "tenant_name": "acme",
     "date": "2026-11-21", "limit_usd": "$20.00", "limit_nano_usd": 20000000000,
     "spend_usd": "$20.13", "spend_nano_usd": 20130000000}

`event` is daily_limit_exceeded or spend_tier_reached (then `date` is null). An alert may come twice when a guardian
dies: `id` is the same. Nothing waits for a webhook: alerts queue, each is tried TRIES times, and what is beyond the
bounds stands in the log only.
"""

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from shared.core.money import show_usd
from shared.state.costs import USD, Alert
from workers.guardian.webhook import Webhook, WebhookFailed

if TYPE_CHECKING:
    from shared.service import Context

MAX_QUEUED: Final = 256
TRIES: Final = 6
#: Doubled after each try: the last one is a minute after the first.
PAUSE_S: Final = 2.0
CLOSE_S: Final = 2.0

_json: Final = msgspec.json.Encoder().encode


class Alerts:
    """Of one guardian process; a task lives while something is to be posted."""

    def __init__(self, ctx: "Context") -> None:
        settings = ctx.settings
        self._log = ctx.log
        self._names = ctx.state.registry.name_of
        self._webhook = (
            Webhook(settings.alert_webhook_url, private=settings.alert_webhook_private)
            if settings.alert_webhook_url
            else None
        )
        self._queue: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None
        sent = ctx.metrics.counter("guardian_alerts", "Spend alerts by what became of them", ("result",))
        self._counts = {name: sent.labels(name) for name in ("raised", "posted", "not_posted")}

    def tell(self, alert: Alert) -> None:
        """Log it, and see that it is posted."""
        self._counts["raised"].inc()
        daily = bool(alert.date)
        fields = {"tenant": alert.tenant, "spend": show_usd(alert.spend), "limit": show_usd(alert.limit)}
        if daily:
            self._log.warning("Daily spend limit exceeded", extra={"date": alert.date, **fields})
        else:
            self._log.warning("Lifetime spend tier reached", extra=fields)
        if self._webhook is None:
            return
        if len(self._queue) >= MAX_QUEUED:
            self._queue.popleft()
            self._counts["not_posted"].inc()
        self._queue.append(self._body(alert))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._post_all(self._webhook))

    def _body(self, alert: Alert) -> bytes:
        return _json(
            {
                "id": f"{alert.tenant}:{alert.date or 'lifetime'}:{alert.limit // USD}",
                "event": "daily_limit_exceeded" if alert.date else "spend_tier_reached",
                "tenant": alert.tenant,
                "tenant_name": self._names(alert.tenant),
                "date": alert.date or None,
                "limit_usd": show_usd(alert.limit),
                "limit_nano_usd": alert.limit,
                "spend_usd": show_usd(alert.spend),
                "spend_nano_usd": alert.spend,
            }
        )

    async def _post_all(self, webhook: Webhook) -> None:
        try:
            while self._queue:
                if await self._post(webhook, self._queue[0]):
                    self._counts["posted"].inc()
                else:
                    self._counts["not_posted"].inc()
                self._queue.popleft()
        finally:
            self._task = None

    async def _post(self, webhook: Webhook, body: bytes) -> bool:
        pause = PAUSE_S
        for number in range(TRIES):
            try:
                await webhook.post(body)
            except WebhookFailed as error:
                last = number == TRIES - 1 or not error.again
                level = logging.ERROR if last else logging.WARNING
                self._log.log(level, "the alert webhook does not take an alert", extra={"error": str(error)})
                if last:
                    return False
            else:
                return True
            await asyncio.sleep(pause)
            pause *= 2
        return False

    async def close(self) -> None:
        """A last moment for what is queued; it stands in the log anyway."""
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=CLOSE_S)
        if self._task is not None:
            self._task.cancel()
