#!lua
-- topup(args=[rid, grace, tombstone, unconfirmed, call, delivery, instance, amount, max_calls, not_after],
--       keys=[balances, entries, leases, journal, rates])
--
-- The holder of the newest call opens call number `call`, the next one, with its own amount. Keys: _balances.lua.
-- Its last call should be settled; when it is still open its settle got no answer, and it becomes UNCONFIRMED.
-- Returns as dispatch does: {'won', call} | {'refused', holder, delivery} | {'closed', holder, delivery} |
--         {'denied', left} | {'exhausted'} | {'late'} | {'stale'} | {'voided'} | {'missing'}
local number, delivery, instance = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local amount, max_calls, not_after = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])

if now > not_after then return {'stale'} end
local entry = load()
if not entry then return {'missing'} end
if entry[STATE] == 'V' then return {'voided'} end
if now > entry[DEADLINE] then return {'late'} end

local last = newest(entry)
if not last then return {'missing'} end -- never dispatched
local opened = last[CALL_STATE] == 'D'
if last[INSTANCE] ~= instance or last[HOLDER_DELIVERY] ~= delivery then
  return {opened and 'refused' or 'closed', last[INSTANCE], last[HOLDER_DELIVERY]}
end
if opened and last[NUMBER] == number then return {'won', number} end -- asked again
if last[NUMBER] ~= number - 1 or not (opened or last[CALL_STATE] == 'S') then
  return {'closed', last[INSTANCE], last[HOLDER_DELIVERY]} -- declared lost, lapsed, or already settled
end

if opened then
  doubt(rid, entry, last)
  save(rid, entry, true) -- before a limit that is damaged stops the rest: the call would be doubted twice
end
local answer = open(entry, number, amount, instance, delivery, max_calls)
if answer[1] == 'won' then save(rid, entry, true) end
return answer
