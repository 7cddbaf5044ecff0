#!lua flags=allow-oom
-- settle(args=[rid, grace, tombstone, unconfirmed, call, cost, estimated], keys=[balances, entries, leases])
--
-- Posts what a call really used, in full, whatever was held for it and in the period of its reserve; runs when Redis
-- is out of memory. Keys and their types: _balances.lua.
-- Returns {'settled'} | {'late'} (was unconfirmed, posted at its bound, or voided) | {'duplicate'} |
--         {'opened'} (the entry or the call was not known: posted as its own)
local number, cost, estimated = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local status = 'settled'
local entry = load()
if not entry then
  entry, status = {'D', 0, 0, 0, today, 0}, 'opened'
end

local call
for i = CALLS + 1, #entry do
  if entry[i][NUMBER] == number then call = entry[i] end
end
if not call then
  call = {number, 'N', 0, 0, 0, '', 0, 0}
  if entry[STATE] == 'R' then -- its dispatch was lost: the reservation was held for this call
    call[CALL_STATE], call[CALL_AMOUNT], call[HOLDER_DELIVERY] = 'D', entry[AMOUNT], entry[DELIVERY]
  elseif status == 'settled' then
    status = entry[STATE] == 'V' and 'late' or 'opened'
  end
  entry[#entry + 1] = call
end

local state, held = call[CALL_STATE], call[CALL_AMOUNT]
if state == 'S' then return {'duplicate'} end
if state == 'U' or state == 'B' then status = 'late' end
move(entry[DAY], state == 'B' and cost - held or cost, state == 'D' and -held or 0, state == 'U' and -held or 0)
entry[STATE], call[CALL_STATE], call[COST], call[ESTIMATED], call[DUE] = 'D', 'S', cost, estimated, 0
save(rid, entry, true)
return {status}
