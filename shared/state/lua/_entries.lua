-- Put in front of every ledger script by scripts.py, after _balances.lua: entries, their calls, and what time does to them.

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

-- A tombstone is kept past the deadline, whatever its span: until then a late duplicate could begin anew (I7).
local function save(id, entry, rescore)
  redis.call('HSET', entries, id, cmsgpack.pack(entry))
  if not rescore then return end
  local at = due(entry) or math.max(now + tombstone, entry[DEADLINE] + grace)
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

-- Holds `amount` where `held` of it is held already, or, when that does not fit but `least` does, what is left. Returns
-- what is held in all, or nil and a refusal.
local function hold(entry, held, amount, least)
  local left, level, period = move(entry, 0, amount - held, 0, true)
  if not left then return amount end
  if least == 0 or held + left < least then return nil, {'denied', left, level, period} end
  move(entry, 0, left, 0, true)
  return held + left
end

-- Opens a further call with its own amount, if the Plan has calls left and it fits (dispatch and topup).
local function open(entry, number, amount, instance, delivery, max_calls)
  if number > max_calls then return {'exhausted'} end
  local left = move(entry, 0, amount, 0, true)
  if left then return {'denied', left} end
  line('topup', rid, entry, number, 0, amount, 0, amount)
  entry[#entry + 1] = {number, 'D', amount, 0, 0, instance, delivery, 0}
  return {'won', number}
end

-- Posts what a call really used, whatever was held for it. Returns {status, id of the line}; `always`: reconcile knows
-- the bill, and what was settled is put right.
local function post(entry, status, number, cost, estimated, always)
  local call = call_of(entry, number)
  if not call then
    call = {number, 'N', 0, 0, 0, '', 0, 0}
    if entry[STATE] == 'R' then -- its dispatch was lost: the reservation was held for this call
      call[CALL_STATE], call[CALL_AMOUNT], call[HOLDER_DELIVERY] = 'D', entry[AMOUNT], entry[DELIVERY]
    elseif status == 'settled' then
      status = entry[STATE] == 'V' and 'late' or 'opened'
    end
    entry[#entry + 1] = call
  end
  local state, held, was = call[CALL_STATE], call[CALL_AMOUNT], 0
  if state == 'S' then
    if not always or (call[COST] == cost and call[ESTIMATED] == 0) then return {'duplicate', ''} end
    status, was = 'corrected', call[COST]
  elseif state == 'B' then
    status, was = 'late', held
  elseif state == 'U' then
    status = 'late'
  elseif state == 'D' and cost > held then
    status = 'overrun'
  end
  local settled, pending, doubted = cost - was, state == 'D' and -held or 0, state == 'U' and -held or 0
  move(entry, settled, pending, doubted)
  local op = (status == 'settled' and 'settle') or (status == 'corrected' and 'correct') or status
  local id = line(op, rid, entry, number, settled, pending, doubted, cost, estimated, held)
  entry[STATE], call[CALL_STATE], call[COST], call[ESTIMATED], call[DUE] = 'D', 'S', cost, estimated, 0
  save(rid, entry, true)
  return {status, id}
end
