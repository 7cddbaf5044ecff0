#!lua flags=allow-oom
-- expire(args=['', grace, tombstone, unconfirmed, keep_days, keep_months], keys=[balances, entries, leases])
--
-- Sweeps up to 16 due entries and, once a day, drops the balances of days and months nobody asks for any more.
-- Keys and their types: _balances.lua.
-- Returns how many entries were due.
local keep_days, keep_months = tonumber(ARGV[5]), tonumber(ARGV[6])
local swept = sweep()

local stamp = string.format('%.0f', today)
if redis.call('HGET', balances, 'pruned') ~= stamp then
  local year, month, date = civil(today - keep_days)
  local first_day = string.format('%04d-%02d-%02d', year, month, date)
  year, month = civil(today)
  local index = year * 12 + month - 1 - keep_months
  local first_month = string.format('%04d-%02d', math.floor(index / 12), index % 12 + 1)
  local old, names = {}, redis.call('HKEYS', balances)
  for _, name in ipairs(names) do
    local bucket = string.match(name, ':([%d-]+):[spu]$')
    if bucket and bucket < (#bucket == 10 and first_day or first_month) then old[#old + 1] = name end
  end
  for i = 1, #old, 1000 do redis.call('HDEL', balances, unpack(old, i, math.min(i + 999, #old))) end
  if #names > 0 then redis.call('HSET', balances, 'pruned', stamp) end
end
return swept
