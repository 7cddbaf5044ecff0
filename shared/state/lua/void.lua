#!lua flags=allow-oom
-- void(args=[rid, grace, tombstone, unconfirmed, delivery, instance, call, key, user],
--      keys=[balances, entries, leases, journal, rates])
--
-- Nothing was used by this delivery: gives an undispatched reservation back and leaves a tombstone that refuses its
-- late reserve and dispatch. With `instance` (a dispatch or topup in doubt, no call was made) the open call which that
-- instance may have won under this delivery is settled at 0, if its number is `call` or above: below are calls that
-- were made, whose settle may still come. Runs when Redis is out of memory. Keys: _balances.lua.
-- Returns {'voided'} | {'kept'} (a later delivery reserved, or one dispatched)
local delivery, instance, lowest = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])

local entry = load()
if not entry then -- should it be settled after all, its user is charged only where that has a limit, as by a reserve
  local user = ARGV[9]
  if user ~= '' and redis.call('HEXISTS', balances, 'u:' .. user .. ':limit') == 0 then user = '' end
  entry = {'V', 0, 0, 0, today, 0, ARGV[8], user, -1}
end
local last = newest(entry)
if last then
  local mine = last[INSTANCE] == instance and last[HOLDER_DELIVERY] == delivery
  if instance == '' or not mine or last[CALL_STATE] ~= 'D' or last[NUMBER] < lowest then return {'kept'} end
  move(entry, 0, -last[CALL_AMOUNT], 0)
  line('void', rid, entry, last[NUMBER], 0, -last[CALL_AMOUNT], 0)
  give_back(entry, 0)
  last[CALL_STATE] = 'S'
  save(rid, entry, true)
  return {'voided'}
end

if delivery < entry[DELIVERY] then return {'kept'} end
if entry[STATE] == 'R' then
  move(entry, 0, -entry[AMOUNT], 0)
  line('void', rid, entry, 0, 0, -entry[AMOUNT], 0)
  give_back(entry, 0)
end
entry[STATE], entry[VOIDED] = 'V', math.max(entry[VOIDED], delivery)
save(rid, entry, true)
return {'voided'}
