"""Programs that start an instance or connect to one: what they define themselves goes by value, and behaves in replicas as in them."""

import sys
from pathlib import Path

import pytest

from tests.code_programs import SAME_ANSWERS, SHARED_DEFINITIONS, run_script, write
from tests.instances import CommandLine

SCRIPT = (
    SHARED_DEFINITIONS
    + """
with serve.start(http_options={"location": None}):
    serve.create_backend("echo", echo)
    serve.create_endpoint("echo", backend="echo")
    fields = Order.__init__, Order.double, Color.RED
    (is_one, doubled, module, required), _ = [serve.get_handle("echo").remote(Order(2)).result(timeout=60) for _ in range(2)]
    print([*is_one, type(doubled) is Order, doubled == Order(4), module, required, fields == (Order.__init__, Order.double, Color.RED)])
"""
)


def test_a_script_and_its_replicas_have_the_same_classes(either_shell: CommandLine) -> None:
    program = run_script(either_shell, SCRIPT)
    assert program.wait() == 0, program.output
    assert str(SAME_ANSWERS) in program.output.splitlines(), program.output


def test_a_script_in_the_folder_of_temporary_files_needs_only_what_is_installed(either_shell: CommandLine) -> None:
    """The folder itself does not travel, so what the script imports from there is refused."""
    shell = either_shell.with_variables(TMPDIR=str(either_shell.folder / "code"))
    text = """
import mqserve as serve
def f(request):
    return "by value"
with serve.start(http_options={"location": None}):
    serve.create_backend("f", f)
    serve.create_endpoint("f", backend="f")
    print(serve.get_handle("f").remote().result(timeout=60))
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


@pytest.mark.parametrize("call", ["start()", "connect()", "create_backend('x', f)"])
def test_a_module_that_starts_or_deploys_while_a_replica_imports_it_is_told(either_shell: CommandLine, call: str) -> None:
    write(either_shell.folder / "code", {"starts.py": f"import mqserve as serve\ndef f(request): ...\nserve.{call}\n"})
    program = run_script(
        either_shell,
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
        client.get_handle("f").remote(value).result(timeout=60)
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


def test_what_a_program_defines_anew_is_new_in_its_replicas(either_shell: CommandLine) -> None:
    """As the cells of a notebook do it: the same names, other definitions."""
    program = run_script(
        either_shell,
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
    ask = lambda function: client.get_handle("call").remote(function).result(timeout=60)[0]
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
    assert str(expected) in program.output.splitlines(), program.output


def test_a_global_that_a_replica_has_set_stays_its_own(distributed_shell: CommandLine, tmp_path: Path) -> None:
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
    print([client.get_handle("count").remote(count).result(timeout=60) for _ in range(3)])
""",
    )
    assert program.wait() == 0, program.output
    assert "[(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]" in program.output.splitlines(), program.output


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
        print(client.get_handle(name).remote(Sub()).result(timeout=60))
"""
SIXTEEN = [
    "sub", "sub", '"mine"', "Order(when='now', price=None)", True, True, 5.9, "opened", 2, "Outer.Inner", ["helped", 1], True, {"k": 1}, 1,
    "sub", "(when: datetime.datetime",
]  # fmt: skip


def test_what_a_program_defines_itself_behaves_in_its_replicas_as_it_does_there(either_shell: CommandLine) -> None:
    write(either_shell.folder / "code", {"registry.py": REGISTRY})
    program = run_script(either_shell, BY_VALUE)
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-2:] == [str(SIXTEEN)] * 2, program.output


def test_a_struct_of_msgspec_that_a_program_defines_itself_is_refused_with_the_way_out(
    distributed_shell: CommandLine, tmp_path: Path
) -> None:
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


def test_a_module_that_is_run_imports_its_siblings_in_its_replicas(either_shell: CommandLine) -> None:
    shop = either_shell.folder / "code" / "shop"
    shop.mkdir(parents=True)
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
    print(client.get_handle("h").remote().result(timeout=60))
"""
    )
    program = either_shell.start_program([sys.executable, "-m", "shop.main"], cwd=either_shell.folder / "code")
    assert program.wait() == 0, program.output
    assert "beside" in program.output.splitlines(), program.output


def test_a_program_sends_objects_of_modules_beside_it_that_its_handler_does_not_name(either_shell: CommandLine) -> None:
    write(either_shell.folder / "code", {"items.py": "class Item:\n    def __init__(self, word): self.word = word\n"})
    write(either_shell.folder / "code", {"late.py": "WORD = 'late'\n"})
    program = run_script(
        either_shell,
        """
import items
import mqserve as serve
def handler(request):
    import late
    return request.data.word, late.WORD, request.data
with serve.start(http_options={"location": None}) as client:
    client.create_backend("h", handler)
    client.create_endpoint("h", backend="h")
    word, late, item = client.get_handle("h").remote(items.Item("well")).result(timeout=60)
    print(word, late, type(item) is items.Item)
""",
    )
    assert program.wait() == 0, program.output
    assert "well late True" in program.output.splitlines(), program.output
