"""The report of a run as one HTML page without external files."""

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ldm_jax.config import to_json
from ldm_jax.data.image_files import BrokenImageError, open_image
from ldm_jax.tools.report.charts import Curve, chart
from ldm_jax.tools.report.html import escaped, figure, section, table
from ldm_jax.tools.report.run_summary import RunSummary, StageSummary
from ldm_jax.tools.report.samples import ReportSamples
from ldm_jax.tools.report.scores import (
    best_scores,
    num_samples,
    score_curves,
    scores_section,
)
from ldm_jax.tools.report.style import STYLE

MAX_BYTES = 500_000
"""Bytes of an image as PNG; larger ones are written as JPEG."""
MAX_WIDTH = 1600
STAGE_TITLES = {
    "autoencoder": "First stage: autoencoder",
    "diffusion": "Second stage: diffusion",
}


def page(
    summary: RunSummary,
    samples: ReportSamples | None,
    *,
    note: str,
    facts: dict[str, str],
) -> str:
    """Write the page.

    Args:
      samples: Samples made for the report; None if there are none.
      note: Why there are none, or "".
      facts: Further facts of the run and the report, by name.
    """
    images = [_stage_images(summary, stage) for stage in reversed(summary.stages)]
    sections = [
        _hero(summary),
        images[0] if images else "",
        scores_section(summary),
        _samples(samples, note),
        *images[1:],
        _curves(summary),
        _steps(summary),
        _making(summary, facts),
    ]
    state = "finished" if summary.is_finished else "unfinished"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(summary.name)}: a run of ldm_jax</title>"
        f"<style>{STYLE}</style></head><body><main>"
        f'<header><p class="over">ldm_jax run · <span class="{state}">{state}</span>'
        f"</p><h1>{escaped(summary.name)}</h1><p>{escaped(_summary(summary))}</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _summary(summary: RunSummary) -> str:
    config = summary.config
    data, second = config.data, config.diffusion
    size = f"{data.image_size}x{data.image_size}"
    details = {"none": "", "class": " by class", "text": " by text", "clip": " by text"}
    text = f"{data.source}, {size} pixels"
    if "diffusion" not in config.stages:
        return f"{text}: an autoencoder alone"
    condition = second.condition
    by = " by class" if condition.label else details.get(condition.context, "")
    extra = {"low_resolution": ", enlarging", "masked_image": ", filling holes"}
    side, channels = config.latent_side, config.autoencoder.latent_channels
    return (
        f"{text}{by}{extra.get(condition.concat, '')}; latents of "
        f"{side}x{side}x{channels}, predicting {second.prediction}"
    )


def _hero(summary: RunSummary) -> str:
    tiles: list[str] = []
    for stage in summary.stages:
        batch = getattr(summary.config, stage.name).batch_size
        share = f"{stage.done:,} steps"
        if stage.done < stage.total:
            share = f"{stage.done:,} of {stage.total:,} steps"
        more = f"{stage.done * batch:,} images"
        if stage.seconds:
            more = f"{more} in {_duration(stage.seconds)}"
        tiles.append(_tile(STAGE_TITLES[stage.name], share, more))
    tiles += [
        _tile("FID", f"{fid:.3g}", of) for of, fid in best_scores(summary).items()
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><span>{escaped(name)}</span>'
        f"<strong>{escaped(value)}</strong><span>{escaped(more)}</span></div>"
    )


def _curves(summary: RunSummary) -> str:
    figures: list[str] = []
    for stage in summary.stages:
        curves = [
            Curve(
                name,
                [r["step"] for r in stage.records if name in r],
                [r[name] for r in stage.records if name in r],
            )
            for name in ("loss", "reconstruction", "gradient_norm")
        ]
        curves = [curve for curve in curves if curve.x]
        svg = chart(
            curves,
            title=f"{stage.name}: loss against steps",
            x_name="steps",
            logarithmic=True,
            smooth=True,
        )
        if svg:
            figures.append(figure(svg, STAGE_TITLES[stage.name]))
    figures += [score_curves(stage) for stage in summary.stages]
    if not any(figures):
        return ""
    return section("Curves", f'<div class="pair">{"".join(figures)}</div>')


def _stage_images(summary: RunSummary, stage: StageSummary) -> str:
    if not stage.images:
        return ""
    first = stage.name == "autoencoder"
    title = "Reconstructions" if first else "Samples over training"
    what = (
        "Held-out images and their reconstructions by the autoencoder"
        if first
        else f"The same seeds at each step, {summary.config.sampling.grid_steps} DDIM "
        f"steps, guidance {summary.config.sampling.grid_guidance_scale:g}"
    )
    last = stage.images[-1]
    visible = [figure(_file(last.path), f"Step {last.step:,}. {what}.")]
    earlier = [
        figure(_file(image.path), f"step {image.step:,}") for image in stage.images[:-1]
    ]
    if earlier:
        visible.append(f'<div class="row">{"".join(earlier)}</div>')
    return section(title, "".join(visible))


