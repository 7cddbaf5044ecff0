#!lua
-- learn(args=[packed], keys=[balances, costs, seen, late])
--
-- What one usage batch says of one tenant: its output/input ratio (S2-10), what each model cost (S1-H2), and the spend
-- tiers and daily limits it crosses (S1-M1). A batch that comes again counts once, and so does a late record.
-- ARGV[1] msgpack {bit: number of the batch in its page, ttl: ms for which repetitions are known, batch: its name,
--         samples: {{id, input estimate, output tokens}...} in order, models: {{date, model, id, requests, cost, input
--         tokens, output tokens}...}, tiers, limits: nano-USD, ascending, most: models at most, days: days kept};
--         id: of a late record, which may stand in several batches, else ''
-- KEYS[1] balances  hash    field ratio -> the ratio x 1,000,000
-- KEYS[2] costs     hash    total -> msgpack {requests, cost, input, output}; models -> msgpack {model: the same}
--                           d:<date> -> msgpack {total, {model: the same}}, models beyond the bound under "*";
--                           since -> ms; a:<alert> -> "<ms> <batch>": when it was crossed, and by which batch
-- KEYS[3] seen      string  a bit for each batch of one page of one process
-- KEYS[4] late      zset    id of a late record -> ms when it was counted
-- Returns {first time (1|0), {alert, amount, spend}...}: the alerts that this batch crossed, told again if it comes again
local given = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function read(field)
  local raw = redis.call('HGET', KEYS[2], field)
  return raw and cmsgpack.unpack(raw)
end

local function add(to, from)
  to = to or {0, 0, 0, 0}
  for i = 1, 4 do to[i] = to[i] + from[i] end
  return to
end

-- The name of one alert, if it was crossed: now, or by this very batch before.
local told = {}
local function check(name, amount, spend, crossed)
  local field = 'a:' .. name
  local before = redis.call('HGET', KEYS[2], field)
  if not before and crossed then
    before = now .. ' ' .. given.batch
    redis.call('HSET', KEYS[2], field, before)
  end
  if before and string.match(before, ' (.*)$') == given.batch then
    told[#told + 1] = {name, string.format('%.0f', amount), string.format('%.0f', spend)}
  end
end

local first = redis.call('SETBIT', KEYS[3], given.bit, 1) == 0
redis.call('PEXPIRE', KEYS[3], given.ttl)
local total, models, dates = read('total'), read('models') or {}, {}
local known = total

-- Whether this batch, or this late record, is counted now.
local fresh, late = {['']=first}, false
local function counts(id)
  if fresh[id] == nil then fresh[id], late = redis.call('ZADD', KEYS[4], 'NX', now, id) == 1, true end
  return fresh[id]
end

local ratio
for _, sample in ipairs(given.samples) do
  if counts(sample[1]) then
    ratio = ratio or tonumber(redis.call('HGET', KEYS[1], 'ratio') or 1000000)
    ratio = ratio + 0.1 * (math.min(sample[3] / sample[2], 1000) * 1000000 - ratio)
  end
end
if ratio and redis.call('HEXISTS', KEYS[1], 'about') == 1 then -- lost balances stay lost
  redis.call('HSET', KEYS[1], 'ratio', string.format('%.0f', ratio))
end

local count, changed = 0, false
for _ in pairs(models) do count = count + 1 end
for _, row in ipairs(given.models) do
  local date, model, spent = row[1], row[2], {row[4], row[5], row[6], row[7]}
  local day = dates[date] or read('d:' .. date)
  if counts(row[3]) then
    changed = true
    day = day or {{0, 0, 0, 0}, {}}
    total = add(total, spent)
    if not models[model] then
      if count >= given.most then -- the one with the fewest requests makes room, before
        local least
        for name, each in pairs(models) do
          if not least or each[1] < models[least][1] or each[1] == models[least][1] and name < least then least = name end
        end
        models[least], count = nil, count - 1
      end
      count = count + 1
    end
    models[model] = add(models[model], spent)
    local name, kept = model, 0
    if not day[2][model] then
      for _ in pairs(day[2]) do kept = kept + 1 end
      if kept >= given.most then name = '*' end
    end
    day[1], day[2][name] = add(day[1], spent), add(day[2][name], spent)
  end
  dates[date] = day
end

if changed then
  if not known then redis.call('HSET', KEYS[2], 'since', now) end
  local write, new = {'total', cmsgpack.pack(total), 'models', cmsgpack.pack(models)}, false
  for date, day in pairs(dates) do
    new = new or redis.call('HEXISTS', KEYS[2], 'd:' .. date) == 0
    write[#write + 1], write[#write + 2] = 'd:' .. date, cmsgpack.pack(day)
  end
  redis.call('HSET', KEYS[2], unpack(write))
  if new then
    local kept, old = {}, {}
    for _, name in ipairs(redis.call('HKEYS', KEYS[2])) do
      local date = string.match(name, '^d:(.*)$')
      if date then kept[#kept + 1] = date end
    end
    table.sort(kept)
    for i = 1, #kept - given.days do
      old[#old + 1], dates[kept[i]] = 'd:' .. kept[i], nil
      for _, limit in ipairs(given.limits) do
        old[#old + 1] = 'a:' .. kept[i] .. ':' .. string.format('%.0f', limit)
      end
    end
    if #old > 0 then redis.call('HDEL', KEYS[2], unpack(old)) end
  end
end

if late then
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', tonumber(now) - given.ttl)
  redis.call('PEXPIRE', KEYS[4], given.ttl)
end

if total then
  for _, tier in ipairs(given.tiers) do
    check('lifetime:' .. string.format('%.0f', tier), tier, total[2], total[2] >= tier)
  end
end
for date, day in pairs(dates) do
  for _, limit in ipairs(given.limits) do
    check(date .. ':' .. string.format('%.0f', limit), limit, day[1][2], day[1][2] > limit)
  end
end
return {first and 1 or 0, unpack(told)}
