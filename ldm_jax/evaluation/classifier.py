"""A small classifier of a data set's classes, whose features are measured."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from ldm_jax.config import OptimConfig
from ldm_jax.evaluation.dataset import Dataset, load_images, prepare_all
from ldm_jax.evaluation.features import MAX_FEATURES
from ldm_jax.images import to_float
from ldm_jax.models.layers import GroupNorm, conv
from ldm_jax.rng import root_key
from ldm_jax.training.state import (
    Optimizer,
    TrainState,
    apply_gradients,
    init_state,
    make_optimizer,
)
from ldm_jax.types import InputError, PyTree

SMALLEST_MAP = 4
"""Side of the map that is averaged; larger ones are halved."""
NORM_EPSILON = 1e-5


class ClassifierOutput(NamedTuple):
    """Outputs of the classifier."""

    pooled: Float[Array, "b d"]
    """Features."""
    logits: Float[Array, "b k"]
    """Logits of the classes."""


class Classifier(nn.Module):
    """Convolutions with strides down to a map of 4x4, a mean, a linear layer.

    Fields:
      num_classes: Number of classes.
      channels: Channels of the first convolution; each later one doubles them, up to
        `width`.
      width: Length of a feature vector.
      num_groups: Groups of every norm.
    """

    num_classes: int
    channels: int
    width: int
    num_groups: int

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> ClassifierOutput:
        """Apply the network to images in [-1, 1] of any size."""
        x, channels, i = images.astype(jnp.float32), self.channels, 0
        while True:
            x = conv(channels, 3, jnp.dtype("float32"), f"conv_{i}")(x)
            x = self._norm(x, f"norm_{i}")
            if min(x.shape[1:3]) < 2 * SMALLEST_MAP:
                break
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            channels, i = min(2 * channels, self.width), i + 1
        x = conv(self.width, 3, jnp.dtype("float32"), "conv_out")(x)
        pooled = self._norm(x, "norm_out").mean(axis=(1, 2))
        return ClassifierOutput(pooled, nn.Dense(self.num_classes, name="head")(pooled))

    def _norm(self, x: Float[Array, "b h w c"], name: str) -> Float[Array, "b h w c"]:
        norm = GroupNorm(self.num_groups, NORM_EPSILON, jnp.dtype("float32"), name=name)
        return nn.silu(norm(x))


CHANNELS, WIDTH, NUM_GROUPS = 16, 64, 8
STEPS, BATCH_SIZE = 1000, 64
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
CLASSIFIER_SEED = 0
"""Seed of all runs, so that two runs on one data set are comparable."""
MAX_BYTES = 2 * 2**30
"""Bytes of training images in memory."""


def classifier(num_classes: int) -> Classifier:
    """Build the classifier, unbound."""
    return Classifier(
        num_classes=num_classes, channels=CHANNELS, width=WIDTH, num_groups=NUM_GROUPS
    )


def classify(
    params: PyTree, images: UInt8[Array, "b h w c"], *, num_classes: int
) -> ClassifierOutput:
    """Apply the classifier to 8-bit images."""
    output: Any = classifier(num_classes).apply({"params": params}, to_float(images))
    return output


def train_classifier(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    num_steps: int = STEPS,
) -> PyTree:
    """Train the classifier by AdamW, with a linearly falling rate and a fixed seed.

    Args:
      images: 8-bit levels.
      num_steps: Batches of 64.

    Returns:
      Its parameters, NumPy arrays.
    """
    optim = OptimConfig(
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        decay_steps=num_steps,
        ema_decay=0.0,
    )
    optimizer = make_optimizer(optim, num_steps=num_steps)
    key = root_key(CLASSIFIER_SEED)
    blank = jnp.zeros((1, *images.shape[1:]), jnp.float32)
    params = jax.jit(classifier(num_classes).init)(key, blank)["params"]
    state = init_state(params, optimizer)
    step = jax.jit(
        functools.partial(_step, optimizer=optimizer, num_classes=num_classes),
        donate_argnums=0,
    )
    for i in range(num_steps):
        chosen = _choose(key, i, len(images))
        state = step(state, images[chosen], labels[chosen])
    return jax.tree.map(np.asarray, state.params)


def _choose(key: Key[Array, ""], step: int, num: int) -> Int[np.ndarray, " b"]:
    chosen = jax.random.randint(jax.random.fold_in(key, step), (BATCH_SIZE,), 0, num)
    return np.asarray(chosen)


def _step(
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    labels: Int[Array, " b"],
    *,
    optimizer: Optimizer,
    num_classes: int,
) -> TrainState:
    def error(params: PyTree) -> Float[Array, ""]:
        logits = classify(params, images, num_classes=num_classes).logits
        details = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return details.mean()

    with jax.default_matmul_precision("highest"):  # the same classifier on any chip
        gradients = jax.grad(error)(state.params)
        return apply_gradients(state, gradients, optimizer)


def accuracy(
    params: PyTree,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
) -> float:
    """Return the classifier's accuracy, in [0, 1]."""
    read = jax.jit(functools.partial(classify, num_classes=num_classes))
    with jax.default_matmul_precision("highest"):
        right = [
            np.asarray(read(params, images[i : i + BATCH_SIZE]).logits).argmax(axis=-1)
            == labels[i : i + BATCH_SIZE]
            for i in range(0, len(images), BATCH_SIZE)
        ]
    return float(np.concatenate(right).mean())


class TrainedClassifier(NamedTuple):
    """A classifier trained on a data set."""

    params: PyTree
    """Its parameters."""
    accuracy: float
    """Accuracy on the held-out split, in [0, 1]."""


def fit_classifier(dataset: Dataset) -> TrainedClassifier:
    """Train the classifier on a run's data set.

    Raises:
      InputError: If the data set has fewer than two classes, or another number than the
        config.
    """
    data = dataset.data
    if data.num_classes < 2:
        raise InputError(
            f"--protocol: dataset-classifier wants labels of two classes or more, but "
            f"{data.source} has {data.num_classes or 'none'}; try --protocol adm with "
            "--inception FILE"
        )
    source = dataset.open_split("train")
    if source.num_classes != data.num_classes:
        raise InputError(
            f"--protocol: dataset-classifier reads the labels of {data.source}, which "
            f"has {source.num_classes or 'no'} classes, but data.num_classes is "
            f"{data.num_classes}; try --protocol adm with --inception FILE"
        )
    side, channels = data.image_size, data.image_channels
    limit = min(MAX_FEATURES, MAX_BYTES // (side * side * channels))
    train = prepare_all(dataset, source.examples, limit=limit)
    params = train_classifier(train.image, train.label, num_classes=data.num_classes)
    test = load_images(dataset, "test", limit=limit)
    right = accuracy(params, test.image, test.label, num_classes=data.num_classes)
    return TrainedClassifier(params, right)
