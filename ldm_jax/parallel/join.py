"""How processes that are started by hand meet, before JAX joins them.

JAX ends a program by a signal where the port of process 0 is in use or a process never
comes, and says nothing until then. Here process 0 listens at the same port first: the
others give their numbers, every process says who is missing, and all go on at once.
"""

import asyncio
import contextlib
import errno
import logging
import re
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from ldm_jax.config.launch import Launch
from ldm_jax.types import InputError

SECONDS_BETWEEN_NOTICES = 15
SECONDS_BETWEEN_TRIES = 0.5
SECONDS_TO_GREET = 5
MAX_LINE = 2**16
"""Bytes of a line: the numbers of the processes that are missing."""


def meet(launch: Launch) -> None:
    """Wait until every process of a launch by hand is there.

    Raises:
      InputError: If the port of process 0 cannot be used, two processes have the same
        number, or some do not come within the launch's `join_timeout`.
    """
    if launch.num_processes in (None, 1):
        return
    wait = _Host(launch) if launch.process_id == 0 else _Guest(launch)
    asyncio.run(_within(launch.join_timeout, wait.run(), wait.missing))


async def _within(
    timeout: int, work: Coroutine[Any, Any, None], missing: Callable[[], str]
) -> None:
    task, waited = asyncio.create_task(work), 0
    try:
        while waited < timeout:
            seconds = min(SECONDS_BETWEEN_NOTICES, timeout - waited)
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if done:
                return task.result()
            waited += seconds
            if waited < timeout:
                logging.getLogger(__name__).warning(
                    "--coordinator: %s (%d s of %d s)", missing(), waited, timeout
                )
        raise InputError(
            f"--coordinator: {missing()} in {timeout} s; try to start every process, "
            "or a longer --join-timeout"
        )
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, InputError):
            await task


def _names(processes: list[int]) -> str:
    one = "process" if len(processes) == 1 else "processes"
    return f"{one} {', '.join(map(str, processes))}"


class _Host:
    """Process 0: counts the others."""

    def __init__(self, launch: Launch) -> None:
        self._where, (_, self._port) = launch.coordinator, launch.address
        self._num = launch.num_processes or 1
        self._guests: dict[int, asyncio.StreamWriter] = {}
        self._open: set[asyncio.StreamWriter] = set()
        self._complete = asyncio.Event()

    def missing(self) -> str:
        """Say who is missing."""
        return f"{_names(self._absent())} did not come to {self._where}"

    def _absent(self) -> list[int]:
        return [i for i in range(1, self._num) if i not in self._guests]

    async def run(self) -> None:
        """Listen until all are there, and tell them so."""
        server = await asyncio.start_server(
            self._greet, sock=_listen(self._port), limit=MAX_LINE
        )
        try:
            await self._complete.wait()
        except asyncio.CancelledError:
            self._say(f"no {self.missing()} in time")
            raise
        else:
            self._say("go")
        finally:
            server.close()
            # They close first, so that no half-closed connection keeps the port.
            for _ in range(SECONDS_TO_GREET * 100):
                if not self._open:
                    break
                await asyncio.sleep(0.01)
            for writer in self._open:
                writer.transport.abort()
            await asyncio.sleep(0.01)

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Take a process in, and wait until it leaves; send a stranger away."""
        this = None
        self._open.add(writer)
        with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            line = await asyncio.wait_for(reader.readline(), SECONDS_TO_GREET)
            found = re.fullmatch(rb"ldm ([0-9]{1,9})/([0-9]{1,9})\n", line)
            if found is not None:
                this = self._take_in(int(found[1]), int(found[2]), writer)
            while this is not None and await reader.read(MAX_LINE):
                pass
        if this is not None:
            del self._guests[this]
            self._tell()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self._open.discard(writer)

    def _take_in(self, this: int, num: int, writer: asyncio.StreamWriter) -> int | None:
        if num != self._num:
            reply = f"--num-processes is {num} there and {self._num} on process 0"
        elif this not in self._absent():
            reply = f"--process-id {this} is taken, wanted one of {self._absent()}"
        else:
            self._guests[this] = writer
            self._tell()
            return this
        writer.write(f"no {reply}\n".encode())
        return None

    def _tell(self) -> None:
        if self._absent():
            self._say(f"wait {self.missing()}")
        else:
            self._complete.set()

    def _say(self, line: str) -> None:
        for writer in self._guests.values():
            writer.write(f"{line}\n".encode())


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        what = "is in use on this machine" if in_use else f"cannot be used ({error})"
        raise InputError(
            f"--coordinator: port {port} {what}, wanted a free one; try another on all "
            "processes"
        ) from None


class _Guest:
    """Another process: finds process 0, and waits for its word."""

    def __init__(self, launch: Launch) -> None:
        self._where, self._address = launch.coordinator, launch.address
        self._greeting = f"ldm {launch.process_id}/{launch.num_processes}\n"
        self._missing = ""

    def missing(self) -> str:
        """Say who is missing."""
        return self._missing

    async def run(self) -> None:
        """Try until process 0 answers, and wait until it says that all are there."""
        while True:
            self._missing = f"process 0 did not answer at {self._where}"
            try:
                if await self._ask():
                    return
            except InputError:
                raise
            except (OSError, ValueError):  # nobody there, or a stranger
                pass
            await asyncio.sleep(SECONDS_BETWEEN_TRIES)

    async def _ask(self) -> bool:
        reader, writer = await asyncio.open_connection(*self._address, limit=MAX_LINE)
        try:
            writer.write(self._greeting.encode())
            while line := (await reader.readline()).decode("ascii").strip():
                word, _, rest = line.partition(" ")
                if word == "go":
                    return True
                if word == "no":
                    raise InputError(f"--coordinator: {rest}")
                self._missing = rest if word == "wait" else self._missing
            return False
        finally:
            writer.close()
