"""The command line. Every setting of a process is a flag and an environment variable, except URLs and keys: these are environment
variables only, so that no process list shows them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..broker.errors import MQServeError
from ..broker.process.freed_memory import keep_freed_memory
from ..broker.process.interrupts import INTERRUPTED, Interrupts, taking
from ..broker.process.lifeline import run as run_loop
from ..broker.process.printable import INDENT, printable, printable_lines
from ..broker.queue_names import check_namespace
from ..broker.settings import Settings
from ..controller.detached_log import PATH_VARIABLE, tend_log
from ..instance.starting import LOCATIONS, MAX_WORKERS
from . import logs
from .setup import FORMATS, print_setup

FAILED = 1
_LEAVE_BUDGET_S = 0.2
_interrupts = Interrupts()  # of this process; a command may set messages of its own


def main() -> None:
    """The entry point of the console script."""
    logs.log_what_python_prints()
    keep_freed_memory()
    os.environ.setdefault("UV_USE_IO_URING", "0")  # a forked child would share the memory of libuv's io_uring with us
    cli(prog_name="mqserve", auto_envvar_prefix=None)


def _one_sentence(command: Callable[..., Any]) -> Callable[..., Any]:
    """Makes our own errors end a command with their sentence instead of a traceback."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        sys.exit(_exit_code(lambda: command(*args, **options)))

    return run


def _exit_code(command: Callable[[], int | None]) -> int:
    try:
        with taking(_interrupts):
            return command() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if (ours := _ours(error)) is None:
            raise
        click.echo(f"Error: {printable_lines(str(ours), INDENT)}", err=True)
        return FAILED


