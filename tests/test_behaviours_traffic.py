"""How an endpoint's requests are split over backends, copied to shadows, and tied to one backend by a key; in both forms."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally

Endpoint = Callable[..., str]
WORDS = ("ape", "bee", "cow", "dog", "eel")


def says(word: str) -> Callable[[object], str]:
    def say(request: object) -> str:
        return word

    return say


@pytest.fixture(scope="module")
def words(client: serve.Client) -> Iterator[dict[str, str]]:
    """Five backends, by what they answer; their names sort as the words do."""
    deploy = Deploy(client)
    names = {word: f"{word}-{new_name('b')}" for word in WORDS}
    for word, name in names.items():
        client.create_backend(name, says(word))
    yield names
    deploy.undo()
    for name in names.values():
        client.delete_backend(name)


@pytest.fixture
def endpoint(client: serve.Client) -> Iterator[Endpoint]:
    """Makes endpoints for one test, each with a route of its own name."""
    made: list[str] = []

    def make(backend: str, traffic: dict[str, float] | None = None) -> str:
        name = new_name("e")
        client.create_endpoint(name, backend=backend, route=f"/{name}", methods=["GET", "POST"])
        made.append(name)
        if traffic is not None:
            client.set_traffic(name, traffic)
        return name

    yield make
    for name in made:
        client.delete_endpoint(name)


def answers(url: str, endpoint: str, count: int) -> Counter[str]:
    with httpx.Client() as http:
        return Counter(http.get(f"{url}/{endpoint}").raise_for_status().text for _ in range(count))


# What set_traffic refuses.


@pytest.mark.parametrize(
    ("share", "error"),
    [
        ({"ape": 0.5, "bee": 0.6}, ValueError),
        ({"ape": 0.5}, ValueError),
        ({"ape": 1.5, "bee": -0.5}, ValueError),
        ({"ape": 1.0, "bee": float("nan")}, ValueError),
        ({}, ValueError),
        ({"ape": "1"}, TypeError),
        ({"ape": True}, TypeError),
    ],
    ids=str,
)
def test_weights_that_are_no_shares_of_one_are_refused_and_change_nothing(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, share: dict[str, Any], error: type[Exception]
) -> None:
    name = endpoint(words["ape"])
    with pytest.raises(error):
        client.set_traffic(name, {words[word]: weight for word, weight in share.items()})
    assert client.list_endpoints()[name]["traffic"] == {words["ape"]: 1.0}


def test_traffic_that_is_no_dict_is_a_type_error(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    with pytest.raises(TypeError, match="must be a dict"):
        client.set_traffic(endpoint(words["ape"]), [(words["ape"], 1.0)])  # type: ignore[arg-type]


def test_traffic_to_an_unknown_backend_or_endpoint_is_refused(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    name = endpoint(words["ape"])
    with pytest.raises(ValueError, match="nobody"):
        client.set_traffic(name, {"nobody": 1.0})
    with pytest.raises(ValueError, match="nowhere"):
        client.set_traffic("nowhere", {words["ape"]: 1.0})


def test_weights_may_miss_one_by_rounding(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    name = endpoint(words["ape"])
    client.set_traffic(name, {words[word]: 1 / 3 + 1e-9 for word in ("ape", "bee", "cow")})
    assert set(answers(client.http_url(), name, 60)) == {"ape", "bee", "cow"}


# The split.


def test_after_set_traffic_the_next_request_goes_to_the_new_backend(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, url: str
) -> None:
    name = endpoint(words["ape"])
    handle = client.get_handle(name)
    for word in ("bee", "cow", "ape", "bee"):
        client.set_traffic(name, {words[word]: 1.0})
        assert httpx.get(f"{url}/{name}").text == word
        assert handle.remote().result(30) == word


def test_an_even_split_reaches_both_backends_by_http_and_by_handle(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, url: str
) -> None:
    name = endpoint(words["ape"], {words["ape"]: 0.5, words["bee"]: 0.5})
    handle = client.get_handle(name)
    by_handle = Counter(serve.get([handle.remote() for _ in range(60)], timeout=30))
    for counted in (by_handle, answers(url, name, 60)):
        assert set(counted) == {"ape", "bee"}
        assert 8 <= counted["ape"] <= 52, "60 fair throws leave this range once in ten million times"


def test_a_canary_gets_its_small_share_and_the_winner_takes_all(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    name = endpoint(words["ape"], {words["ape"]: 0.9, words["bee"]: 0.05, words["cow"]: 0.05})
    handle = client.get_handle(name)
    counted = Counter(serve.get([handle.remote() for _ in range(400)], timeout=60))
    assert counted["ape"] > 300 and 0 < counted["bee"] < 60 and 0 < counted["cow"] < 60
    client.set_traffic(name, {words["cow"]: 1})
    assert set(serve.get([handle.remote() for _ in range(20)], timeout=30)) == {"cow"}


def test_a_backend_of_weight_zero_gets_nothing_and_cannot_be_deleted(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, url: str
) -> None:
    name = endpoint(words["ape"], {words["ape"]: 1, words["bee"]: 0})
    assert answers(url, name, 30) == {"ape": 30}
    assert client.list_endpoints()[name]["traffic"] == {words["ape"]: 1.0, words["bee"]: 0.0}
    with pytest.raises(ValueError, match=name):
        client.delete_backend(words["bee"])


def test_traffic_changes_under_load_fail_no_request(client: serve.Client, words: dict[str, str], endpoint: Endpoint, url: str) -> None:
    name = endpoint(words["ape"])
    ended = threading.Event()

    def ask() -> list[int]:
        with httpx.Client(timeout=30) as http:
            statuses = []
            while not ended.is_set():
                statuses.append(http.get(f"{url}/{name}").status_code)
            return statuses

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        try:
            for turn in range(10):
                client.set_traffic(name, {words[WORDS[turn % 5]]: 0.75, words[WORDS[(turn + 2) % 5]]: 0.25})
                time.sleep(0.2)
        finally:
            ended.set()
        statuses = Counter(status for future in asking for status in future.result())
    assert set(statuses) == {200}, statuses


# Shard keys.


def test_a_shard_key_maps_the_same_way_by_http_and_by_handle_twice(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, url: str
) -> None:
    name = endpoint(words["ape"], {words[word]: 0.2 for word in WORDS})
    handle = client.get_handle(name)
    keys = [f"session-{number}" for number in range(40)]

    def by_http() -> list[str]:
        with httpx.Client() as http:
            return [http.get(f"{url}/{name}", headers={"X-SERVE-SHARD-KEY": key}).text for key in keys]

    def by_handle() -> list[str]:
        return list(serve.get([handle.options(shard_key=key).remote() for key in keys], timeout=30))

    first = by_http()
    assert by_http() == first and by_handle() == first and by_handle() == first
    assert len(set(first)) >= 3, "40 keys over five backends"


def test_a_shard_key_maps_the_same_way_in_a_replica(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, deploy: Deploy
) -> None:
    name = endpoint(words["ape"], {words[word]: 0.2 for word in WORDS})
    keys = [f"user-{number}" for number in range(20)]

    async def ask(request: serve.ServeRequest) -> list[str]:
        handle = serve.get_handle(name, sync=False)
        return [await (await handle.options(shard_key=key).remote()) for key in request.data]

    handle = client.get_handle(name)
    here = serve.get([handle.options(shard_key=key).remote() for key in keys], timeout=30)
    assert client.get_handle(deploy(ask)).remote(keys).result(30) == here


def test_a_shard_key_stays_where_it_is_while_only_the_other_part_is_split_anew(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint
) -> None:
    """Cumulative weights over sorted names: the first half of the interval stays the first backend's."""
    name = endpoint(words["ape"], {words["ape"]: 0.5, words["bee"]: 0.5})
    handle = client.get_handle(name)
    keys = [str(number) for number in range(40)]
    before = serve.get([handle.options(shard_key=key).remote() for key in keys], timeout=30)
    client.set_traffic(name, {words["ape"]: 0.5, words["bee"]: 0.25, words["cow"]: 0.25})
    after = serve.get([handle.options(shard_key=key).remote() for key in keys], timeout=30)
    assert [was == "ape" for was in before] == [now == "ape" for now in after]


