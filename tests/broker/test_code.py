"""Code travels by name where every machine has it, else by value and sealed, and arrives as it left."""

import asyncio
import hashlib
import importlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import starlette.requests
from starlette.middleware import Middleware

from mqserve.broker.errors import BadEnvelope, BadSignature, BadValue, NotEncodable
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.code import load, load_import_string, name_of_object, open_record, pack, save, unpack
from mqserve.broker.values.signing import SealScope, Signer

NO_SIGNER = Signer([], "ns")
USER_CODE = """
from dataclasses import dataclass

GREETING = "Hello"

def helper(name):
    return f"{GREETING}, {name}!"

def hello(name):
    return helper(name)

@dataclass
class Greeter:
    greeting: str

    def __call__(self, name):
        return f"{self.greeting}, {name}!"

    class Inner:
        pass
"""


def test_a_function_of_the_main_file_arrives_by_value_in_a_process_without_that_file(
    main_module: ModuleType, signer: Signer, namespace: str, tmp_path: Path
) -> None:
    code = pack(main_module.hello, (), signer)
    assert (code.name, code.target) == ("hello", "")
    script = (
        "import sys; from mqserve.broker.values.code import unpack; from mqserve.broker.values.signing import Signer\n"
        "raw = open(sys.argv[1], 'rb').read()\n"
        "target, args = unpack(raw, sys.argv[2], Signer([b'k' * 32], sys.argv[3]))\n"
        "print(target('there'), args)"
    )
    (tmp_path / "code").write_bytes(code.to_bytes())
    command = [sys.executable, "-c", script, str(tmp_path / "code"), code.sha256, namespace]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "Hello, there! []\n"


def test_code_run_as_main_goes_by_value_even_from_an_installed_file(
    main_module: ModuleType, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Path(sysconfig.get_paths()["purelib"], "package", "__main__.py")
    monkeypatch.setattr(main_module, "__file__", str(installed), raising=False)
    assert pack(main_module.hello, (), signer).sealed


def test_code_of_a_users_own_module_arrives_without_it(user_module: ModuleType, signer: Signer) -> None:
    code = pack(user_module.Greeter, ("Hi",), signer)
    del sys.modules[user_module.__name__]
    target, args = unpack(code.to_bytes(), code.sha256, signer)
    assert target(*args)("there") == "Hi, there!"


def test_a_closure_and_an_object_arrive_by_value(signer: Signer) -> None:
    suffix = "!"
    for target in (lambda name: name + suffix, Shout("!")):
        code = pack(target, (), signer)
        arrived, _ = unpack(code.to_bytes(), code.sha256, signer)
        assert arrived("hi") == "hi!"


@pytest.mark.parametrize("target", [starlette.requests.Request, starlette.requests.Request.body])
def test_code_of_an_installed_package_goes_by_name_and_without_a_key(target: Any) -> None:
    code = pack(target, (), NO_SIGNER)
    assert (code.target, code.sealed) == (f"starlette.requests:{target.__qualname__}", b"")
    assert unpack(code.to_bytes(), code.sha256, NO_SIGNER) == (target, [])


def test_an_installed_name_that_leads_elsewhere_goes_by_value(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = starlette.requests.cookie_parser
    monkeypatch.setattr(starlette.requests, "cookie_parser", lambda text: {"replaced": text})
    assert pack(original, (), signer).sealed


def test_an_object_has_the_name_that_the_module_gives_it_which_defines_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "naming_first.py").write_text("from naming_second import thing as known\n")
    (tmp_path / "naming_second.py").write_text("thing = object()\n")
    (tmp_path / "naming_third.py").write_text("from naming_second import *\n")
    names = ("naming_first", "naming_third", "naming_second")
    modules = [importlib.import_module(name) for name in names]
    try:
        thing = modules[2].thing
        assert name_of_object(thing, lambda module: module.__name__.startswith("naming")) == "naming_second:thing"
        assert name_of_object(thing, lambda module: module.__name__ == "naming_first") == "naming_first:known"
        assert name_of_object(object(), lambda module: True) == ""
        assert name_of_object(len, lambda module: True) == "", "a function has a name of its own"
    finally:
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["{}:Greeter", "{}.Greeter", "{}:Greeter.Inner"])
def test_an_import_string_goes_as_it_is_and_is_found_in_either_spelling(user_module: ModuleType, name: str) -> None:
    target = name.format(user_module.__name__)
    code = pack(target, (1, "two"), NO_SIGNER)
    assert (code.name, code.target) == (target, target)
    found, args = unpack(code.to_bytes(), code.sha256, NO_SIGNER)
    assert found.__qualname__ == target.rpartition(":")[2].removeprefix(f"{user_module.__name__}.")
    assert args == [1, "two"]


