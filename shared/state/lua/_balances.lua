-- Put in front of every ledger script by scripts.py, with _entries.lua: arguments, server time, balances, the journal.
--
-- KEYS[1] balances  hash    <level>:<bucket> -> "settled pending unconfirmed", nano-USD; levels are t (the tenant),
--                           k:<key id> and u:<user id>, buckets 2026-11-21, 2026-11 and lifetime;
--                           <level>:limit -> "day month lifetime", each nano-USD or "-"; ratio (learn.lua);
--                           users: levels u: with a limit; pruned, snap: see expire.lua
-- KEYS[2] entries   hash    rid (16 bytes) -> entry (msgpack)
-- KEYS[3] leases    zset    rid -> server ms at which the entry is next due: its lease, an unconfirmed call, its tombstone
-- KEYS[4] journal   stream  r: rid, l: msgpack [op, call, day, key, user, settled, pending, unconfirmed, more...]: what a
--                           transition moved in every bucket of its levels (core/journal.py replays it, and lists the ops)
-- KEYS[5] rates     hash    see _rates.lua
-- ARGV[1..4] rid, lease grace, tombstone and unconfirmed spans in ms; each script names its own further ones.
--
-- entry {state, delivery, voided, deadline, day, amount, key, user, rated, call...}   state R reserved, V voided, D dispatched or
--       settled; delivery: newest that reserved; voided: newest that was voided; deadline: 0 if never reserved; day: of
--       the reserve, charged at the settle; user: '' without a limit; rated: tokens taken of the rate limits, -1: none are
-- call  {number, state, amount, cost, estimated, instance, delivery, due}   state D dispatched, S settled,
--       U unconfirmed (until due), B posted at its upper bound, N not known before its settle
local STATE, DELIVERY, VOIDED, DEADLINE, DAY, AMOUNT, KEY, USER, RATED, CALLS = 1, 2, 3, 4, 5, 6, 7, 8, 9, 9
local NUMBER, COST, ESTIMATED, INSTANCE, HOLDER_DELIVERY, DUE = 1, 4, 5, 6, 7, 8
local CALL_STATE, CALL_AMOUNT = 2, 3
local PERIODS = {'day', 'month', 'lifetime'}
local EXACT = 9007199254740991 -- 2^53 - 1, the largest integer a Lua number holds exactly

local balances, entries, leases, journal, rid = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local grace, tombstone, unconfirmed = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local today = math.floor(now / 86400000)
local ratio -- of the tenant, once a guarded move has read it

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

local function damaged() error({err = 'NOTINTEGER a balance or limit is damaged'}) end

-- What is not three plain integers must never become headroom, nor "unlimited" (D2).
local function balance(text)
  if not text then return '0', 0, 0 end
  local settled, pending, held = string.match(text, '^(%-?%d+) (%d+) (%d+)$')
  if not settled or #settled > 18 or #pending > 16 or #held > 16 then damaged() end
  return settled, tonumber(pending), tonumber(held)
end

-- A limit of the three as text ("-" = none), or nil.
local function limit_of(text)
  if text == '-' then return nil end
  local limit = tonumber(text) -- of digits and dashes, by the pattern it was read with
  if not limit or limit < 0 or #text > 16 then damaged() end
  return limit
end

-- Decimal text + number. A lifetime may pass 2^53 nano-USD ($9 million): whole dollars and nano-USD are added apart then.
local function add(text, delta)
  if #text < 16 and delta < 4503599627370496 and delta > -4503599627370496 then
    return string.format('%.0f', tonumber(text) + delta)
  end
  local sign, digits = string.match(text, '^(%-?)(%d+)$')
  sign = sign == '-' and -1 or 1
  local dollars = math.floor(delta / 1e9)
  local low = sign * tonumber(string.sub(digits, -9)) + (delta - dollars * 1e9)
  local carry = math.floor(low / 1e9)
  local high = sign * (tonumber(string.sub(digits, 1, -10)) or 0) + dollars + carry
  low = low - carry * 1e9
  sign = ''
  if high < 0 then -- only of a day that was dropped, and whose postings are corrected after all
    sign, high = '-', -high
    if low > 0 then high, low = high - 1, 1e9 - low end
  end
  if high > 0 then return string.format('%s%.0f%09.0f', sign, high, low) end
  return string.format('%s%.0f', sign, low)
