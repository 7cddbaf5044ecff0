#!lua
-- dispatch(args=[rid, grace, tombstone, unconfirmed, delivery, instance, lost, amount, max_calls, not_after],
--          keys=[balances, entries, leases, journal, rates])
--
-- Compare-and-set: one delivery wins the right to make the next upstream call. `lost` names a holder known dead: its
-- open call becomes UNCONFIRMED, whether or not a further one fits. Keys and their types: _balances.lua.
-- Returns {'won', call} | {'refused', holder, delivery} | {'closed', holder, delivery} | {'denied', left} |
--         {'exhausted'} | {'late'} | {'stale'} | {'voided'} | {'missing'}
local delivery, instance, lost = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local amount, max_calls, not_after = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])

if now > not_after then return {'stale'} end
local entry = load()
if not entry then return {'missing'} end
if entry[STATE] == 'V' or delivery <= entry[VOIDED] then return {'voided'} end
if now > entry[DEADLINE] then return {'late'} end

local last = newest(entry)
if not last then
  if max_calls < 1 then return {'exhausted'} end
  line('dispatch', rid, entry, 1, 0, 0, 0, instance, delivery)
  entry[STATE] = 'D'
  entry[CALLS + 1] = {1, 'D', entry[AMOUNT], 0, 0, instance, delivery, 0}
  save(rid, entry, false) -- the lease stays: deadline + grace
  return {'won', 1}
end

local opened = last[CALL_STATE] == 'D'
if opened and last[INSTANCE] == instance and last[HOLDER_DELIVERY] == delivery then return {'won', last[NUMBER]} end
if lost == '' or last[INSTANCE] ~= lost or lost == instance then
  return {opened and 'refused' or 'closed', last[INSTANCE], last[HOLDER_DELIVERY]}
end

if opened then
  doubt(rid, entry, last)
  save(rid, entry, true) -- before a limit that is damaged stops the rest: the call would be doubted twice
end
local answer = open(entry, last[NUMBER] + 1, amount, instance, delivery, max_calls)
if answer[1] == 'won' then save(rid, entry, true) end
return answer
