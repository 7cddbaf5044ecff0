-- Put in front of reserve and expire by scripts.py, after _entries.lua: what time does to entries.

-- What the passing of time does to a due entry; true when it did something.
local function lapse(id, entry)
  local changed = false
  if entry[STATE] == 'R' and entry[DEADLINE] + grace <= now then
    move(entry, 0, -entry[AMOUNT], 0)
    line('expire', id, entry, 0, 0, -entry[AMOUNT], 0)
    entry[STATE], entry[VOIDED], changed = 'V', math.max(entry[VOIDED], entry[DELIVERY]), true
  end
  for i = CALLS + 1, #entry do
    local call = entry[i]
    local amount = call[CALL_AMOUNT]
    if call[CALL_STATE] == 'D' and entry[DEADLINE] + grace <= now then
      doubt(id, entry, call)
      changed = true
    elseif call[CALL_STATE] == 'U' and call[DUE] <= now then
      move(entry, amount, 0, -amount)
      line('post', id, entry, call[NUMBER], amount, 0, -amount, amount, 1)
      call[CALL_STATE], call[COST], call[ESTIMATED], changed = 'B', amount, 1, true
    end
  end
  return changed
end

-- Sweeps at most 16 due entries; returns how many were due.
local function sweep()
  local ids = redis.call('ZRANGEBYSCORE', leases, '-inf', string.format('%.0f', now), 'LIMIT', 0, 16)
  if #ids == 0 then return 0 end
  local gone = {}
  for i, raw in ipairs(redis.call('HMGET', entries, unpack(ids))) do
    local entry = raw and cmsgpack.unpack(raw)
    if entry and (lapse(ids[i], entry) or due(entry)) then save(ids[i], entry, true) else gone[#gone + 1] = ids[i] end
  end
  if #gone > 0 then
    redis.call('HDEL', entries, unpack(gone))
    redis.call('ZREM', leases, unpack(gone))
  end
  return #ids
end
