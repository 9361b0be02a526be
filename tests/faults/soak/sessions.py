"""WebSockets: everything that was said comes back in order, and each session ends with a code that says why."""

import asyncio
import time
from collections.abc import Mapping

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from mqserve.broker.sessions import CloseCode
from tests.faults.soak.backends import ENDED, GOODBYE, REQUEST_TIMEOUT_S
from tests.faults.soak.handle_client import GRACE_S
from tests.faults.soak.ledger import End, Entry, Ledger, told

MESSAGES = 40
PAUSE_S = 0.05
AHEAD = 5  # messages on their way
LARGE = "x" * 100_000  # more than one frame
HANGS_S = REQUEST_TIMEOUT_S + GRACE_S


class WrongEcho(Exception):
    """Something else came back than was said."""


class Talker:
    def __init__(self, urls: Mapping[str, str], ledger: Ledger) -> None:
        self._urls = urls
        self._ledger = ledger

    async def talk(self, entry: Entry) -> None:
        """Runs one session."""
        url = f"{self._urls[entry.proxy].replace('http', 'ws', 1)}/{entry.backend}/{entry.number}"
        try:
            async with connect(url, open_timeout=HANGS_S, compression=None) as socket:
                await self._converse(entry, socket)
        except ConnectionClosed as closed:
            self._end(entry, End.FAILED, str(code_of(closed)))
        except WrongEcho as error:
            self._ledger.findings.append(f"{told(entry)}: {error}")
            self._end(entry, End.FAILED, "wrong echo")
        except InvalidStatus as refused:
            status = refused.response.status_code
            self._end(entry, End.EXPIRED if status == 504 else End.FAILED, str(status))
        except TimeoutError as error:
            self._end(entry, End.HANGING, repr(error))
        except ConnectionRefusedError:
            self._end(entry, End.FAILED, "refused")
        except (OSError, InvalidHandshake):
            self._end(entry, End.FAILED, "reset")

    async def _converse(self, entry: Entry, socket: ClientConnection) -> None:
        """Hears the word of the run, then says everything and hears it again, until the app closes. Raises WrongEcho, ConnectionClosed and
        TimeoutError."""
        entry.words.add(await hear(socket))
        for turn in range(MESSAGES + AHEAD):
            if turn < MESSAGES:
                async with asyncio.timeout(HANGS_S):
                    await socket.send(message_of(entry.number, turn))
            if turn >= AHEAD:
                expected, heard = message_of(entry.number, turn - AHEAD), await hear(socket)
                if heard != expected:
                    raise WrongEcho(f"{heard[:100]!r} came back for {expected[:100]!r}")
            await asyncio.sleep(PAUSE_S)
        await socket.send(GOODBYE)
        try:
            raise WrongEcho(f"{(await hear(socket))[:100]!r} came behind all echoes")
        except ConnectionClosed as closed:
            if code_of(closed) != ENDED:
                raise
        self._end(entry, End.ANSWERED)

    def _end(self, entry: Entry, end: End, detail: str = "") -> None:
        self._ledger.end(entry, end, time.monotonic(), detail)


def message_of(number: int, turn: int) -> str:
    return f"{number} {turn} {LARGE if turn % 20 == 19 else ''}"


async def hear(socket: ClientConnection) -> str:
    async with asyncio.timeout(HANGS_S):
        return str(await socket.recv())


def code_of(closed: ConnectionClosed) -> int:
    """Its close code; 1006 where there was no close."""
    return closed.rcvd.code if closed.rcvd is not None else CloseCode.ABNORMAL
