"""Hotpath's books against the simulator's: what `hotpath ledger show` and `hotpath budget show` say of a tenant."""

from typing import Any, Protocol

from msgspec import Struct

from tests.e2e.sim import until

OUTPUT_NANO = 600  # nano-USD per output token of the simulator's paid models ($0.60 per million)


class Commands(Protocol):
    """A running Hotpath's command line."""

    def cli(self, *words: str) -> Any:
        """`hotpath WORDS... --json`: its JSON."""


class Entry(Struct, frozen=True):
    """One upstream call in the ledger."""

    rid: str
    call: int
    state: str
    amount: int
    cost: int
    estimated: bool = False
    instance: str = ""  # the provider that held it


def entries(up: Commands, tenant: str) -> dict[str, Entry]:
    """Every call of a tenant by `<rid>.<call>`."""
    found: list[dict[str, Any]] = up.cli("ledger", "show", tenant)["entries"]
    made = [Entry(*(raw[name] for name in Entry.__struct_fields__)) for raw in found]
    return {f"{entry.rid}.{entry.call}": entry for entry in made}


def level(up: Commands, tenant: str, period: str = "lifetime") -> dict[str, Any]:
    """The tenant's row of `hotpath budget show` for a period."""
    (row,) = [row for row in up.cli("budget", "show", tenant)["levels"] if row["period"] == period]
    found: dict[str, Any] = row
    return found


def settled_level(up: Commands, tenant: str, within: float) -> dict[str, Any]:
    """The same once nothing is pending any more; the last row either way."""
    return until(lambda: level(up, tenant), lambda row: row["pending"] == 0, within, every=0.1)
