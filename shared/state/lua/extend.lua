#!lua
-- extend(args=[rid, grace, tombstone, unconfirmed, call, delivery, instance, total, not_after],
--        keys=[balances, entries, leases, journal, rates])
--
-- More for a call that runs: its holder wants `total` held for it in all. Keys: _balances.lua.
-- Returns {'ok', held} | {'denied', left} | {'closed'} (not open, or not this holder's) | {'stale'} | {'missing'}
local number, delivery, instance = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local total, not_after = tonumber(ARGV[8]), tonumber(ARGV[9])

if now > not_after then return {'stale'} end
local entry = load()
if not entry then return {'missing'} end
local call = call_of(entry, number)
if not call or call[CALL_STATE] ~= 'D' or call[INSTANCE] ~= instance or call[HOLDER_DELIVERY] ~= delivery then
  return {'closed'}
end
local more = total - call[CALL_AMOUNT]
if more <= 0 then return {'ok', call[CALL_AMOUNT]} end
local left = move(entry, 0, more, 0, true)
if left then return {'denied', left} end
line('extend', rid, entry, number, 0, more, 0, total)
call[CALL_AMOUNT] = total
save(rid, entry, false)
return {'ok', total}
