"""The web page that samples a run: limits, command line, server and browser."""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import math
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import NamedTuple

import pytest
from PIL import Image

from ldm_jax.cli.sample import parse_sample
from ldm_jax.cli.serve import parse
from ldm_jax.config import to_json
from ldm_jax.sampling.request import MAX_SEED, command_line
from ldm_jax.tools.demo import server
from ldm_jax.tools.demo.controls import (
    MAX_PROMPT_LENGTH,
    Limits,
    check_controls,
    request_of,
    sampling_of,
)
from ldm_jax.tools.demo.queue import RenderQueue
from ldm_jax.tools.demo.server import (
    MAX_HEADER,
    Gate,
    address_of,
    make_server,
    open_socket,
    own_names,
)
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support import tiny
from tests.support.browser import CHROMIUM, open_tab
from tests.support.commands import (
    LDM,
    ROOT,
    TIMEOUT,
    environment,
    error_line,
    ldm,
    write_run,
)
from tests.support.models import config_of
from tests.support.pretrained import with_condition

CLASSES = Limits(max_steps=9, max_images=4, num_classes=10, reads_text=False)
TEXTS = Limits(max_steps=9, max_images=4, num_classes=0, reads_text=True)
GIVEN = {
    "seed": 7,
    "num_images": 3,
    "steps": 5.0,
    "guidance_scale": 2.5,
    "label": 4,
    "prompt": "a 'red' $cross",
    "negative_prompt": "-blue",
}
needs_nicegui = pytest.mark.skipif(
    importlib.util.find_spec("nicegui") is None, reason="the extra browse is missing"
)


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(tiny.get_config()))
    return folder


def parsed(*args):
    request, _ = parse([str(arg) for arg in args])
    return request


@pytest.mark.parametrize(
    "name, values",
    [
        ("seed", [-1, MAX_SEED - 1, 2**70, 1.5, math.nan, math.inf, "7", None, True]),
        ("num_images", [0, 5, 10**9, "1", [1], None]),
        ("steps", [0, 10, 2.5, -3, math.inf, {"value": 3}]),
        ("guidance_scale", [-0.1, 16, math.nan, math.inf, "2", None, False]),
        ("label", [-1, 10, 3.5, None, "../../etc/passwd"]),
    ],
)
def test_control_values_out_of_range_are_refused(name, values):
    assert check_controls(GIVEN, CLASSES).label == 4
    for value in values:
        with pytest.raises(InputError, match=r"got .*, wanted [01] to "):
            check_controls({**GIVEN, name: value}, CLASSES)
    with pytest.raises(InputError, match="got NoneType"):
        check_controls({k: v for k, v in GIVEN.items() if k != name}, CLASSES)


def test_prompts_are_made_one_line_and_long_ones_are_refused():
    controls = check_controls({**GIVEN, "prompt": "a\n red\x00\tcross "}, TEXTS)
    assert controls.prompt == "a red cross" and controls.label is None
    with pytest.raises(InputError, match="got 1001 letters, wanted at most 1000"):
        check_controls({**GIVEN, "prompt": "a" * (MAX_PROMPT_LENGTH + 1)}, TEXTS)
    with pytest.raises(InputError, match="negative prompt: got list, wanted a text"):
        check_controls({**GIVEN, "negative_prompt": ["a"]}, TEXTS)


@pytest.mark.parametrize("limits", [CLASSES, TEXTS])
@pytest.mark.parametrize("num_images", [1, 3])
def test_command_of_the_page_requests_the_selected_controls(
    workdir, limits, num_images
):
    settings = parsed(workdir, "--sampler", "unipc", "--spacing", "karras").settings
    controls = check_controls({**GIVEN, "num_images": num_images}, limits)
    expected = sampling_of(controls, settings), request_of(controls)
    words = shlex.split(command_line(*expected))
    assert words[:2] == ["ldm", "sample"]
    assert parse_sample(words[2:])[:2] == expected


def test_render_queue_runs_one_page_and_limits_those_that_wait():
    async def count():
        queue, inside, most = RenderQueue(3), 0, 0
        refused = []

        async def draw():
            nonlocal inside, most
            try:
                async with queue.turn():
                    inside += 1
                    most = max(most, inside)
                    await asyncio.sleep(0)
                    inside -= 1
            except InputError as error:
                refused.append(str(error))

        await asyncio.gather(*(draw() for _ in range(10)))
        await draw()  # the queue is free again
        return most, refused

    most, refused = asyncio.run(count())
    assert most == 1 and 0 < len(refused) < 10
    assert refused[0] == "busy: 3 other pages wait for their images; try again"


