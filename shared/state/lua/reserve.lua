#!lua
-- reserve(args=[rid, grace, tombstone, unconfirmed, delivery, amount, deadline, not_after], keys=[balances, entries, leases])
--
-- Holds `amount` for the first call of a request, until deadline + grace. Keys and their types: _balances.lua. A later
-- delivery that needs more than is held (another body under the same rid, a price that rose) has the rest held too.
-- Returns {'ok', held} | {'denied', left} | {'late'} | {'stale'} | {'refused'} | {'closed'}:
--   ok       held now, or already: for an earlier delivery, or by an open call
--   refused  this or a later delivery was voided
--   closed   no call is open, and this delivery is not new or there was never a holder whose place it could take
local delivery, amount = tonumber(ARGV[5]), tonumber(ARGV[6])
local deadline, not_after = tonumber(ARGV[7]), tonumber(ARGV[8])

if now > not_after then return {'stale'} end
if now > deadline then return {'late'} end
sweep()

local entry = load()
if entry and entry[STATE] ~= 'V' then
  local last = newest(entry)
  local held = (not last and entry[AMOUNT]) or (last[CALL_STATE] == 'D' and last[CALL_AMOUNT]) or nil
  if not held and (delivery <= entry[DELIVERY] or last[INSTANCE] == '') then return {'closed'} end
  local more = not last and amount > held
  if more then
    local left = move(entry[DAY], 0, amount - held, 0, true)
    if left then return {'denied', left} end
    entry[AMOUNT], held = amount, amount
  end
  if more or delivery > entry[DELIVERY] then
    entry[DELIVERY] = math.max(delivery, entry[DELIVERY])
    save(rid, entry, false)
  end
  return {'ok', held or 0}
end
if entry and delivery <= entry[VOIDED] then return {'refused'} end

local left = move(today, 0, amount, 0, true)
if left then return {'denied', left} end
save(rid, {'R', delivery, entry and entry[VOIDED] or 0, deadline, today, amount}, true)
return {'ok', amount}
