-- Put in front of settle and correct by scripts.py, after _entries.lua: a cost is posted.

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
