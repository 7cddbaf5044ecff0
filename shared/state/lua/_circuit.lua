-- Put in front of circuit.lua by scripts.py: the rule of core/circuit.py, line by line, in its words. circuit.lua fills
-- the names declared here.

local SLOT_MS, SLOTS, MAX_PROBES, MAX_DOUBLINGS = 5000, 12, 8, 4
local threshold, cooldown, probe_ms, rate, least, not_after, now, slot
local failures, open_until, openings, probes, probe_until, window
local moved, claimed = 0, 0
local calls, bad -- sums of the window, once this run has looked at it: a batch may be thousands of outcomes

local function state()
  if open_until == 0 then return 'closed' end
  if now < open_until then return 'open' end
  if now < probe_until then return 'probing' end
  return 'half_open'
end

local function set(in_a_row, opened, till)
  failures, openings, open_until, probes, probe_until, window, moved = in_a_row, opened, till, {}, 0, {}, 1
  calls = nil
end

-- Slots that have left the window go, the current one is there.
local function look_at_window()
  local kept = {}
  calls, bad = 0, 0
  for _, each in ipairs(window) do
    if slot - SLOTS < each[1] and each[1] <= slot then
      kept[#kept + 1] = each
      calls, bad = calls + each[2], bad + each[3]
    end
  end
  if #kept == 0 or kept[#kept][1] ~= slot then kept[#kept + 1] = {slot, 0, 0} end
  window = kept
end

local function count(failed)
  if not calls then look_at_window() end
  local last = window[#window]
  last[2], last[3] = last[2] + 1, last[3] + failed
  calls, bad = calls + 1, bad + failed
  failures = failed == 1 and failures + 1 or 0
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
