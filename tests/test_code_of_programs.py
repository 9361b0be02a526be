"""Code of a program's own file: what a file under `mqserve run` declares is executed by replicas, what a script defines goes by value."""

import json
import signal
import sys
from pathlib import Path

import httpx
import pytest

from tests.instances import CommandLine, Program, wait_until
from tests.ports import free_port

ASK = """
import dataclasses, enum, functools, pickle, sys, threading
import mqserve as serve
import beside

class Color(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Order:
    pieces: int
    color: Color = Color.RED

    def double(self):
        return Order(self.pieces * 2)

@functools.lru_cache
def get_model():
    return Order(7)

COUNT = 0

def echo(request):
    order = request.data
    is_one = isinstance(order, Order), order == Order(2), order.color is Color.RED
    is_one += get_model() is get_model(), beside.Thing is type(beside.THING)
    return is_one, order.double(), type(order).__module__, [f.name for f in dataclasses.fields(Order) if f.default is dataclasses.MISSING]
"""
SCRIPT = (
    ASK
    + """
with serve.start(http_options={"location": None}):
    serve.create_backend("echo", echo)
    serve.create_endpoint("echo", backend="echo")
    fields = Order.__init__, Order.double, Color.RED
    (is_one, doubled, module, required), _ = [serve.get_handle("echo").remote(Order(2)).result(timeout=20) for _ in range(2)]
    print([*is_one, type(doubled) is Order, doubled == Order(4), module, required, fields == (Order.__init__, Order.double, Color.RED)])
"""
)
RUN = (
    ASK
    + """
@serve.endpoint("/ask")
def ask(request):
    import app
    is_one, doubled, module, required = serve.get_handle("echo").remote(Order(2)).result(timeout=20)
    by_name = pickle.loads(pickle.dumps(Order(1))) == Order(1) and app.Order is Order and sys.modules["__mp_main__"] is app
    return [*is_one, type(doubled) is Order, doubled == Order(4), module, required, by_name]

serve.endpoint(None)(echo)
"""
)
SAME = [True, True, True, True, True, True, True, "__main__", ["pieces"], True]


@pytest.fixture(params=["embedded", "distributed"])
def command_line(request: pytest.FixtureRequest, tmp_path: Path) -> CommandLine:
    chosen: CommandLine = request.getfixturevalue("shell" if request.param == "embedded" else "distributed_shell")
    code = tmp_path / "code"
    code.mkdir()
    (code / "beside.py").write_text("class Thing: ...\nTHING = Thing()\n")
    return chosen.with_variables(MQSERVE_CODE_CACHE=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")


def run_script(command_line: CommandLine, text: str) -> Program:
    path = command_line.folder / "code" / "script.py"
    path.write_text(text)
    return command_line.start_program([sys.executable, str(path)])


def answer_of(program: Program, url: str) -> str:
    def ask() -> str:
        try:
            response = httpx.get(url)
            return response.text if response.status_code == 200 else ""
        except httpx.TransportError:
            return ""

    return wait_until(lambda: ask() or ("ended" if program.ended else ""), told=lambda: program.output)


def test_a_script_and_its_replicas_have_the_same_classes(command_line: CommandLine) -> None:
    program = run_script(command_line, SCRIPT)
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1] == str(SAME)


def test_all_replicas_of_a_run_file_have_the_same_classes(command_line: CommandLine) -> None:
    (command_line.folder / "code" / "app.py").write_text(RUN)
    port = free_port()
    program = command_line.start("run", "code/app.py", "--port", str(port))
    assert json.loads(answer_of(program, f"http://127.0.0.1:{port}/ask")) == SAME, program.output
    program.signal(signal.SIGTERM)
    program.wait()


