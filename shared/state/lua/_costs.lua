-- Put in front of learn.lua by scripts.py: the cost tracker's parts. Keys and arguments: learn.lua.
local balances, costs, seen, lates = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local given = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function read(field)
  local raw = redis.call('HGET', costs, field)
  return raw and cmsgpack.unpack(raw)
end

local function add(to, from)
  to = to or {0, 0, 0, 0}
  for i = 1, 4 do to[i] = to[i] + from[i] end
  return to
end

local function size(map)
  local count = 0
  for _ in pairs(map) do count = count + 1 end
  return count
end

-- Whether the batch comes for the first time. Pages that were not written for so long are dropped when one begins.
local function unseen()
  local raw = redis.call('HGET', seen, given.page)
  local bits, at, mask = raw and string.sub(raw, 14) or '', math.floor(given.bit / 8), 2 ^ (given.bit % 8)
  if not raw then
    local pages, oldest = redis.call('HGETALL', seen), tonumber(now) - given.ttl
    for i = 1, #pages, 2 do
      if tonumber(string.sub(pages[i + 1], 1, 13)) < oldest then redis.call('HDEL', seen, pages[i]) end
    end
  end
  bits = bits .. string.rep('\0', at + 1 - #bits)
  local byte = string.byte(bits, at + 1)
  local new = math.floor(byte / mask) % 2 == 0
  if new then bits = string.sub(bits, 1, at) .. string.char(byte + mask) .. string.sub(bits, at + 2) end
  redis.call('HSET', seen, given.page, now .. bits)
  redis.call('PEXPIRE', seen, given.ttl)
  return new
end

-- Whether this batch, or this late record, is counted now.
local first = unseen()
local fresh, late = {['']=first}, false
local function counts(id)
  if fresh[id] == nil then fresh[id], late = redis.call('ZADD', lates, 'NX', now, id) == 1, true end
  return fresh[id]
end

-- Adds to a model; of as many as may be kept, the one with the fewest requests makes room before (S1-H2a).
local function add_model(models, model, spent)
  if not models[model] and size(models) >= given.most then
    local least
    for name, each in pairs(models) do
      if not least or each[1] < models[least][1] or each[1] == models[least][1] and name < least then least = name end
    end
    models[least] = nil
  end
  models[model] = add(models[model], spent)
end

-- Adds to a model's part of a day; those beyond the bound share one.
local function add_day(day, model, spent)
  local name = (day[2][model] or size(day[2]) < given.most) and model or '*'
  day[1], day[2][name] = add(day[1], spent), add(day[2][name], spent)
end

-- Drops all but the newest days, with their alerts.
local function drop_days(dates)
  local kept, old = {}, {}
  for _, name in ipairs(redis.call('HKEYS', costs)) do
    local date = string.match(name, '^d:(.*)$')
    if date then kept[#kept + 1] = date end
  end
  table.sort(kept)
  for i = 1, #kept - given.days do
    old[#old + 1], dates[kept[i]] = 'd:' .. kept[i], nil
    for _, limit in ipairs(given.limits) do old[#old + 1] = 'a:' .. kept[i] .. ':' .. string.format('%.0f', limit) end
  end
  if #old > 0 then redis.call('HDEL', costs, unpack(old)) end
end

-- The name of one alert, if it was crossed: now, or by this very batch before.
local told = {}
local function check(name, amount, spend, crossed)
  name = name .. ':' .. string.format('%.0f', amount)
  local field = 'a:' .. name
  local before = redis.call('HGET', costs, field)
  if not before and crossed then
    before = now .. ' ' .. given.batch
    redis.call('HSET', costs, field, before)
  end
  if before and string.match(before, ' (.*)$') == given.batch then
    told[#told + 1] = {name, string.format('%.0f', amount), string.format('%.0f', spend)}
  end
end
