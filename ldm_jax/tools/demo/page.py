"""The page: knobs, the images they make, and the command that makes them too."""

import base64
import logging
import random
import time
from typing import Any

from fastapi import FastAPI
from nicegui import Client, background_tasks, run, ui

from ldm_jax.sampling.request import MAX_SEED, command_line
from ldm_jax.tools.demo.controls import (
    MAX_LETTERS,
    MAX_SCALE,
    Controls,
    check_controls,
    request_of,
    sampling_of,
)
from ldm_jax.tools.demo.queue import RenderQueue
from ldm_jax.tools.demo.renderer import Drawn, Renderer, doubts, draw, initial_controls
from ldm_jax.tools.demo.style import PRIMARY, STYLE
from ldm_jax.types import InputError

MOST_WAITING = 8
SIDE = 560
"""Pixels of the screen that the images take at most, along a side."""


def make_page(renderer: Renderer) -> FastAPI:
    """Make what is served: one page, and the library's own files behind it.

    Args:
      renderer: Draws what is wished for on the page.

    Returns:
      An ASGI application.
    """
    queue = RenderQueue(MOST_WAITING)

    @ui.page("/")
    def show(client: Client) -> None:
        ui.add_css(STYLE)
        ui.colors(primary=PRIMARY)
        desk = Desk(renderer, queue)
        client.on_delete(desk.close)
        ui.timer(0.0, desk.change, once=True)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        app,
        title=f"{_name(renderer)} - ldm_jax",
        favicon="🖼",
        dark=None,  # as the reader's machine is
        tailwind=False,
        message_history_length=0,  # images are not kept to be sent again
        show_welcome_message=False,
    )
    return app


def _details(value: Any) -> str:
    """Write a slider's value, whatever was sent for it."""
    return f"{value:g}" if isinstance(value, int | float) else "?"


def _name(renderer: Renderer) -> str:
    return str(renderer.pipeline.settings.workdir).rstrip("/").rpartition("/")[2]


