-- Put in front of reserve, dispatch and topup by scripts.py, after _entries.lua: room taken for a call (I2).

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