def test_modules_beside_a_run_file_in_a_package_come_first(command_line: CommandLine) -> None:
    code = command_line.folder / "code"
    (code / "pkg").mkdir()
    (code / "pkg" / "__init__.py").touch()
    (code / "pkg" / "utils9.py").write_text("WHERE = 'beside'\n")
    (code / "utils9.py").write_text("WHERE = 'above'\n")
    (code / "pkg" / "app.py").write_text(
        "import utils9\nimport mqserve as serve\n@serve.endpoint('/where')\ndef where(request):\n    return utils9.WHERE\n"
    )
    port = free_port()
    program = command_line.start("run", "code/pkg/app.py", "--port", str(port))
    assert answer_of(program, f"http://127.0.0.1:{port}/where") == "beside", program.output
    program.signal(signal.SIGTERM)
    program.wait()


def test_a_script_in_the_folder_of_temporary_files_needs_only_what_is_installed(command_line: CommandLine) -> None:
    """The folder itself does not travel, so what the script imports from there is refused."""
    shell = command_line.with_variables(TMPDIR=str(command_line.folder / "code"))
    text = """
import mqserve as serve
def f(request):
    return "by value"
with serve.start(http_options={"location": None}):
    serve.create_backend("f", f)
    serve.create_endpoint("f", backend="f")
    print(serve.get_handle("f").remote().result(timeout=20))
    import beside
    try:
        serve.create_backend("thing", beside.Thing)
    except serve.BadValue as error:
        print(error)
"""
    program = run_script(shell, text)
    assert program.wait() == 0, program.output
    assert "by value" in program.output
    if "MQSERVE_BROKER_URL" in shell.env:
        assert "the folder of everybody's temporary files" in program.output
        assert "move the code into a folder of its own" in program.output


def test_a_run_file_that_calls_the_api_is_not_executed_by_replicas(command_line: CommandLine) -> None:
    text = """
import mqserve as serve
print("executed")
def hello(request):
    return "hello"
serve.create_backend("hello", hello)
serve.create_endpoint("hello", backend="hello", route="/hello")
"""
    (command_line.folder / "code" / "app.py").write_text(text)
    port = free_port()
    program = command_line.start("run", "code/app.py", "--port", str(port))
    assert answer_of(program, f"http://127.0.0.1:{port}/hello") == "hello"
    program.signal(signal.SIGTERM)
    program.wait()
    assert program.output.count("executed") == 1


def test_environment_that_the_top_of_a_run_file_sets_holds_in_replicas(command_line: CommandLine) -> None:
    text = """
import logging, os
import mqserve as serve
os.environ["SHOP"] = "open"
logging.getLogger("shop").setLevel(logging.ERROR)
@serve.endpoint("/shop")
def shop(request):
    return [os.environ["SHOP"], logging.getLogger("shop").level]
"""
    (command_line.folder / "code" / "app.py").write_text(text)
    port = free_port()
    program = command_line.start("run", "code/app.py", "--port", str(port))
    assert json.loads(answer_of(program, f"http://127.0.0.1:{port}/shop")) == ["open", 40]
    program.signal(signal.SIGTERM)
    program.wait()


@pytest.mark.parametrize("call", ["start()", "connect()", "create_backend('x', f)"])
def test_a_module_that_starts_or_deploys_while_a_replica_imports_it_is_told(command_line: CommandLine, call: str) -> None:
    (command_line.folder / "code" / "starts.py").write_text(f"import mqserve as serve\ndef f(request): ...\nserve.{call}\n")
    program = run_script(
        command_line,
        """
import mqserve as serve
with serve.start(http_options={"location": None}):
    try:
        serve.create_backend("f", "starts:f")
    except serve.BackendFailed as error:
        print(error)
""",
    )
    assert program.wait() == 0, program.output
    assert "while a replica imports the code: each replica would call it again" in program.output


