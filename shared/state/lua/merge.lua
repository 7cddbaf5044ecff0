#!lua
-- merge(args=['', grace, tombstone, unconfirmed, last, snapshot, field, value...], keys=[balances, entries, leases, journal, rates])
--
-- Redis lost a tenant with all it had, and may have gone on since with nothing: adds what a snapshot of the second copy
-- had settled to what is there, and sets its limits in each period of a level that has none. The caller has left out
-- what was pending and added what was unconfirmed, for their entries are lost; `snapshot` is the id of the line that it
-- was in the lost journal. Once: the caller looks for the line that this writes. Keys and their types: _balances.lua.
-- Returns {'merged', id of the journal's line} | {'moved'}: the journal's newest line is not `last` | {'lost'}: the
-- balances alone are gone, see restore.lua
local last, snapshot = ARGV[5], ARGV[6]
local newest_line = redis.call('XREVRANGE', journal, '+', '-', 'COUNT', 1)[1]
if (newest_line and newest_line[1] or '') ~= last then return {'moved'} end
if newest_line and redis.call('HEXISTS', balances, 'about') == 0 then return {'lost'} end
begin(false)
local fields, users = {}, 0
for i = 7, #ARGV, 2 do
  local field, value = ARGV[i], ARGV[i + 1]
  fields[i - 6], fields[i - 5] = field, value
  if string.sub(field, -6) == ':limit' then
    local limits = {string.match(value, '^([%d-]+) ([%d-]+) ([%d-]+)$')}
    local stand = {string.match(redis.call('HGET', balances, field) or '- - -', '^([%d-]+) ([%d-]+) ([%d-]+)$')}
    if #limits ~= 3 or #stand ~= 3 then damaged() end
    for period = 1, 3 do
      if stand[period] == '-' then stand[period] = limits[period] end
    end
    local new = redis.call('HSET', balances, field, table.concat(stand, ' '))
    if string.sub(field, 1, 2) == 'u:' then users = users + new end
  else
    local settled, pending, held = balance(redis.call('HGET', balances, field))
    local more = balance(value)
    if string.sub(more, 1, 1) == '-' then
      settled = add(settled, tonumber(more))
    else -- dollars and nano-USD apart, as `add` has them
      settled = add(add(settled, (tonumber(string.sub(more, 1, -10)) or 0) * 1e9), tonumber(string.sub(more, -9)))
    end
    redis.call('HSET', balances, field, string.format('%s %.0f %.0f', settled, pending, held))
  end
end
if users > 0 then redis.call('HINCRBY', balances, 'users', users) end
return {'merged', line('restore', '', {'', 0, 0, 0, today, 0, '', '', -1}, 0, 0, 0, 0, snapshot, fields)}
