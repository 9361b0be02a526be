"""The examples run as shipped."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from sklearn.datasets import load_digits

from tests.faults.wire import Wire
from tests.instances import ROOT, SECRET_KEY, CommandLine, new_namespace, wait_until

EXAMPLES = ROOT / "examples"
QUESTION = "What is a replica?"
CHAT_TOKEN_S = 0.02  # as in chat.py
EVENTS, EVENT_S = 12, 0.25  # as in events.py


@pytest.fixture(scope="module")
def digits_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    shell = CommandLine(tmp_path_factory.mktemp("digits"))
    yield f"{serve_example(shell, EXAMPLES / 'digits.py')}/digits"
    shell.close()


def serve_example(shell: CommandLine, file: Path) -> str:
    line = shell.start("run", str(file), "--port", "0").wait_for("Ctrl-C stops", deadline_s=60)
    found = re.search(r"http://\S+", line)
    assert found, line
    return found[0]


def test_hello_has_at_most_seven_lines() -> None:
    assert len((EXAMPLES / "hello.py").read_text().splitlines()) <= 7


def test_hello_greets(shell: CommandLine) -> None:
    url = serve_example(shell, EXAMPLES / "hello.py")
    assert httpx.get(f"{url}/hello/Ada", timeout=30).text == "Hello, Ada!"


@pytest.mark.parametrize("image_id", [0, 7, 1796])
def test_digits_reads_an_image_of_the_data_set(digits_url: str, image_id: int) -> None:
    answer = httpx.get(f"{digits_url}/{image_id}", timeout=30).json()
    assert set(answer) == {"image_id", "digit", "probabilities"}
    assert (answer["image_id"], answer["digit"]) == (image_id, load_digits().target[image_id])
    assert len(answer["probabilities"]) == 10 and sum(answer["probabilities"]) == pytest.approx(1)


def test_digits_reads_pixels_that_are_sent(digits_url: str) -> None:
    pixels = load_digits().data[42].tolist()
    answer = httpx.post(f"{digits_url}/9001", json=pixels, timeout=30).json()
    assert (answer["image_id"], answer["digit"]) == (9001, load_digits().target[42])


@pytest.mark.parametrize(("body", "status"), [("[1, 2]", 422), ("[1, ", 422)])
def test_digits_refuses_what_is_no_image(digits_url: str, body: str, status: int) -> None:
    response = httpx.post(f"{digits_url}/1", content=body, headers={"content-type": "application/json"}, timeout=30)
    assert response.status_code == status


def test_the_fastapi_app_keeps_notes_and_counts_words(shell: CommandLine) -> None:
    url = serve_example(shell, EXAMPLES / "fastapi_app.py")
    assert httpx.post(f"{url}/v1/notes", json={"text": "buy tea"}).json() == {"count": 1}
    assert httpx.get(f"{url}/v1/notes").json() == [{"text": "buy tea"}]
    assert httpx.post(f"{url}/v1/notes", json={}).status_code == 422
    assert "/v1/openapi.json" in httpx.get(f"{url}/v1/docs").text
    assert httpx.get(f"{url}/words/count", params={"text": "the cat and a dog"}).json() == 2


def test_digits_has_no_image_beyond_its_data_set(digits_url: str) -> None:
    assert httpx.get(f"{digits_url}/999999", timeout=30).status_code == 404


@pytest.fixture(scope="module")
def serve_in_form(form: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Serves an example in each form; returns its URL."""
    servers = {f"MQSERVE_{name.upper()}": request.getfixturevalue(name) for name in ("broker_url", "store_url") if form == "distributed"}
    shell = CommandLine(tmp_path_factory.mktemp("examples"), **servers, MQSERVE_SECRET_KEY=SECRET_KEY)

    def serve(file: str) -> str:
        variables = {"MQSERVE_NAMESPACE": new_namespace(file), "MQSERVE_CODE_CACHE": str(shell.folder / "cache")}
        return serve_example(shell.with_variables(**variables), EXAMPLES / file)

    yield serve
    shell.close()


