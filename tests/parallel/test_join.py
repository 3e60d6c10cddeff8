"""How processes that are started by hand find each other."""

import asyncio
import concurrent.futures
import socket
import threading
import time

import pytest

from ldm_jax.config.launch import Launch
from ldm_jax.parallel import join, launch
from ldm_jax.types import InputError
from tests.support.commands import LDM, TIMEOUT, error_line, run


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launched(port, this, *, num=3, timeout=60):
    return Launch(
        coordinator=f"localhost:{port}",
        num_processes=num,
        process_id=this,
        join_timeout=timeout,
    )


def met(*launches):
    """Let processes meet; return what became of each."""

    def end(launch):
        try:
            return join.meet(launch)
        except InputError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(launches)) as threads:
        return list(threads.map(end, launches))


def test_all_go_on_when_the_last_has_come_and_the_port_is_free_again(port):
    assert met(*(launched(port, i) for i in (2, 0, 1))) == [None] * 3
    with join._listen(port):
        pass


def test_every_process_says_who_is_missing_and_ends_in_one_line(
    port, monkeypatch, caplog
):
    counted, take_in, wait = threading.Event(), join._Host._take_in, asyncio.wait

    def count(self, *guest):
        found = take_in(self, *guest)
        counted.set()
        return found

    async def wait_from_then_on(tasks, **kwargs):
        while not counted.is_set():
            await asyncio.sleep(0.01)
        return await wait(tasks, **kwargs)

    # No time passes before process 2 is there, however slow the machine is.
    monkeypatch.setattr(join._Host, "_take_in", count)
    monkeypatch.setattr(asyncio, "wait", wait_from_then_on)
    monkeypatch.setattr(join, "SECONDS_BETWEEN_NOTICES", 1)
    # Process 0 waits less: it would miss process 2 as well after that has left.
    waits = {0: 3, 2: 20}
    found = met(*(launched(port, i, num=5, timeout=x) for i, x in waits.items()))
    missing = f"processes 1, 3, 4 did not come to localhost:{port}"
    # The other process may see the connection end before its own time does.
    ends = [[missing], [missing, f"process 0 did not answer at localhost:{port}"]]
    for line, words in zip(found, ends, strict=True):
        assert any(word in line for word in words) and "\n" not in line, line
    assert "in 3 s; try to start every process" in found[0]
    assert f"{missing} (1 s of 3 s)" in caplog.text


def test_without_process_0_the_others_end_in_one_line(port):
    (line,) = met(launched(port, 1, timeout=1))
    assert f"process 0 did not answer at localhost:{port} in 1 s" in line


def test_a_number_that_is_taken_and_another_count_are_refused(port):
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        host, *twice = (threads.submit(met, launched(port, i)) for i in (0, 1, 1))
        # Which of the two is first, depends on the machine; the other is refused.
        done, _ = concurrent.futures.wait(twice, return_when="FIRST_COMPLETED")
        (other,) = met(launched(port, 2, num=4))
        assert met(launched(port, 2)) == [None]
        assert host.result() == [None]
        found = [line for one in twice for line in one.result()]
    assert len(done) == 1 and None in found
    assert "--coordinator: --process-id 1 is taken, wanted one of [2]" in found
    assert "--num-processes is 4 there and 3 on process 0" in other


def test_strangers_at_the_port_are_sent_away(port, monkeypatch):
    listening, listen = threading.Event(), join._listen

    def listen_and_say_so(port):
        opened = listen(port)
        listening.set()
        return opened

    monkeypatch.setattr(join, "_listen", listen_and_say_so)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        host = threads.submit(met, launched(port, 0, num=2))
        assert listening.wait(TIMEOUT)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"ldm 7/2\n", b"\xff" * 2**17):
            with socket.create_connection(("localhost", port)) as stranger:
                try:
                    stranger.sendall(words)
                    while stranger.recv(1024):
                        pass
                except ConnectionError:
                    pass
        assert met(launched(port, 1, num=2)) == [None]
        assert host.result() == [None]


def test_a_port_in_use_ends_a_command_before_jax_is_asked():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        flags = ("--config", "digits", "--workdir", "nowhere")
        two = ("--coordinator", f"localhost:{port}", "--num-processes", 2)
        line = error_line(run(*LDM, "train", *flags, *two, "--process-id", 0))
    assert f"--coordinator: port {port} is in use on this machine" in line


@pytest.mark.parametrize(
    "address", ["localhost:99999999", "localhost:0", "localhost:²", ":1", "localhost:"]
)
def test_a_port_out_of_range_is_refused(address):
    with pytest.raises(InputError, match=r"coordinator: got .*wanted HOST:PORT"):
        Launch(coordinator=address, num_processes=2, process_id=0)


def test_a_pod_that_stays_incomplete_ends_in_one_line(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(launch.os, "_exit", codes.append)
    with launch._ending_after(1):
        while not codes:
            time.sleep(0.01)
    assert codes == [1]
    line = capsys.readouterr().err.strip()
    assert line.startswith("ldm: error: --pod: the other processes did not all come")
