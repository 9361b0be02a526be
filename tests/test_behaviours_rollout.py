"""`update_backend`: new code, new replicas first; a version that does not get ready stops there. In both forms."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally


def says(word: str) -> Callable[[Any], str]:
    def say(request: Any) -> str:
        time.sleep(0.005)
        return word

    return say


class Asking:
    """Callers that ask one endpoint without a pause, until `stop`; what they were answered."""

    def __init__(self, client: serve.Client, name: str) -> None:
        self._handle = client.get_handle(name)
        self._ended = threading.Event()
        self._threads = ThreadPoolExecutor(4)
        self._futures = [self._threads.submit(self._ask) for _ in range(4)]

    def _ask(self) -> list[str]:
        found = []
        while not self._ended.is_set():
            found.append(self._handle.remote().result(60))
        return found

    def stop(self) -> Counter[str]:
        self._ended.set()
        self._threads.shutdown()
        return Counter(answer for future in self._futures for answer in future.result())


def test_new_code_replaces_the_old_without_a_failed_request(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(says("old"), num_replicas=2)
    asking = Asking(client, name)
    client.update_backend(name, says("new"))
    after = serve.get([client.get_handle(name).remote() for _ in range(20)], timeout=60)
    answers = asking.stop()
    assert set(answers) == {"old", "new"} or set(answers) == {"new"}
    wait_until(lambda: set(serve.get([client.get_handle(name).remote() for _ in range(20)], timeout=60)) == {"new"})
    assert "new" in after


def test_a_backend_keeps_its_config_and_takes_new_constructor_arguments(client: serve.Client, deploy: Deploy) -> None:
    class Greeter:
        def __init__(self, word: str) -> None:
            self.word = word

        def __call__(self, request: Any) -> str:
            return self.word

    name = deploy(Greeter, "hello", max_concurrent_queries=3)
    client.update_backend(name, Greeter, "goodbye")
    wait_until(lambda: client.get_handle(name).remote().result(30) == "goodbye")
    assert client.get_backend_config(name).max_concurrent_queries == 3


def test_the_user_config_is_told_to_the_new_code(client: serve.Client, deploy: Deploy) -> None:
    class Keeper:
        def reconfigure(self, config: Any) -> None:
            self.config = config

        def __call__(self, request: Any) -> Any:
            return self.config

    class Newer(Keeper):
        def __call__(self, request: Any) -> Any:
            return ["newer", self.config]

    name = deploy(Keeper, user_config=7)
    client.update_backend(name, Newer)
    wait_until(lambda: client.get_handle(name).remote().result(30) == ["newer", 7])


def test_the_new_replica_is_ready_before_the_old_one_goes(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    class Slow:
        def __init__(self) -> None:
            gate.pass_through()

        def __call__(self, request: Any) -> str:
            return "new"

    name = deploy(says("old"))
    handle = client.get_handle(name)
    with ThreadPoolExecutor(1) as background:
        updating = background.submit(client.update_backend, name, Slow)
        wait_until(lambda: gate.came == 1)
        assert set(serve.get([handle.remote() for _ in range(10)], timeout=30)) == {"old"}
        assert not updating.done()
        gate.open()
        updating.result()
    wait_until(lambda: handle.remote().result(30) == "new")


@pytest.mark.parametrize(("surge", "at_once"), [(1, 1), (2, 2)])
def test_no_more_than_max_surge_start_at_once(client: serve.Client, deploy: Deploy, tmp_path: Path, surge: int, at_once: int) -> None:
    gate, made = Gate(tmp_path), Tally(tmp_path)

    class Slow:
        def __init__(self) -> None:
            made.note()
            gate.pass_through()

        def __call__(self, request: Any) -> str:
            return "new"

    name = deploy(says("old"), num_replicas=2, max_surge=surge)
    with ThreadPoolExecutor(1) as background:
        updating = background.submit(client.update_backend, name, Slow)
        wait_until(lambda: gate.came == at_once)
        handle = client.get_handle(name)
        deadline = time.monotonic() + 1.5  # longer than the controller's tick: another one would show
        while time.monotonic() < deadline:
            assert handle.remote().result(30) == "old"
        assert len(made) == at_once
        gate.open()
        updating.result()
    wait_until(lambda: set(serve.get([client.get_handle(name).remote() for _ in range(10)], timeout=30)) == {"new"})
    assert len(made) == 2


def test_a_version_that_cannot_be_constructed_is_undone_and_the_old_one_serves(client: serve.Client, deploy: Deploy) -> None:
    class Broken:
        def __init__(self) -> None:
            raise LookupError("no model file")

        def __call__(self, request: Any) -> None:
            return None

    name = deploy(says("old"), num_replicas=2)
    asking = Asking(client, name)
    with pytest.raises(serve.BackendFailed, match="no model file"):
        client.update_backend(name, Broken)
    assert set(serve.get([client.get_handle(name).remote() for _ in range(10)], timeout=30)) == {"old"}
    assert set(asking.stop()) == {"old"}
    client.update_backend(name, says("mended"))
    wait_until(lambda: client.get_handle(name).remote().result(30) == "mended")


def test_requests_of_the_old_version_that_run_are_finished(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def old(request: Any) -> str:
        gate.pass_through()
        return "old"

    name = deploy(old)
    ref = client.get_handle(name).remote()
    wait_until(lambda: gate.came == 1)
    client.update_backend(name, says("new"))
    assert not ref.done()
    assert client.get_handle(name).remote().result(30) == "new"
    gate.open()
    assert ref.result(30) == "old" and gate.came == 1


def test_an_unknown_backend_cannot_be_updated(client: serve.Client) -> None:
    with pytest.raises(ValueError, match="nobody"):
        client.update_backend("nobody", says("new"))
