"""The short form of `make soak`: a few faults under load, and everything reconciles."""

import asyncio
import faulthandler
import io
from pathlib import Path

from rich.console import Console

from tests.faults.soak.__main__ import Options, report, soak
from tests.faults.soak.ledger import End

SHORT = Options(seconds=45, rate=40, faults=4, seed=3, only=("kill -9 a replica", "kill -9 a proxy", "restart RabbitMQ", "restart Redis"))


def test_under_load_and_faults_nothing_accepted_is_lost_and_nothing_is_left_behind(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test: this one starts servers and runs for 45
    told = io.StringIO()
    console = Console(file=told, width=140)
    outcome = asyncio.run(soak(SHORT, tmp_path, console))
    report(outcome, console)
    assert not outcome.findings, told.getvalue()
    assert len(outcome.faults) == SHORT.faults
    assert outcome.ledger.counts()[End.ANSWERED] > SHORT.seconds * SHORT.rate / 3, told.getvalue()
