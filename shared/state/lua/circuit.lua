#!lua flags=allow-oom
-- circuit(args=[endpoint, outcomes, threshold, cooldown, keep], keys=[circuits])
--
-- Counts failures in a row of one endpoint over all processes. `outcomes` is ended calls, oldest first, '1' good and
-- '0' failed; `threshold` failures in a row open the circuit for `cooldown` ms; after that calls pass again until the
-- next failure opens it again. While it is open nothing counts: those calls began before it opened.
-- KEYS[1] circuits  hash  <endpoint>:failures -> in a row; <endpoint>:until -> server ms, 0 closed; version -> changes.
--                         Dropped `keep` ms after the last outcome.
-- Returns {changed (1 or 0), until}
local circuits, endpoint, outcomes = KEYS[1], ARGV[1], ARGV[2]
local threshold, cooldown, keep = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local stored = redis.call('HMGET', circuits, endpoint .. ':failures', endpoint .. ':until')
local failures, open_until = tonumber(stored[1] or 0), tonumber(stored[2] or 0)
local changed = 0
for i = 1, #outcomes do
  if now < open_until then break end
  if string.sub(outcomes, i, i) == '1' then
    if open_until > 0 then changed = 1 end
    failures, open_until = 0, 0
  else
    failures = failures + 1
    if failures >= threshold then open_until, changed = now + cooldown, 1 end
  end
end

redis.call('HSET', circuits, endpoint .. ':failures', string.format('%.0f', failures),
  endpoint .. ':until', string.format('%.0f', open_until))
redis.call('PEXPIRE', circuits, keep)
if changed == 1 then redis.call('HINCRBY', circuits, 'version', 1) end
return {changed, open_until}