def test_a_class_that_the_caller_cannot_import_is_an_error_with_its_module(distributed_shell: CommandLine, tmp_path: Path) -> None:
    """The backend is deployed by one program, from its folder, and called by another."""
    owner, caller = tmp_path / "owner", tmp_path / "caller"
    for folder in (owner, caller):
        folder.mkdir()
    (owner / "private_mod.py").write_text("class Secret: ...\ndef f(request): return Secret()\n")
    (owner / "app.py").write_text("import mqserve as serve, private_mod\nserve.endpoint(None, name='f')(private_mod.f)\n")
    (caller / "ask.py").write_text(
        """
import mqserve as serve
client = serve.connect()
for value in (None, {1: 2}):
    try:
        client.get_handle("f").remote(value).result(timeout=20)
    except serve.RemoteError as error:
        print(error)
"""
    )
    instance = distributed_shell.start("run", "owner/app.py", "--location", "NoServer")
    instance.wait_for("Ctrl-C stops")
    program = distributed_shell.start_program([sys.executable, "caller/ask.py"])
    assert program.wait() == 0, program.output
    assert program.output.count("cannot be opened here: the value has an object of a class that this process cannot import") == 2
    assert "No module named 'private_mod'" in program.output


def test_what_a_script_cannot_send_is_named(distributed_shell: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    program = run_script(
        distributed_shell,
        """
import threading
import mqserve as serve
lock = threading.Lock()
def helper():
    return lock
def handler(request):
    return helper()
with serve.start(http_options={"location": None}):
    try:
        serve.create_backend("h", handler)
    except serve.NotEncodable as error:
        print(error)
""",
    )
    assert program.wait() == 0, program.output
    said = "it uses the global 'helper', and that uses the global 'lock' (a _thread.lock), which does not pickle"
    assert said in program.output


def test_what_a_program_defines_anew_is_new_in_its_replicas(command_line: CommandLine) -> None:
    """As the cells of a notebook do it: the same names, other definitions."""
    program = run_script(
        command_line,
        """
import dataclasses
import mqserve as serve

def handler(request):
    made = request.data()
    return made, type(made).__name__

RATE = 1
def rate(): return RATE
def helper(): return "old"
def f(): return helper()

@dataclasses.dataclass
class Point:
    x: int = 1

with serve.start(http_options={"location": None}) as client:
    client.create_backend("call", handler)
    client.create_endpoint("call", backend="call")
    ask = lambda function: client.get_handle("call").remote(function).result(timeout=20)[0]
    said = [ask(f), ask(rate), ask(Point) == Point(1)]
    OldPoint, old = Point, f

    def helper(): return "new"
    said += [ask(f)]
    def f(): return "anew"
    RATE = 2
    @dataclasses.dataclass
    class Point:
        x: int = 5
        y: int = 6
    said += [ask(f), ask(old), ask(rate), ask(Point) == Point(5, 6), type(ask(Point)) is Point, type(ask(OldPoint)) is OldPoint]
    print(said)
""",
    )
    assert program.wait() == 0, program.output
    expected = ["old", 1, True, "new", "anew", "new", 2, True, True, True]
    assert program.output.splitlines()[-1] == str(expected), program.output


def test_a_global_that_a_replica_has_set_stays_its_own(distributed_shell: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    program = run_script(
        distributed_shell,
        """
import mqserve as serve
COUNT, SEEN = 0, []
def count():
    return COUNT, SEEN
def handler(request):
    global COUNT
    COUNT += 1
    SEEN.append(COUNT)
    return request.data()
with serve.start(http_options={"location": None}) as client:
    client.create_backend("count", handler)
    client.create_endpoint("count", backend="count")
    print([client.get_handle("count").remote(count).result(timeout=20) for _ in range(3)])
""",
    )
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1] == "[(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]", program.output


def test_a_run_file_may_change_the_working_directory_and_has_no_future_of_ours(command_line: CommandLine) -> None:
    text = """
import os
import mqserve as serve
os.chdir("/")
@serve.endpoint("/kind")
def kind(request):
    def f(x: int): ...
    return f.__annotations__["x"].__name__
"""
    (command_line.folder / "code" / "app.py").write_text(text)
    port = free_port()
    program = command_line.start("run", "code/app.py", "--port", str(port))
    assert answer_of(program, f"http://127.0.0.1:{port}/kind") == "int"
    program.signal(signal.SIGTERM)
    program.wait()


def test_a_run_file_in_a_package_is_executed_once_whatever_name_it_is_imported_by(command_line: CommandLine) -> None:
    pkg = command_line.folder / "code" / "pkg"
    pkg.mkdir()
    (pkg / "__init__.py").write_text("")
    (pkg / "sibling.py").write_text("def ask():\n    from pkg.app import WORD\n    return WORD\n")
    text = """
import sys, pathlib
sys.path.append(str(pathlib.Path(__file__).parents[1]))
import mqserve as serve
print("executed")
WORD = "well"
@serve.endpoint("/word")
def word(request):
    import pkg.sibling
    return pkg.sibling.ask()
"""
    (pkg / "app.py").write_text(text)
    port = free_port()
    program = command_line.start("run", "code/pkg/app.py", "--port", str(port))
    assert answer_of(program, f"http://127.0.0.1:{port}/word") == "well"
    program.signal(signal.SIGTERM)
    program.wait()
    assert program.output.count("executed") <= 2  # by the program, and by the replica where that is a process of its own


REGISTRY = """
import functools, threading
HANDLERS, LOCK = {"k": 1}, threading.Lock()

class Sentinel: ...
MISSING = Sentinel()

def is_missing(value):
    return value is MISSING

def locked(function):
    @functools.wraps(function)
    def wrapper(*args):
        with LOCK:
            return helper(function(*args))
    return wrapper

def helper(value):
    return ["helped", value]
"""
BY_VALUE = """
from __future__ import annotations
import abc, contextlib, dataclasses, datetime, enum, inspect, json, pickle, typing
import mqserve as serve
from registry import HANDLERS, LOCK, MISSING, is_missing, locked

class Base(abc.ABC):
    @abc.abstractmethod
    def name(self): return "base"
    @staticmethod
    def kind(): return "base"

class Sub(Base):
    def name(self): return "sub"
    @staticmethod
    def kind(): return "sub"

class Encoder(json.JSONEncoder):
    def default(self, value): return "mine"

@dataclasses.dataclass
class Order:
    when: datetime.datetime
    price: typing.Optional[Later] = None

class Later: ...

class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    def __init__(self, mass, radius):
        self.mass, self.radius = mass, radius

class Outer:
    class Inner:
        def __init__(self, x): self.x = x

@contextlib.contextmanager
def opened():
    yield "opened"

@locked
def wrapped(value):
    return value

COUNT = 0
def bump():
    global COUNT
    COUNT += 1
    return COUNT
class Counted:
    @property
    def count(self): return COUNT
look = lambda: (bump(), COUNT, Counted().count)

def handler(request):
    with opened() as word, LOCK:
        inner = pickle.loads(pickle.dumps(Outer.Inner(2)))
    hints = typing.get_type_hints(Order)
    return [
        Sub().name(), Sub.kind(), Encoder().encode(MISSING), str(Order("now")), hints["when"] is datetime.datetime,
        typing.get_args(hints["price"])[0] is Later, Planet.EARTH.mass, word, inner.x, Outer.Inner.__qualname__, wrapped(1),
        is_missing(MISSING), HANDLERS, len(set(look())), request.data.name(), str(inspect.signature(Order, eval_str=True))[:24],
    ]
handle = lambda request: handler(request)

with serve.start(http_options={"location": None}) as client:
    for name, function in {"plain": handler, "lambda": handle}.items():
        client.create_backend(name, function)
        client.create_endpoint(name, backend=name)
        print(client.get_handle(name).remote(Sub()).result(timeout=20))
"""
SIXTEEN = [
    "sub", "sub", '"mine"', "Order(when='now', price=None)", True, True, 5.9, "opened", 2, "Outer.Inner", ["helped", 1], True, {"k": 1}, 1,
    "sub", "(when: datetime.datetime",
]  # fmt: skip


def test_what_a_program_defines_itself_behaves_in_its_replicas_as_it_does_there(command_line: CommandLine) -> None:
    (command_line.folder / "code" / "registry.py").write_text(REGISTRY)
    program = run_script(command_line, BY_VALUE)
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-2:] == [str(SIXTEEN)] * 2, program.output


