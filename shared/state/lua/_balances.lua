-- Put in front of every ledger script by scripts.py, with _entries.lua: arguments, server time, periods, balances.
--
-- KEYS[1] balances  hash  <level>:<bucket>:<s|p|u> -> nano-USD settled, pending, unconfirmed; buckets are 2026-11-21,
--                         2026-11 and lifetime; <level>:limit:<day|month|lifetime> -> nano-USD
-- KEYS[2] entries   hash  rid (16 bytes) -> entry (msgpack)
-- KEYS[3] leases    zset  rid -> server ms at which the entry is next due: its lease, an unconfirmed call, its tombstone
-- ARGV[1..4] rid, lease grace, tombstone and unconfirmed spans in ms; each script names its own further ones.
--
-- entry {state, delivery, voided, deadline, day, amount, call...}   state R reserved, V voided, D dispatched or settled;
--       delivery: newest that reserved; voided: newest that was voided; deadline: 0 if never reserved; day: of the reserve, charged at the settle
-- call  {number, state, amount, cost, estimated, instance, delivery, due}   state D dispatched, S settled,
--       U unconfirmed (until due), B posted at its upper bound, N not known before its settle
local STATE, DELIVERY, VOIDED, DEADLINE, DAY, AMOUNT, CALLS = 1, 2, 3, 4, 5, 6, 6
local NUMBER, COST, ESTIMATED, INSTANCE, HOLDER_DELIVERY, DUE = 1, 4, 5, 6, 7, 8
local CALL_STATE, CALL_AMOUNT = 2, 3
local LEVELS, PERIODS, KINDS = {'t'}, {'day', 'month', 'lifetime'}, {':s', ':p', ':u'}
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
  local deltas, kinds = {settled, pending, held}, {}
  for k = 1, 3 do
    if guarded or deltas[k] ~= 0 then kinds[#kinds + 1] = k end
  end
  if #kinds == 0 then return end
  local year, month, date = civil(day)
  local buckets = {string.format('%04d-%02d-%02d', year, month, date), string.format('%04d-%02d', year, month), 'lifetime'}
  local names, n = {}, 0
  for _, level in ipairs(LEVELS) do
    for i = 1, 3 do
      local stem = level .. ':' .. buckets[i]
      for _, k in ipairs(kinds) do
        n = n + 1
        names[n] = stem .. KINDS[k]
      end
      if guarded then
        n = n + 1
        names[n] = level .. ':limit:' .. PERIODS[i]
      end
    end
  end
  local values, i = redis.call('HMGET', balances, unpack(names)), 0
  local left, write, w, big = EXACT, {}, 0, nil
  while i < n do
    local used = 0
    for _, k in ipairs(kinds) do
      i = i + 1
      local before, delta = integer(values[i], '^%-?%d+$'), deltas[k]
      used = used + before
      if delta ~= 0 then
        -- nothing held never goes below 0: a hash that was deleted must not turn into headroom
        local after = (k == 1 or before + delta > 0) and before + delta or 0
        if after > EXACT then -- HINCRBY counts in 64 bits
          big = big or {}
          big[#big + 1] = {names[i], string.format('%.0f', delta)}
        else
          write[w + 1], write[w + 2], w = names[i], string.format('%.0f', after), w + 2
        end
      end
    end
    if guarded then
      i = i + 1
      if values[i] then left = math.min(left, integer(values[i], '^%d+$') - used) end
    end
  end
  if guarded and pending > 0 and pending > left then return math.max(0, left) end
  -- a field over 64 bytes keeps the hash out of the list encoding, whose look-ups walk past every day that is kept
  if guarded and not values[n - 2] then
    write[w + 1], write[w + 2], w = 'about', string.rep('balances in nano-USD; ', 3), w + 2
  end
  if w > 0 then redis.call('HSET', balances, unpack(write)) end
  for _, change in ipairs(big or {}) do redis.call('HINCRBY', balances, change[1], change[2]) end
end
