"""The examples run as shipped."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sklearn.datasets import load_digits

from tests.instances import ROOT, CommandLine

EXAMPLES = ROOT / "examples"


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
