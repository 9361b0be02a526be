"""Starting an instance from Python: what is refused, and what one process may have."""

from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.instances import started


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70_000}, "port 70000 must be a whole number"),
        ({"location": "Everywhere"}, "must be one of HeadOnly, EveryNode, NoServer or None"),
        ({"prot": 1}, "http_options has no prot"),
        ({"host": 7}, "host must be a name or an address"),
        ({"middlewares": "shop:Stamp"}, "middlewares must be a list"),
        ({"workers": 0}, "workers 0 must be a whole number from 1 to 64"),
        ({"workers": 65}, "workers 65 must be a whole number from 1 to 64"),
        ({"workers": "a"}, "workers 'a' must be a whole number from 1 to 64"),
    ],
)
def test_a_bad_option_gets_a_sentence_and_starts_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(serve.MQServeError, match=words), started(**options):
        pass


def test_several_http_workers_are_refused_to_the_embedded_form() -> None:
    with pytest.raises(serve.InstanceError, match=r"the embedded form is a single one: set MQSERVE_BROKER_URL"), started(workers=2):
        pass


def test_a_second_instance_in_one_process_is_refused() -> None:
    with started(), pytest.raises(serve.InstanceError, match="this process has an instance already"):
        serve.start()


def start_with_middlewares_that_are_not_there(**where: str) -> None:
    with pytest.raises(serve.InstanceError, match="No module named 'no'"), started(**where, middlewares=["no.such:Middleware"]):
        pass


def test_middlewares_that_cannot_be_made_start_nothing_and_are_said() -> None:
    start_with_middlewares_that_are_not_there()


def test_middlewares_that_another_process_cannot_make_start_nothing_and_are_said(broker_url: str, store_url: str) -> None:
    start_with_middlewares_that_are_not_there(broker_url=broker_url, store_url=store_url)


def test_a_folder_of_results_that_is_not_there_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQSERVE_RESULT_STORE", (tmp_path / "nowhere").as_uri())
    with pytest.raises(serve.InstanceError, match=r"MQSERVE_RESULT_STORE names .*nowhere.*No such file or directory"), started():
        pass


def test_an_instance_may_follow_another() -> None:
    for _ in range(2):
        with started() as client:
            assert client.list_backends() == {}


def test_a_client_that_was_shut_down_says_so() -> None:
    with started() as client:
        pass
    client.shutdown()
    with pytest.raises(serve.InstanceError, match="has already been shut down"):
        client.list_backends()


def test_an_embedded_instance_of_another_process_cannot_be_joined() -> None:
    with pytest.raises(serve.InstanceError, match="there is no instance in this process"):
        serve.connect()
