#!lua flags=allow-oom
-- settle(args=[rid, grace, tombstone, unconfirmed, call, cost, estimated, key, user, day, tokens],
--        keys=[balances, entries, leases, journal, rates])
--
-- Posts what a call really used, in full, whatever was held for it and in the period of its reserve; runs when Redis
-- is out of memory. `key`, `user` and `day` (0 = today) are charged when no entry is known, `tokens` put the rate limits
-- right. Keys and their types: _balances.lua.
-- Returns {'settled' | 'overrun' (more than was held) | 'late' (was unconfirmed, posted at its bound, or voided) |
--          'opened' (the entry or the call was not known: posted as its own) | 'duplicate', id of the journal's line}
local number, cost, estimated = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local key, user, day, tokens = ARGV[8], ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11])

local status = 'settled'
local entry = load()
if not entry then
  begin(false)
  entry, status = {'D', 0, 0, 0, day > 0 and day or today, 0, key, user, -1}, 'opened'
end
if entry[KEY] == '' then entry[KEY], entry[USER] = key, user end -- voided before it was ever reserved
local call = call_of(entry, number)
if not (call and call[CALL_STATE] == 'S') then give_back(entry, tokens) end
return post(entry, status, number, cost, estimated, false)
