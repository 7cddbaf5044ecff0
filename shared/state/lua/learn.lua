#!lua
-- learn(args=[packed], keys=[balances, costs, seen, late])
--
-- What one usage batch says of one tenant: its output/input ratio (S2-10), what each model cost (S1-H2), and the spend
-- tiers and daily limits it crosses (S1-M1). A batch that comes again counts once, and so does a late record.
-- ARGV[1] msgpack {page, bit: of the batch among those of its process, ttl: ms for which repetitions are known,
--         batch: its name, samples: {{id, input estimate, output tokens}...} in order, models: {{date, model, id, requests, cost, input
--         tokens, output tokens}...}, tiers, limits: nano-USD, ascending, most: models at most, days: days kept};
--         id: of a late record, which may stand in several batches, else ''
-- KEYS[1] balances  hash    field ratio -> the ratio x 1,000,000
-- KEYS[2] costs     hash    total -> msgpack {requests, cost, input, output}; models -> msgpack {model: the same}
--                           d:<date> -> msgpack {total, {model: the same}}, models beyond the bound under "*";
--                           since -> ms; a:<alert> -> "<ms> <batch>": when it was crossed, and by which batch
-- KEYS[3] seen      hash    <process>:<page> -> ms of the last write (13 digits), and a bit for each batch
-- KEYS[4] late      zset    id of a late record -> ms when it was counted
-- Returns {first time (1|0), {alert, amount, spend}...}: the alerts that this batch crossed, told again if it comes again
local ratio
for _, sample in ipairs(given.samples) do
  if counts(sample[1]) then
    ratio = ratio or tonumber(redis.call('HGET', balances, 'ratio'))
    if not (ratio and ratio >= 0 and ratio <= 1e9) then ratio = 1000000 end
    ratio = ratio + 0.1 * (math.min(sample[3] / sample[2], 1000) * 1000000 - ratio)
  end
end
if ratio and redis.call('HEXISTS', balances, 'about') == 1 then -- lost balances stay lost
  redis.call('HSET', balances, 'ratio', string.format('%.0f', ratio))
end

local known, models, dates, changed = read('total'), read('models') or {}, {}, false
local total = known
for _, row in ipairs(given.models) do
  local date, model, spent = row[1], row[2], {row[4], row[5], row[6], row[7]}
  dates[date] = dates[date] or read('d:' .. date)
  if counts(row[3]) then
    changed, total, dates[date] = true, add(total, spent), dates[date] or {{0, 0, 0, 0}, {}}
    add_model(models, model, spent)
    add_day(dates[date], model, spent)
  end
end

if changed then
  if not known then redis.call('HSET', costs, 'since', now) end
  local write, new = {'total', cmsgpack.pack(total), 'models', cmsgpack.pack(models)}, false
  for date, day in pairs(dates) do
    new = new or redis.call('HEXISTS', costs, 'd:' .. date) == 0
    write[#write + 1], write[#write + 2] = 'd:' .. date, cmsgpack.pack(day)
  end
  redis.call('HSET', costs, unpack(write))
  if new then drop_days(dates) end
end
if late then
  redis.call('ZREMRANGEBYSCORE', lates, '-inf', tonumber(now) - given.ttl)
  redis.call('PEXPIRE', lates, given.ttl)
end

for _, tier in ipairs(total and given.tiers or {}) do check('lifetime', tier, total[2], total[2] >= tier) end
for date, day in pairs(dates) do
  for _, limit in ipairs(given.limits) do check(date, limit, day[1][2], day[1][2] > limit) end
end
return {first and 1 or 0, unpack(told)}
