-- Put in front of reserve, settle and void by scripts.py: token buckets of a minute and velocity counters. Advice, not
-- money: fractions are welcome.
--
-- KEYS[5] rates  hash  t and k:<key id> -> {requests left, tokens left, at (ms), minute, its requests, hour, its requests}
--                      (msgpack)
local rates = KEYS[5]
local REQUESTS, TOKENS, AT, MINUTE, IN_MINUTE, HOUR, IN_HOUR = 1, 2, 3, 4, 5, 6, 7
local precise = time[1] * 1000 + time[2] / 1000 -- ms with their fraction: at 100 a second one takes 10

-- What is in a bucket of `limit` a minute by now; one without a limit is bottomless, and full when it gets one.
local function refill(level, limit, since)
  if limit == 0 then return math.huge end
  return math.min(limit, level + math.max(0, precise - since) * limit / 60000)
end

-- A scope's buckets as of now; full ones when it is new. A limit of 0 is none.
local function scope(raw, requests, tokens)
  local s = raw and cmsgpack.unpack(raw) or {requests, tokens, precise, 0, 0, 0, 0}
  s[REQUESTS], s[TOKENS] = refill(s[REQUESTS], requests, s[AT]), refill(s[TOKENS], tokens, s[AT])
  s[AT] = precise
  return s
end

-- Ms until `need` is in a bucket: 0 when it is, -1 when it never will be.
local function wait(level, need, limit)
  if limit == 0 or level >= need then return 0 end
  if need > limit then return -1 end
  return math.max(1, math.ceil((need - level) * 60000 / limit))
end

-- The buckets of a tenant and a key as of now, and a refusal when one has not enough: the one it waits longest for.
local function look(key, needs, limits)
  local stored = redis.call('HMGET', rates, 't', 'k:' .. key)
  local found = {scope(stored[1], limits[1], limits[2]), scope(stored[2], limits[3], limits[4])}
  local longest, refusal = 0, nil
  for i, level in ipairs({'t', 'k:' .. key}) do
    for kind, name in ipairs({'requests', 'tokens'}) do
      local ms = wait(found[i][kind], needs[kind], limits[2 * i - 2 + kind])
      if ms < 0 then return found, {'limited', -1, level, name} end
      if ms > longest then longest, refusal = ms, {'limited', ms, level, name} end
    end
  end
  return found, refusal
end

-- Appends {limit, left, full in ms} of the tighter bucket of requests, then of tokens (limit 0: none), to a reply.
local function show(found, limits, reply)
  local own, size = found[2], #reply
  for kind = 1, 2 do
    local scarce, most = own, limits[2 + kind]
    if limits[kind] > 0 and (most == 0 or found[1][kind] < own[kind]) then scarce, most = found[1], limits[kind] end
    local at = size + 3 * kind - 3
    reply[at + 1], reply[at + 2], reply[at + 3] = most, 0, 0
    if most > 0 then
      reply[at + 2] = math.max(0, math.floor(scarce[kind]))
      reply[at + 3] = math.max(0, math.ceil((most - scarce[kind]) * 60000 / most))
    end
  end
  return reply
end

-- Takes what a request needs, counts it, and appends what `show` does and the requests of the key in this minute and
-- hour to a reply.
local function take(key, found, needs, limits, reply)
  local own = found[2]
  for _, s in ipairs(found) do s[REQUESTS], s[TOKENS] = s[REQUESTS] - 1, s[TOKENS] - needs[2] end
  local minute, hour = math.floor(now / 60000), math.floor(now / 3600000)
  if own[MINUTE] ~= minute then own[MINUTE], own[IN_MINUTE] = minute, 0 end
  if own[HOUR] ~= hour then own[HOUR], own[IN_HOUR] = hour, 0 end
  own[IN_MINUTE], own[IN_HOUR] = own[IN_MINUTE] + 1, own[IN_HOUR] + 1
  redis.call('HSET', rates, 't', cmsgpack.pack(found[1]), 'k:' .. key, cmsgpack.pack(own))
  show(found, limits, reply)
  reply[#reply + 1], reply[#reply + 2] = own[IN_MINUTE], own[IN_HOUR]
  return reply
end

-- Tokens taken at the reserve and not used go back; those used beyond are owed.
local function give_back(entry, used)
  if entry[RATED] < 0 then return end
  local names = {'t', 'k:' .. entry[KEY]}
  for i, raw in ipairs(redis.call('HMGET', rates, unpack(names))) do
    if raw then
      local s = cmsgpack.unpack(raw)
      s[TOKENS] = s[TOKENS] + entry[RATED] - used
      redis.call('HSET', rates, names[i], cmsgpack.pack(s))
    end
  end
  entry[RATED] = 0
end
