"""The state that processes share: one Redis (or Valkey) holds every such fact, each change of one is a single script.

base       what the rest of the code may ask for; StateUnavailable
redis      State: connects and owns everything below; the admin calls of `hotpath keys|budget|ledger`
ledger     the two-phase ledger (DESIGN 4), one Lua call per verb: lua/{reserve,dispatch,topup,settle,void,expire}.lua
clock      this process's monotonic clock mapped to Redis TIME
registry   this process's copy of tenants and keys
costs      by model and day, alerts, the output ratio; late: settlements that Redis did not take at once
circuits   which endpoints are out of rotation
pipeline   the one connection of the hot calls: pipelined, hiredis-parsed, no retries, a gate
scripts    loads lua/*.lua and runs them by digest
resp       packing of commands; address: what a Redis URL says
voids      reservations given back behind the answer
keys       every key and field name
"""
