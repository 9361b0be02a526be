"""LitServe with one worker: python server.py PORT noop|bodies|streaming, which are the paths it serves. It takes JSON by POST alone."""

import asyncio
import sys
import time

import litserve

CHUNKS, CHUNK = 1000, "." * 31 + "~"
PACED_CHUNKS, PACE_S = 20, 0.005


class Noop(litserve.LitAPI):
    def setup(self, device):
        pass

    def predict(self, body):
        return "ok"


class Json(Noop):
    def predict(self, body):
        return body


class Length(Noop):
    def predict(self, body):
        return str(len(body["data"]))


class Fast(Noop):
    def predict(self, body):
        for _ in range(CHUNKS):
            yield CHUNK

    def encode_response(self, chunks):
        yield from chunks


class AsyncFast(Noop):
    async def predict(self, body):
        for _ in range(CHUNKS):
            yield CHUNK

    async def encode_response(self, chunks):
        async for chunk in chunks:
            yield chunk


class AsyncPaced(AsyncFast):
    async def predict(self, body):
        for _ in range(PACED_CHUNKS):
            yield f"{time.monotonic():.6f}~"
            await asyncio.sleep(PACE_S)


APIS = {
    "noop": {"/noop": (Noop, {})},
    "bodies": {"/json": (Json, {}), "/length": (Length, {})},
    "streaming": {
        "/fast": (Fast, {"stream": True}),
        "/async_fast": (AsyncFast, {"stream": True, "enable_async": True}),
        "/async_paced": (AsyncPaced, {"stream": True, "enable_async": True}),
    },
}

if __name__ == "__main__":
    port, kind = sys.argv[1:]
    apis = [api(api_path=path, **options) for path, (api, options) in APIS[kind].items()]
    litserve.LitServer(apis, accelerator="cpu", workers_per_device=1).run(port=int(port), generate_client_file=False, log_level="warning")
