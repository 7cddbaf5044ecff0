"""The shell around `scan.py`: off the loop where it is long, counted, and told to the SIEM without what was found."""

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from shared.core import pii
from shared.state.base import Principal
from shared.telemetry.log import security
from shared.telemetry.metrics import Metrics
from shared.wire.errors import ContentBlocked
from shared.wire.messages import Ask
from workers.guardian.scan import Screened, describe, is_large, screen

if TYPE_CHECKING:
    from collections.abc import Callable

#: A flood costs at most this many log lines a second; the rest are counted.
LINES_PER_S: Final = 10


class Screening:
    """Applies a tenant's policy on personal data and keywords to its prompts."""

    def __init__(self, metrics: Metrics, log: logging.Logger, clock: "Callable[[], float]") -> None:
        """`clock`: seconds, monotonic."""
        self._log = log
        self._clock = clock
        self._second, self._lines = 0, 0
        self._found = metrics.counter(
            "guardian_found", "Prompts in which a policy found something, by policy and kind.", ("policy", "kind")
        )

    async def __call__(self, ask: Ask, principal: Principal) -> tuple[Ask, str]:
        """The request as it may go on, redacted where the policy says so, and `on`, or `degraded` when a scan whose
        result is advice failed (D4). Raises ContentBlocked, ScanDown."""
        policy, words = principal.pii, principal.keywords
        try:
            screened = await self._screen(ask, policy, words)
        except ContentBlocked:
            self._found.labels(policy, "blocked").inc()
            self._tell(ask, policy, "")
            raise
        if screened.findings:
            self._on_found(screened, policy)
        if screened.fault:
            self._log.warning("a prompt could not be scanned", extra={"rid": ask.rid, "error": screened.fault})
        return screened.ask, screened.status

    @staticmethod
    async def _screen(ask: Ask, policy: str, words: tuple[str, ...]) -> Screened:
        if not is_large(ask, policy):
            try:
                return screen(ask, policy, words, pii.Effort(pii.ON_LOOP_CANDIDATES))
            except pii.Laborious:
                pass  # nobody's requests wait for a text that is made of candidates
        return await asyncio.to_thread(screen, ask, policy, words)

    def _on_found(self, screened: Screened, policy: str) -> None:
        for finding in screened.findings:
            self._found.labels(policy, finding.kind).inc()
        self._tell(screened.ask, policy, describe(screened.findings))

    def _tell(self, ask: Ask, policy: str, kinds: str) -> None:
        second = int(self._clock())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= LINES_PER_S:
            fields = {"policy": policy, "kinds": kinds, "tenant": ask.tenant, "key": ask.key}
            security(self._log, "personal_data", **fields, requestId=ask.label, rid=ask.rid)
