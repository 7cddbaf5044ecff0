#!lua
-- restore(args=['', grace, tombstone, unconfirmed, last, field, value...], keys=[balances, entries, leases, journal, rates])
--
-- Puts balances back that were lost: those of a replayed journal, whose newest line was `last`; or, where the journal is
-- gone too (`last` ''), of a snapshot of the second copy: the caller has then left out what was pending, and posted what
-- was unconfirmed, for their entries are lost as well. What settlements wrote since the loss is in the journal.
-- Keys and their types: _balances.lua.
-- Returns {'restored', id of the journal's snapshot line} | {'kept'}: nothing is lost | {'moved'}: `last` is not the newest
local last = ARGV[5]
if redis.call('HEXISTS', balances, 'about') == 1 then return {'kept'} end
local newest_line = redis.call('XREVRANGE', journal, '+', '-', 'COUNT', 1)[1]
if (newest_line and newest_line[1] or '') ~= last then return {'moved'} end
redis.call('DEL', balances)
for i = 6, #ARGV, 1000 do
  local fields = {unpack(ARGV, i, math.min(i + 999, #ARGV))}
  redis.call('HSET', balances, unpack(fields))
end
redis.call('HSET', balances, 'about', string.rep('balances in nano-USD; ', 3))
local snap = line('snap', '', {'', 0, 0, 0, today, 0, '', '', -1}, 0, 0, 0, 0, redis.call('HGETALL', balances))
local at = snap .. ' ' .. string.format('%.0f', redis.call('XLEN', journal))
redis.call('HSET', balances, 'snap', at .. ' ' .. at) -- see expire.lua
return {'restored', snap}
