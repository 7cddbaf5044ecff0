#!lua flags=allow-oom
-- expire(args=['', grace, tombstone, unconfirmed, keep_days, keep_months, keep_user_days, lines, snapshot_ms],
--        keys=[balances, entries, leases, journal, rates])
--
-- Sweeps up to 16 due entries; once a day drops the balances of days and months nobody asks for any more; and when the
-- journal grew by `lines` since its last snapshot, or at all within `snapshot_ms`, writes the next one: all fields of the
-- balances. What lies before the snapshot before that is dropped, never more: a replay begins with a snapshot.
-- Keys and their types: _balances.lua; field snap: "<id of the newest snapshot> <length of the journal then>".
-- Returns {how many entries were due, id of the snapshot written or ''}
local keep_days, keep_months, keep_user_days = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local lines, snapshot_ms = tonumber(ARGV[8]), tonumber(ARGV[9])
local nobody = {'', 0, 0, 0, today, 0, '', '', -1}
local swept = sweep()

local stamp = string.format('%.0f', today)
if redis.call('HGET', balances, 'pruned') ~= stamp then
  local day, _ = buckets_of(today - keep_days)
  local user_day, user_month = buckets_of(today - keep_user_days)
  local year, month = civil(today)
  local index = year * 12 + month - 1 - keep_months
  month = string.format('%04d-%02d', math.floor(index / 12), index % 12 + 1)
  local old, names = {}, redis.call('HKEYS', balances)
  for _, name in ipairs(names) do
    local level, bucket = string.match(name, '^([tku]).*:([%d-]+)$')
    if bucket and bucket < (#bucket == 10 and (level == 'u' and user_day or day) or level == 'u' and user_month or month) then
      old[#old + 1] = name
    end
  end
  for i = 1, #old, 1000 do redis.call('HDEL', balances, unpack(old, i, math.min(i + 999, #old))) end
  if #old > 0 then line('prune', '', nobody, 0, 0, 0, 0, day, month, user_day, user_month) end
  if #names > 0 then redis.call('HSET', balances, 'pruned', stamp) end
end

local length = redis.call('XLEN', journal)
if length == 0 then return {swept, ''} end
local id, before = string.match(redis.call('HGET', balances, 'snap') or '0-0 0', '^(%d+%-%d+) (%d+)$')
local grown = length - tonumber(before)
local late = grown > 0 and now - tonumber(string.match(id, '^%d+')) >= snapshot_ms
if grown < lines and not late then return {swept, ''} end
if id ~= '0-0' then redis.call('XTRIM', journal, 'MINID', id) end
local snap = line('snap', '', nobody, 0, 0, 0, 0, redis.call('HGETALL', balances))
redis.call('HSET', balances, 'snap', snap .. ' ' .. string.format('%.0f', redis.call('XLEN', journal)))
return {swept, snap}
