"""The page: controls, the images they select, and the command that makes them."""

import base64
import logging
import random
import time
from typing import Any

from fastapi import FastAPI
from nicegui import Client, background_tasks, run, ui

from ldm_jax.sampling.conditions import prompt_warnings
from ldm_jax.sampling.request import MAX_SEED, command_line
from ldm_jax.tools.demo.controls import (
    MAX_PROMPT_LENGTH,
    MAX_SCALE,
    Controls,
    check_controls,
    request_of,
    sampling_of,
)
from ldm_jax.tools.demo.queue import RenderQueue
from ldm_jax.tools.demo.renderer import (
    RenderedImage,
    Renderer,
    first_controls,
    render,
)
from ldm_jax.tools.demo.style import PRIMARY, STYLE
from ldm_jax.types import InputError

MAX_WAITING = 8
SIDE = 560
"""Maximum height and width of the images on the screen, in pixels."""


def make_page(renderer: Renderer) -> FastAPI:
    """Make an ASGI application that serves the page and nicegui's own files."""
    queue = RenderQueue(MAX_WAITING)

    @ui.page("/")
    def open_page(client: Client) -> None:
        ui.add_css(STYLE)
        ui.colors(primary=PRIMARY)
        page = Page(renderer, queue)
        client.on_delete(page.close)
        ui.timer(0.0, page.change, once=True)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        app,
        title=f"{_name(renderer)} - ldm_jax",
        favicon="🖼",
        dark=None,  # as the browser's setting
        tailwind=False,
        message_history_length=0,  # images are not kept to be resent
        show_welcome_message=False,
    )
    return app


def _value_text(value: Any) -> str:
    """Write a slider's value, which may be anything that a page sent."""
    return f"{value:g}" if isinstance(value, int | float) else "?"


def _name(renderer: Renderer) -> str:
    return str(renderer.pipeline.settings.workdir).rstrip("/").rpartition("/")[2]


