"""The commands about requests: calls, jobs, schedules and dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..broker.errors import BadValue
from ..broker.jobs import JobState
from ..broker.process.lifeline import run as run_loop
from .endings import interrupts, one_sentence
from .options import distributed, json_option, namespace_option, with_options

if TYPE_CHECKING:
    from .jobs import Filter


@click.command()
@click.argument("endpoint")
@namespace_option
@click.option(
    "--data", default="null", metavar="JSON|@FILE", help="What the handler gets as request.data; @- reads it from standard input."
)
@click.option("--later", is_flag=True, help="Send a job, and show its progress until it is done. Ctrl-C leaves it running.")
@click.option("--tag", default="", help="A word by which `mqserve jobs` finds it, with --later.")
@click.option("--delay", type=float, default=0.0, metavar="SECONDS", help="It does not begin before, with --later.")
@one_sentence
def call(endpoint: str, namespace: str | None, data: str, later: bool, tag: str, delay: float) -> int:
    """Call ENDPOINT and print its answer."""
    from .call import call_endpoint, call_later

    settings = distributed(namespace, "call")
    if not later and (tag or delay):
        raise BadValue("only a job has a tag or a delay: add --later, or leave out --tag and --delay")
    if later:
        return call_later(settings, endpoint, data, interrupts, tag=tag, delay_s=delay)
    return call_endpoint(settings, endpoint, data)


@click.group()
def jobs() -> None:
    """List, show, watch, cancel, retry and purge jobs, the requests that are kept until they are done."""


filter_options = [
    click.option("--backend", default="", help="Only jobs of this backend."),
    click.option("--tag", default="", help="Only jobs with this tag."),
    click.option(
        "--state",
        "states",
        multiple=True,
        type=click.Choice([state.value for state in JobState]),
        help="Only jobs in this state; may be given again.",
    ),
]
job_selection_options = [
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    *filter_options,
    click.option("--all", "everything", is_flag=True, help="All jobs that the command applies to."),
    click.option("--yes", is_flag=True, help="Required for more than 10 jobs that are not named by their ids."),
]


def _filter(backend: str, tag: str, states: tuple[str, ...]) -> Filter:
    from .jobs import Filter

    return Filter(backend, tag, tuple(map(JobState, states)))


@jobs.command("list")
@with_options(filter_options)
@namespace_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The largest number to list, latest first.")
@json_option
@one_sentence
def list_jobs(namespace: str | None, limit: int, as_json: bool, **filter: Any) -> int:
    """List jobs."""
    from . import jobs

    return run_loop(jobs.list_jobs(distributed(namespace, "jobs list"), _filter(**filter), limit, as_json=as_json))


@jobs.command("show")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@namespace_option
@json_option
@one_sentence
def show_jobs(ids: tuple[str, ...], namespace: str | None, as_json: bool) -> int:
    """Show all that is known of jobs, with their runs and events; of a group, how many of its jobs have ended."""
    from . import jobs

    return run_loop(jobs.show_jobs(distributed(namespace, "jobs show"), ids, as_json=as_json))


@jobs.command("watch")
@click.argument("job_id", metavar="[ID]", default="")
@with_options(filter_options)
@namespace_option
@click.option("--limit", type=click.IntRange(1), default=30, show_default=True, help="The largest number of jobs to watch without an ID.")
@json_option
@one_sentence
def watch_jobs(job_id: str, namespace: str | None, limit: int, as_json: bool, **filter: Any) -> int:
    """Show what happens to a job until it has ended; without ID, what happens to the latest jobs."""
    settings = distributed(namespace, "jobs watch")
    if job_id:
        from .call import watch_by_id

        if any(filter.values()):
            raise BadValue("a job that is named by its id needs no --backend, --tag or --state: leave out the one or the others")
        return watch_by_id(settings, job_id, interrupts, as_json=as_json)
    from . import jobs

    return run_loop(jobs.watch_jobs(settings, _filter(**filter), limit, as_json=as_json))


@jobs.command("cancel")
@with_options(job_selection_options)
@namespace_option
@one_sentence
def cancel_jobs(ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None, **filter: Any) -> int:
    """Cancel jobs: those that wait never run. The id of a group stands for all its jobs."""
    from . import jobs

    selection = jobs.Selection.read(ids, _filter(**filter), everything=everything)
    return run_loop(jobs.cancel_jobs(distributed(namespace, "jobs cancel"), selection, yes=yes))


@jobs.command("retry")
@with_options(job_selection_options)
@namespace_option
@one_sentence
def retry_jobs(ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None, **filter: Any) -> int:
    """Send jobs that have ended again, as new ones; without ids, those that failed, were cancelled or expired."""
    from . import jobs

    selection = jobs.Selection.read(ids, _filter(**filter), everything=everything)
    return run_loop(jobs.retry_jobs(distributed(namespace, "jobs retry"), selection, yes=yes))


@jobs.command("purge")
@with_options(job_selection_options)
@namespace_option
@one_sentence
def purge_jobs(ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None, **filter: Any) -> int:
    """Forget jobs that have ended, with their results."""
    from . import jobs

    selection = jobs.Selection.read(ids, _filter(**filter), everything=everything)
    return run_loop(jobs.purge_jobs(distributed(namespace, "jobs purge"), selection, yes=yes))


@click.group()
def schedules() -> None:
    """List, show, pause, resume, delete and run schedules, which send jobs at the times of a cron expression."""


names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...")


@schedules.command("list")
@namespace_option
@json_option
@one_sentence
def list_schedules(namespace: str | None, as_json: bool) -> int:
    """List schedules, with the next and the last time of each."""
    from .schedules import list_schedules

    return run_loop(list_schedules(distributed(namespace, "schedules list"), as_json=as_json))


@schedules.command("show")
@names_argument
@namespace_option
@json_option
@one_sentence
def show_schedules(names: tuple[str, ...], namespace: str | None, as_json: bool) -> int:
    """Show schedules in full: the next five times, and what their jobs are like."""
    from .schedules import show_schedules

    return run_loop(show_schedules(distributed(namespace, "schedules show"), names, as_json=as_json))


@schedules.command("pause")
@names_argument
@namespace_option
@one_sentence
def pause_schedules(names: tuple[str, ...], namespace: str | None) -> int:
    """Let schedules fire no more until they are resumed."""
    from .schedules import pause_schedules

    return run_loop(pause_schedules(distributed(namespace, "schedules pause"), names))


@schedules.command("resume")
@names_argument
@namespace_option
@one_sentence
def resume_schedules(names: tuple[str, ...], namespace: str | None) -> int:
    """Let schedules fire again, from now on."""
    from .schedules import resume_schedules

    return run_loop(resume_schedules(distributed(namespace, "schedules resume"), names))


@schedules.command("delete")
@names_argument
@namespace_option
@one_sentence
def delete_schedules(names: tuple[str, ...], namespace: str | None) -> int:
    """Delete schedules; the jobs that they sent stay."""
    from .schedules import delete_schedules

    return run_loop(delete_schedules(distributed(namespace, "schedules delete"), names))


@schedules.command("run")
@click.argument("name")
@namespace_option
@one_sentence
def run_schedule(name: str, namespace: str | None) -> int:
    """Send a job of NAME now, beside its times, also while it is paused."""
    from .schedules import run_schedule

    return run_schedule(distributed(namespace, "schedules run"), name)


@click.group()
def dead() -> None:
    """List, show, retry and drop dead letters, the messages that were set aside. BACKEND is @endpoints for messages that were published to
    an endpoint and got no further."""


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
@one_sentence
def list_dead(backend: str, namespace: str | None, limit: int, as_json: bool) -> int:
    """List the dead letters of BACKEND."""
    from . import dead as letters

    return run_loop(letters.list_dead(distributed(namespace, "dead list"), backend, limit, as_json=as_json))


@dead.command("show")
@click.argument("backend")
@click.argument("message_id", metavar="ID")
@namespace_option
@json_option
@one_sentence
def show_dead(backend: str, message_id: str, namespace: str | None, as_json: bool) -> int:
    """Show all that is known of one dead letter."""
    from . import dead as letters

    return run_loop(letters.show_dead(distributed(namespace, "dead show"), backend, message_id, as_json=as_json))


@dead.command("retry")
@with_options(selection_options)
@namespace_option
@one_sentence
def retry_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Send dead letters to BACKEND again, under their ids and as if they had never run."""
    from . import dead as letters

    selection = letters.Selection.read(ids, everything)
    return run_loop(letters.retry_dead(distributed(namespace, "dead retry"), backend, selection, yes=yes))


@dead.command("drop")
@with_options(selection_options)
@namespace_option
@one_sentence
def drop_dead(backend: str, ids: tuple[str, ...], everything: bool, yes: bool, namespace: str | None) -> int:
    """Drop dead letters of BACKEND for good."""
    from . import dead as letters

    selection = letters.Selection.read(ids, everything)
    return run_loop(letters.drop_dead(distributed(namespace, "dead drop"), backend, selection, yes=yes))
