"""Keeps calls under way, in the processes that call a handle or a task. Imports the standard library alone, for the peers' environments.

The process prints `ready`, then reads lines such as `async 64 2.0` (how, how many at once, seconds), and answers each with a line of JSON:
how many calls were answered, the seconds, and percentiles of the time from sending to the result.
"""

import asyncio
import json
import statistics
import sys
import time
from collections import deque


class Caller:
    """How results are had: `begin` sends and `finish` waits for it (sync), `call` does both (async). One of the two is enough: it then
    stands for the other, since the program has no other. Where `begin` itself waits, `finish` has nothing to do."""

    def __init__(self, begin=None, finish=None, call=None):
        self.begin, self.finish, self.call = begin, finish, call

    async def serve(self):
        """Measures until the standard input ends."""
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            how, in_flight, seconds = line.split()
            sync = self.begin is not None and (how == "sync" or self.call is None)
            if sync:
                report = await asyncio.to_thread(self._sync, int(in_flight), float(seconds))
            else:
                report = await self._async(int(in_flight), float(seconds))
            print(json.dumps(report), flush=True)

    def _sync(self, in_flight, seconds):
        """One thread; it sends another request as soon as it has the oldest result."""
        latencies, under_way, began = [], deque(), time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            if len(under_way) == in_flight:
                sent, future = under_way.popleft()
                self.finish(future)
                now = time.perf_counter()
                latencies.append(now - sent)
            under_way.append((now, self.begin()))
        for sent, future in under_way:
            self.finish(future)
            latencies.append(time.perf_counter() - sent)
        return _report(latencies, time.perf_counter() - began)

    async def _async(self, in_flight, seconds):
        """As many coroutines, each of which sends and waits, over and over."""
        latencies, began = [], time.perf_counter()

        async def keep_calling():
            while (sent := time.perf_counter()) < began + seconds:
                await self.call()
                latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(keep_calling() for _ in range(in_flight)))
        return _report(latencies, time.perf_counter() - began)


def _report(latencies, seconds):
    hundredths = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99
    return {"calls": len(latencies), "seconds": seconds, "p50_ms": hundredths[49] * 1000, "p99_ms": hundredths[98] * 1000}
