"""Code travels as files: however a package is deployed, a replica has each of its definitions once, and answers the same."""

import json
import sys
from pathlib import Path

import pytest

from tests.code_programs import answer_of, end, write
from tests.instances import CommandLine
from tests.ports import free_port

SHOP = {
    "shop/__init__.py": "",
    "shop/rates.txt": "21 percent\n",
    "shop/shapes.py": """
import dataclasses, enum, functools

class Color(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Order:
    pieces: int
    _: dataclasses.KW_ONLY
    color: Color = Color.RED
    tags: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def label(self) -> str:
        self.tags.append("labelled")
        return f"{self.pieces} {self.color.name}"
""",
    "shop/stock.py": """
import functools, threading
from .shapes import Order

LOCK = threading.Lock()
SOLD: list[int] = []

def sell(pieces: int) -> Order:
    with LOCK:
        SOLD.append(pieces)
    return Order(pieces)

@functools.lru_cache(maxsize=None)
def get_model() -> object:
    return object()
""",
    "shop/prices.py": """
import functools
from . import shapes

@functools.singledispatch
def price(thing: object) -> str:
    return "unknown"

@price.register
def _(thing: int) -> str:
    return "a number"

@price.register
def _(thing: shapes.Order) -> str:
    return "an order"
""",
    "shop/answers.py": """
import dataclasses, importlib.resources, inspect, logging, os, pathlib, pickle, sys, typing
import mqserve as serve
from . import prices, shapes, stock
from .shapes import Color, Order

os.environ["SHOP_IS_OPEN"] = "yes"
logging.getLogger("shop").setLevel(logging.ERROR)

@serve.endpoint("/answers")
def answers(request: serve.Request) -> object:
    order, before = stock.sell(2), len(stock.SOLD)
    stock.sell(3)
    again = pickle.loads(pickle.dumps(order))
    is_same, label = order == again, order.label + order.label
    with stock.LOCK:
        is_locked = stock.LOCK.locked()
    return [
        isinstance(order, Order), isinstance(again, Order), is_same, again.color is Color.RED,
        len(stock.SOLD) - before, sys.modules["shop.stock"] is stock, stock.get_model() is stock.get_model(),
        stock.get_model.cache_info().misses, prices.price(1), prices.price(order), is_locked,
        label, order.tags, importlib.resources.files("shop").joinpath("rates.txt").read_text(),
        pathlib.Path(__file__).with_name("rates.txt").read_text(), sorted(typing.get_type_hints(stock.sell)),
        inspect.getsource(stock.sell).splitlines()[0], [f.name for f in dataclasses.fields(Order) if f.default is dataclasses.MISSING],
        pickle.loads(pickle.dumps(stock.sell)) is stock.sell, [os.environ["SHOP_IS_OPEN"], logging.getLogger("shop").level],
    ]

@serve.endpoint("/where")
def where(request: serve.Request) -> str:
    return __file__
""",
    "app.py": "import shop.answers\n",
    "script.py": """
import signal, sys
import mqserve as serve
from shop.answers import answers, where

with serve.start(http_options={"port": int(sys.argv[1])}) as client:
    for function in (answers, where):
        target = function if sys.argv[2] == "object" else f"shop.answers:{function.__name__}"
        serve.create_backend(function.__name__, target)
        serve.create_endpoint(function.__name__, backend=function.__name__, route=f"/{function.__name__}")
    signal.sigwait([signal.SIGTERM])
""",
}
TWENTY = [
    True, True, True, True, 1, True, True, 1, "a number", "an order", True, "2 RED2 RED", ["labelled"], "21 percent\n", "21 percent\n",
    ["pieces", "return"], "def sell(pieces: int) -> Order:", ["pieces", "tags"], True, ["yes", 40],
]  # fmt: skip
WAYS = {
    "run file": ["-m", "mqserve", "run", "{code}/app.py", "--port", "{port}"],
    "module": ["-m", "mqserve", "run", "shop.answers", "--port", "{port}"],
    "script": ["{code}/script.py", "{port}", "object"],
    "import string": ["{code}/script.py", "{port}", "string"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_package_answers_the_same_however_it_is_deployed(either_shell: CommandLine, way: str, tmp_path: Path) -> None:
    code, port = write(tmp_path / "code", SHOP), free_port()
    command = [sys.executable, *(word.format(code=code, port=port) for word in WAYS[way])]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = either_shell.start_program(command, cwd=code if way == "module" else elsewhere)

    assert json.loads(answer_of(program, f"http://127.0.0.1:{port}/answers")) == TWENTY, program.output
    is_distributed = "MQSERVE_BROKER_URL" in either_shell.env
    assert Path(answer_of(program, f"http://127.0.0.1:{port}/where")).is_relative_to(tmp_path / ("cache" if is_distributed else "code"))
    end(program)


def test_files_that_the_store_lost_come_back_from_the_machine_that_has_them(
    distributed_shell: CommandLine, store_url: str, namespace: str, tmp_path: Path
) -> None:
    """All data is lost; then a machine with an empty cache starts a replica."""
    shell = distributed_shell.with_variables(MQSERVE_CODE_CACHE=str(tmp_path / "cache"))
    write(tmp_path / "code", {"lost_mod.py": "def f(request):\n    return 'found'\n"})
    program = """
import shutil, sys, time
import mqserve as serve, lost_mod, redis

store, keys = redis.Redis.from_url(sys.argv[1]), f"mqserve:{sys.argv[2]}:"
with serve.start(http_options={"location": None}) as client:
    client.create_backend("f", lost_mod.f)
    client.create_endpoint("f", backend="f")
    codes = set(store.scan_iter(f"{keys}code:*"))
    store.delete(*store.scan_iter(f"{keys}*"))
    until = time.monotonic() + 30
    while set(store.scan_iter(f"{keys}code:*")) != codes and time.monotonic() < until:
        time.sleep(0.05)
    shutil.rmtree(sys.argv[3])
    client.update_backend_config("f", {"num_replicas": 2})
    print(len(codes), client.get_handle("f").remote().result(timeout=60))
"""
    (tmp_path / "code" / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "code" / "program.py"), store_url, namespace, str(tmp_path / "cache")]
    started = shell.start_program(command)
    assert started.wait() == 0, started.output
    assert "4 found" in started.output.splitlines(), started.output
