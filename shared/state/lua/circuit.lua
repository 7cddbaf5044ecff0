#!lua flags=allow-oom
-- circuit(args=[endpoint, events, threshold, cooldown, probe_ms, rate, least, keep, not_after, probe ids...],
--         keys=[circuits])
--
-- What happened at one endpoint, oldest first, one character each: an ordinary call ended '+' well or '-' badly;
-- 'C' somebody claims the probe; a probe ended 'P' well, 'F' badly, 'V' without a verdict. Each of C P F V takes the
-- next of the probe ids. The rule stands in _circuit.lua. A claim that runs after `not_after` (server ms; 0 = none) is
-- refused: nobody waits for it any more.
-- KEYS[1] circuits  hash, dropped `keep` ms after the last event:
--   version               counts changes that other processes should see
--   <endpoint>:failures   in a row
--   <endpoint>:until      server ms; 0 = closed
--   <endpoint>:openings   in a row, without a good probe between
--   <endpoint>:probes     ids without a verdict, the newest last, separated by blanks
--   <endpoint>:probing    server ms until which the newest probe keeps others out
--   <endpoint>:window     slot:calls:failures of the last 12 slots of 5 s, separated by blanks
-- Returns {moved (1: others should see it), claimed (1: the last claim is the probe), now, and the fields above from
-- failures on, as strings}
local circuits, endpoint, events, keep, next_probe = KEYS[1], ARGV[1], ARGV[2], ARGV[8], 10
threshold, cooldown, probe_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
rate, least, not_after = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[9])
local time = redis.call('TIME')
now = time[1] * 1000 + math.floor(time[2] / 1000)
slot = math.floor(now / SLOT_MS)

local names = {}
for i, name in ipairs({'failures', 'until', 'openings', 'probes', 'probing', 'window'}) do
  names[i] = endpoint .. ':' .. name
end
local stored = redis.call('HMGET', circuits, unpack(names))
failures, open_until, openings = tonumber(stored[1] or 0), tonumber(stored[2] or 0), tonumber(stored[3] or 0)
probes, probe_until, window = {}, tonumber(stored[5] or 0), {}
for id in string.gmatch(stored[4] or '', '%S+') do probes[#probes + 1] = id end
for number, calls, failed in string.gmatch(stored[6] or '', '(%d+):(%d+):(%d+)') do
  window[#window + 1] = {tonumber(number), tonumber(calls), tonumber(failed)}
end

for i = 1, #events do
  local event = string.sub(events, i, i)
  if event == '+' or event == '-' then
    if state() == 'closed' then count(event == '-' and 1 or 0) end
  else
    if event == 'C' then claim(ARGV[next_probe]) else verdict(event, ARGV[next_probe]) end
    next_probe = next_probe + 1
  end
end

local whole, values, fields = function(number) return string.format('%.0f', number) end, {}, {}
for i, each in ipairs(window) do window[i] = whole(each[1]) .. ':' .. whole(each[2]) .. ':' .. whole(each[3]) end
values = {whole(failures), whole(open_until), whole(openings), table.concat(probes, ' '), whole(probe_until),
  table.concat(window, ' ')}
for i = 1, #names do fields[2 * i - 1], fields[2 * i] = names[i], values[i] end
redis.call('HSET', circuits, unpack(fields))
redis.call('PEXPIRE', circuits, keep)
if moved == 1 then redis.call('HINCRBY', circuits, 'version', 1) end
return {moved, claimed, now, unpack(values)}