@pytest.mark.parametrize("target", ["", "word", ":attribute", "module:", ".attribute"])
def test_an_import_string_that_names_nothing_is_refused_with_the_right_form(target: str) -> None:
    with pytest.raises(BadValue, match=r"package\.module:attribute"):
        pack(target, (), NO_SIGNER)


def test_a_missing_attribute_or_module_is_an_import_error_that_names_it(user_module: ModuleType) -> None:
    with pytest.raises(ImportError, match="'nothing'"):
        load_import_string(f"{user_module.__name__}:Greeter.nothing")
    with pytest.raises(ImportError, match="no_such_module"):
        load_import_string("no_such_module:attribute")


def test_without_a_key_code_by_value_is_refused_and_both_ways_out_are_named(user_module: ModuleType) -> None:
    with pytest.raises(NotEncodable, match=r"hello .*MQSERVE_SECRET_KEY.*'package\.module:hello'"):
        pack(user_module.hello, (), NO_SIGNER)


def test_without_a_key_arguments_that_need_a_pickle_are_refused() -> None:
    with pytest.raises(NotEncodable, match="complex"):
        pack("package.module:attribute", (1j,), NO_SIGNER)


def test_code_that_does_not_pickle_is_refused_with_the_way_out(signer: Signer) -> None:
    generator = (number for number in range(3))
    with pytest.raises(NotEncodable, match="keep such objects out of globals and closures"):
        pack(lambda: next(generator), (), signer)


def test_changed_bytes_are_refused(user_module: ModuleType, signer: Signer) -> None:
    code = pack(user_module.hello, (), signer)
    with pytest.raises(BadSignature, match="hash"):
        unpack(code.to_bytes() + b"\x00", code.sha256, signer)


def test_code_sealed_by_another_key_is_refused_even_under_its_right_hash(user_module: ModuleType, signer: Signer, namespace: str) -> None:
    foreign = pack(user_module.hello, (), Signer([b"x" * 32], namespace))
    with pytest.raises(BadSignature):
        unpack(foreign.to_bytes(), foreign.sha256, signer)
    forged = msgspec.structs.replace(foreign, sealed=signer.seal(b"any", SealScope("result")))
    with pytest.raises(BadSignature):
        unpack(forged.to_bytes(), forged.sha256, signer)


@pytest.mark.parametrize("args", [(), ("Hi",), (1j,)])
def test_a_record_of_code_is_sealed_as_a_whole(user_module: ModuleType, signer: Signer, args: tuple[Any, ...]) -> None:
    for target in (user_module.Greeter, "starlette.requests:Request"):
        code = pack(target, args, signer)
        unpack(code.to_bytes(), code.sha256, signer)
        changes: list[dict[str, Any]] = [
            {"name": "other"},
            {"args_type": "application/json"},
            {"args": msgspec.msgpack.encode(["/other"])},
            {"seal": b"none"},
            {"seal": pack("starlette.requests:Request", ("other",), signer).seal},
            {"target": "os:system", "sealed": b""},
        ]
        for changed in changes:
            forged = msgspec.structs.replace(code, **changed)
            with pytest.raises(BadSignature):
                unpack(forged.to_bytes(), forged.sha256, signer)


