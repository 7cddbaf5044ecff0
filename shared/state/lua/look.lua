#!lua flags=no-writes
-- look(args=[after, lines, overdue, rid...], keys=[balances, entries, leases, journal, rates])
--
-- What the books say at one moment, for `hotpath ledger verify` (state/audit.py): the lines behind the id `after`, at most
-- `lines`; the balances, when these are all there are; the entries of these lines' requests and of each `rid`; and leases
-- due more than `overdue` ms ago, at most 100. Keys and their types: _balances.lua.
-- Returns {server ms, {{id, {field, value...}}...}, {field, value...}, {rid, entry or false...}, {rid, due...}}
local after, count, overdue = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local start = after == '' and '-' or '(' .. after
local lines = redis.call('XRANGE', KEYS[4], start, '+', 'COUNT', count)
local balances = #lines < count and redis.call('HGETALL', KEYS[1]) or {}

local seen, entries, n = {}, {}, 0
local function tell(rid)
  if rid == '' or seen[rid] then return end
  seen[rid] = true
  entries[n + 1], entries[n + 2] = rid, redis.call('HGET', KEYS[2], rid)
  n = n + 2
end
for i = 4, #ARGV do tell(ARGV[i]) end
for _, line in ipairs(lines) do tell(line[2][2]) end

local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now - overdue), 'WITHSCORES', 'LIMIT', 0, 100)
return {now, lines, balances, entries, due}
