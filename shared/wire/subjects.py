"""Every NATS subject and queue group, defined once (DESIGN 3; the allow-lists in deploy/nats.conf name the same).

A subject is built here from a role and an instance id that *we* made (lower-case letters and digits); a client's
string never becomes part of one. Nothing outside this file may spell a subject: `tests/test_floors.py` looks.
"""

import re
from typing import Final

PREFIX: Final = "hotpath.v1"

#: Direct publishers (NATS user `loadgen`) hand requests in here; guardians share it as one queue group.
ADMIT: Final = f"{PREFIX}.admit"
ADMIT_GROUP: Final = "guardian"

#: How provider calls ended, batched; one routing worker of the group records each batch.
OUTCOME: Final = f"{PREFIX}.outcome"
OUTCOME_GROUP: Final = "routing"

#: The second copy of the money (DESIGN 4): usage records, in a JetStream stream that guardians share one consumer of.
USAGE: Final = f"{PREFIX}.usage"
USAGE_STREAM: Final = "hotpath_usage"
USAGE_CONSUMER: Final = "guardian"

#: Something every process keeps a copy of has changed; the copy is also polled, since a notice may be lost.
NOTICE_REGISTRY: Final = f"{PREFIX}.notice.registry"
NOTICE_CIRCUIT: Final = f"{PREFIX}.notice.circuit"

#: What a published subject must look like (DESIGN 3: one space delivers elsewhere, CRLF publishes a second message).
SUBJECT: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")
#: What a subscription may look like: the same, and `*` or a last `>` as whole tokens.
PATTERN: Final = re.compile(r"([A-Za-z0-9_-]+|\*)(\.([A-Za-z0-9_-]+|\*))*(\.>)?\Z")
#: The two families of JetStream that we publish to: requests to its API, and acknowledgements.
JETSTREAM: Final = re.compile(r"\$JS\.(API|ACK)(\.[A-Za-z0-9_-]+)+\Z")
#: One token: a role or an instance id.
TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")

#: Who is asked whether it lives: whoever a request is waited for from.
_ASKED: Final = frozenset({"guardian", "routing", "provider"})
_ONE: Final = r"[A-Za-z0-9_-]{1,64}"
#: Where the answer may go: `alive`, a direct publisher's reply subject, or the inbox an ingress of the builds before
#: decision 15 asks from (until none of them is rolled from any more).
_ANSWERABLE: Final = re.compile(
    rf"{re.escape(PREFIX)}\.(inbox\.alive\.{_ONE}\.{_ONE}|reply\.loadgen\.{_ONE}|inbox\.{_ONE}\.{_ONE})\Z"
)


def worker(role: str, instance: str) -> str:
    """The subject one live instance of `role` (guardian, routing, provider) takes its requests from."""
    return f"{PREFIX}.{role}.{instance}"


def reply(role: str, instance: str) -> str:
    """Where frames for the asker go; `role` is `ingress` or `loadgen`."""
    return f"{PREFIX}.reply.{role}.{instance}"


def control(instance: str) -> str:
    """Cancel, credit and the empty liveness message for one instance of any role."""
    return f"{PREFIX}.control.{instance}"


def beat(role: str, instance: str) -> str:
    """Where an instance says every 500 ms that it lives; `*` as instance subscribes to the whole role."""
    return f"{PREFIX}.beat.{role}.{instance}"


def inbox(role: str, instance: str, token: str) -> str:
    """The sender's own reply subject of one publish: NATS's 503 (no responders) comes back only here.

    The role stands in it so that an allow-list can give each role its own inboxes and no other's; nobody may publish
    to any, the 503 is the server's own.
    """
    return f"{PREFIX}.inbox.{role}.{instance}.{token}"


def jetstream(verb: str, stream: str) -> str:
    """JetStream's API: `verb` is STREAM.CREATE, STREAM.UPDATE, STREAM.INFO."""
    return f"$JS.API.{verb}.{stream}"


def jetstream_consumer(verb: str, stream: str, consumer: str) -> str:
    """The same for one consumer: CONSUMER.CREATE, CONSUMER.DELETE, CONSUMER.MSG.NEXT."""
    return f"$JS.API.{verb}.{stream}.{consumer}"


def alive(instance: str, asked: str) -> str:
    """Where an ingress is told that the instance it asked lives; `asked` tells which one."""
    return f"{PREFIX}.inbox.alive.{instance}.{asked}"


def answerable(role: str, reply: str) -> bool:
    """Whether an instance of `role` answers a liveness question there: a worker does, to who waits for it.

    Anybody who may ask may name any reply subject; without this a question would make its target publish elsewhere, or
    break its allow-list.
    """
    return role in _ASKED and _ANSWERABLE.match(reply) is not None
