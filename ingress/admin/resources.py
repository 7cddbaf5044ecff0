"""What each operation does: the words of a request become a call of shared/state/operations.py.

Every method takes (path parameters in order, query, body) as far as its row in operations.py has them.
"""

from msgspec import UNSET

from ingress.admin import operations as api
from shared.state.admin import NewKey
from shared.state.operations import Budget, CostReport, Key, Limits, Missing, Operations, Spend, Tenant
from shared.state.policies import KeyChange, TenantChange


class Resources:
    """See the module. All raise Missing, ValueError, StateUnavailable."""

    def __init__(self, operations: Operations) -> None:
        self._do = operations

    async def tenants(self) -> api.Tenants:
        """All."""
        return api.Tenants(tenants=await self._do.tenants())

    async def tenant(self, tenant: str) -> Tenant:
        """One."""
        return await self._do.tenant(tenant)

    async def set_tenant(self, tenant: str, body: TenantChange) -> Tenant:
        """Its policy afterwards."""
        return await self._do.set_tenant(tenant, body)

    async def budget(self, tenant: str, query: api.OfLevel) -> Budget:
        """Of the tenant, a key or a user."""
        return await self._do.budget(tenant, key=query.key or "", user=query.user or "")

    async def set_budget(self, tenant: str, query: api.OfLevel, body: Limits) -> Budget:
        """As it is then."""
        return await self._do.set_limits(tenant, body, key=query.key or "", user=query.user or "")

    async def spend(self, tenant: str, query: api.OfSpend) -> Spend:
        """By model, key or day."""
        return await self._do.spend(tenant, query.by, query.days)

    async def costs(self, tenant: str) -> CostReport:
        """By model and day."""
        return await self._do.costs(tenant)

    async def entries(self, tenant: str, rid: str) -> api.Entries:
        """Of one request. Missing when the ledger remembers none."""
        found = await self._do.entries(tenant, rid)
        if not found:
            raise Missing("request", rid)
        return api.Entries(tenant=tenant, entries=found)

    async def keys(self, query: api.OfTenant) -> api.Keys:
        """Of one tenant, or all."""
        return api.Keys(keys=await self._do.keys(query.tenant or None))

    async def create_key(self, body: api.KeyRequest) -> NewKey:
        """The only time that the key is seen."""
        change = KeyChange(expires=body.expires, models=body.models, rpm=body.rpm, tpm=body.tpm)
        return await self._do.create_key(
            body.tenant,
            synthetic=body.synthetic,
            tenant_limits=Limits() if body.tenant_limits is UNSET else body.tenant_limits,
            limits=Limits() if body.limits is UNSET else body.limits,
            change=change,
        )

    async def key(self, key_id: str) -> Key:
        """One."""
        return await self._do.key(key_id)

    async def set_key(self, key_id: str, body: KeyChange) -> Key:
        """As it is then."""
        return await self._do.set_key(key_id, body)

    async def revoke_key(self, key_id: str) -> api.Revoked:
        """For good."""
        await self._do.revoke_key(key_id)
        return api.Revoked(key_id=key_id)