def _samples(samples: ReportSamples | None, note: str) -> str:
    if samples is None:
        return section("Denoising", f"<p>{escaped(note)}</p>") if note else ""
    how = f"{samples.steps} DDIM steps, guidance {samples.scale:g}"
    rows = [np.concatenate(list(frames), axis=1) for frames in samples.denoising]
    captions = "; ".join(samples.captions[: len(rows)])
    strips = figure(_array(np.concatenate(rows)), captions)
    pairs = "".join(
        f'<div class="two">{_array(sample)}{_array(near)}</div>'
        for sample, near in zip(*samples.neighbours, strict=True)
    )
    return section(
        "Denoising",
        f"<p>From noise to image, left to right; {how}.</p>" + strips,
    ) + section(
        "Nearest training images",
        f'<div class="pairs">{pairs}</div><p>Above, samples of seeds 0 to '
        f"{samples.seeds - 1}; below each, the nearest of {samples.num_searched:,} "
        "training images, by small averaged pixels. The median sample is "
        f"<strong>{samples.closeness:.2f}</strong> times as far from its nearest "
        "training image as the median held-out image is: 1 is as far as new real "
        "images are, near 0 is a copy.</p>",
    )


def _steps(summary: RunSummary) -> str:
    if summary.steps is None or summary.steps_plot is None:
        return ""
    chosen = summary.steps["cheapest"]
    text = (
        f"Cheapest within 5 % of the best: <strong>{escaped(chosen['sampler'])}, "
        f"{chosen['steps']} steps</strong>, by the Fréchet distance of "
        f"{summary.steps['num_images']:,} images' small pixels (ldm steps)."
    )
    return section(
        "Sampling steps", figure(_file(summary.steps_plot), "") + f"<p>{text}</p>"
    )


def _making(summary: RunSummary, facts: dict[str, str]) -> str:
    name = shlex.quote(str(summary.workdir))
    commands = [
        *_training_commands(summary),
        f"ldm sample --workdir {name}",
        *(_evaluation_command(summary, one) for one in summary.metrics),
        f"ldm report --workdir {name}",
    ]
    listed = "\n".join(commands)
    final = {} if summary.final is None else summary.final
    rows = [["config digest", summary.config_digest]]
    rows += [["digest of the run", final["digest"]]] if "digest" in final else []
    rows += [["changed", _change(change)] for change in summary.changes]
    rows += [[name, value] for name, value in facts.items()]
    return section(
        "Reproduction",
        table(["", ""], rows, kind="facts")
        + f"<pre>{escaped(listed)}</pre>"
        + f"<details><summary>The whole config</summary><pre>"
        f"{escaped(to_json(summary.config))}</pre></details>",
    )


def _change(change: dict[str, Any]) -> str:
    fields = [f"{k} from {old} to {new}" for k, (old, new) in change["fields"].items()]
    steps = [f"step {step:,} of {name}" for name, step in change["steps"].items()]
    return f"{', '.join(fields)}, at {' and '.join(steps)}"


def _training_commands(summary: RunSummary) -> list[str]:
    """Return the commands that train the run again, one more for each change."""
    place = summary.workdir
    command = (
        f"ldm train --config {shlex.quote(f'{place}/config.json')} --workdir "
        f"{shlex.quote(f'{place}_again')}"
    )
    values: dict[str, Any] = {}
    for change in reversed(summary.changes):
        values |= {name: old for name, (old, _) in change["fields"].items()}
    flags = [f" --{_flag(name, value, ' ')}" for name, value in values.items()]
    commands = [f"{command}{''.join(flags)}"]
    for change in summary.changes:
        reached = [
            f"{step} of {name}" for name, step in change["steps"].items() if step
        ]
        commands[-1] += f"  # to step {reached[-1] if reached else 0}"
        values |= {name: new for name, (_, new) in change["fields"].items()}
        flags = [
            f" --change {_flag(name, value, '=')}"
            if name in change["fields"]
            else f" --{_flag(name, value, ' ')}"
            for name, value in values.items()
        ]
        commands.append(f"{command}{''.join(flags)}")
    return commands


def _flag(name: str, value: Any, between: str) -> str:
    return f"{shlex.quote(name)}{between}{shlex.quote(str(value))}"


def _evaluation_command(summary: RunSummary, one: dict[str, Any]) -> str:
    settings = one["settings"]
    scale = ",".join(f"{value:g}" for value in settings["guidance_scale"])
    takes_file = one["protocol"]["network"] != "classifier"
    is_own = one["real"]["source"] == summary.config.data.source
    flags = {
        "workdir": shlex.quote(str(summary.workdir)),
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
        "precision": one["made_with"].get("precision"),
    }
    details = (
        f"--{name} {value}" for name, value in flags.items() if value is not None
    )
    return f"ldm evaluate {' '.join(details)}"


def _file(path: Path) -> str:
    """Write the image of a file, or why there is none."""
    try:
        with open_image(path) as image:
            return _img(image.convert("RGB"))
    except (BrokenImageError, OSError) as error:
        return f"<p>{escaped(f'{path.name} cannot be shown: {error}')}</p>"


def _array(image: UInt8[np.ndarray, "h w c"]) -> str:
    return _img(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))


def _img(image: Image.Image) -> str:
    """Write an image as an `img` element that holds its data."""
    if image.width > MAX_WIDTH:
        height = round(image.height * MAX_WIDTH / image.width)
        image = image.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    kind, buffer = "png", io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MAX_BYTES:
        kind, buffer = "jpeg", io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=90)
    text = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="" width="{image.width}" height="{image.height}" '
        f'src="data:image/{kind};base64,{text}">'
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
