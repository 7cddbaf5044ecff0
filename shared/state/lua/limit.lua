#!lua
-- limit(args=['', grace, tombstone, unconfirmed, level, period (1 day, 2 month, 3 lifetime), limit or '-', most users],
--       keys=[balances, entries, leases, journal, rates])
--
-- Sets or clears one limit of a level. Keys and their types: _balances.lua.
-- Returns {'ok'} | {'full'}: as many users as may have a limit have one
begin(false)
local level, period, limit, most = ARGV[5], tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])
local field = level .. ':limit'
local was = redis.call('HGET', balances, field)
local limits = {string.match(was or '- - -', '^([%d-]+) ([%d-]+) ([%d-]+)$')}
if #limits ~= 3 then damaged() end
limits[period] = limit
local text = table.concat(limits, ' ')
local user = string.sub(level, 1, 2) == 'u:'
if text == '- - -' then
  if was then
    redis.call('HDEL', balances, field)
    if user then redis.call('HINCRBY', balances, 'users', -1) end
  end
else
  if user and not was then
    if tonumber(redis.call('HGET', balances, 'users') or 0) >= most then return {'full'} end
    redis.call('HINCRBY', balances, 'users', 1)
  end
  redis.call('HSET', balances, field, text)
end
line('limit', '', {'', 0, 0, 0, today, 0, '', '', -1}, 0, 0, 0, 0, level, PERIODS[period], limit == '-' and -1 or tonumber(limit))
return {'ok'}