def test_a_struct_of_msgspec_that_a_program_defines_itself_is_refused_with_the_way_out(
    distributed_shell: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "code").mkdir()
    program = run_script(
        distributed_shell,
        """
import msgspec
import mqserve as serve
class Point(msgspec.Struct):
    x: int
def handler(request): return Point(1)
with serve.start(http_options={"location": None}):
    try:
        serve.create_backend("h", handler)
    except serve.NotEncodable as error:
        print(error)
""",
    )
    assert program.wait() == 0, program.output
    assert "handler cannot travel to its replicas: the msgspec.Struct Point is defined in the program itself" in program.output


def test_a_run_files_objects_reach_its_replicas_though_their_class_cannot_travel(command_line: CommandLine) -> None:
    text = """
import threading
import msgspec
import mqserve as serve
LOCK = threading.Lock()
class Locked:
    def ask(self):
        with LOCK:
            return "asked"
class Point(msgspec.Struct):
    x: int
serve.endpoint(None, name="ask")(lambda request: [request.data[0].ask(), request.data[1]])
@serve.endpoint("/ask")
def first(request):
    said, point = serve.get_handle("ask").remote([Locked(), Point(3)]).result(timeout=20)
    return [said, type(point) is Point, point.x]
"""
    (command_line.folder / "code" / "app.py").write_text(text)
    port = free_port()
    program = command_line.start("run", "code/app.py", "--port", str(port))
    assert json.loads(answer_of(program, f"http://127.0.0.1:{port}/ask")) == ["asked", True, 3]
    program.signal(signal.SIGTERM)
    program.wait()


