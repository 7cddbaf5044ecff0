"""The ingress runs on uvloop, whose transports differ from asyncio's in more than speed: the telling tests again."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import uvloop

from tests.ingress import test_answers as answers
from tests.ingress import test_overload as overload
from tests.ingress import test_refusals as refusals
from tests.ingress import test_slow_clients as slow
from tests.ingress import test_streams as streams
from tests.ingress.world import KEY, World

AGAIN: list[Callable[..., Awaitable[None]]] = [
    answers.test_a_whole_answer,
    answers.test_one_connection_carries_many_requests,
    answers.test_http_1_0_gets_a_stream_without_chunks,
    answers.test_a_large_whole_answer_in_many_deltas,
    overload.test_a_queue_that_stands_is_shed,
    refusals.test_72_74_odd_keys,
    refusals.test_a_bad_chunk_half_way_answers_at_once,
    refusals.test_a_small_chunked_body_is_read,
    streams.test_a_lost_frame_is_an_error_never_silence,
    streams.test_14_the_holder_dies_after_text,
    streams.test_24_the_bus_goes,
    streams.test_a_client_that_left_before_anybody_accepted,
    streams.test_a_reader_gets_credit_and_a_slow_one_does_not,
    slow.test_what_waits_is_kept_small_and_read_late_is_whole,
    slow.test_http_1_0_read_late_is_whole_too,
    slow.test_a_stalled_client_that_says_it_is_done_is_gone,
]


@pytest.mark.parametrize("test", AGAIN, ids=lambda test: str(test.__name__))
def test_on_uvloop(test: Callable[..., Awaitable[None]]) -> None:
    async def run() -> None:
        world = await World().start()
        try:
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http:
                has: dict[str, Any] = {"world": world, "http": http}
                await test(**{name: has[name] for name in inspect.signature(test).parameters})
        finally:
            await world.close()

    uvloop.run(run())
