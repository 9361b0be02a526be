"""Files under `mqserve run`: replicas execute one that only declares, so they have its definitions under its names."""

import json
from pathlib import Path

from tests.code_programs import SAME_ANSWERS, SHARED_DEFINITIONS, answer_once_ended, write
from tests.instances import CommandLine

RUN = (
    SHARED_DEFINITIONS
    + """
@serve.endpoint("/ask")
def ask(request):
    import app
    is_one, doubled, module, required = serve.get_handle("echo").remote(Order(2)).result(timeout=60)
    by_name = pickle.loads(pickle.dumps(Order(1))) == Order(1) and app.Order is Order and sys.modules["__mp_main__"] is app
    return [*is_one, type(doubled) is Order, doubled == Order(4), module, required, by_name]

serve.endpoint(None)(echo)
"""
)


def test_all_replicas_of_a_run_file_have_the_same_classes(either_shell: CommandLine) -> None:
    answer, program = answer_once_ended(either_shell, RUN, "/ask")
    assert json.loads(answer) == SAME_ANSWERS, program.output


def test_modules_beside_a_run_file_in_a_package_come_first(either_shell: CommandLine) -> None:
    files = {"pkg/__init__.py": "", "pkg/utils9.py": "WHERE = 'beside'\n", "utils9.py": "WHERE = 'above'\n"}
    write(either_shell.folder / "code", files)
    text = "import utils9\nimport mqserve as serve\n@serve.endpoint('/where')\ndef where(request):\n    return utils9.WHERE\n"
    answer, program = answer_once_ended(either_shell, text, "/where", file="pkg/app.py")
    assert answer == "beside", program.output


def test_a_run_file_that_calls_the_api_is_not_executed_by_replicas(either_shell: CommandLine) -> None:
    text = """
import mqserve as serve
print("executed")
def hello(request):
    return "hello"
serve.create_backend("hello", hello)
serve.create_endpoint("hello", backend="hello", route="/hello")
"""
    answer, program = answer_once_ended(either_shell, text, "/hello")
    assert answer == "hello", program.output
    assert program.output.count("executed") == 1


def test_environment_that_the_top_of_a_run_file_sets_holds_in_replicas(either_shell: CommandLine) -> None:
    text = """
import logging, os
import mqserve as serve
os.environ["SHOP"] = "open"
logging.getLogger("shop").setLevel(logging.ERROR)
@serve.endpoint("/shop")
def shop(request):
    return [os.environ["SHOP"], logging.getLogger("shop").level]
"""
    answer, program = answer_once_ended(either_shell, text, "/shop")
    assert json.loads(answer) == ["open", 40], program.output


def test_a_run_file_may_change_the_working_directory_and_has_no_future_of_ours(either_shell: CommandLine) -> None:
    text = """
import os
import mqserve as serve
os.chdir("/")
@serve.endpoint("/kind")
def kind(request):
    def f(x: int): ...
    return f.__annotations__["x"].__name__
"""
    answer, program = answer_once_ended(either_shell, text, "/kind")
    assert answer == "int", program.output


def test_a_run_file_in_a_package_is_executed_once_whatever_name_it_is_imported_by(either_shell: CommandLine) -> None:
    sibling = "def ask():\n    from pkg.app import WORD\n    return WORD\n"
    write(either_shell.folder / "code", {"pkg/__init__.py": "", "pkg/sibling.py": sibling})
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
    answer, program = answer_once_ended(either_shell, text, "/word", file="pkg/app.py")
    assert answer == "well", program.output
    is_distributed = "MQSERVE_BROKER_URL" in either_shell.env
    assert program.output.count("executed") == 1 + is_distributed  # by the program, and by a replica that is a process of its own


def test_a_run_files_objects_reach_its_replicas_though_their_class_cannot_travel(either_shell: CommandLine) -> None:
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
    said, point = serve.get_handle("ask").remote([Locked(), Point(3)]).result(timeout=60)
    return [said, type(point) is Point, point.x]
"""
    answer, program = answer_once_ended(either_shell, text, "/ask")
    assert json.loads(answer) == ["asked", True, 3], program.output


def test_a_file_in_a_package_that_imports_its_siblings_is_run_by_its_name(shell: CommandLine, tmp_path: Path) -> None:
    pkg = tmp_path / "code" / "pkg"
    pkg.mkdir(parents=True)
    (pkg / "__init__.py").write_text("")
    (pkg / "app.py").write_text("from . import sibling\n")
    program = shell.start("run", "code/pkg/app.py", "--location", "NoServer")
    assert program.wait() == 1, program.output
    assert "run it by its name from the folder around, `mqserve run pkg.app`" in program.output


def test_a_run_file_that_calls_a_handle_finds_what_it_has_declared_until_then(either_shell: CommandLine) -> None:
    text = """
import mqserve as serve
def first(request):
    return "first"
def second(request):
    return f"second after {answer}"
serve.create_backend("first", first)
serve.create_endpoint("first", backend="first")
answer = serve.get_handle("first").remote().result(60)
serve.create_backend("second", second)
serve.create_endpoint("second", backend="second", route="/second")
"""
    answer, program = answer_once_ended(either_shell, text, "/second")
    assert answer == "second after first", program.output


def test_a_run_file_that_changes_what_it_has_called_calls_what_its_last_lines_say(either_shell: CommandLine) -> None:
    text = """
import mqserve as serve
def first(request):
    return "first"
def second(request):
    return "second"
def said(request):
    return " ".join(answers)
serve.create_backend("b", first)
serve.create_endpoint("b", backend="b")
handle = serve.get_handle("b")
answers = [handle.remote().result(60)]
serve.update_backend("b", second)
answers.append(handle.remote().result(60))
serve.create_backend("said", said)
serve.create_endpoint("said", backend="said", route="/said")
"""
    answer, program = answer_once_ended(either_shell, text, "/said")
    assert answer == "first second", program.output


def test_a_run_file_composes_backends_by_handles_in_their_constructors(either_shell: CommandLine) -> None:
    text = """
import mqserve as serve
@serve.endpoint("/part")
def part(request):
    return "part"
@serve.endpoint("/whole")
class Whole:
    def __init__(self):
        self.handle = serve.get_handle("part")
    def __call__(self, request):
        return "of a " + self.handle.remote().result(30)
"""
    answer, program = answer_once_ended(either_shell, text, "/whole")
    assert answer == "of a part", program.output
