-- Put in front of reserve, settle and void by scripts.py, after _entries.lua: what the rate limits remember.
--
-- KEYS[5] rates  hash  t and k:<key id> -> {requests left, tokens left, at (ms), minute, its requests, hour, its requests}
--                      (msgpack)
local rates = KEYS[5]
local REQUESTS, TOKENS, AT, MINUTE, IN_MINUTE, HOUR, IN_HOUR = 1, 2, 3, 4, 5, 6, 7

-- Tokens taken at the reserve and not used go back; those used beyond are owed.
local function give_back(entry, used)
  if entry[RATED] < 0 then return end
  local names, write = {'t', 'k:' .. entry[KEY]}, {}
  for i, raw in ipairs(redis.call('HMGET', rates, unpack(names))) do
    if raw then
      local s = cmsgpack.unpack(raw)
      s[TOKENS] = s[TOKENS] + entry[RATED] - used
      write[#write + 1], write[#write + 2] = names[i], cmsgpack.pack(s)
    end
  end
  if #write > 0 then redis.call('HSET', rates, unpack(write)) end
  entry[RATED] = 0
end
