"""`WORKER_ROLES=guardian,routing,provider python -m workers`: several roles in one process, for small installs.

Each `workers/<role>/__main__.py` has the class of its role by name: Guardian, Routing, Provider. None given: all.
"""

import importlib
from collections.abc import Callable

from shared import settings
from shared.service import Role, main_of


def roles(chosen: settings.Settings) -> list[Callable[[], Role]]:
    """The classes of the roles that WORKER_ROLES names (checked by the settings)."""
    names = chosen.roles() or settings.ROLES
    return [getattr(importlib.import_module(f"workers.{name}.__main__"), name.capitalize()) for name in names]


if __name__ == "__main__":
    main_of(roles)