def _ours(error: BaseException) -> MQServeError | None:
    """Returns the one error of ours in `error`, also from inside exception groups, else None."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, MQServeError) else None


def _settings(namespace: str | None) -> Settings:
    return Settings.read(namespace=namespace)


def _distributed(namespace: str | None, command: str) -> Settings:
    settings = _settings(namespace)
    if settings.embedded:
        raise MQServeError(
            f"`mqserve {command}` joins other processes over RabbitMQ and Redis: "
            "set MQSERVE_BROKER_URL (amqp://…) and MQSERVE_STORE_URL (redis://…)"
        )
    return settings


namespace_option = click.option(
    "--namespace", envvar="MQSERVE_NAMESPACE", metavar="NAME", help="The instance's name on broker and store [mqserve]."
)
http_options = [
    click.option("--host", envvar="MQSERVE_HTTP_HOST", default="127.0.0.1", show_default=True, help="Where proxies listen."),
    click.option(
        "--port", envvar="MQSERVE_HTTP_PORT", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one."
    ),
    click.option(
        "--location", envvar="MQSERVE_HTTP_LOCATION", type=click.Choice(LOCATIONS), default="HeadOnly", show_default=True,
        help="Which nodes run a proxy.",
    ),
    click.option("--debug", is_flag=True, envvar="MQSERVE_DEBUG", help="Show tracebacks in HTTP answers."),
    click.option(
        "--http-workers", envvar="MQSERVE_HTTP_WORKERS", type=click.IntRange(1, MAX_WORKERS), default=1, show_default=True,
        help="Proxies on each port: one for each core that HTTP may take.",
    ),
]  # fmt: skip


kept_options = [  # options that a keeper passes to the process that it starts: see supervisor.py
    click.option("--instance", hidden=True, default=""),
    click.option("--kept-by", hidden=True, default=""),
    click.option("--kept-node", hidden=True, default=""),
    click.option("--lock", hidden=True, type=int),
]


def _http_options(http_workers: int, **others: Any) -> dict[str, Any]:
    """Returns the `http_options` of `serve.start`."""
    return {"workers": http_workers, **others}


def _with(options: list[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mqserve")
@click.option("-v", "--verbose", is_flag=True, envvar="MQSERVE_VERBOSE", help="Log routine events too, not only problems.")
def cli(verbose: bool) -> None:
    """Serve Python functions and models from a message queue."""
    _log(verbose)


@cli.command()
@click.argument("target", metavar="FILE | MODULE[:ATTRIBUTE]")
@namespace_option
@_with(http_options)
@_one_sentence
def run(target: str, namespace: str | None, **http: Any) -> int:
    """Start an instance, deploy what FILE declares, serve until Ctrl-C."""
    from .run import run_until_stopped

    return run_until_stopped(target, _settings(namespace), _http_options(**http))


@cli.command()
@namespace_option
@_with(http_options)
@click.option("--no-node", is_flag=True, envvar="MQSERVE_NO_NODE", help="Run no node here: only the controller.")
@_one_sentence
def start(namespace: str | None, no_node: bool, **http: Any) -> int:
    """Start a detached instance: it runs until `mqserve shutdown`."""
    from ..client.session import open_client
    from ..controller.detached_log import detached_log
    from ..instance.starting import StartOptions, parse_http_options

    _interrupts.first = "\nEnding what was begun … (once more to end at once)"
    _interrupts.at_once = "\nEnding at once: what was begun may go on, and `mqserve shutdown` ends that."
    parsed, _ = parse_http_options(_http_options(**http))
    settings = _distributed(namespace, "start")
    url = open_client(settings, StartOptions(parsed, detached=True, with_node=not no_node)).http_url()
    where = f", HTTP on {printable(url)}" if url else ""
    click.echo(
        f"Instance {settings.namespace!r} runs{where}. End it with `mqserve shutdown`; its log is {detached_log(settings.namespace)}."
    )
    sys.stdout.flush()
    os._exit(0)  # the instance lives on in its own processes, so nothing has to be undone here


@cli.command()
@namespace_option
@_one_sentence
def shutdown(namespace: str | None) -> int:
    """End the running instance: drain, then clear."""
    from ..instance.starting import end_instance

    settings = _distributed(namespace, "shutdown")
    _interrupts.first = "\nThe instance drains on without this command: `mqserve shutdown` waits for it again."
    run_loop(end_instance(settings, click.echo))
    click.echo("Done.")
    return 0


@cli.command()
@namespace_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")
@_one_sentence
def status(namespace: str | None, as_json: bool) -> int:
    """Show nodes, proxies, backends and replicas, and what is wrong with them."""
    from .status import show_status

    settings = _distributed(namespace, "status")

    async def show() -> int:
        code = await show_status(settings, as_json=as_json)
        await _end_if_closing_hangs(code)
        return code

    return run_loop(show())


@cli.group()
def dead() -> None:
    """List, show, retry and drop dead letters, the messages that were set aside."""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts, one object per line.")
selection_options = [
    click.argument("backend"),
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    click.option("--all", "everything", is_flag=True, help="Every dead letter of the backend."),
    click.option("--yes", is_flag=True, help="Required with --all for more than 10 dead letters."),
]


@dead.command("list")
@click.argument("backend")
@namespace_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The largest number to list, oldest first.")
@json_option
@_one_sentence
def list_dead(backend: str, namespace: str | None, limit: int, as_json: bool) -> int:
    """List the dead letters of BACKEND."""
    from . import dead

    return run_loop(dead.list_dead(_distributed(namespace, "dead list"), backend, limit, as_json=as_json))


@dead.command("show")
@click.argument("backend")
@click.argument("message_id", metavar="ID")
@namespace_option
@json_option
@_one_sentence
def show_dead(backend: str, message_id: str, namespace: str | None, as_json: bool) -> int:
    """Show all that is known of one dead letter."""
    from . import dead

    return run_loop(dead.show_dead(_distributed(namespace, "dead show"), backend, message_id, as_json=as_json))


@dead.command("retry")
@_with(selection_options)
@namespace_option
@_one_sentence
def retry_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Send dead letters to BACKEND again, under their ids and as if they had never run."""
    from . import dead

    selection = dead.Selection.read(ids, everything)
    return run_loop(dead.retry_dead(_distributed(namespace, "dead retry"), backend, selection, yes=yes))


