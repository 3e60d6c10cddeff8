"""The page: knobs, the images they make, and the command that makes them too."""

import base64
import logging
import random
import time
from typing import Any

from fastapi import FastAPI
from nicegui import Client, background_tasks, run, ui

from ldm_jax.browse.easel import Drawn, Easel, doubts, draw, first_wish
from ldm_jax.browse.look import PRIMARY, STYLE
from ldm_jax.browse.turns import Turns
from ldm_jax.browse.wish import (
    MAX_LETTERS,
    MAX_SCALE,
    Wish,
    check_wish,
    command_of,
)
from ldm_jax.requests import MAX_SEED
from ldm_jax.types import InputError

MOST_WAITING = 8
SIDE = 560
"""Pixels of the screen that the images take at most, along a side."""


def make_page(easel: Easel) -> FastAPI:
    """Make what is served: one page, and the library's own files behind it.

    Args:
      easel: Draws what is wished for on the page.

    Returns:
      An ASGI application.
    """
    turns = Turns(MOST_WAITING)

    @ui.page("/")
    def show(client: Client) -> None:
        ui.add_css(STYLE)
        ui.colors(primary=PRIMARY)
        desk = Desk(easel, turns)
        client.on_delete(desk.close)
        ui.timer(0.0, desk.change, once=True)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        app,
        title=f"{_name(easel)} - ldm_jax",
        favicon="🖼",
        dark=None,  # as the reader's machine is
        tailwind=False,
        message_history_length=0,  # images are not kept to be sent again
        show_welcome_message=False,
    )
    return app


def _told(value: Any) -> str:
    """Write a slider's value, whatever was sent for it."""
    return f"{value:g}" if isinstance(value, int | float) else "?"


def _name(easel: Easel) -> str:
    return str(easel.studio.settings.workdir).rstrip("/").rpartition("/")[2]


class Desk:
    """One reader's page.

    What its knobs say is drawn in the background, image by image. A knob that moves
    meanwhile puts a newer wish in the place of the one that is being drawn.
    """

    def __init__(self, easel: Easel, turns: Turns) -> None:
        """Lay the page out, in the page that is being built."""
        self._easel, self._turns = easel, turns
        self._knobs: dict[str, Any] = {}
        self._changed = self._drawing = self._closed = False
        with ui.element("main").classes("desk"):
            self._lay_title()
            with ui.element("section").classes("card knobs"):
                self._lay_knobs(first_wish(easel))
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
                await self._draw_or_tell()
        finally:
            self._drawing = False

    async def _draw_or_tell(self) -> None:
        try:
            values = {name: knob.value for name, knob in self._knobs.items()}
            await self._draw(check_wish(values, self._easel.limits))
        except InputError as error:
            self._tell(str(error), wrong=True)
        except Exception as error:  # what a reader did must not end the page
            logging.getLogger(__name__).exception("an image could not be drawn")
            self._tell(f"not drawn: {type(error).__name__}; see the log", wrong=True)

    async def _draw(self, wish: Wish) -> None:
        if self._easel.limits.reads_text and not wish.prompt:
            self._tell("Write what is to be drawn.")
            return
        images = draw(self._easel, wish)
        seconds = 0.0
        for i in range(wish.num_images):
            async with self._turns.take():
                if self._changed or self._closed:
                    return
                begun = time.perf_counter()
                drawn = await run.io_bound(next, images, None)
                seconds += time.perf_counter() - begun
            if drawn is None or self._closed:
                return
            if i == 0:
                self._lay_cells(wish.num_images)
                self._command.text = command_of(wish, self._easel.studio.settings)
                for image, _, _ in self._cells:
                    image.classes(add="old")
            self._show(i, drawn)
        each = seconds / wish.num_images
        told = [f"{wish.steps} steps, {each:.2f} s an image"]
        self._tell(
            "; ".join(told + [f"the text {x}" for x in doubts(self._easel, wish)])
        )

    def _tell(self, text: str, *, wrong: bool = False) -> None:
        if not self._closed:
            self._status.text = text
            self._status.classes(replace="status wrong" if wrong else "status")

    def _show(self, i: int, drawn: Drawn) -> None:
        image, caption, link = self._cells[i]
        source = f"data:image/png;base64,{base64.b64encode(drawn.png).decode()}"
        told = f"seed {drawn.seed}"
        caption.text = told
        image.props["src"], image.props["alt"] = source, told
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
        studio = self._easel.studio
        step = f"checkpoint {studio.run.step}, " if studio.run.step else ""
        with ui.element("header").classes("title"):
            with ui.element("h1"):
                ui.label(_name(self._easel))
            with ui.element("p"):
                ui.label(f"{step}sampler {studio.settings.sampler}")

    def _lay_knobs(self, first: Wish) -> None:
        limits = self._easel.limits
        if limits.num_classes:
            names = enumerate(self._easel.names)
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
        self, name: str, told: str, span: tuple[float, float, float], first: Wish
    ) -> None:
        low, high, step = span
        with ui.element("div"):
            with ui.element("div").classes("named"):
                ui.label(told)
                value = ui.label()
            slider = ui.slider(min=low, max=high, step=step, value=getattr(first, name))
            slider.props(f"aria-label='{told}'")
        value.bind_text_from(slider, "value", backward=_told)
        self._knobs[name] = slider