def passes_gate(scope):
    """Return whether the gate of a local page passes a request."""
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope)

    async def send(message):
        sent.append(message)

    asyncio.run(Gate(app, ("127.0.0.1", "localhost", "::1"))(scope, None, send))
    return bool(passed)


@pytest.mark.parametrize(
    "kind, method, host, origin, may",
    [
        ("http", "GET", "127.0.0.1:7860", "", True),
        ("http", "GET", "LOCALHOST", "", True),
        ("http", "HEAD", "[::1]:7860", "", True),
        ("http", "POST", "127.0.0.1:7860", "", False),
        ("http", "PUT", "127.0.0.1:7860", "", False),
        ("http", "GET", "evil.example:7860", "", False),
        ("http", "GET", "", "", False),
        ("websocket", "", "127.0.0.1:7860", "http://127.0.0.1:7860", True),
        ("websocket", "", "127.0.0.1:7860", "http://evil.example", False),
        ("websocket", "", "127.0.0.1:7860", "null", False),
        ("lifespan", "", "", "", True),
    ],
)
def test_gate_passes_only_read_requests_to_local_hosts(kind, method, host, origin, may):
    headers = [(b"host", host.encode())]
    headers += [(b"origin", origin.encode())] if origin else []
    assert passes_gate({"type": kind, "method": method, "headers": headers}) == may