@dead.command("drop")
@_with(selection_options)
@namespace_option
@_one_sentence
def drop_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Drop dead letters of BACKEND for good."""
    from . import dead

    selection = dead.Selection.read(ids, everything)
    return run_loop(dead.drop_dead(_distributed(namespace, "dead drop"), backend, selection, yes=yes))


@cli.command()
@namespace_option
@click.option("--node-id", envvar="MQSERVE_NODE_ID", help="Its name; two nodes may share a machine [host name and process id].")
@click.option("--http-host", envvar="MQSERVE_HTTP_HOST", help="Where this node's proxy listens [the instance's].")
@click.option("--http-port", envvar="MQSERVE_HTTP_PORT", type=click.IntRange(0, 65535), help="Its port [the instance's].")
@click.option(
    "--http-workers",
    envvar="MQSERVE_HTTP_WORKERS",
    type=click.IntRange(1, MAX_WORKERS),
    help="Proxies on that port [the instance's number].",
)
@click.option("--no-proxy", is_flag=True, envvar="MQSERVE_NO_PROXY", help="Never run a proxy here.")
@click.option("--num-cpus", envvar="MQSERVE_NUM_CPUS", type=float, help="CPUs that this node offers [those of the machine].")
@click.option("--num-gpus", envvar="MQSERVE_NUM_GPUS", type=int, help="GPUs that it offers [those that it finds].")
@click.option("--resources", envvar="MQSERVE_RESOURCES", default="{}", help="Other resources that it offers, as JSON: '{\"tpu\": 1}'.")
@click.option(
    "--metrics-host", envvar="MQSERVE_METRICS_HOST", default="127.0.0.1", show_default=True, help="Where its metrics page listens."
)
@click.option("--metrics-port", envvar="MQSERVE_METRICS_PORT", type=click.IntRange(0, 65535), default=0, help="Its port [any free one].")
@_with(kept_options)
@_one_sentence
def node(
    namespace: str | None,
    node_id: str | None,
    http_host: str | None,
    http_port: int | None,
    http_workers: int | None,
    no_proxy: bool,
    num_cpus: float | None,
    num_gpus: int | None,
    resources: str,
    metrics_host: str,
    metrics_port: int,
    **kept: Any,
) -> int:
    """Run an agent: the replicas and the proxy that the controller assigns to it."""
    from ..controller.machine_resources import measure_node
    from ..controller.node import NodeOptions
    from ..controller.state.resources import parse_node_resources
    from ..instance.roles import run_node

    capacity = measure_node(num_cpus, num_gpus, parse_node_resources(resources))
    keeper = _kept(**kept)
    options = NodeOptions(
        node_id or _own_id("node"), http_host, http_port, http_workers, not no_proxy, capacity, ends_with_instance=keeper is not None
    )
    return run_loop(run_node(_distributed(namespace, "node"), options, metrics_host, metrics_port, keeper))


@cli.command()
@namespace_option
@_with(kept_options)
@_one_sentence
def controller(namespace: str | None, **kept: Any) -> int:
    """Run a controller; it starts a detached instance if there is none."""
    from ..instance.roles import run_controller

    return run_loop(run_controller(_distributed(namespace, "controller"), _own_id("controller"), _kept(**kept)))


@cli.command(hidden=True)
@namespace_option
@_with(kept_options)
@_one_sentence
def supervisor(namespace: str | None, **kept: Any) -> int:
    """Keep a detached instance's controller and node running; `mqserve start` starts it."""
    from ..instance.supervisor import run_supervisor

    if (keeper := _kept(**kept)) is None:
        raise MQServeError("`mqserve supervisor` is started by `mqserve start`")
    return run_loop(run_supervisor(_distributed(namespace, "supervisor"), keeper))


