"""The choke point of everything that goes to a bus: subjects, patterns and sizes (faults 2 group D).

A NATS client writes the protocol line it is given: one space in a subject delivers elsewhere, CRLF publishes a second
message (measured). So nothing is written that did not pass here, whatever the library below checks or does not.
"""

from typing import Final

from shared.bus.base import BadSubject, PayloadTooLarge
from shared.wire.errors import quote
from shared.wire.subjects import JETSTREAM, PATTERN, SUBJECT

MAX_SUBJECT: Final = 256  # characters; ours are at most about 150. The server's control line ends at 4096 bytes
KNOWN: Final = 4096  # validated subjects remembered: one for each instance and role this process talks to


class Checks:
    """Subject checks with a bounded memory of those already found good (0.05 us against 0.7 us a message)."""

    def __init__(self) -> None:
        self._good: set[str] = set()

    def subject(self, subject: str) -> None:
        """Raises BadSubject unless `subject` may be published to."""
        if subject in self._good:
            return
        _match_subject(subject)
        if len(self._good) >= KNOWN:
            self._good.clear()
        self._good.add(subject)

    def reply(self, reply: str) -> None:
        """The same for a reply subject: made anew for each message, so not worth remembering."""
        _match_subject(reply)


def _match_subject(subject: str) -> None:
    if len(subject) > MAX_SUBJECT or (SUBJECT.match(subject) is None and JETSTREAM.match(subject) is None):
        raise BadSubject(f"not a subject: {quote(subject)}")


def pattern(pattern: str, queue: str) -> None:
    """Raises BadSubject unless `pattern` may be subscribed to, as a member of `queue` (empty: none)."""
    if len(pattern) > MAX_SUBJECT or PATTERN.match(pattern) is None:
        raise BadSubject(f"not a subscription: {quote(pattern)}")
    if queue and (len(queue) > MAX_SUBJECT or SUBJECT.match(queue) is None):
        raise BadSubject(f"not a queue group: {quote(queue)}")


def size(payload: bytes, limit: int) -> None:
    """Raises PayloadTooLarge."""
    if len(payload) > limit:
        raise PayloadTooLarge(f"{len(payload)} bytes, the bus takes {limit}")
