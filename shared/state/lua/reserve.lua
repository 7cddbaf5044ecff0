#!lua
-- reserve(args=[rid, grace, tombstone, unconfirmed, delivery, amount, deadline, not_after, key, user, least,
--               tokens, tenant_requests, tenant_tokens, key_requests, key_tokens],
--         keys=[balances, entries, leases, journal, rates])
--
-- Holds `amount` for the first call of a request, until deadline + grace. Keys and their types: _balances.lua. A later
-- delivery that needs more than is held (another body under the same rid, a price that rose) has the rest held too.
-- `least` > 0: when `amount` does not fit but this does, what is left is held. `tokens` '' : nothing but the money.
-- Returns {'ok', held, day, ratio, user (1: its level moves), counts...} | {'denied', left, level, period} |
--         {'limited', wait ms (-1: for ever), level, requests|tokens, counts but the last two} | {'late'} | {'stale'} | {'refused'} | {'closed'}:
--   ok       held now, or already: for an earlier delivery, or by an open call
--   refused  this or a later delivery was voided
--   closed   no call is open, and this delivery is not new or there was never a holder whose place it could take
-- counts  {limit, left, full in ms} of the tighter bucket of requests, then of tokens (limit 0: none), requests of the key
--         in this minute and hour
local delivery, amount = tonumber(ARGV[5]), tonumber(ARGV[6])
local deadline, not_after = tonumber(ARGV[7]), tonumber(ARGV[8])
local key, user, least = ARGV[9], ARGV[10], tonumber(ARGV[11])
local tokens = tonumber(ARGV[12])
local needs, limits = {1, tokens}, {tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15]), tonumber(ARGV[16])}

if now > not_after then return {'stale'} end
if now > deadline then return {'late'} end
sweep()

local entry = load()
if entry and entry[STATE] ~= 'V' then
  local last = newest(entry)
  local held = (not last and entry[AMOUNT]) or (last[CALL_STATE] == 'D' and last[CALL_AMOUNT]) or nil
  if not held and (delivery <= entry[DELIVERY] or last[INSTANCE] == '') then return {'closed'} end
  local more = not last and amount > held
  if more and least > 0 and least <= held then more = false end -- it was clamped, and stays so
  if more then
    local all, denied = hold(entry, held, amount, least)
    if denied then return denied end
    line('extend', rid, entry, 0, 0, all - held, 0, all)
    entry[AMOUNT], held = all, all
  end
  if more or delivery > entry[DELIVERY] then
    entry[DELIVERY] = math.max(delivery, entry[DELIVERY])
    save(rid, entry, false)
  end
  return {'ok', held or 0, entry[DAY], 1000000, entry[USER] ~= '' and 1 or 0}
end
if entry and delivery <= entry[VOIDED] then return {'refused'} end

local found, refusal
if tokens then
  found, refusal = look(key, needs, limits)
  if refusal then return show(found, limits, refusal) end
end
if user ~= '' and redis.call('HEXISTS', balances, 'u:' .. user .. ':limit') == 0 then user = '' end
local fresh = {'R', delivery, entry and entry[VOIDED] or 0, deadline, today, amount, key, user, tokens or -1}
local held, denied = hold(fresh, 0, amount, least)
if denied then return denied end
fresh[AMOUNT] = held
line('reserve', rid, fresh, 0, 0, held, 0, held)
save(rid, fresh, true)

local reply = {'ok', held, today, ratio, user ~= '' and 1 or 0}
return found and take(key, found, needs, limits, reply) or reply
