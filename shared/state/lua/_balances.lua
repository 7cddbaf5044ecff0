-- Put in front of every ledger script by scripts.py, with _entries.lua: arguments, server time, periods, balances.
--
-- KEYS[1] balances  hash  <level>:<bucket>:<s|p|u> -> nano-USD settled, pending, unconfirmed; buckets are 2026-11-21,
--                         2026-11 and lifetime; <level>:limit:<day|month|lifetime> -> nano-USD
-- KEYS[2] entries   hash  rid (16 bytes) -> entry (msgpack)
-- KEYS[3] leases    zset  rid -> server ms at which the entry is next due: its lease, an unconfirmed call, its tombstone
-- ARGV[1..4] rid, lease grace, tombstone and unconfirmed spans in ms; each script names its own further ones.
--
-- entry {state, delivery, voided, deadline, day, amount, call...}   state R reserved, V voided, D dispatched or settled;
--       delivery: newest that reserved; voided: newest that was voided; day: of the reserve, charged at the settle
-- call  {number, state, amount, cost, estimated, instance, delivery, due}   state D dispatched, S settled,
--       U unconfirmed (until due), B posted at its upper bound, N not known before its settle
local STATE, DELIVERY, VOIDED, DEADLINE, DAY, AMOUNT, CALLS = 1, 2, 3, 4, 5, 6, 6
local NUMBER, COST, ESTIMATED, INSTANCE, HOLDER_DELIVERY, DUE = 1, 4, 5, 6, 7, 8
local CALL_STATE, CALL_AMOUNT = 2, 3
local LEVELS, PERIODS = {'t'}, {'day', 'month', 'lifetime'}
local EXACT = 9007199254740991 -- 2^53 - 1, the largest integer a Lua number holds exactly

local balances, entries, leases, rid = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
local grace, tombstone, unconfirmed = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local today = math.floor(now / 86400000)

-- Year, month, day of a day number since 1970-01-01 (proleptic Gregorian; the year is taken to begin in March).
local function civil(day)
  local floor = math.floor
  local z = day + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return yoe + era * 400 + (month <= 2 and 1 or 0), month, doy - floor((153 * mp + 2) / 5) + 1
end

-- A stored number, or an error reply: what is not a plain integer must never become "unlimited" (D2).
local function integer(text, pattern)
  if not text then return 0 end
  if #text > 18 or not string.find(text, pattern) then error({err = 'NOTINTEGER a balance or limit is damaged'}) end
  return tonumber(text)
end

-- Adds to the balances of every level in a day, its month and the lifetime: everything is read and checked, then
-- written at once. With `guarded`, writes nothing and returns what is left when a limit would be passed (I2).
local function move(day, settled, pending, held, guarded)
  local year, month, date = civil(day)
  local buckets = {string.format('%04d-%02d-%02d', year, month, date), string.format('%04d-%02d', year, month), 'lifetime'}
  local names = {}
  for _, level in ipairs(LEVELS) do
    for i, bucket in ipairs(buckets) do
      local stem, n = level .. ':' .. bucket, #names
      names[n + 1], names[n + 2], names[n + 3] = stem .. ':s', stem .. ':p', stem .. ':u'
      names[n + 4] = level .. ':limit:' .. PERIODS[i]
    end
  end
  local values, deltas = redis.call('HMGET', balances, unpack(names)), {settled, pending, held}
  local left, write, big = EXACT, {}, {}
  for i = 1, #names, 4 do
    local used = 0
    for k = 0, 2 do
      local before = integer(values[i + k], '^%-?%d+$')
      -- never below nothing: a hash that was deleted must not turn into headroom
      local after = (k == 0) and before + deltas[1] or math.max(0, before + deltas[k + 1])
      used = used + before
      if math.abs(after) > EXACT then
        big[#big + 1] = {names[i + k], string.format('%.0f', deltas[k + 1])}
      elseif after ~= before then
        write[#write + 1] = names[i + k]
        write[#write + 1] = string.format('%.0f', after)
      end
    end
    if guarded and values[i + 3] then left = math.min(left, integer(values[i + 3], '^%d+$') - used) end
  end
  if guarded and pending > 0 and pending > left then return math.max(0, left) end
  -- a field over 64 bytes keeps the hash out of the list encoding, whose look-ups walk every day kept
  if not values[#values - 2] and #write > 0 then
    write[#write + 1], write[#write + 2] = 'about', string.rep('balances in nano-USD; ', 3)
  end
  if #write > 0 then redis.call('HSET', balances, unpack(write)) end
  for _, change in ipairs(big) do redis.call('HINCRBY', balances, change[1], change[2]) end
end
