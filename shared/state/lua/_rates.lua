-- Put in front of reserve by scripts.py, after _rated.lua: token buckets of a minute and velocity counters. Advice, not
-- money: fractions are welcome.

local KINDS = {'requests', 'tokens'}
local BLUR = 1e-6 -- sums of fractions are off in the 13th digit: that makes nobody wait a millisecond more
local precise = time[1] * 1000 + time[2] / 1000 -- ms with their fraction: at 100 a second one takes 10

-- A scope's buckets as of now; full ones when it is new. One without a limit (0) is bottomless, and full when it gets one.
local function scope(raw, requests, tokens)
  local s = raw and remembered(raw) or {requests, tokens, precise, 0, 0, 0, 0}
  local ms = math.max(0, precise - s[AT])
  s[REQUESTS] = requests == 0 and math.huge or math.min(requests, s[REQUESTS] + ms * requests / 60000)
  s[TOKENS] = tokens == 0 and math.huge or math.min(tokens, s[TOKENS] + ms * tokens / 60000)
  s[AT] = precise
  return s
end

-- The buckets of a tenant and a key as of now, and a refusal when one has not enough: the one it waits longest for; -1
-- ms when it never will have.
local function look(key, needs, limits)
  local stored = redis.pcall('HMGET', rates, 't', 'k:' .. key)
  local found = {scope(stored[1], limits[1], limits[2]), scope(stored[2], limits[3], limits[4])}
  local longest, refusal = 0, nil
  for i = 1, 4 do
    local level, kind = i < 3 and 1 or 2, i % 2 == 1 and REQUESTS or TOKENS
    local short = needs[kind] - found[level][kind]
    if short > BLUR then
      local ms = needs[kind] > limits[i] and -1 or math.max(1, math.ceil(short * 60000 / limits[i] - BLUR))
      if ms < 0 or ms > longest then
        longest = ms
        refusal = {'limited', ms, level == 1 and 't' or 'k:' .. key, KINDS[kind]}
      end
      if ms < 0 then break end
    end
  end
  return found, refusal
end

-- Appends {limit, left, full in ms} of the tighter bucket of requests, then of tokens (limit 0: none), to a reply; of
-- the one that refuses, where one does.
local function show(found, limits, reply)
  local own, size = found[2], #reply
  for kind = 1, 2 do
    local scarce, most = own, limits[2 + kind]
    local tenants = limits[kind] > 0 and (most == 0 or found[1][kind] < own[kind])
    if reply[4] == KINDS[kind] then tenants = reply[3] == 't' end
    if tenants then scarce, most = found[1], limits[kind] end
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
  for i = 1, 2 do
    found[i][REQUESTS], found[i][TOKENS] = found[i][REQUESTS] - needs[REQUESTS], found[i][TOKENS] - needs[TOKENS]
  end
  local minute, hour = math.floor(now / 60000), math.floor(now / 3600000)
  if own[MINUTE] ~= minute then own[MINUTE], own[IN_MINUTE] = minute, 0 end
  if own[HOUR] ~= hour then own[HOUR], own[IN_HOUR] = hour, 0 end
  own[IN_MINUTE], own[IN_HOUR] = own[IN_MINUTE] + 1, own[IN_HOUR] + 1
  redis.pcall('HSET', rates, 't', cmsgpack.pack(found[1]), 'k:' .. key, cmsgpack.pack(own))
  show(found, limits, reply)
  reply[#reply + 1], reply[#reply + 2] = own[IN_MINUTE], own[IN_HOUR]
  return reply
end