@cli.command()
@namespace_option
@_with(http_options[:2] + http_options[3:])
@click.option("--proxy-id", hidden=True)
@click.option("--node-id", hidden=True, default="")
@click.option("--fd", hidden=True, type=int)
@click.option("--common-fd", hidden=True, type=int)
@_one_sentence
def proxy(
    namespace: str | None,
    host: str,
    port: int,
    debug: bool,
    http_workers: int,
    proxy_id: str | None,
    node_id: str,
    fd: int | None,
    common_fd: int | None,
) -> int:
    """Run HTTP proxies by hand, one or several on one port: the controller configures and shows them, but does not count them."""
    settings = _distributed(namespace, "proxy")
    if http_workers > 1:
        from ..instance.proxy_workers import run_proxy_workers

        return run_loop(run_proxy_workers(settings, host, port, http_workers, debug=debug))
    from ..proxy.main import ProxyOptions
    from ..proxy.main import main as run_proxy

    own_id = proxy_id or f"{_own_id('proxy')}#{secrets.token_hex(3)}"  # a restarted container may get the same host name and pid again
    options = ProxyOptions(own_id, host, port, node_id, external=proxy_id is None, debug=debug, fd=fd, common_fd=common_fd)
    return run_loop(run_proxy(settings, options))


@cli.command()
@click.argument("backend")
@namespace_option
@click.option("--replica-id", hidden=True)
@click.option("--node-id", hidden=True, default="")
@_one_sentence
def replica(backend: str, namespace: str | None, replica_id: str | None, node_id: str) -> int:
    """Run one replica of BACKEND by hand: the controller configures and shows it, but does not count it."""
    from ..replicas.main import ReplicaOptions
    from ..replicas.main import main as run_replica

    options = ReplicaOptions(backend, replica_id or f"{backend}#{secrets.token_hex(3)}", node_id, external=replica_id is None)
    _leave_now(run_replica(_distributed(namespace, "replica"), options))


@cli.command()
@namespace_option
@click.option("--print", "is_print", is_flag=True, help="Print it; mqserve itself changes no server's users.")
@click.option(
    "--format", "what", type=click.Choice(FORMATS), default="commands", show_default=True,
    help="Lines for a shell, definitions for RabbitMQ, or an ACL file for Redis.",
)  # fmt: skip
@click.option("--vhost", default="/", show_default=True, help="RabbitMQ's virtual host.")
@_one_sentence
def setup(namespace: str | None, is_print: bool, what: str, vhost: str) -> int:
    """Show the users and rights that RabbitMQ and Redis should have for an instance."""
    if not is_print:
        raise MQServeError("mqserve changes no server's users: say `mqserve setup --print`, and run what that prints")
    click.echo(print_setup(check_namespace(namespace or "mqserve"), what, vhost, os.environ))
    return 0


def _leave_now(role: Coroutine[Any, Any, int]) -> NoReturn:
    """Ends the process when the role ends, in any way: a user's thread that still runs must not keep it alive."""
    code = FAILED
    try:
        code = _exit_code(lambda: run_loop(role))
    except BaseException as error:
        logs.log_uncaught(type(error), error, error.__traceback__)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _end_if_closing_hangs(code: int) -> None:
    """Ends the process at once if closing connections would wait seconds for a server that hangs: nothing has to be undone here."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    if rest and (await asyncio.wait(rest, timeout=_LEAVE_BUDGET_S))[1]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kept(instance: str, kept_by: str, kept_node: str, lock: int | None) -> Any:
    from ..instance.supervisor import Kept

    return Kept(instance, kept_by, kept_node, lock) if instance else None


def _own_id(role: str) -> str:
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def _log(verbose: bool) -> None:
    path = os.environ.get(PATH_VARIABLE)
    logs.set_up(verbose=verbose, dated=bool(path))
    if path:
        tend_log(Path(path))
    if verbose:
        os.environ["MQSERVE_VERBOSE"] = "1"  # inherited by the children