end

local function buckets_of(day)
  local year, month, date = civil(day)
  return string.format('%04d-%02d-%02d', year, month, date), string.format('%04d-%02d', year, month), 'lifetime'
end

-- A tenant's first balance. The field keeps the hash out of the list encoding, whose look-ups walk past every day that is
-- kept, by being over 64 bytes; and it tells a new tenant from one whose balances were lost, limits and all (faults 52):
-- that one is admitted nothing until `hotpath ledger rebuild` has replayed its journal.
local function begin(guarded)
  if redis.call('HEXISTS', balances, 'about') == 1 then return end
  if redis.call('EXISTS', journal) == 0 then
    redis.call('HSET', balances, 'about', string.rep('balances in nano-USD; ', 3))
  elseif guarded then
    error({err = 'LOST the balances of this tenant are gone, its journal is there: hotpath ledger rebuild'})
  end
end

-- Limits of the levels at values[at + 1...], flat: day, month, lifetime of each; nil where there is none.
local function limits_of(values, at, levels)
  local found = {}
  for i = 1, levels do
    local text = values[at + i]
    if text then
      local day, month, lifetime = string.match(text, '^([%d-]+) ([%d-]+) ([%d-]+)$')
      if not day then damaged() end
      found[3 * i - 2], found[3 * i - 1], found[3 * i] = limit_of(day), limit_of(month), limit_of(lifetime)
    end
  end
  return found
end

-- Adds to the balances of every level of an entry in its day, month and lifetime: everything is read and checked, then
-- written at once. With `guarded`, writes nothing and returns what is left, the level and the period when a limit would
-- be passed (I2).
local function move(entry, settled, pending, held, guarded)
  if settled == 0 and pending == 0 and held == 0 and not guarded then return end
  local day, month, lifetime = buckets_of(entry[DAY])
  local levels, names, size = {'t'}, {}, 0
  if entry[KEY] ~= '' then levels[2] = 'k:' .. entry[KEY] end
  if entry[USER] ~= '' then levels[#levels + 1] = 'u:' .. entry[USER] end
  for i = 1, #levels do
    local level = levels[i] .. ':'
    names[size + 1], names[size + 2], names[size + 3] = level .. day, level .. month, level .. lifetime
    size = size + 3
  end
  local at = size + #levels
  if guarded then
    for i = 1, #levels do names[size + i] = levels[i] .. ':limit' end
    names[at + 1], names[at + 2] = 'ratio', 'about'
  end
  local values = redis.call('HMGET', balances, unpack(names))
  local limits = guarded and limits_of(values, size, #levels)
  local left, tightest, write = EXACT, 3, {}
  for i = 1, size do
    local s, p, u = balance(values[i])
    if guarded then
      -- without a limit too: what is held stays a number that Lua can add to, whatever moves from pending to unconfirmed
      local limit = limits[i]
      local rest = (limit and limit - tonumber(s) or EXACT) - p - u
      if rest < left then left, tightest = rest, i end
    end
    -- nothing held never goes below 0: a hash that was deleted must not turn into headroom
    p, u = p + pending, u + held
    if settled ~= 0 then s = add(s, settled) end
    write[2 * i - 1] = names[i]
    write[2 * i] = string.format('%s %.0f %.0f', s, p > 0 and p or 0, u > 0 and u or 0)
  end
  if guarded and not values[at + 2] or not values[3] then begin(guarded) end
  if guarded then
    ratio = tonumber(values[at + 1])
    if not (ratio and ratio >= 0 and ratio <= 1e9) then ratio = 1000000 end -- not learned yet, or damaged: it is advice
    if pending > 0 and pending > left then
      return left > 0 and left or 0, levels[math.ceil(tightest / 3)], PERIODS[(tightest - 1) % 3 + 1]
    end
    if pending == 0 then return end
  end
  redis.call('HSET', balances, unpack(write))
end

-- One line of the journal; returns its id.
local function line(op, id, entry, number, settled, pending, held, ...)
  return redis.call('XADD', journal, '*', 'r', id, 'l',
    cmsgpack.pack({op, number, entry[DAY], entry[KEY], entry[USER], settled, pending, held, ...}))
end
