"""A story and its pictures as one page of HTML that needs nothing from outside."""

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ldm_jax.config import to_json
from ldm_jax.report.charts import Curve, chart
from ldm_jax.report.parts import escaped, figure, section, table
from ldm_jax.report.scores import (
    best_by_way,
    num_samples,
    score_curves,
    scores_section,
)
from ldm_jax.report.shots import Shots
from ldm_jax.report.story import StageStory, Story
from ldm_jax.report.style import STYLE

MOST_BYTES = 500_000
"""Of a picture as PNG; larger ones are written as JPEG."""
MOST_WIDTH = 1600
STAGE_TITLES = {
    "autoencoder": "First stage: autoencoder",
    "diffusion": "Second stage: diffusion",
}


def page(story: Story, shots: Shots | None, *, note: str, facts: dict[str, str]) -> str:
    """Write the page.

    Args:
      story: What there is to tell.
      shots: Pictures drawn for the report; None if none could be.
      note: Why there are none, or "".
      facts: More to say of how the report was made, by name.
    """
    pictures = [_stage_pictures(story, stage) for stage in reversed(story.stages)]
    sections = [
        _hero(story),
        pictures[0] if pictures else "",
        scores_section(story),
        _shots(shots, note),
        *pictures[1:],
        _curves(story),
        _steps(story),
        _making(story, facts),
    ]
    state = "finished" if story.is_finished else "unfinished"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(story.name)}: a run of ldm_jax</title>"
        f"<style>{STYLE}</style></head><body><main>"
        f'<header><p class="over">ldm_jax run · <span class="{state}">{state}</span>'
        f"</p><h1>{escaped(story.name)}</h1><p>{escaped(_summary(story))}</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _summary(story: Story) -> str:
    config = story.config
    data, second = config.data, config.diffusion
    size = f"{data.image_size}x{data.image_size}"
    told = {"none": "", "class": " by class", "text": " by text", "clip": " by text"}
    text = f"{data.source}, {size} pixels"
    if "diffusion" not in config.stages:
        return f"{text}: an autoencoder alone"
    condition = second.condition
    by = " by class" if condition.label else told.get(condition.context, "")
    extra = {"low_resolution": ", enlarging", "masked_image": ", filling holes"}
    side, channels = config.latent_side, config.autoencoder.latent_channels
    return (
        f"{text}{by}{extra.get(condition.concat, '')}; latents of "
        f"{side}x{side}x{channels}, predicting {second.prediction}"
    )


def _hero(story: Story) -> str:
    tiles: list[str] = []
    for stage in story.stages:
        batch = getattr(story.config, stage.name).batch_size
        share = f"{stage.done:,} steps"
        if stage.done < stage.total:
            share = f"{stage.done:,} of {stage.total:,} steps"
        more = f"{stage.done * batch:,} images"
        if stage.seconds:
            more = f"{more} in {_duration(stage.seconds)}"
        tiles.append(_tile(STAGE_TITLES[stage.name], share, more))
    tiles += [_tile("FID", f"{fid:.3g}", of) for of, fid in best_by_way(story).items()]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><span>{escaped(name)}</span>'
        f"<strong>{escaped(value)}</strong><span>{escaped(more)}</span></div>"
    )


def _curves(story: Story) -> str:
    figures: list[str] = []
    for stage in story.stages:
        curves = [
            Curve(
                name,
                [r["step"] for r in stage.records if name in r],
                [r[name] for r in stage.records if name in r],
            )
            for name in ("loss", "reconstruction", "gradient_norm")
        ]
        curves = [curve for curve in curves if curve.x]
        drawn = chart(
            curves,
            title=f"{stage.name}: loss against steps",
            x_name="steps",
            logarithmic=True,
            smooth=True,
        )
        if drawn:
            figures.append(figure(drawn, STAGE_TITLES[stage.name]))
    figures += [score_curves(stage) for stage in story.stages]
    if not any(figures):
        return ""
    return section("Curves", f'<div class="pair">{"".join(figures)}</div>')


def _stage_pictures(story: Story, stage: StageStory) -> str:
    if not stage.pictures:
        return ""
    first = stage.name == "autoencoder"
    title = "Reconstructions" if first else "Samples over training"
    what = (
        "Held-out images and what the autoencoder makes of them"
        if first
        else f"The same seeds at each step, {story.config.sampling.grid_steps} DDIM "
        f"steps, guidance {story.config.sampling.grid_guidance_scale:g}"
    )
    last = stage.pictures[-1]
    shown = [figure(_file(last.path), f"Step {last.step:,}. {what}.")]
    earlier = [
        figure(_file(picture.path), f"step {picture.step:,}")
        for picture in stage.pictures[:-1]
    ]
    if earlier:
        shown.append(f'<div class="row">{"".join(earlier)}</div>')
    return section(title, "".join(shown))


