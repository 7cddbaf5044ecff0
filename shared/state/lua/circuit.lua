#!lua flags=allow-oom
-- circuit(args=[endpoint, events, threshold, cooldown, probe_ms, rate, least, keep, not_after, probe ids...],
--         keys=[circuits])
--
-- What happened at one endpoint, oldest first, one character each: an ordinary call ended '+' well or '-' badly;
-- 'C' somebody claims the probe; a probe ended 'P' well, 'F' badly, 'V' without a verdict. Each of C P F V takes the
-- next of the probe ids. The rule is core/circuit.py's table, line by line; its words are used here. A claim that runs
-- after `not_after` (server ms; 0 = none) is refused: nobody waits for it any more.
-- KEYS[1] circuits  hash, dropped `keep` ms after the last event:
--   version               counts changes that other processes should see
--   <endpoint>:failures   in a row
--   <endpoint>:until      server ms; 0 = closed
--   <endpoint>:openings   in a row, without a good probe between
--   <endpoint>:probes     ids without a verdict, the newest last, separated by blanks
--   <endpoint>:probing    server ms until which the newest probe keeps others out
--   <endpoint>:window     slot:calls:failures of the last 12 slots of 5 s, separated by blanks
-- Returns {moved (1: others should see it), claimed (1: the last claim is the probe, 0: it is not), now, and the fields
-- above from failures on, as strings}
local circuits, endpoint, events = KEYS[1], ARGV[1], ARGV[2]
local threshold, cooldown, probe_ms = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local rate, least, keep, not_after = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local next_probe = 10
local SLOT_MS, SLOTS, MAX_PROBES, MAX_DOUBLINGS = 5000, 12, 8, 4

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local slot = math.floor(now / SLOT_MS)

local names = {}
for i, name in ipairs({'failures', 'until', 'openings', 'probes', 'probing', 'window'}) do
  names[i] = endpoint .. ':' .. name
end
local stored = redis.call('HMGET', circuits, unpack(names))
local failures, open_until, openings = tonumber(stored[1] or 0), tonumber(stored[2] or 0), tonumber(stored[3] or 0)
local probes, probe_until, window = {}, tonumber(stored[5] or 0), {}
for id in string.gmatch(stored[4] or '', '%S+') do probes[#probes + 1] = id end
for number, calls, failed in string.gmatch(stored[6] or '', '(%d+):(%d+):(%d+)') do
  window[#window + 1] = {tonumber(number), tonumber(calls), tonumber(failed)}
end
local moved, claimed = 0, 0

local function state()
  if open_until == 0 then return 'closed' end
  if now < open_until then return 'open' end
  if now < probe_until then return 'probing' end
  return 'half_open'
end

local function set(in_a_row, opened, till)
  failures, openings, open_until, probes, probe_until, window, moved = in_a_row, opened, till, {}, 0, {}, 1
end

local function count(failed)
  local kept = {}
  for _, each in ipairs(window) do
    if slot - SLOTS < each[1] and each[1] <= slot then kept[#kept + 1] = each end
  end
  if #kept == 0 or kept[#kept][1] ~= slot then kept[#kept + 1] = {slot, 0, 0} end
  local last = kept[#kept]
  last[2], last[3] = last[2] + 1, last[3] + failed
  window = kept
  failures = failed == 1 and failures + 1 or 0
  local calls, bad = 0, 0
  for _, each in ipairs(window) do calls, bad = calls + each[2], bad + each[3] end
  if failures >= threshold or (calls >= least and bad * 100 >= rate * calls) then set(failures, 1, now + cooldown) end
end

local function claim(probe)
  claimed = 0
  if state() ~= 'half_open' or (not_after > 0 and now > not_after) then return end
  probes[#probes + 1] = probe
  if #probes > MAX_PROBES then table.remove(probes, 1) end
  probe_until, claimed, moved = now + probe_ms, 1, 1
end

local function verdict(event, probe)
  local at = state()
  if at == 'closed' or at == 'open' then return end
  local place
  for i, each in ipairs(probes) do
    if each == probe then place = i end
  end
  if not place then return end
  if event == 'P' then
    set(0, 0, 0)
  elseif event == 'F' then
    set(failures + 1, openings + 1, now + cooldown * 2 ^ math.min(openings, MAX_DOUBLINGS))
  else
    if place == #probes then probe_until = 0 end
    table.remove(probes, place)
    moved = 1
  end
end

for i = 1, #events do
  local event = string.sub(events, i, i)
  if event == '+' or event == '-' then
    if open_until == 0 then count(event == '-' and 1 or 0) end
  else
    local probe = ARGV[next_probe]
    next_probe = next_probe + 1
    if event == 'C' then claim(probe) else verdict(event, probe) end
  end
end

local slots = {}
for i, each in ipairs(window) do slots[i] = string.format('%.0f:%.0f:%.0f', each[1], each[2], each[3]) end
local values = {
  string.format('%.0f', failures), string.format('%.0f', open_until), string.format('%.0f', openings),
  table.concat(probes, ' '), string.format('%.0f', probe_until), table.concat(slots, ' '),
}
local fields = {}
for i = 1, #names do
  fields[2 * i - 1], fields[2 * i] = names[i], values[i]
end
redis.call('HSET', circuits, unpack(fields))
redis.call('PEXPIRE', circuits, keep)
if moved == 1 then redis.call('HINCRBY', circuits, 'version', 1) end
return {moved, claimed, now, unpack(values)}