def test_a_module_that_is_run_imports_its_siblings_in_its_replicas(command_line: CommandLine) -> None:
    shop = command_line.folder / "code" / "shop"
    shop.mkdir()
    (shop / "__init__.py").write_text("")
    (shop / "util.py").write_text("WORD = 'beside'\n")
    (shop / "main.py").write_text(
        """
import mqserve as serve
def handler(request):
    from .util import WORD
    return WORD
with serve.start(http_options={"location": None}) as client:
    client.create_backend("h", handler)
    client.create_endpoint("h", backend="h")
    print(client.get_handle("h").remote().result(timeout=20))
"""
    )
    program = command_line.start_program([sys.executable, "-m", "shop.main"], cwd=command_line.folder / "code")
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1] == "beside", program.output


def test_a_program_sends_objects_of_modules_beside_it_that_its_handler_does_not_name(command_line: CommandLine) -> None:
    (command_line.folder / "code" / "items.py").write_text("class Item:\n    def __init__(self, word): self.word = word\n")
    (command_line.folder / "code" / "late.py").write_text("WORD = 'late'\n")
    program = run_script(
        command_line,
        """
import items
import mqserve as serve
def handler(request):
    import late
    return request.data.word, late.WORD, request.data
with serve.start(http_options={"location": None}) as client:
    client.create_backend("h", handler)
    client.create_endpoint("h", backend="h")
    word, late, item = client.get_handle("h").remote(items.Item("well")).result(timeout=20)
    print(word, late, type(item) is items.Item)
""",
    )
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1] == "well late True", program.output


def test_a_file_in_a_package_that_imports_its_siblings_is_run_by_its_name(shell: CommandLine, tmp_path: Path) -> None:
    pkg = tmp_path / "code" / "pkg"
    pkg.mkdir(parents=True)
    (pkg / "__init__.py").write_text("")
    (pkg / "app.py").write_text("from . import sibling\n")
    program = shell.start("run", "code/pkg/app.py", "--location", "NoServer")
    assert program.wait() == 1, program.output
    assert "run it by its name from the folder around, `mqserve run pkg.app`" in program.output