def test_code_by_name_without_a_seal_is_not_even_imported(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "imported_by_nobody.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef f(request): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for maker in (NO_SIGNER, Signer([b"x" * 32], "ns")):
        code = pack("imported_by_nobody:f", (), maker)
        with pytest.raises(BadSignature, match=r"deploy it again|does not hold"):
            unpack(code.to_bytes(), code.sha256, signer)
    assert not mark.exists()
    code = pack("imported_by_nobody:f", (), signer)
    unpack(code.to_bytes(), code.sha256, signer)
    assert mark.exists()


def test_what_an_earlier_version_sent_by_value_opens_where_nothing_can_have_been_put_beside_it(
    user_module: ModuleType, signer: Signer
) -> None:
    plain = msgspec.structs.replace(pack(user_module.hello, (), signer), seal=b"")
    target, args = unpack(plain.to_bytes(), plain.sha256, signer)
    assert (target("there"), args) == ("Hello, there!", [])
    for args_type, packed in (("application/msgpack", msgspec.msgpack.encode(["x"])), ("application/octet-stream", plain.args)):
        more = msgspec.structs.replace(plain, args_type=args_type, args=packed)
        with pytest.raises(BadSignature, match="deploy it again"):
            unpack(more.to_bytes(), more.sha256, signer)


@pytest.mark.parametrize("beside", [{"files": "0" * 64}, {"run_file": "0/app.py"}, {"home": "run-0"}, {"target": "os:system"}])
def test_what_is_put_beside_the_code_of_an_earlier_version_is_refused(
    user_module: ModuleType, signer: Signer, beside: dict[str, Any]
) -> None:
    forged = msgspec.structs.replace(pack(user_module.hello, (), signer), seal=b"", **beside)
    with pytest.raises(BadSignature, match="deploy it again"):
        unpack(forged.to_bytes(), forged.sha256, signer)


@pytest.mark.parametrize("by", [{"files": "0" * 64}, {"run_file": "0/app.py"}, {"target": "", "sealed": b"any"}])
def test_a_process_without_a_key_takes_nothing_but_names(by: dict[str, Any]) -> None:
    record = msgspec.structs.replace(pack("starlette.requests:Request", (), NO_SIGNER), **by)
    with pytest.raises(BadSignature, match="set MQSERVE_SECRET_KEY to that of the instance"):
        open_record(record.to_bytes(), record.sha256, NO_SIGNER)


def test_the_hash_of_files_is_a_hash(signer: Signer) -> None:
    record = msgspec.structs.replace(pack("starlette.requests:Request", (), signer), files="../../etc").with_seal(signer)
    with pytest.raises(BadEnvelope):
        open_record(record.to_bytes(), record.sha256, signer)


def test_the_classes_of_middlewares_arrive_without_their_module(user_module: ModuleType, signer: Signer) -> None:
    code = pack([Middleware(user_module.Greeter, "Hi")], (), signer)
    del sys.modules[user_module.__name__]
    (arrived,), _ = unpack(code.to_bytes(), code.sha256, signer)
    assert arrived.cls(*arrived.args)("there") == "Hi, there!"


def test_a_process_without_a_key_takes_code_by_name_from_one_with_a_key(signer: Signer) -> None:
    code = pack("starlette.requests:Request", (), signer)
    assert unpack(code.to_bytes(), code.sha256, NO_SIGNER) == (starlette.requests.Request, [])


def test_bytes_that_are_no_code_are_refused(signer: Signer) -> None:
    raw = b"\xc1"
    with pytest.raises(BadEnvelope):
        unpack(raw, hashlib.sha256(raw).hexdigest(), signer)


def test_the_same_code_has_the_same_hash_and_other_arguments_another() -> None:
    one, same, other = (pack("pkg.mod:f", args, NO_SIGNER) for args in ((1,), (1,), (2,)))
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.anyio
async def test_code_is_kept_in_the_store_under_its_hash(store: Store, keys: StoreKeys, signer: Signer, user_module: ModuleType) -> None:
    sha256 = await save(store, keys, pack(user_module.Greeter, ("Hi",), signer))
    target, args = await load(store, keys, sha256, signer)
    assert target(*args)("there") == "Hi, there!"


@pytest.mark.anyio
async def test_code_that_nobody_keeps_goes_and_what_is_kept_is_left_alone(
    store: Store, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.values.code.CODE_TTL_S", 1)
    kept, left = pack("pkg.mod:kept", (), NO_SIGNER), pack("pkg.mod:left", (), NO_SIGNER)
    await save(store, keys, kept)
    await store.expire([keys.code(kept.sha256)], None)
    await save(store, keys, kept)  # deployed again
    await save(store, keys, left)
    async with asyncio.timeout(10):
        while await store.get(keys.code(left.sha256)):
            await asyncio.sleep(0.05)
    assert await store.get(keys.code(kept.sha256)) == kept.to_bytes()


@pytest.mark.anyio
async def test_code_that_is_not_in_the_store_is_said_to_be_missing(store: Store, keys: StoreKeys, signer: Signer) -> None:
    with pytest.raises(BadValue, match="deploy it again"):
        await load(store, keys, "0" * 64, signer)


class Shout:
    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    def __call__(self, name: str) -> str:
        return name + self._suffix


def test_several_threads_pack_code_of_one_module_at_a_time(user_module: ModuleType, signer: Signer) -> None:
    class SlowToPickle:
        def __reduce__(self) -> Any:
            time.sleep(0.05)
            return str, ("Hello",)

    user_module.GREETING = SlowToPickle()  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as threads:
        codes = list(threads.map(lambda _: pack(user_module.hello, (), signer), range(4)))
    sys.modules.pop(user_module.__name__)  # what went by reference would not arrive
    for code in codes:
        target, _ = unpack(code.to_bytes(), code.sha256, signer)
        assert target("there") == "Hello, there!"


@pytest.fixture
def main_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """User code executed as `__main__`, as `mqserve run` does it."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(USER_CODE, module.__dict__)
    return module


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """User code in a file of its own, importable and not installed."""
    name = "the_users_greetings"
    (tmp_path / f"{name}.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__(name)
    sys.modules.pop(name, None)


def test_code_that_travels_by_value_keeps_the_name_of_its_file(signer: Signer) -> None:
    """Tracebacks and logs are to say the user's line, whatever cloudpickle thinks of file names."""

    def outer() -> Any:
        def inner() -> None: ...

        return inner

    packed = pack(outer, (), signer)
    arrived, _ = unpack(packed.to_bytes(), packed.sha256, signer)
    assert arrived.__code__.co_filename == arrived().__code__.co_filename == __file__
