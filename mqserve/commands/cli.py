"""The command line. Every setting of a process is a flag and an environment variable, except URLs and keys: these are environment
variables only, so that no process list shows them."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..broker.errors import MQServeError
from ..broker.process.freed_memory import keep_freed_memory
from ..broker.process.lifeline import run as run_loop
from ..broker.process.printable import printable
from ..broker.queue_names import check_namespace
from ..controller.detached_log import PATH_VARIABLE, tend_log
from ..instance.starting import MAX_WORKERS
from . import logs
from .endings import end_if_closing_hangs, interrupts, leave_now, one_sentence
from .options import distributed, http_options, http_settings, kept_options, namespace_option, read_settings, with_options
from .request_commands import call, dead, jobs, schedules
from .setup import FORMATS, print_setup
from .webhooks import webhooks


def main() -> None:
    """The entry point of the console script."""
    logs.log_what_python_prints()
    keep_freed_memory()
    os.environ.setdefault("UV_USE_IO_URING", "0")  # a forked child would share the memory of libuv's io_uring with us
    cli(prog_name="mqserve", auto_envvar_prefix=None)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mqserve")
@click.option("-v", "--verbose", is_flag=True, envvar="MQSERVE_VERBOSE", help="Log routine events too, not only problems.")
def cli(verbose: bool) -> None:
    """Serve Python functions and models from a message queue."""
    _log(verbose)


for command in (call, jobs, schedules, dead, webhooks):
    cli.add_command(command)


@cli.command()
@click.argument("target", metavar="FILE | MODULE[:ATTRIBUTE]")
@namespace_option
@with_options(http_options)
@one_sentence
def run(target: str, namespace: str | None, **http: Any) -> int:
    """Start an instance, deploy what FILE declares, serve until Ctrl-C."""
    from .run import run_until_stopped

    return run_until_stopped(target, read_settings(namespace), http_settings(**http))


@cli.command()
@namespace_option
@with_options(http_options)
@click.option("--no-node", is_flag=True, envvar="MQSERVE_NO_NODE", help="Run no node here: only the controller.")
@one_sentence
def start(namespace: str | None, no_node: bool, **http: Any) -> int:
    """Start a detached instance: it runs until `mqserve shutdown`."""
    from ..client.session import open_client
    from ..controller.detached_log import detached_log
    from ..instance.starting import StartOptions, parse_http_options

    interrupts.first = "\nEnding what was begun … (once more to end at once)"
    interrupts.at_once = "\nEnding at once: what was begun may go on, and `mqserve shutdown` ends that."
    parsed, _ = parse_http_options(http_settings(**http))
    settings = distributed(namespace, "start")
    url = open_client(settings, StartOptions(parsed, detached=True, with_node=not no_node)).http_url()
    where = f", HTTP on {printable(url)}" if url else ""
    click.echo(
        f"Instance {settings.namespace!r} runs{where}. End it with `mqserve shutdown`; its log is {detached_log(settings.namespace)}."
    )
    sys.stdout.flush()
    os._exit(0)  # the instance lives on in its own processes, so nothing has to be undone here


@cli.command()
@namespace_option
@one_sentence
def shutdown(namespace: str | None) -> int:
    """End the running instance: drain, then clear."""
    from ..instance.starting import end_instance

    settings = distributed(namespace, "shutdown")
    interrupts.first = "\nThe instance drains on without this command: `mqserve shutdown` waits for it again."
    run_loop(end_instance(settings, click.echo))
    click.echo("Done.")
    return 0


@cli.command()
@namespace_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")
@one_sentence
def status(namespace: str | None, as_json: bool) -> int:
    """Show nodes, proxies, backends and replicas, and what is wrong with them."""
    from .status import show_status

    settings = distributed(namespace, "status")

    async def show() -> int:
        code = await show_status(settings, as_json=as_json)
        await end_if_closing_hangs(code)
        return code

    return run_loop(show())


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
@with_options(kept_options)
@one_sentence
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
    return run_loop(run_node(distributed(namespace, "node"), options, metrics_host, metrics_port, keeper))


@cli.command()
@namespace_option
@with_options(kept_options)
@one_sentence
def controller(namespace: str | None, **kept: Any) -> int:
    """Run a controller; it starts a detached instance if there is none."""
    from ..instance.roles import run_controller

    return run_loop(run_controller(distributed(namespace, "controller"), _own_id("controller"), _kept(**kept)))


@cli.command(hidden=True)
@namespace_option
@with_options(kept_options)
@one_sentence
def supervisor(namespace: str | None, **kept: Any) -> int:
    """Keep a detached instance's controller and node running; `mqserve start` starts it."""
    from ..instance.supervisor import run_supervisor

    if (keeper := _kept(**kept)) is None:
        raise MQServeError("`mqserve supervisor` is started by `mqserve start`")
    return run_loop(run_supervisor(distributed(namespace, "supervisor"), keeper))


@cli.command()
@namespace_option
@with_options(http_options[:2] + http_options[4:])
@click.option("--proxy-id", hidden=True)
@click.option("--node-id", hidden=True, default="")
@click.option("--fd", hidden=True, type=int)
@click.option("--common-fd", hidden=True, type=int)
@one_sentence
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
    settings = distributed(namespace, "proxy")
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
@one_sentence
def replica(backend: str, namespace: str | None, replica_id: str | None, node_id: str) -> int:
    """Run one replica of BACKEND by hand: the controller configures and shows it, but does not count it."""
    from ..replicas.main import ReplicaOptions
    from ..replicas.main import main as run_replica

    options = ReplicaOptions(backend, replica_id or f"{backend}#{secrets.token_hex(3)}", node_id, external=replica_id is None)
    leave_now(run_replica(distributed(namespace, "replica"), options))


@cli.command()
@namespace_option
@click.option("--print", "is_print", is_flag=True, help="Print it; mqserve itself changes no server's users.")
@click.option(
    "--format", "what", type=click.Choice(FORMATS), default="commands", show_default=True,
    help="Lines for a shell, definitions for RabbitMQ, or an ACL file for Redis.",
)  # fmt: skip
@click.option("--vhost", default="/", show_default=True, help="RabbitMQ's virtual host.")
@one_sentence
def setup(namespace: str | None, is_print: bool, what: str, vhost: str) -> int:
    """Show the users and rights that RabbitMQ and Redis should have for an instance."""
    if not is_print:
        raise MQServeError("mqserve changes no server's users: say `mqserve setup --print`, and run what that prints")
    click.echo(print_setup(check_namespace(namespace or "mqserve"), what, vhost, os.environ))
    return 0


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
