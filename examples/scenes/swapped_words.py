"""How much a wrong word raises the loss of a run of scenes, by noise level.

    python -m examples.scenes.swapped_words --workdir runs/scenes

Takes captions of the split `test` with a place or a relation in them, swaps one word
for another, and prints by how much the loss of the true picture rises: for colours and
places at high noise, for shapes in the middle. A word that raises the loss nowhere is
not read. Works on a run that is still being trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from examples.scenes.things import COLOURS, SHAPES
from ldm_jax.build import open_tokenizer
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config.flags import parse_flags
from ldm_jax.config.validation import checked_dataclass
from ldm_jax.data.sources import open_source
from ldm_jax.diffusion.losses import DiffusionObjective, denoising_loss
from ldm_jax.diffusion.schedules import Level, level_at
from ldm_jax.latent_diffusion import denoiser_of, encode_images, prepare
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import root_key
from ldm_jax.types import InputError

PROG = "examples/scenes/swapped_words.py"
POSITIONS = (200, 400, 500, 600, 700, 800, 900, 990)
"""Of 1,000 levels, from little noise to much."""
PLACES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATIONS = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


class Captioned(NamedTuple):
    """Pictures and what is said of them."""

    images: Float[np.ndarray, "b h w c"]
    """As they are drawn, in [-1, 1]."""
    captions: dict[str, list[str]]
    """By what is wrong in them; `nothing` has the true ones."""


@checked_dataclass
class Flags:
    """Measure what a wrong word costs a run of scenes, at each noise level."""

    workdir: Path
    """Folder of the run."""
    num: int = 128
    """Captions."""
    json: Path | None = None
    """File to write."""


def following(names: tuple[str, ...]) -> dict[str, str]:
    """Return each name's successor, the last one's being the first."""
    return dict(zip(names, (*names[1:], names[0]), strict=True))


def swap_first(caption: str, swaps: dict[str, str]) -> str:
    """Swap the first of some words that is in a caption."""
    found = [(caption.index(word), word) for word in swaps if word in caption]
    if not found:
        return caption
    _, word = min(found)
    return caption.replace(word, swaps[word], 1)


def swap_places(caption: str) -> str:
    """Put everything on the other side."""
    return " ".join(PLACES.get(word, word) for word in caption.split())


def read(run: Run, num: int) -> Captioned:
    """Take the first captions that say where something is, and make them wrong."""
    data = run.config.data
    examples = open_source(data.source, "test", directory=data.directory).examples
    few = [caption_of(examples[i]) for i in range(min(64, len(examples)))]
    relations = any(word in caption for caption in few for word in RELATIONS)
    kind = "relation" if relations else "place"
    images: list[np.ndarray] = []
    captions = {name: [] for name in ("nothing", kind, "shape", "colour")}
    for i in range(len(examples)):
        caption = caption_of(examples[i])
        wrong = swap_first(caption, RELATIONS) if relations else swap_places(caption)
        if wrong == caption:
            continue
        images.append(examples[i]["image"])
        captions["nothing"].append(caption)
        captions[kind].append(wrong)
        captions["shape"].append(swap_first(caption, following(SHAPES)))
        captions["colour"].append(swap_first(caption, following(COLOURS)))
        if len(images) == num:
            break
    if not images:
        raise InputError(
            f"--workdir: got a run on {data.source}, whose captions say nothing of "
            "places; wanted one of examples/scenes"
        )
    return Captioned(np.stack(images) / 127.5 - 1.0, captions)


def caption_of(example: Mapping[str, Any]) -> str:
    """Return an example's caption as text."""
    return bytes(example["caption"]).decode()


def costs(run: Run, captioned: Captioned) -> list[dict[str, float]]:
    """Return a row for each noise level: its SNR, its loss, and what each swap adds."""
    model, settings = run.model, run.config.diffusion
    tokenizer = open_tokenizer(settings.condition)
    images = jnp.asarray(captioned.images, jnp.float32)
    latents = encode_images(model, run.params, images)
    eps = jax.random.normal(root_key(0), latents.shape)

    @jax.jit
    def loss(level: Level, tokens: Int[Array, "b n"]) -> Float[Array, ""]:
        cond = prepare(model, run.params, ConditionInputs(tokens=tokens))
        losses = denoising_loss(
            denoiser_of(model, run.params),
            latents,
            level,
            eps,
            cond,
            objective=DiffusionObjective(
                model.schedule,
                model.prediction,
                sigma_data=model.sigma_data,
                loss=settings.loss,
            ),
        )
        return losses.mean()

    rows: list[dict[str, float]] = []
    tokens = {
        k: jnp.asarray(tokenizer.encode(v)) for k, v in captioned.captions.items()
    }
    for position in POSITIONS:
        level = level_at(model.schedule, np.full(len(latents), float(position)))
        on_device = Level(*(jnp.asarray(part, jnp.float32) for part in level))
        found = {name: float(loss(on_device, t)) for name, t in tokens.items()}
        base = found.pop("nothing")
        rows.append(
            {
                "position": position,
                "snr": float(np.square(level.alpha / level.sigma).mean()),
                "loss": base,
                **{name: value / base - 1.0 for name, value in found.items()},
            }
        )
    return rows


def main(args: list[str]) -> None:
    """Measure and print a table."""
    flags = parse_flags(Flags, args, prog=PROG)
    run = load_run(flags.workdir)
    rows = costs(run, read(run, flags.num))
    names = list(rows[0])[3:]
    print(f"| noise | SNR | loss | {' | '.join(f'wrong {n}' for n in names)} |")
    print("|---:" * (3 + len(names)) + "|")
    for row in rows:
        added = " | ".join(f"{row[name]:+.1%}" for name in names)
        noise = f"{row['position']:.0f} | {row['snr']:.4f} | {row['loss']:.4f}"
        print(f"| {noise} | {added} |")
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main, PROG)
