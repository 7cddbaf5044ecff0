"""A role that does nothing, as a process of its own: `python -m tests.service_role [name ...]`."""

import sys

from shared.service import Context, main
from shared.wire.messages import Cancel, Credit


class Idle:
    """Counts what it is told."""

    watches: tuple[str, ...] = ("guardian", "routing")
    capacity = 5

    def __init__(self, name: str = "guardian") -> None:
        self.name = name
        self.controls: list[Cancel | Credit] = []
        self.drained = False
        self.ctx: Context | None = None

    def in_flight(self) -> int:
        return 0

    async def start(self, ctx: Context) -> None:
        self.ctx = ctx
        ctx.log.info("started")

    def control(self, message: Cancel | Credit) -> None:
        self.controls.append(message)

    async def drain(self) -> None:
        self.drained = True


class Stuck(Idle):
    """Never done draining."""

    async def drain(self) -> None:
        import asyncio  # noqa: PLC0415

        await asyncio.Event().wait()


if __name__ == "__main__":
    make = Stuck if "stuck" in sys.argv else Idle
    main(*(lambda name=name: make(name) for name in sys.argv[1].split(",")))
