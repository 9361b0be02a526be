"""Where requests are found by their ids: the setting `futures_path`, for servers in front that hide `/-/`."""

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import mqserve as serve
from tests.instances import Deploy, started

ASYNC = {"Prefer": "respond-async"}


def test_the_paths_may_stand_elsewhere_under_the_cors_of_the_edge() -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["https://page.example"], expose_headers=["Location"])
    page = {"Origin": "https://page.example"}
    with started(futures_path="/jobs", middlewares=[cors]) as client:
        url = Deploy(client).at(lambda request: "done")
        answer = httpx.get(url, headers={**ASYNC, **page})
        assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        found = httpx.get(f"{client.http_url()}{answer.headers['location']}/result?wait=30", headers=page)
        assert (found.text, found.headers["access-control-allow-origin"]) == ("done", "https://page.example")
        hidden = httpx.get(f"{client.http_url()}/-/futures/{answer.json()['id']}", headers=page)
        assert hidden.status_code == 403


def test_the_paths_may_stand_elsewhere_without_middlewares() -> None:
    with started(futures_path="/jobs") as client:
        id = httpx.get(Deploy(client).at(lambda request: "done"), headers=ASYNC).json()["id"]
        assert httpx.get(f"{client.http_url()}/jobs/{id}/result?wait=30").text == "done"
        assert httpx.get(f"{client.http_url()}/-/futures/{id}/result").text == "done"
        assert httpx.get(f"{client.http_url()}/jobs/nothing").status_code == 404


@pytest.mark.parametrize("path", ["jobs", "/jobs/", "/", "/-/jobs", "/a b", "/{id}", ""])
def test_a_place_that_cannot_be_one_is_refused(path: str) -> None:
    with pytest.raises(serve.MQServeError, match="futures_path"):
        serve.start(http_options={"port": 0, "futures_path": path})
