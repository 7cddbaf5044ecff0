"""Run one process: settings, connections, checks, roles, beats, drain (DESIGN 1, 3).

    main(Guardian)                     one role
    main(Guardian, Routing, Provider)  several in one process, over the same subjects and the same code

Boot: settings and catalogue (exit 78 when wrong) -> bus and state at once, tried for 10 s (exit 1) -> sizes checked,
registry warm -> control and beats subscribed -> those it hands work to heard (0.6 s at most) -> each role's `start`
-> first beat, ready line. End: SIGTERM or SIGINT
-> beats say draining -> each role's `drain` -> connections closed, exit 0; a second signal ends at once.
"""

import asyncio
import contextlib
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import uvloop

from shared import catalog as catalogs
from shared import settings as environment
from shared.bus.nats import NatsBus
from shared.catalog import Catalog
from shared.service.contract import BootError, Context, Role
from shared.service.process import EXIT_FAULT, Process
from shared.settings import Settings
from shared.state.redis import State
from shared.telemetry.log import Log

__all__ = ["BootError", "Context", "Process", "Role", "main", "main_of"]

EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h: a supervisor need not try again
#: How long a thread that counts a large prompt keeps the interpreter from the event loop. By Python's own 5 ms one such
#: prompt after the other made every turn of the loop 4 ms late (p95; 1.6 ms with this).
SWITCH_S: Final = 0.001


def main(*factories: Callable[[], Role]) -> None:
    """Process entry: run the roles until a signal. Exits with 0, 78 (settings, catalogue) or 1."""
    main_of(lambda _settings: factories)


def main_of(choose: Callable[[Settings], Iterable[Callable[[], Role]]]) -> None:
    """The same for roles that the settings name."""
    sys.exit(_run(choose, os.environ, time.monotonic()))


def _raise_descriptors() -> None:
    """The soft limit of open files up to the hard one, as Go's runtime does: 1024 is a bound for select(), unused here.

    Under `ulimit -n` both are what it says.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some kernels take less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(choose: Callable[[Settings], Iterable[Callable[[], Role]]], env: Mapping[str, str], started_at: float) -> int:
    try:
        settings = environment.load(env)
        catalog = catalogs.load(settings.hotpath_catalog, env)
    except (environment.SettingsError, catalogs.CatalogError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    _raise_descriptors()
    sys.setswitchinterval(SWITCH_S)
    log = Log(settings.log_level, _secrets(settings, catalog))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(choose, settings, catalog, log, started_at))
    except BootError as error:
        sys.stderr.write(log.redactor.clean(f"{error}\n"))
        return EXIT_FAULT
    except Exception:  # the process's door: whatever it was becomes one log line and an exit code
        logging.getLogger("hotpath").critical("the process failed", exc_info=True)
        return EXIT_FAULT
    finally:
        log.close()
    return 0


async def _serve(
    choose: Callable[[Settings], Iterable[Callable[[], Role]]],
    settings: Settings,
    catalog: Catalog,
    log: Log,
    started_at: float,
) -> None:
    process = Process(
        [factory() for factory in choose(settings)],
        settings,
        catalog,
        log,
        connect_bus=NatsBus.connect,
        connect_state=State.connect,
        started_at=started_at,
    )
    await process.run()


def _secrets(settings: Settings, catalog: Catalog) -> Iterator[str]:
    yield from (settings.gateway_api_key, settings.key_pepper, settings.admin_api_key)
    yield from (endpoint.key for endpoint in catalog.endpoints.values())
    for name in settings.__struct_fields__:
        if "_url" in name and "@" in (url := getattr(settings, name)):
            user = url.partition("://")[2].rpartition("@")[0]
            yield user
            yield user.partition(":")[2]
