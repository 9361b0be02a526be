"""`mqserve run`: an instance for one file, in the foreground."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..broker.errors import BadValue, MQServeError
from ..broker.files.roots import root_of_file
from ..broker.process.interrupts import DRAINING, Interrupts, taking
from ..broker.process.printable import printable
from ..broker.settings import Settings
from ..broker.values.code import load_import_string
from ..broker.values.main_module import RunFile
from ..client import api
from ..client.client import Client
from ..client.clients import clients
from ..client.declared import take_declarations
from ..client.deploying import Declaration
from ..controller.state.documents import ANY_METHOD
from ..instance.starting import StartOptions, parse_http_options
from ..replicas.ingress import app_of

HINT_AFTER_S = 10.0

Found = tuple[list[Declaration], RunFile | None]  # the declarations, and the file that makes them


def run_until_stopped(target: str, settings: Settings, http: dict[str, Any]) -> int:
    """Loads first, so that a file that does not import starts nothing; the exit code."""
    parsed, _ = parse_http_options(http)
    gc.freeze()  # as in our other processes (`lifeline.run`), and before there are any objects of the user
    with taking(Interrupts(), signal.SIGINT, signal.SIGTERM) as interrupts:
        find_declarations = _prepare(target)
        options = StartOptions(parsed, incomplete=True, keeps_queues=True, tell=lambda line: click.echo(line, err=True))
        client = api.start_under_run(settings, options)
        try:
            with client.deploying_file(_tell_ready):
                with _hint(f"{target} still runs: what it declares is deployed once it has been executed"):
                    declarations, run_file = find_declarations()
                if not clients.were_asked_for:  # it only declares, so replicas may execute it
                    client.run_file = run_file
                for declaration in declarations:
                    client.deploy(declaration)
                if not client.list_endpoints():
                    raise BadValue(
                        f"{target} declares no endpoint, so there is nothing to serve: decorate a function with @serve.endpoint('/path'), "
                        "or call serve.create_backend and serve.create_endpoint"
                    )
                client.tell_complete()
            interrupts.raises = False  # before it is said that Ctrl-C stops
            _announce(client, settings, {declaration.name: declaration.target for declaration in declarations})
            while not interrupts.came and not client.has_ended:
                time.sleep(0.2)
            click.echo("The instance was shut down." if client.has_ended else DRAINING, err=True)
        except KeyboardInterrupt:
            click.echo(DRAINING, err=True)
            raise
        finally:
            client.shutdown()
    return 0


def _prepare(target: str) -> Callable[[], Found]:
    """Checks the target. Returns a function that executes it and finds its declarations; call that after the instance is up, since the
    target may use it."""
    path = Path(target)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise BadValue(f"there is no file {target}: give the path of a Python file, or a module as package.module:attribute")
        return lambda: _execute(path)
    if "/" in target or not target.replace(":", ".").replace(".", "").isidentifier():
        raise BadValue(f"there is no file {target}: give the path of a Python file, or a module as package.module:attribute")
    return lambda: _import(target)


def _execute(path: Path) -> Found:
    """As `python FILE` would: under the name __main__, with its folder first on the path."""
    sys.path.insert(0, str(path.resolve().parent))
    run_file = RunFile.read(path)
    try:
        run_file.execute()
    except MQServeError:
        raise
    except (Exception, SystemExit) as error:
        raise BadValue(_does_not_import(str(path), error)) from error
    return take_declarations(), run_file


def _import(target: str) -> Found:
    module, _, attribute = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        if not attribute:
            __import__(module)
            return take_declarations(), None
        found = load_import_string(target)
    except MQServeError:
        raise
    except (Exception, SystemExit) as error:
        raise BadValue(_does_not_import(target, error)) from error
    declarations = take_declarations(only=found)
    if not declarations:
        raise BadValue(f"{target} is not declared for serving: decorate it with @serve.endpoint('/path')")
    return declarations, None


def _does_not_import(target: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.endswith(("mqserve/commands/run.py", "values/main_module.py"))
    ]
    where = "".join(traceback.format_list(frames)).rstrip()
    if isinstance(error, ImportError) and target.endswith(".py") and (Path(target).absolute().parent / "__init__.py").exists():
        path = Path(target).absolute()
        module = ".".join(path.relative_to(root_of_file(path)).with_suffix("").parts)
        return (
            f"{target} does not import ({error}): it lies in a package; run it by its name from the folder around, `mqserve run {module}`"
        )
    if isinstance(error, SyntaxError):
        return f"{target} does not import: {error.msg} in line {error.lineno}; mend it and run again"
    return f"{target} does not import ({type(error).__name__}: {error}); mend it and run again\n{where}"


@contextmanager
def _hint(line: str) -> Iterator[None]:
    """Says the line if what is inside takes long."""
    timer = threading.Timer(HINT_AFTER_S, click.echo, (line,), {"err": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell_ready(name: str, took_s: float) -> None:
    click.echo(f"  {printable(name)} is ready ({took_s:.1f} s)", err=True)


def _announce(client: Client, settings: Settings, targets: dict[str, Any]) -> None:
    """`targets` are the functions, classes and apps that the file declares, by the names of their endpoints."""
    form = "embedded" if settings.embedded else f"distributed, namespace {settings.namespace!r}"
    base = client.http_url()
    click.echo(f"Serving on {printable(base) or 'no HTTP port'} ({form}). Ctrl-C stops.")
    for name, facts in [*client.list_endpoints().items(), *client.list_pipelines().items()]:
        if base and facts["route"]:
            below = "/…" if facts.get("prefix") else ""
            route = facts["route"].rstrip("/") + below if below else facts["route"]
            stages = f": {' → '.join(facts['stages'])}" if "stages" in facts else ""
            click.echo(printable(f"  {','.join(facts['methods']):<9} {base}{route}  ({name}{stages})"))
    for schedule in client.list_schedules().values():
        upcoming = "paused" if schedule.next_at is None else f"next at {schedule.next_at:%Y-%m-%d %H:%M:%S} UTC"
        click.echo(printable(f"  schedule  {schedule.name}: {schedule.cron} ({schedule.timezone}) to {schedule.endpoint}, {upcoming}"))
    if base and (example := _curl(base, client, targets)):
        click.echo(f"Try:\n  {printable(example)}")
    sys.stdout.flush()


def _curl(base: str, client: Client, targets: dict[str, Any]) -> str:
    """A call of the first route, ready to paste. Of a FastAPI app it is the docs page: such an app need not have anything else that answers
    a GET without parameters."""
    samples = {"int": "1", "float": "1.5", "uuid": "12345678-1234-5678-1234-567812345678", "path": "a/b"}
    for name, facts in client.list_endpoints().items():
        if facts["route"] and {"GET", ANY_METHOD} & set(facts["methods"]):
            path = facts["route"]
            if facts.get("prefix"):
                return f"curl {base}{path.rstrip('/')}{_docs_path(targets.get(name)) or '/'}"
            while "{" in path:
                before, _, rest = path.partition("{")
                parameter, _, after = rest.partition("}")
                name, _, kind = parameter.partition(":")
                path = before + samples.get(kind, "you" if name == "name" else "1") + after
            return f"curl {base}{path}"
    return ""


def _docs_path(target: Any) -> str:
    """Returns the path of the docs page of a FastAPI app, or an empty string."""
    app = app_of(target)
    path = getattr(target if app is None else app, "docs_url", None)
    return path if isinstance(path, str) else ""
