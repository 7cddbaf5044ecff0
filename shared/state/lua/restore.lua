#!lua
-- restore(args=['', grace, tombstone, unconfirmed, field, value...], keys=[balances, entries, leases, journal, rates])
--
-- Puts the balances of a snapshot back where there are none: Redis lost them with its host. The caller has left out what
-- was pending, and posted what was unconfirmed: their entries are lost too. Keys and their types: _balances.lua.
-- Returns {'restored', id of the journal's snapshot line} | {'kept'}: there are balances
if redis.call('EXISTS', balances) == 1 then return {'kept'} end
for i = 5, #ARGV, 1000 do
  local fields = {unpack(ARGV, i, math.min(i + 999, #ARGV))}
  redis.call('HSET', balances, unpack(fields))
end
local snap = line('snap', '', {'', 0, 0, 0, today, 0, '', '', -1}, 0, 0, 0, 0, redis.call('HGETALL', balances))
redis.call('HSET', balances, 'snap', snap .. ' ' .. string.format('%.0f', redis.call('XLEN', journal)))
return {'restored', snap}
