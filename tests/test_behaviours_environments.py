"""A backend's own Python: an interpreter by its path, or packages laid over the node's environment. Distributed."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.instances import new_name, started


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the node keeps what it builds; empty at first."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture(scope="module")
def instance(broker_url: str, store_url: str, environments: Path) -> Iterator[serve.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_ENVIRONMENTS", str(environments))
        with started(broker_url=broker_url, store_url=store_url) as client:
            yield client


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A package that nobody has installed, as a requirement that needs no index."""
    wheel = tmp_path_factory.mktemp("package") / "mqserve_test_color-1.0-py3-none-any.whl"
    info = "mqserve_test_color-1.0.dist-info"
    files = {
        "mqserve_test_color.py": "COLOR = 'blue'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mqserve-test-color\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: mqserve\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return str(wheel)


def tell_color(request: Any) -> list[str]:
    import sys

    import mqserve_test_color  # type: ignore[import-not-found]

    return [mqserve_test_color.COLOR, sys.prefix]


def ask(client: serve.Client, name: str) -> Any:
    client.create_endpoint(name, backend=name)
    try:
        return client.get_handle(name).remote().result(60)
    finally:
        client.delete_endpoint(name)


def test_a_backends_own_packages_are_built_once_and_shared(instance: serve.Client, environments: Path, package: str) -> None:
    with pytest.raises(ImportError):
        __import__("mqserve_test_color")
    first, second = new_name("b"), new_name("b")
    instance.create_backend(first, tell_color, actor_options={"pip": [package]}, config={"num_replicas": 2})
    color, prefix = ask(instance, first)
    assert color == "blue" and Path(prefix).parent == environments
    before = {path: path.stat().st_mtime_ns for path in environments.rglob(".complete")}
    instance.create_backend(second, tell_color, actor_options={"pip": [package]})
    assert ask(instance, second) == [color, prefix]
    assert {path: path.stat().st_mtime_ns for path in environments.rglob(".complete")} == before and len(before) == 1
    for name in (first, second):
        instance.delete_backend(name)


def test_a_backend_without_packages_of_its_own_does_not_see_them(instance: serve.Client, package: str) -> None:
    own, plain = new_name("b"), new_name("b")
    instance.create_backend(own, tell_color, actor_options={"pip": [package]})
    instance.create_backend(plain, tell_color)
    instance.create_endpoint(plain, backend=plain)
    with pytest.raises(ImportError, match="mqserve_test_color"):
        instance.get_handle(plain).remote().result(30)
    instance.delete_endpoint(plain)
    for name in (own, plain):
        instance.delete_backend(name)


def test_packages_that_cannot_be_had_are_said_in_the_installers_words_and_nothing_stays(
    instance: serve.Client, environments: Path, tmp_path: Path
) -> None:
    name, missing = new_name("b"), str(tmp_path / "no_such_thing-1.0-py3-none-any.whl")
    before = {path for path in environments.iterdir() if path.is_dir()}
    with pytest.raises(serve.BackendFailed, match="the Python environment cannot be built") as caught:
        instance.create_backend(name, tell_color, actor_options={"pip": [missing]})
    assert "no_such_thing" in str(caught.value)
    assert name not in instance.list_backends()
    assert {path for path in environments.iterdir() if path.is_dir()} == before, "half an environment was left"


def test_a_backend_runs_in_the_interpreter_it_names(instance: serve.Client, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages" / "all.pth"
    site.write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("site-packages")) + "\n")

    def prefix(request: Any) -> str:
        import sys

        return sys.prefix

    name = new_name("b")
    instance.create_backend(name, prefix, actor_options={"python": str(folder / "bin" / "python")})
    assert ask(instance, name) == str(folder)
    instance.delete_backend(name)


@pytest.mark.parametrize(("python", "words"), [("/nowhere/bin/python", "no interpreter"), ("/bin/false", "cannot import mqserve")])
def test_an_interpreter_that_will_not_do_is_said_at_create(instance: serve.Client, python: str, words: str) -> None:
    name = new_name("b")
    with pytest.raises(serve.BackendFailed, match=words):
        instance.create_backend(name, tell_color, actor_options={"python": python})
    assert name not in instance.list_backends()