def _shots(shots: Shots | None, note: str) -> str:
    if shots is None:
        return section("Denoising", f"<p>{escaped(note)}</p>") if note else ""
    how = f"{shots.steps} DDIM steps, guidance {shots.scale:g}"
    rows = [np.concatenate(list(frames), axis=1) for frames in shots.denoising]
    shown = "; ".join(shots.shown[: len(rows)])
    strips = figure(_array(np.concatenate(rows)), shown)
    pairs = "".join(
        f'<div class="two">{_array(sample)}{_array(near)}</div>'
        for sample, near in zip(*shots.neighbours, strict=True)
    )
    return section(
        "Denoising",
        f"<p>From noise to image, left to right; {how}.</p>" + strips,
    ) + section(
        "Is it copying?",
        f'<div class="pairs">{pairs}</div><p>Above, samples of seeds 0 to '
        f"{shots.seeds - 1}; beneath each, the nearest of {shots.num_searched:,} "
        "training images, by small averaged pixels. The median sample is "
        f"<strong>{shots.closeness:.2f}</strong> times as far from its nearest "
        "training image as the median held-out image is: 1 is as new as real images "
        "are, near 0 is a copy.</p>",
    )


def _steps(story: Story) -> str:
    if story.steps is None or story.steps_picture is None:
        return ""
    chosen = story.steps["cheapest"]
    text = (
        f"Cheapest within 5 % of the best: <strong>{escaped(chosen['sampler'])}, "
        f"{chosen['steps']} steps</strong>, by the Fréchet distance of "
        f"{story.steps['num_images']:,} images' small pixels (python -m "
        "ldm_jax.evaluation.steps)."
    )
    return section(
        "How many steps?", figure(_file(story.steps_picture), "") + f"<p>{text}</p>"
    )


def _making(story: Story, facts: dict[str, str]) -> str:
    place = story.workdir
    again, name = f"{place}_again", shlex.quote(str(place))
    commands = [
        f"python train.py --config {shlex.quote(f'{place}/config.json')} --workdir "
        f"{shlex.quote(again)}",
        f"python sample.py --workdir {name}",
        *(_evaluation_command(story, one) for one in story.metrics),
        f"python -m ldm_jax.report --workdir {name}",
    ]
    listed = "\n".join(commands)
    final = {} if story.final is None else story.final
    rows = [["config digest", story.config_digest]]
    rows += [["digest of the run", final["digest"]]] if "digest" in final else []
    rows += [[name, value] for name, value in facts.items()]
    return section(
        "How it was made",
        table(["", ""], rows, kind="facts")
        + f"<pre>{escaped(listed)}</pre>"
        + f"<details><summary>The whole config</summary><pre>"
        f"{escaped(to_json(story.config))}</pre></details>",
    )


def _evaluation_command(story: Story, one: dict[str, Any]) -> str:
    settings = one["settings"]
    scale = ",".join(f"{value:g}" for value in settings["guidance_scale"])
    takes_file = one["protocol"]["network"] != "classifier"
    is_own = one["real"]["source"] == story.config.data.source
    flags = {
        "workdir": shlex.quote(str(story.workdir)),
        "step": settings.get("step"),
        "protocol": one["protocol"]["name"],
        "inception": "FILE" if takes_file else None,
        "reference": None if is_own else "FILE",
        "num-images": num_samples(one),
        "sampler": settings["sampler"],
        "steps": settings["steps"],
        "spacing": settings.get("spacing"),
        "eta": settings.get("eta") or None,
        "guidance-scale": scale,
        "ema-lengths": settings.get("ema_length"),
    }
    told = (f"--{name} {value}" for name, value in flags.items() if value is not None)
    return f"python -m ldm_jax.evaluation {' '.join(told)}"


def _file(path: Path) -> str:
    with Image.open(path) as picture:
        return _picture(picture.convert("RGB"))


def _array(image: UInt8[np.ndarray, "h w c"]) -> str:
    return _picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))


def _picture(picture: Image.Image) -> str:
    """Write a picture into the page; small ones stay as sharp as their pixels."""
    if picture.width > MOST_WIDTH:
        height = round(picture.height * MOST_WIDTH / picture.width)
        picture = picture.resize((MOST_WIDTH, height), Image.Resampling.LANCZOS)
    kind, buffer = "png", io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MOST_BYTES:
        kind, buffer = "jpeg", io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
    text = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/{kind};base64,{text}">'
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
