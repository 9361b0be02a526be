-- Requests /r0, /r1, … of so many paths in turn: wrk -s spread.lua URL -- PATHS

local requests, number = {}, 0

function init(arguments)
  for path = 0, tonumber(arguments[1]) - 1 do
    requests[path] = wrk.format("GET", "/r" .. path)
  end
end

function request()
  number = (number + 1) % (#requests + 1)
  return requests[number]
end