@pytest.fixture(scope="module")
def chat(serve_in_form: Callable[[str], str]) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, of the chat example in each form."""
    with openai.OpenAI(base_url=f"{serve_in_form('chat.py')}/v1", api_key="any", timeout=30, max_retries=0) as client:
        yield client


def ask(chat: openai.OpenAI, text: str = QUESTION, **parameters: Any) -> ChatCompletion:
    answer: ChatCompletion = chat.chat.completions.create(**asking(text, parameters))
    return answer


def stream(chat: openai.OpenAI, text: str = QUESTION, **parameters: Any) -> Iterator[ChatCompletionChunk]:
    with chat.chat.completions.create(**asking(text, parameters), stream=True) as chunks:
        yield from chunks


def asking(text: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"model": "readme", "messages": [{"role": "user", "content": text}], "max_tokens": 12, **parameters}


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def joined(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chat_lists_its_model(chat: openai.OpenAI) -> None:
    assert [model.id for model in chat.models.list()] == ["readme"]
    assert chat.models.retrieve("readme").owned_by == "mqserve"


def test_chat_answers_with_a_text_its_usage_and_why_it_ended(chat: openai.OpenAI) -> None:
    answer = ask(chat, max_tokens=3, seed=1)
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", "readme", 1)
    assert text_of(answer).startswith("Replica")
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens <= 3
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens


def test_chat_streams_the_text_that_it_gives_in_one_piece_for_the_same_seed(chat: openai.OpenAI) -> None:
    for seed in range(5):
        whole, chunks = ask(chat, seed=seed), list(stream(chat, seed=seed))
        assert joined(chunks) == text_of(whole)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, whole.choices[0].finish_reason]
        assert len({chunk.id for chunk in chunks}) == 1


def test_chat_ends_a_stream_with_the_usage_if_it_is_asked_to(chat: openai.OpenAI) -> None:
    *chunks, last = stream(chat, seed=1, stream_options={"include_usage": True})
    assert last.usage == ask(chat, seed=1).usage and not last.choices
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_answers_differently_for_other_seeds_but_not_without_temperature(chat: openai.OpenAI) -> None:
    assert len({text_of(ask(chat, temperature=2, seed=seed)) for seed in range(8)}) > 1
    assert len({text_of(ask(chat, temperature=0, seed=seed)) for seed in range(3)}) == 1


def test_chat_ends_before_a_stop_sequence_also_in_a_stream(chat: openai.OpenAI) -> None:
    text = text_of(ask(chat, seed=2))
    stop = text[len(text) // 2 :][:3]
    answer = ask(chat, seed=2, stop=["not in it", stop])
    assert (text_of(answer), answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert joined(list(stream(chat, seed=2, stop=["not in it", stop]))) == text_of(answer)


def test_chat_takes_parts_of_text_and_null_for_a_default(chat: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a replica?"}]
    answer = ask(
        chat, seed=3, messages=[{"role": "system", "content": ""}, {"role": "user", "content": parts}], temperature=None, stop=None
    )
    assert text_of(answer) == text_of(ask(chat, seed=3))


def test_chat_says_that_there_is_no_such_model(chat: openai.OpenAI) -> None:
    for use in (lambda: ask(chat, model="gpt-4o"), lambda: chat.models.retrieve("gpt-4o"), lambda: list(stream(chat, model="gpt-4o"))):
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'") as raised:
            use()
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"stream_options": {"include_usage": "perhaps"}}, "stream_options.include_usage"),
    ],
)
def test_chat_refuses_a_wrong_parameter_by_its_name(chat: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(chat, **wrong)
    assert (raised.value.param, raised.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize("body", ["{", "[1]", ""])
def test_chat_refuses_a_body_that_is_no_object(chat: openai.OpenAI, body: str) -> None:
    response = httpx.post(f"{chat.base_url}chat/completions", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_chat_has_no_other_paths(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no POST /v1/embeddings") as raised:
        chat.embeddings.create(model="readme", input="a")
    assert raised.value.code == "unknown_url"


def test_chat_streams_its_pieces_as_they_are_made(chat: openai.OpenAI) -> None:
    """By OpenAI's own client: of an answer of 40 pieces the last one comes long after the first."""
    for seed in range(50):
        arrivals = [time.monotonic() for _ in stream(chat, seed=seed, max_tokens=40)]
        if len(arrivals) > 40:
            break
    else:
        pytest.fail("no answer is that long")
    assert arrivals[-1] - arrivals[0] > 40 * CHAT_TOKEN_S / 2


@pytest.fixture(scope="module")
def events_url(serve_in_form: Callable[[str], str]) -> str:
    return serve_in_form("events.py")


def state_of(page: Chrome) -> str:
    return page.find_element(By.ID, "state").text


def steps_of(page: Chrome) -> list[str]:
    return page.find_element(By.ID, "steps").text.splitlines()


def numbers_of(page: Chrome) -> list[int]:
    return [int(number) for step in steps_of(page) for number in re.findall(r"step (\d+) of", step)]


def test_a_browser_shows_events_as_they_are_made(events_url: str, browser: Chrome) -> None:
    browser.get(events_url)
    wait_until(lambda: state_of(browser) == "complete", told=lambda: f"{state_of(browser)}: {steps_of(browser)}")
    assert numbers_of(browser) == list(range(1, EVENTS + 1))
    shown_ms = [int(time) for step in steps_of(browser) for time in re.findall(r"after (\d+) ms", step)]
    assert shown_ms[-1] - shown_ms[0] > (EVENTS - 1) * EVENT_S * 1000 / 2


def test_a_browser_whose_connection_was_cut_goes_on_where_it_was(events_url: str, browser: Chrome) -> None:
    with Wire(events_url) as wire:
        browser.get(wire.url)
        wait_until(lambda: len(numbers_of(browser)) >= 3)
        wire.reset()
        wait_until(lambda: state_of(browser) == "complete", told=lambda: f"{state_of(browser)}: {steps_of(browser)}")
    assert numbers_of(browser) == list(range(1, EVENTS + 1))
