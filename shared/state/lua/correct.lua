#!lua flags=allow-oom
-- correct(args=[rid, grace, tombstone, unconfirmed, call, cost, key, user, day, was], keys=[balances, entries, leases, journal, rates])
--
-- Reconcile: the provider's bill says what the call cost. What is unconfirmed or posted at its bound is settled, what was
-- settled at another cost is put right. `was`: what was posted for a call whose entry is forgotten, as its journal line
-- tells (charged to `key`, `user` and `day`); -1: nobody knows. Keys and their types: _balances.lua.
-- Returns {'corrected' | 'late' | 'opened' | 'overrun' | 'settled' | 'duplicate' (it was right) | 'missing', id of the line}
local number, cost = tonumber(ARGV[5]), tonumber(ARGV[6])
local key, user, day, was = ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])

local entry = load()
if entry and entry[KEY] == '' then entry[KEY], entry[USER] = key, user end
if entry then return post(entry, 'settled', number, cost, 0, true) end
if was < 0 then return {'missing', ''} end
if was == cost then return {'duplicate', ''} end
entry = {'D', 0, 0, 0, day, 0, key, user, -1}
move(entry, cost - was, 0, 0)
return {'corrected', line('correct', rid, entry, number, cost - was, 0, 0, cost, 0, 0)}
