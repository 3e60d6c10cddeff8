"""A small network that reads digits, trained by `augmentation.py`.

It has no diffusion in it: images and labels in, an accuracy out. Every draw is a
function of the key, the step and what it is for.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from ldm_jax.data.pipeline import Batch

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 1e-2
MAX_DEGREES, MAX_SHIFT = 10.0, 1 / 8
SIDE = 8
"""Of the digits as they were written; what is learned from."""


class Arm(NamedTuple):
    """What a network learns from beside the real digits."""

    samples: bool
    """Whether half of every batch is samples."""
    warps: bool
    """Whether every image is turned and shifted."""


class Classifier(nn.Module):
    """Three convolutions and a linear layer.

    The convolutions are products of patches: inside `lax.scan` on a CPU, XLA's own take
    more than ten times as long.
    """

    channels: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
        """Return the logits of images in [0, 1]."""
        for i, factor in enumerate((1, 2, 2)):
            x = nn.relu(nn.Dense(factor * self.channels, name=f"conv_{i}")(patches(x)))
            x = halved(x) if i else x
        return nn.Dense(self.num_classes, name="head")(x.reshape(len(x), -1))


CLASSIFIER = Classifier(channels=16, num_classes=10)


def patches(x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Put the 3x3 neighbours of every pixel side by side; outside there are zeros."""
    height, width = x.shape[1:3]
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Keep the largest of each 2x2."""
    num, height, width, channels = x.shape
    blocks = x.reshape(num, height // 2, 2, width // 2, 2, channels)
    return blocks.max(axis=(2, 4))


def shrink(images: Float[Array, "b h w 1"]) -> Float[Array, "b s s 1"]:
    """Average images over blocks to the digits' own size."""
    num, side = images.shape[:2]
    block = side // SIDE
    return images.reshape(num, SIDE, block, SIDE, block, 1).mean(axis=(2, 4))


def warp(
    key: Key[Array, ""], images: Float[Array, "b h w 1"]
) -> Float[Array, "b h w 1"]:
    """Turn and shift each image by what is drawn for it; outside it is black."""
    num, side = images.shape[:2]
    most = jnp.asarray([math.radians(MAX_DEGREES), MAX_SHIFT * side, MAX_SHIFT * side])
    draws = jax.random.uniform(key, (num, 3), minval=-1.0, maxval=1.0) * most
    centre = (side - 1) / 2.0
    rows, columns = jnp.meshgrid(*[jnp.arange(side) - centre] * 2, indexing="ij")

    def one(image: Float[Array, "h w 1"], draw: Float[Array, "3"]) -> Array:
        cos, sin = jnp.cos(draw[0]), jnp.sin(draw[0])
        at = [
            cos * rows - sin * columns + draw[1] + centre,
            sin * rows + cos * columns + draw[2] + centre,
        ]
        found = jax.scipy.ndimage.map_coordinates(image[..., 0], at, order=1)
        return found[..., None]

    return jax.vmap(one)(images, draws)


class Labelled(NamedTuple):
    """Images and their classes."""

    images: Float[Array, "b h w 1"]
    """In [0, 1]."""
    labels: Int[Array, " b"]
    """One for each."""


def labelled(batch: Batch) -> Labelled:
    """Take images and classes from a batch."""
    images = jnp.asarray(batch.image, jnp.float32) / 255.0
    return Labelled(images, jnp.asarray(batch.label, jnp.int32))


def draw(key: Key[Array, ""], data: Labelled, num: int) -> Labelled:
    """Draw examples, each with equal chance."""
    chosen = jax.random.randint(key, (num,), 0, len(data.labels))
    return Labelled(data.images[chosen], data.labels[chosen])


class Examples(NamedTuple):
    """Training and test data of a network."""

    real: Labelled
    """The real digits that it may see."""
    samples: Labelled
    """Of a diffusion model."""
    test: Labelled
    """Held-out real digits."""


def draw_batch(key: Key[Array, ""], examples: Examples, arm: Arm) -> Labelled:
    """Draw the examples of a step."""
    real_key, sample_key, warp_key = jax.random.split(key, 3)
    num_samples = BATCH_SIZE // 2 if arm.samples else 0
    batch = draw(real_key, examples.real, BATCH_SIZE - num_samples)
    if arm.samples:
        samples = draw(sample_key, examples.samples, num_samples)
        batch = Labelled(*map(jnp.concatenate, zip(batch, samples, strict=True)))
    if arm.warps:
        batch = batch._replace(images=warp(warp_key, batch.images))
    return batch


def logits_of(params: Any, images: Float[Array, "b h w 1"]) -> Float[Array, "b n"]:
    """Read images of any size that the digits' own divides."""
    return cast(Array, CLASSIFIER.apply({"params": params}, shrink(images)))


def error_of(params: Any, batch: Labelled) -> Float[Array, ""]:
    """Return the mean cross-entropy."""
    logits = logits_of(params, batch.images)
    details = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return details.mean()


@functools.partial(jax.jit, static_argnames=("arm", "num_steps"))
def accuracy(
    key: Key[Array, ""], examples: Examples, *, arm: Arm, num_steps: int
) -> Float[Array, ""]:
    """Teach one network; return the part of the test images it reads right.

    Args:
      key: Of its first parameters and of all that is drawn.
      examples: What it sees.
      arm: How it sees them.
      num_steps: AdamW steps, the rate falling to 0 as a cosine.
    """
    init_key, step_key = jax.random.split(key)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    optimiser = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    blank = jnp.zeros((1, SIDE, SIDE, 1))
    params = CLASSIFIER.init(init_key, blank)["params"]

    def step(carry: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        batch = draw_batch(jax.random.fold_in(step_key, i), examples, arm)
        grads = jax.grad(error_of)(params, batch)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimiser.init(params))
    (params, _), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
    read = jnp.argmax(logits_of(params, examples.test.images), axis=-1)
    return (read == examples.test.labels).mean()
