"""How the body of one upstream answer is read, and what its end says: of the bytes, nothing of timers. Pure.

sse     events, one by one through the translator (the exchange's own loop)
whole   a whole answer, collected; json: one where a stream was asked for
error   a status other than 200: the body says why
other   nothing to be read
"""

from collections.abc import Mapping

from shared.core import sse
from shared.core.translators.base import Failure, Translator, UpstreamFailure
from shared.core.translators.failures import MAX_BODY as MAX_ERROR_BODY
from shared.wire import errors
from shared.wire.errors import HotpathError
from workers.provider.ended import UNPAID, Ended, content_length, mode_of, refused


class Reading:
    """One answer. `mode`: see the module; `readable`: what came can be counted; `size`: bytes of the body so far."""

    __slots__ = (
        "_error_status", "_headers", "_parts", "_stream", "_translator", "_whole", "mode", "parser", "readable", "size",
    )  # fmt: skip

    def __init__(self, translator: Translator, *, stream: bool) -> None:
        self._translator = translator
        self._stream = stream
        self._headers: Mapping[str, str] = {}
        self._error_status = 0
        self._parts: list[bytes] = []
        self._whole = b""
        self.parser = sse.Parser()
        self.mode = "sse" if stream else "whole"
        self.readable = True
        self.size = 0

    def head(self, status: int, headers: Mapping[str, str]) -> str:
        """Decide by the head how the body is read; what is wrong with it, "" when nothing is."""
        self._headers = headers
        if status != 200:
            self.mode = "error"
            self._error_status = status
            return ""
        self.mode, self.readable, wrong = mode_of(headers, stream=self._stream)
        return wrong

    def keep(self, data: bytes, limit: int) -> bool:
        """A piece of a body that is no event stream; True when there is too much of it."""
        if self.mode == "error":
            self._parts.append(data)
            return self.size > MAX_ERROR_BODY
        if self.mode != "other" and self.size <= limit:
            self._parts.append(data)
            return False
        self._parts.clear()
        return True

    def count(self, events: list[bytes]) -> None:
        """Events that nobody gets: what they carry is billed all the same."""
        for event in events:
            try:
                self._translator.feed(event)
            except (HotpathError, UpstreamFailure):
                continue
        if self.parser.failed:
            self.readable = False

    def end(self, *, cut: bool) -> bytes:
        """What the end of the bytes brings for the client. Raises HotpathError, UpstreamFailure."""
        if self.mode == "sse":
            return self._translator.finish(self.parser.rest(), self.parser.stray())
        if cut or self.mode == "other":
            raise errors.UpstreamTruncated
        body = b"".join(self._parts)
        self._parts.clear()
        if self.mode == "json":
            return self._translator.whole_as_stream(body)
        self._whole = self._translator.whole(body)
        return b""

    # ---- how the call ended ------------------------------------------------------------------------------------------

    def good(self) -> Ended:
        """All came, and well."""
        return Ended(outcome=True, billed=True, complete=True, body=self._whole)

    def refusal(self, *, cancelled: bool) -> Ended:
        """A status other than 200: the body, as far as it came, says why."""
        failure = self._translator.failure(self._error_status, self._headers, b"".join(self._parts))
        return refused(failure, cancelled=cancelled)

    def broken(self, failure: Failure, *, cancelled: bool, complete: bool) -> Ended:
        """A 200 that ended before its time; `complete`: all the upstream wrote was read."""
        announced = content_length(self._headers) if self.mode in ("whole", "json") else 0
        return Ended(
            error=failure.error,
            cancelled=cancelled,
            cut=failure is UNPAID,
            retryable=failure.retryable and not self._translator.started,
            same_endpoint=failure.same_endpoint,
            outcome=False if failure.endpoint_fault else None,
            billed=True,
            complete=complete,
            readable=self.readable and (self.mode in ("sse", "other") or self._counts_whole(complete=complete)),
            size=announced if self.size < announced else 0,
        )

    def _counts_whole(self, *, complete: bool) -> bool:
        """Of a whole answer either nothing was written, or all of it was understood: else its tokens are unknown."""
        return self._translator.finished or (complete and not self.size)
