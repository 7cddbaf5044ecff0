#!lua flags=allow-oom
-- expire(args=['', grace, tombstone, unconfirmed, keep_days, keep_months, keep_user_days, lines, snapshot_ms, renew_ms],
--        keys=[balances, entries, leases, journal, rates])
--
-- Sweeps up to 16 due entries; once a day drops the balances of days and months nobody asks for any more; and writes
-- snapshots to the journal, all fields of the balances: a mark when it grew by `lines` since the last one, which drops
-- what lies before that last one, never more (a replay begins with a snapshot; between one and two times `lines` are
-- kept); and in between, in the place of the one before that is no mark: when it grew at all within `snapshot_ms`, and
-- after `renew_ms` in any case, since the copy of a snapshot in JetStream has its age too.
-- Keys and their types: _balances.lua; field snap: "<id of the newest snapshot> <length of the journal then> <the same
-- two of the newest mark>".
-- Returns {how many entries were due, id of the snapshot written or ''}
local keep_days, keep_months, keep_user_days = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local lines, snapshot_ms, renew_ms = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local nobody = {'', 0, 0, 0, today, 0, '', '', -1}
local swept = sweep()
-- lost balances stay lost: a snapshot of what was written since would take the place of what the journal adds up to
if redis.call('HEXISTS', balances, 'about') == 0 then return {swept, ''} end

local stamp = string.format('%.0f', today)
if redis.call('HGET', balances, 'pruned') ~= stamp then
  local day, _ = buckets_of(today - keep_days)
  local user_day, user_month = buckets_of(today - keep_user_days)
  local year, month = civil(today)
  local index = year * 12 + month - 1 - keep_months
  month = string.format('%04d-%02d', math.floor(index / 12), index % 12 + 1)
  local old, fields = {}, redis.call('HGETALL', balances)
  for i = 1, #fields, 2 do
    local level, bucket = string.match(fields[i], '^([tku]).*:([%d-]+)$')
    local oldest = bucket and (#bucket == 10 and (level == 'u' and user_day or day) or level == 'u' and user_month or month)
    -- one that still holds something stays: nobody swept for days
    if bucket and bucket < oldest and string.find(fields[i + 1], ' 0 0$') then old[#old + 1] = fields[i] end
  end
  for i = 1, #old, 1000 do redis.call('HDEL', balances, unpack(old, i, math.min(i + 999, #old))) end
  if #old > 0 then line('prune', '', nobody, 0, 0, 0, 0, day, month, user_day, user_month) end
  redis.call('HSET', balances, 'pruned', stamp)
end

local length = redis.call('XLEN', journal)
if length == 0 then return {swept, ''} end
local id, size, mark, marked = string.match(redis.call('HGET', balances, 'snap') or '', '^(%d+%-%d+) (%d+) (%d+%-%d+) (%d+)$')
if not id then id, size, mark, marked = '0-0', 0, '0-0', 0 end
local full = length - tonumber(marked) >= lines
local age = now - tonumber(string.match(id, '^%d+'))
local late = age >= renew_ms or (age >= snapshot_ms and length > tonumber(size))
if not full and not late then return {swept, ''} end
if full and mark ~= '0-0' then redis.call('XTRIM', journal, 'MINID', mark) end
if id ~= mark then redis.call('XDEL', journal, id) end
local snap = line('snap', '', nobody, 0, 0, 0, 0, redis.call('HGETALL', balances))
length = string.format('%.0f', redis.call('XLEN', journal))
if full then mark, marked = snap, length end
redis.call('HSET', balances, 'snap', table.concat({snap, length, mark, marked}, ' '))
return {swept, snap}