class Desk:
    """One reader's page.

    What its knobs say is drawn in the background, image by image. A knob that moves
    meanwhile puts a newer wish in the place of the one that is being drawn.
    """

    def __init__(self, renderer: Renderer, queue: RenderQueue) -> None:
        """Lay the page out, in the page that is being built."""
        self._renderer, self._queue = renderer, queue
        self._knobs: dict[str, Any] = {}
        self._changed = self._drawing = self._closed = False
        with ui.element("main").classes("desk"):
            self._lay_title()
            with ui.element("section").classes("card knobs"):
                self._lay_knobs(initial_controls(renderer))
            with ui.element("section").classes("card shown"):
                self._status = ui.label().classes("status").props("role=status")
                self._pictures = ui.element("div").classes("pictures")
            with ui.element("section").classes("card command"):
                with ui.element("code"):
                    self._command = ui.label()
                copy = ui.button(icon="content_copy")
                copy.props("flat dense round aria-label='copy the command'")
                copy.on_click(lambda: ui.clipboard.write(self._command.text))
        self._cells: list[tuple[Any, Any, Any]] = []

    def close(self) -> None:
        """Draw nothing more: the reader is gone."""
        self._closed = True

    def change(self) -> None:
        """Draw what the knobs say now, as soon as it may be."""
        self._changed = True
        if not self._drawing:
            self._drawing = True
            background_tasks.create(self._work())

    async def _work(self) -> None:
        try:
            while self._changed and not self._closed:
                self._changed = False
                await self._draw_or_report()
        finally:
            self._drawing = False

    async def _draw_or_report(self) -> None:
        try:
            values = {name: knob.value for name, knob in self._knobs.items()}
            await self._draw(check_controls(values, self._renderer.limits))
        except InputError as error:
            self._report(str(error), wrong=True)
        except Exception as error:  # what a reader did must not end the page
            logging.getLogger(__name__).exception("an image could not be drawn")
            self._report(f"not drawn: {type(error).__name__}; see the log", wrong=True)

    async def _draw(self, controls: Controls) -> None:
        if self._renderer.limits.reads_text and not controls.prompt:
            self._report("Write what is to be drawn.")
            return
        images = draw(self._renderer, controls)
        seconds = 0.0
        for i in range(controls.num_images):
            async with self._queue.take():
                if self._changed or self._closed:
                    return
                begun = time.perf_counter()
                drawn = await run.io_bound(next, images, None)
                seconds += time.perf_counter() - begun
            if drawn is None or self._closed:
                return
            if i == 0:
                self._lay_cells(controls.num_images)
                settings = sampling_of(controls, self._renderer.pipeline.settings)
                self._command.text = command_line(settings, request_of(controls))
                for image, _, _ in self._cells:
                    image.classes(add="old")
            self._show(i, drawn)
        each = seconds / controls.num_images
        details = [f"{controls.steps} steps, {each:.2f} s an image"]
        self._report(
            "; ".join(
                details + [f"the text {x}" for x in doubts(self._renderer, controls)]
            )
        )

    def _report(self, text: str, *, wrong: bool = False) -> None:
        if not self._closed:
            self._status.text = text
            self._status.classes(replace="status wrong" if wrong else "status")

    def _show(self, i: int, drawn: Drawn) -> None:
        image, caption, link = self._cells[i]
        source = f"data:image/png;base64,{base64.b64encode(drawn.png).decode()}"
        details = f"seed {drawn.seed}"
        caption.text = details
        image.props["src"], image.props["alt"] = source, details
        image.classes(remove="old")
        link.props["href"], link.props["download"] = source, f"{drawn.seed}.png"
        image.update()
        link.update()

    def _lay_cells(self, num: int) -> None:
        """Make room for as many images as there will be."""
        if num == len(self._cells):
            return
        columns = next(n for n in range(1, num + 1) if n * n >= num)
        self._pictures.style(
            f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); "
            f"max-width: {SIDE}px"
        )
        self._pictures.clear()
        self._cells = []
        with self._pictures:
            for _ in range(num):
                with ui.element("figure"):
                    image = ui.element("img")
                    with ui.element("figcaption"):
                        caption = ui.label()
                        with ui.element("a") as link:
                            ui.label("save")
                self._cells.append((image, caption, link))

    def _lay_title(self) -> None:
        pipeline = self._renderer.pipeline
        step = f"checkpoint {pipeline.run.step}, " if pipeline.run.step else ""
        with ui.element("header").classes("title"):
            with ui.element("h1"):
                ui.label(_name(self._renderer))
            with ui.element("p"):
                ui.label(f"{step}sampler {pipeline.settings.sampler}")

    def _lay_knobs(self, first: Controls) -> None:
        limits = self._renderer.limits
        if limits.num_classes:
            names = enumerate(self._renderer.names)
            options = {i: n if n == str(i) else f"{i} {n}" for i, n in names}
            self._knobs["label"] = ui.select(
                options, label="label", value=first.label, with_input=len(options) > 20
            )
        if limits.reads_text:
            for name in ("prompt", "negative_prompt"):
                text = ui.input(name.replace("_", " ")).props(
                    f"maxlength={MAX_LETTERS} autogrow debounce=400"
                )
                self._knobs[name] = text
        with ui.element("div").classes("seed"):
            seed = ui.number("seed", value=first.seed, min=0, max=MAX_SEED, precision=0)
            self._knobs["seed"] = seed
            dice = ui.button(icon="casino").props("flat round aria-label='any seed'")
            dice.on_click(lambda: seed.set_value(random.randint(0, 9999)))
        if limits.guided:
            self._slider("guidance_scale", "guidance", (0, MAX_SCALE, 0.1), first)
        self._slider("steps", "steps", (1, limits.max_steps, 1), first)
        self._slider("num_images", "images", (1, limits.max_images, 1), first)
        for knob in self._knobs.values():
            knob.on_value_change(self.change)

    def _slider(
        self, name: str, details: str, span: tuple[float, float, float], first: Controls
    ) -> None:
        low, high, step = span
        with ui.element("div"):
            with ui.element("div").classes("named"):
                ui.label(details)
                value = ui.label()
            slider = ui.slider(min=low, max=high, step=step, value=getattr(first, name))
            slider.props(f"aria-label='{details}'")
        value.bind_text_from(slider, "value", backward=_details)
        self._knobs[name] = slider
