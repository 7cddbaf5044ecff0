"""What the admin API has: one row per operation."""

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.state.admin import NewKey
from shared.state.books import Entry
from shared.state.operations import MAX_DAYS, MAX_USER, Budget, By, CostReport, Key, Limits, Spend, Tenant
from shared.state.policies import Expiry, KeyChange, Models, Rate, TenantChange

#: Path parameters: (pattern, what it is).
PARAMETERS: Final = {
    "tenant": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "The tenant's name."),
    "key_id": (r"[A-Za-z0-9_-]{1,64}", "The key's id; `bootstrap` is GATEWAY_API_KEY's."),
    "rid": (r"[0-9a-f]{32}", "The request's id (X-BR-Request-Id)."),
}

TenantName = Annotated[str, Meta(pattern=rf"^{PARAMETERS['tenant'][0]}$", max_length=64)]


class OfLevel(Struct, kw_only=True, forbid_unknown_fields=True):
    """Whose budget: the tenant's own without either; not both."""

    key: Annotated[str, Meta(pattern=rf"^{PARAMETERS['key_id'][0]}$", description="Of this key.")] | UnsetType = UNSET
    user: (
        Annotated[str, Meta(min_length=1, max_length=MAX_USER, description="Of this user, as requests name it.")]
        | UnsetType
    ) = UNSET


class OfSpend(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which rows, of which time."""

    by: Annotated[By, Meta(description="One row per ...")] = "model"
    days: Annotated[int, Meta(ge=0, le=MAX_DAYS, description="The last so many days (UTC); 0: all.")] = 0


class OfTenant(Struct, kw_only=True, forbid_unknown_fields=True):
    """Only one tenant's."""

    tenant: TenantName | UnsetType = UNSET


class KeyRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A key to make. The tenant is made with it when the name is new; `tenant_limits` are the tenant's, `limits` the
    key's own (nano-USD)."""

    tenant: TenantName
    synthetic: bool = False
    tenant_limits: Limits | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET
    expires: Expiry | UnsetType = UNSET
    models: Models | UnsetType = UNSET
    rpm: Rate | UnsetType = UNSET
    tpm: Rate | UnsetType = UNSET


class Tenants(Struct, kw_only=True):
    """All tenants."""

    tenants: list[Tenant]


class Keys(Struct, kw_only=True):
    """Keys, revoked ones too."""

    keys: list[Key]


class Revoked(Struct, kw_only=True):
    """The key is revoked everywhere within a second."""

    key_id: str
    revoked: Literal[True] = True


class Entries(Struct, kw_only=True):
    """The calls of a request, as the ledger remembers them."""

    tenant: str
    entries: list[Entry]


class Operation(Struct, frozen=True, kw_only=True):
    """One row. `does` is the method of resources.Resources, and the operation's id."""

    method: str
    path: str
    does: str
    summary: str
    query: type[Struct] | None = None
    body: type[Struct] | None = None
    answer: Any
    status: int = 200
    contrary: bool = False  # 409 is possible


OPERATIONS: Final = (
    Operation(method="GET", path="/v1/tenants", does="tenants", summary="All tenants", answer=Tenants),
    Operation(method="GET", path="/v1/tenants/{tenant}", does="tenant", summary="A tenant", answer=Tenant),
    Operation(
        method="PATCH", path="/v1/tenants/{tenant}", does="set_tenant", summary="Change a tenant's policy",
        body=TenantChange, answer=Tenant,
    ),
    Operation(
        method="GET", path="/v1/tenants/{tenant}/budget", does="budget", summary="Balances and limits",
        query=OfLevel, answer=Budget, contrary=True,
    ),
    Operation(
        method="PATCH", path="/v1/tenants/{tenant}/budget", does="set_budget", summary="Set and clear limits",
        query=OfLevel, body=Limits, answer=Budget, contrary=True,
    ),
    Operation(
        method="GET", path="/v1/tenants/{tenant}/spend", does="spend", summary="What models, keys or days cost",
        query=OfSpend, answer=Spend,
    ),
    Operation(
        method="GET", path="/v1/tenants/{tenant}/costs", does="costs", summary="The cost tracker: by model and day",
        answer=CostReport,
    ),
    Operation(
        method="GET", path="/v1/tenants/{tenant}/entries/{rid}", does="entries", summary="A request's calls and money",
        answer=Entries,
    ),
    Operation(method="GET", path="/v1/keys", does="keys", summary="Keys", query=OfTenant, answer=Keys),
    Operation(
        method="POST", path="/v1/keys", does="create_key", summary="Make a key; it is shown this once",
        body=KeyRequest, answer=NewKey, status=201, contrary=True,
    ),
    Operation(method="GET", path="/v1/keys/{key_id}", does="key", summary="A key", answer=Key),
    Operation(
        method="PATCH", path="/v1/keys/{key_id}", does="set_key", summary="Change what a key may do",
        body=KeyChange, answer=Key,
    ),
    Operation(
        method="POST", path="/v1/keys/{key_id}/revoke", does="revoke_key", summary="Revoke a key; it stays in the list",
        answer=Revoked,
    ),
)  # fmt: skip