class Page:
    """One browser's page.

    The images that its controls select are made in the background, one by one. A
    control that changes meanwhile replaces the images that are not made yet.
    """

    def __init__(self, renderer: Renderer, queue: RenderQueue) -> None:
        """Build the elements of the page, in nicegui's current page."""
        self._renderer, self._queue = renderer, queue
        self._controls: dict[str, Any] = {}
        self._changed = self._rendering = self._closed = False
        with ui.element("main").classes("page"):
            self._add_title()
            with ui.element("section").classes("card controls"):
                self._add_controls(first_controls(renderer))
            with ui.element("section").classes("card result"):
                self._status = ui.label().classes("status").props("role=status")
                self._images = ui.element("div").classes("images")
            with ui.element("section").classes("card command"):
                with ui.element("code"):
                    self._command = ui.label()
                copy = ui.button(icon="content_copy")
                copy.props("flat dense round aria-label='copy the command'")
                copy.on_click(lambda: ui.clipboard.write(self._command.text))
        self._cells: list[tuple[Any, Any, Any]] = []

    def close(self) -> None:
        """Stop making images: the browser has left."""
        self._closed = True

    def change(self) -> None:
        """Make the images that the controls select now, as soon as possible."""
        self._changed = True
        if not self._rendering:
            self._rendering = True
            background_tasks.create(self._work())

    async def _work(self) -> None:
        try:
            while self._changed and not self._closed:
                self._changed = False
                await self._render_or_report()
        finally:
            self._rendering = False

    async def _render_or_report(self) -> None:
        try:
            values = {name: one.value for name, one in self._controls.items()}
            await self._render(check_controls(values, self._renderer.limits))
        except InputError as error:
            self._report(str(error), wrong=True)
        except Exception as error:  # no input may end the page
            logging.getLogger(__name__).exception("an image could not be made")
            self._report(f"not made: {type(error).__name__}; see the log", wrong=True)

    async def _render(self, controls: Controls) -> None:
        if self._renderer.limits.reads_text and not controls.prompt:
            self._report("Enter a prompt.")
            return
        images = render(self._renderer, controls)
        seconds = 0.0
        for i in range(controls.num_images):
            async with self._queue.turn():
                if self._changed or self._closed:
                    return
                begun = time.perf_counter()
                made = await run.io_bound(next, images, None)
                seconds += time.perf_counter() - begun
            if made is None or self._closed:
                return
            if i == 0:
                self._set_cells(controls.num_images)
                settings = sampling_of(controls, self._renderer.pipeline.settings)
                self._command.text = command_line(settings, request_of(controls))
                for image, _, _ in self._cells:
                    image.classes(add="old")
            self._show(i, made)
        each = seconds / controls.num_images
        parts = [f"{controls.steps} steps, {each:.2f} s an image"]
        if controls.prompt:
            model = self._renderer.pipeline.model
            warnings = prompt_warnings(model, controls.prompt)
            parts += [f"the text {warning}" for warning in warnings]
        self._report("; ".join(parts))

    def _report(self, text: str, *, wrong: bool = False) -> None:
        if not self._closed:
            self._status.text = text
            self._status.classes(replace="status wrong" if wrong else "status")

    def _show(self, i: int, made: RenderedImage) -> None:
        image, caption, link = self._cells[i]
        source = f"data:image/png;base64,{base64.b64encode(made.png).decode()}"
        caption.text = f"seed {made.seed}"
        image.props["src"], image.props["alt"] = source, caption.text
        image.classes(remove="old")
        link.props["href"], link.props["download"] = source, f"{made.seed}.png"
        image.update()
        link.update()

    def _set_cells(self, num: int) -> None:
        """Make one cell for each image, if their number has changed."""
        if num == len(self._cells):
            return
        columns = next(n for n in range(1, num + 1) if n * n >= num)
        self._images.style(
            f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); "
            f"max-width: {SIDE}px"
        )
        self._images.clear()
        self._cells = []
        with self._images:
            for _ in range(num):
                with ui.element("figure"):
                    image = ui.element("img")
                    with ui.element("figcaption"):
                        caption = ui.label()
                        with ui.element("a") as link:
                            ui.label("save")
                self._cells.append((image, caption, link))

    def _add_title(self) -> None:
        pipeline = self._renderer.pipeline
        step = f"checkpoint {pipeline.run.step}, " if pipeline.run.step else ""
        with ui.element("header").classes("title"):
            with ui.element("h1"):
                ui.label(_name(self._renderer))
            with ui.element("p"):
                ui.label(f"{step}sampler {pipeline.settings.sampler}")

    def _add_controls(self, first: Controls) -> None:
        limits = self._renderer.limits
        if limits.num_classes:
            names = enumerate(self._renderer.class_names)
            options = {i: n if n == str(i) else f"{i} {n}" for i, n in names}
            self._controls["label"] = ui.select(
                options, label="label", value=first.label, with_input=len(options) > 20
            )
        if limits.reads_text:
            for name in ("prompt", "negative_prompt"):
                text = ui.input(name.replace("_", " ")).props(
                    f"maxlength={MAX_PROMPT_LENGTH} autogrow debounce=400"
                )
                self._controls[name] = text
        with ui.element("div").classes("seed"):
            seed = ui.number("seed", value=first.seed, min=0, max=MAX_SEED, precision=0)
            self._controls["seed"] = seed
            dice = ui.button(icon="casino").props("flat round aria-label='any seed'")
            dice.on_click(lambda: seed.set_value(random.randint(0, 9999)))
        if limits.guided:
            self._slider("guidance_scale", "guidance", (0, MAX_SCALE, 0.1), first)
        self._slider("steps", "steps", (1, limits.max_steps, 1), first)
        self._slider("num_images", "images", (1, limits.max_images, 1), first)
        for control in self._controls.values():
            control.on_value_change(self.change)

    def _slider(
        self, name: str, label: str, span: tuple[float, float, float], first: Controls
    ) -> None:
        low, high, step = span
        with ui.element("div"):
            with ui.element("div").classes("named"):
                ui.label(label)
                value = ui.label()
            slider = ui.slider(min=low, max=high, step=step, value=getattr(first, name))
            slider.props(f"aria-label='{label}'")
        value.bind_text_from(slider, "value", backward=_value_text)
        self._controls[name] = slider
