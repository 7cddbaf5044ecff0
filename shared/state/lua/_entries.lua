-- Put in front of the ledger's scripts by scripts.py, after _balances.lua: entries and their calls.

local function load()
  local raw = redis.call('HGET', entries, rid)
  return raw and cmsgpack.unpack(raw)
end

-- When the entry is next due while it holds money; nil for a tombstone.
local function due(entry)
  if entry[STATE] == 'R' then return entry[DEADLINE] + grace end
  local first
  for i = CALLS + 1, #entry do
    local call = entry[i]
    local at = (call[CALL_STATE] == 'D' and entry[DEADLINE] + grace) or (call[CALL_STATE] == 'U' and call[DUE]) or nil
    if at and (not first or at < first) then first = at end
  end
  return first
end

-- How long the entry is remembered once nothing is held. What was counted by us as long as what is unconfirmed: a
-- provider's bill comes hours later, and reconcile has to find the calls that it corrects.
local function span(entry)
  for i = CALLS + 1, #entry do
    if entry[i][ESTIMATED] == 1 then return math.max(tombstone, unconfirmed) end
  end
  return tombstone
end

-- A tombstone is kept past the deadline, whatever its span: until then a late duplicate could begin anew (I7).
local function save(id, entry, rescore)
  redis.call('HSET', entries, id, cmsgpack.pack(entry))
  if not rescore then return end
  local at = due(entry) or math.max(now + span(entry), entry[DEADLINE] + grace)
  redis.call('ZADD', leases, string.format('%.0f', at), id)
end

-- The call with the highest number, or nil: its holder owns the stream.
local function newest(entry)
  local top
  for i = CALLS + 1, #entry do
    if not top or entry[i][NUMBER] > top[NUMBER] then top = entry[i] end
  end
  return top
end

local function call_of(entry, number)
  for i = CALLS + 1, #entry do
    if entry[i][NUMBER] == number then return entry[i] end
  end
end

local function doubt(id, entry, call)
  move(entry, 0, -call[CALL_AMOUNT], call[CALL_AMOUNT])
  line('unconfirm', id, entry, call[NUMBER], 0, -call[CALL_AMOUNT], call[CALL_AMOUNT])
  call[CALL_STATE], call[DUE] = 'U', now + unconfirmed
end
