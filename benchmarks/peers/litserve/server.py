"""LitServe with one worker: python server.py PORT noop|bodies, which are the paths it serves. It takes JSON by POST alone."""

import sys

import litserve


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


APIS = {"noop": {"/noop": Noop}, "bodies": {"/json": Json, "/length": Length}}

if __name__ == "__main__":
    port, kind = sys.argv[1:]
    apis = [api(api_path=path) for path, api in APIS[kind].items()]
    litserve.LitServer(apis, accelerator="cpu", workers_per_device=1).run(port=int(port), generate_client_file=False, log_level="warning")