def test_server_listens_on_localhost_by_default(workdir):
    _, flags = parse([str(workdir), "--port", "0"])
    with open_socket(flags.host, flags.port) as open_port:
        host, port = open_port.getsockname()
        assert (
            host == "127.0.0.1" and address_of(open_port) == f"http://127.0.0.1:{port}/"
        )
        with pytest.raises(InputError, match=f"--port: {port} is in use.* --port 0"):
            open_socket(flags.host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.9.8.7", "::1"])
def test_every_loopback_address_takes_its_own_names_alone(host):
    try:
        with open_socket(host, 0) as taken:
            names = own_names(taken)
    except InputError:
        pytest.skip(f"this machine has no {host}")
    assert {host, "localhost"} <= set(names) and "evil.example" not in names


def test_an_address_of_all_takes_any_name():
    with open_socket("0.0.0.0", 0) as taken:
        assert own_names(taken) == ()


def test_few_pages_are_open_at_once(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    headers = [(b"host", b"localhost")]
    scope = {"type": "websocket", "method": "", "headers": headers}

    async def count():
        sent, leave = [], asyncio.Event()

        async def app(scope, receive, send):
            await leave.wait()

        async def send(message):
            sent.append(message)

        gate = Gate(app, ("localhost",))
        pages = [asyncio.create_task(gate(scope, None, send)) for _ in range(3)]
        await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(*pages)
        return sent, gate.num_pages

    assert asyncio.run(count()) == ([{"type": "websocket.close", "code": 1008}], 0)


class Answering(NamedTuple):
    """A server that answers with a word."""

    address: tuple[str, int]
    """Where its limits are short."""
    patient: tuple[str, int]
    """Where a client has minutes, for those that a busy machine may not fail."""
    asked: threading.Event
    """Set by the first request that came whole."""
    connections: set
    """Those that are open."""


@pytest.fixture
def answering(monkeypatch):
    """Serve a page of one word, with short limits at one of two addresses."""
    monkeypatch.setattr(server, "SECONDS_TO_ASK", 0.5)
    monkeypatch.setattr(server, "SECONDS_TO_ANSWER", 1.0)
    bounded, asked = server._bounded_protocol(), threading.Event()

    async def app(scope, receive, send):
        asked.set()
        size = 10**8 if scope["path"] == "/large" else 4
        head = {"type": "http.response.start", "status": 200, "headers": []}
        await send(head)
        await send({"type": "http.response.body", "body": b"word" * (size // 4)})

    with open_socket("127.0.0.1", 0) as short, open_socket("127.0.0.1", 0) as long:
        address, patient = short.getsockname(), long.getsockname()

        class Bounded(bounded):
            def set_limit(self, seconds):
                limited = seconds is not None and self.server == patient
                super().set_limit(float(TIMEOUT) if limited else seconds)

        monkeypatch.setattr(server, "_bounded_protocol", lambda: Bounded)
        running = make_server(app, short)
        monkeypatch.setattr(running.config, "lifespan", "off")
        thread = threading.Thread(target=running.run, args=([short, long],))
        thread.start()
        yield Answering(address, patient, asked, running.server_state.connections)
        running.should_exit = True
        thread.join()


def spoken(address, *words):
    """Say words to a server; return what it says until it hangs up, and how much."""
    heard, said = b"", 0
    with socket.create_connection(address, timeout=60) as wire:
        with contextlib.suppress(ConnectionError):
            for word in words:
                wire.sendall(word)
                said += len(word)
        with contextlib.suppress(ConnectionError):
            while part := wire.recv(2**16):
                heard += part
    return heard, said


def asks(path):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode()


@needs_nicegui
def test_an_endless_header_is_refused_after_few_bytes(answering):
    address = answering.address
    heard, said = spoken(address, asks("/"), b"X: ", *[b"x" * 1024] * 100_000)
    assert said < 2**25  # what the system's own buffers take, and no more
    assert not heard or heard.startswith(b"HTTP/1.1 400 ")
    heard, _ = spoken(address, asks("/"), b"X: ", b"x" * MAX_HEADER)
    assert not heard or heard.startswith(b"HTTP/1.1 400 ")


@needs_nicegui
@pytest.mark.parametrize(
    "words",
    [
        [],
        [b"GET"],
        [asks("/")],
        [asks("/"), b"Content-Length: 9\r\n\r\n", b"x"],
        [asks("/"), b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhel"],
        [asks("/"), b"\r\n", asks("/")],
    ],
)
def test_a_request_that_never_comes_whole_loses_its_connection(answering, words):
    half = threading.Thread(target=spoken, args=(answering.address, *words))
    half.start()
    heard, _ = spoken(answering.patient, asks("/"), b"Connection: close\r\n\r\n")
    assert b"word" in heard  # others are answered meanwhile
    half.join(60)
    assert not half.is_alive()


@needs_nicegui
def test_an_answer_that_nobody_reads_loses_its_connection(answering):
    with socket.create_connection(answering.address, timeout=60) as wire:
        wire.sendall(asks("/large") + b"\r\n")
        assert answering.asked.wait(TIMEOUT)
        until = time.monotonic() + TIMEOUT
        while answering.connections:
            assert time.monotonic() < until, "the connection stays open"
            time.sleep(0.01)
        heard = 0
        with contextlib.suppress(ConnectionError):
            while part := wire.recv(2**16):
                heard += len(part)
    assert heard < 10**8


def test_bad_serve_arguments_are_refused(workdir, tmp_path, monkeypatch):
    cases = (
        ((tmp_path,), r"WORKDIR: .* is not a run \(no config.json\); try"),
        ((tmp_path / "none",), "WORKDIR: .* is not a run"),
        ((), "WORKDIR: not given"),
        ((workdir, "--port", "70000"), "--port: got 70000, wanted 0 to 65535"),
        ((workdir, "--port", "x"), "--port: got 'x', wanted a whole number"),
        ((workdir, "--max-steps", "0"), "--max-steps: got 0, wanted 1 to 1000"),
        ((workdir, "--max-images", "65"), "--max-images: got 65, wanted 1 to 64"),
        ((workdir, "--sampler", "dim"), "--sampler: got 'dim'.* did you mean ddim"),
        ((workdir, "--spacing", "ldm"), "--spacing: got 'ldm'.*wanted trailing"),
        ((workdir, "--share"), "--share: no such flag"),
    )
    for args, message in cases:
        with pytest.raises(InputError, match=message):
            parsed(*args)
    (workdir / "config.json").write_text(to_json(config_of("low_resolution")))
    with pytest.raises(InputError, match="conditioned on vectors or images"):
        parsed(workdir)
    for host in ("203.0.113.7", "no such host"):
        with pytest.raises(InputError, match=f"--host: got '{host}', wanted an addr"):
            open_socket(host, 0)


def test_missing_nicegui_is_refused_with_its_extra(workdir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nicegui: not installed.* try .*browse"):
        parsed(workdir)


@needs_nicegui
def test_serve_on_a_port_in_use_is_refused(workdir):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = error_line(ldm("serve", workdir, "--port", port))
    assert line.startswith(f"ldm serve: error: --port: {port} is in use")


def test_serve_help_imports_neither_jax_nor_nicegui():
    script = (
        "import sys; from ldm_jax.cli.serve import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit('jax' in sys.modules or 'nicegui' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1" in done.stdout and "--sampler" in done.stdout


@contextlib.contextmanager
def page_of(config, folder):
    """Serve the page of an untrained run; yield its folder and address."""
    write_run(config, folder)
    flags = ("--port", "0", "--max-steps", "9", "--max-images", "4")
    with subprocess.Popen(
        [sys.executable, *LDM, "serve", str(folder), *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = iter(process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("http")), "")
        assert line, "the page was not served"
        try:
            yield folder, line.split()[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with page_of(tiny.get_config(), tmp_path_factory.mktemp("browse") / "tiny") as page:
        yield page


def status_of(request):
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@needs_nicegui
def test_server_refuses_files_outside_the_page(served):
    _, url = served
    page = status_of(url)[1].decode()
    files = re.search(r"/_nicegui/[\d.]+/", page).group()
    passwd = "%2e%2e/" * 12 + "etc/passwd"
    for path in (
        "etc/passwd",
        passwd,
        f"{files}static/{passwd}"[1:],
        f"{files}resources/x/{passwd}"[1:],
        f"{files}esm/vue/{passwd}"[1:],
        f"{files}libraries//etc/passwd"[1:],
        "gradio_api/file=/etc/passwd",
        "docs",
        "openapi.json",
    ):
        status, body = status_of(url + path)
        assert status in (403, 404) and b"root:" not in body, path
    upload = urllib.request.Request(url, data=b"x" * 1000, method="POST")
    assert status_of(upload) == (403, b"not from here\n")
    elsewhere = urllib.request.Request(url, headers={"Host": "evil.example"})
    assert status_of(elsewhere)[0] == 403


STATUS = "document.querySelector('.status')?.innerText ?? ''"
IMAGES = "[...document.querySelectorAll('.images img')].map(x => x.src)"
COMMAND = "document.querySelector('.command code').innerText"


def set_control(knob, value):
    """Return a script that sends a control's value, in or out of its range."""
    found = f"""document.querySelector('[aria-label="{knob}"]').closest('[id^="c"]')"""
    return f"getElement({found}).$emit('update:model-value', {value})"


@needs_nicegui
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_page_of_a_class_model_in_a_browser(served, tmp_path):
    folder, url = served
    with open_tab(tmp_path / "profile") as tab:
        tab.go(url)
        tab.wait(f"({STATUS}).includes('9 steps, ')")
        first = tab.run(IMAGES)
        assert len(set(first)) == 4
        command = tab.run(COMMAND)
        assert f"--workdir {folder} " in command and "--labels 0 --seeds 0-3" in command
        tab.run(set_control("steps", 4))
        tab.wait(f"({STATUS}).includes('4 steps, ')")
        tab.run(set_control("images", 1))
        tab.wait(f"({IMAGES}).length == 1 && ({STATUS}).includes('steps')")
        tab.run(set_control("guidance", 3.5))
        tab.wait(f"({COMMAND}).includes('--guidance-scale 3.5')")
        tab.wait(f"({STATUS}).includes('4 steps, ')")
        image = Image.open(io.BytesIO(base64.b64decode(tab.run(IMAGES)[0][22:])))
        assert image.size == (8, 8)
        assert image.text["seed"] == "0" and image.text["guidance_scale"] == "3.5"
        # The server refuses values that the page never sends.
        tab.run(set_control("steps", 10**6))
        tab.wait(f"({STATUS}).includes('steps: got 1000000, wanted 1 to 9')")
        tab.run(set_control("steps", "'/etc/passwd'"))
        tab.wait(f"({STATUS}).includes('steps: got str, wanted 1 to 9')")
        for width in (390, 1280):
            tab.go(url, width=width)
            tab.wait(f"({STATUS}).includes('9 steps, ')")
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert (
                tab.run(
                    "getComputedStyle(document.querySelector('img')).imageRendering"
                )
                == "pixelated"
            )
        assert all(x.startswith((url, "data:", f"ws{url[4:]}")) for x in tab.requests)
        assert not tab.errors


def write(tab, knob, text):
    """Replace the text of a control."""
    tab.run(f"""document.querySelector('[aria-label="{knob}"]').select()""")
    tab.send("Input.insertText", text=text)


@needs_nicegui
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_page_of_a_text_model_in_a_browser(tmp_path):
    (tmp_path / "words").mkdir()
    write_clip(tmp_path / "words", "sd1")
    config = with_condition(config_of("clip"), tokenizer=str(tmp_path / "words"))
    with (
        page_of(config, tmp_path / "run") as (_, url),
        open_tab(tmp_path / "profile") as tab,
    ):
        tab.go(url)
        tab.wait(f"({STATUS}).includes('Enter a prompt')")
        write(tab, "prompt", "cat")
        tab.wait(f"({STATUS}).includes('9 steps, ')")
        before = tab.run(IMAGES)
        assert len(before) == 4
        write(tab, "prompt", "hello 'cat'")
        tab.wait(f"!({IMAGES}).some(x => {json.dumps(before)}.includes(x))")
        tab.wait(f"({STATUS}).includes('9 steps, ')")
        assert "--prompt" in tab.run(COMMAND) and "hello" in tab.run(COMMAND)
        after = tab.run(IMAGES)
        assert len(after) == 4
        image = Image.open(io.BytesIO(base64.b64decode(after[0][22:])))
        assert image.text["prompt"] == "hello 'cat'"
        write(tab, "prompt", "")
        tab.wait(f"({STATUS}).includes('Enter a prompt')")
        assert not tab.errors