# Shadows.


def noting(tally: Tally) -> Callable[[Any], str]:
    def note(request: Any) -> str:
        tally.note(request.query_params.get("n", ""))
        return "shadow"

    return note


def test_a_shadow_of_one_gets_every_request_once_and_the_caller_the_primarys_answer(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, deploy: Deploy, url: str, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    shadow = deploy(noting(tally))
    name = endpoint(words["ape"])
    client.shadow_traffic(name, shadow, 1.0)
    handle = client.get_handle(name)
    with httpx.Client() as http:
        assert {http.get(f"{url}/{name}?n={number}").text for number in range(50)} == {"ape"}
    assert set(serve.get([handle.remote(n=number) for number in range(50, 100)], timeout=30)) == {"ape"}
    wait_until(lambda: len(tally) >= 100)
    client.delete_endpoint(name)  # so that nothing more can come, and an excess would show
    assert Counter(tally.lines) == {str(number): 1 for number in range(100)}


def test_shadows_of_a_half_and_a_tenth_get_about_that(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, deploy: Deploy, tmp_path: Path
) -> None:
    half, tenth, all_of_it = Tally(tmp_path), Tally(tmp_path), Tally(tmp_path)
    name = endpoint(words["ape"])
    for tally, proportion in ((half, 0.5), (tenth, 0.1), (all_of_it, 1)):
        client.shadow_traffic(name, deploy(noting(tally)), proportion)
    handle = client.get_handle(name)
    assert set(serve.get([handle.remote(n=number) for number in range(300)], timeout=60)) == {"ape"}
    wait_until(lambda: len(all_of_it) == 300 and len(half) > 100 and len(tenth) > 2, told=lambda: (half, tenth, all_of_it))
    assert len(half) < 200, "300 fair throws leave this range once in ten million times"
    assert len(tenth) < 80
    client.delete_endpoint(name)


def test_a_proportion_of_zero_ends_a_shadow_and_frees_its_backend(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    name = endpoint(words["ape"])
    client.create_backend(shadow := new_name("b"), says("shadow"))
    client.shadow_traffic(name, shadow, 0.5)
    with pytest.raises(ValueError, match=name):
        client.delete_backend(shadow)
    assert client.list_endpoints()[name]["shadows"] == {shadow: 0.5}
    client.shadow_traffic(name, shadow, 0)
    assert client.list_endpoints()[name]["shadows"] == {}
    client.delete_backend(shadow)


def test_a_proportion_of_zero_for_what_is_no_shadow_stores_nothing(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    name = endpoint(words["ape"])
    client.shadow_traffic(name, words["bee"], 0)
    assert client.list_endpoints()[name]["shadows"] == {}


@pytest.mark.parametrize("proportion", [-0.1, 1.1, "0.5", None, True, float("nan")], ids=str)
def test_a_proportion_that_is_no_share_is_a_type_error(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, proportion: Any
) -> None:
    with pytest.raises(TypeError, match="proportion"):
        client.shadow_traffic(endpoint(words["ape"]), words["bee"], proportion)


def test_a_shadow_needs_a_known_endpoint_and_a_known_backend(client: serve.Client, words: dict[str, str], endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="nobody"):
        client.shadow_traffic(endpoint(words["ape"]), "nobody", 0.5)
    with pytest.raises(ValueError, match="nowhere"):
        client.shadow_traffic("nowhere", words["ape"], 0.5)


def test_set_traffic_keeps_the_shadows(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, deploy: Deploy, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    shadow = deploy(noting(tally))
    name = endpoint(words["ape"])
    client.shadow_traffic(name, shadow, 1)
    client.set_traffic(name, {words["bee"]: 1})
    assert client.list_endpoints()[name]["shadows"] == {shadow: 1.0}
    assert client.get_handle(name).remote(n=7).result(30) == "bee"
    wait_until(lambda: tally.lines == ["7"])
    client.delete_endpoint(name)


def test_a_shadow_that_raises_or_hangs_changes_nothing_for_the_caller(
    client: serve.Client, words: dict[str, str], endpoint: Endpoint, deploy: Deploy, url: str, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)

    def fail(request: Any) -> None:
        tally.note()
        raise ValueError("a shadow's own trouble")

    def hang(request: Any) -> None:
        tally.note()
        time.sleep(5)

    name = endpoint(words["ape"])
    failing, hanging = deploy(fail), deploy(hang, graceful_shutdown_timeout_s=0, max_queued_requests=2, request_timeout_s=8)
    client.shadow_traffic(name, failing, 1)
    client.shadow_traffic(name, hanging, 1)
    handle = client.get_handle(name)
    started = time.monotonic()
    assert answers(url, name, 20) == {"ape": 20}
    assert set(serve.get([handle.remote() for _ in range(20)], timeout=30)) == {"ape"}
    assert time.monotonic() - started < 30, "the primary waited for a shadow: the 40 would take at least 100 s"
    wait_until(lambda: len(tally) >= 41)
    client.delete_endpoint(name)
    client.delete_endpoint(hanging)
    client.delete_backend(hanging, force=True)
