"""The Inception network of FID, of 2015 and TensorFlow 1.

It differs from Inception v3 of today's libraries in poolings, 1,008 classes and the
resizing of images; each difference changes published scores.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

INCEPTION_SIDE = 299
NUM_CLASSES = 1008
NUM_FEATURES = 2048
NUM_SPATIAL = 7
"""Channels, of 192, of the map that sFID uses."""
EPSILON = 1e-3

Pool = Literal["none", "mean", "max", "halve"]


class Features(NamedTuple):
    """Outputs of the network."""

    pooled: Float[Array, "b 2048"]
    """Means of the last map, for FID and KID."""
    spatial: Float[Array, "b 2023"]
    """Seven channels of an early map, for sFID."""
    logits: Float[Array, "b 1008"]
    """Class logits without the bias, for the Inception Score."""


class Unit(NamedTuple):
    """A convolution, its norm and a ReLU."""

    name: str
    """Name of the module."""
    channels: int
    """Channels out."""
    size: tuple[int, int] = (1, 1)
    """Height and width of the kernel."""
    halves: bool = False
    """Whether it has stride 2 and no padding."""
    shrinks: bool = False
    """Whether it has stride 1 and no padding; otherwise the size is kept."""


class Branch(NamedTuple):
    """One branch of a block."""

    units: tuple[Unit, ...]
    """Units in sequence."""
    pool: Pool = "none"
    """Pooling before the units."""
    fork: tuple[Unit, ...] = ()
    """Parallel units after `units`."""


def _block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 64),)),
        Branch((Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Unit("branch_pool", pooled),), pool="mean"),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch3x3", 384, (3, 3), halves=True),)),
        Branch(
            (
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3), halves=True),
            )
        ),
        Branch((), pool="halve"),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 192),)),
        Branch(
            (
                Unit("branch7x7_1", width),
                Unit("branch7x7_2", width, (1, 7)),
                Unit("branch7x7_3", 192, (7, 1)),
            )
        ),
        Branch(
            (
                Unit("branch7x7dbl_1", width),
                Unit("branch7x7dbl_2", width, (7, 1)),
                Unit("branch7x7dbl_3", width, (1, 7)),
                Unit("branch7x7dbl_4", width, (7, 1)),
                Unit("branch7x7dbl_5", 192, (1, 7)),
            )
        ),
        Branch((Unit("branch_pool", 192),), pool="mean"),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        Branch(
            (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), halves=True))
        ),
        Branch(
            (
                Unit("branch7x7x3_1", 192),
                Unit("branch7x7x3_2", 192, (1, 7)),
                Unit("branch7x7x3_3", 192, (7, 1)),
                Unit("branch7x7x3_4", 192, (3, 3), halves=True),
            )
        ),
        Branch((), pool="halve"),
    )


def _block_e(pool: Pool) -> tuple[Branch, ...]:
    def fork(name: str) -> tuple[Unit, ...]:
        return (Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1)))

    return (
        Branch((Unit("branch1x1", 320),)),
        Branch((Unit("branch3x3_1", 384),), fork=fork("branch3x3_2")),
        Branch(
            (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3))),
            fork=fork("branch3x3dbl_3"),
        ),
        Branch((Unit("branch_pool", 192),), pool=pool),
    )


STEM = (
    (
        Unit("conv2d_1a_3x3", 32, (3, 3), halves=True),
        Unit("conv2d_2a_3x3", 32, (3, 3), shrinks=True),
        Unit("conv2d_2b_3x3", 64, (3, 3)),
    ),
    (
        Unit("conv2d_3b_1x1", 80),
        Unit("conv2d_4a_3x3", 192, (3, 3), shrinks=True),
    ),
)
"""Units before the blocks; each group ends in a pooling."""
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "mixed_5b": _block_a(32),
    "mixed_5c": _block_a(64),
    "mixed_5d": _block_a(64),
    "mixed_6a": _block_b(),
    "mixed_6b": _block_c(128),
    "mixed_6c": _block_c(160),
    "mixed_6d": _block_c(160),
    "mixed_6e": _block_c(192),
    "mixed_7a": _block_d(),
    "mixed_7b": _block_e("mean"),
    # Maximum instead of mean: an error of the 2015 network that scores depend on.
    "mixed_7c": _block_e("max"),
}
SPATIAL_BLOCK = "mixed_6d"
"""Block whose first branch is the tensor `mixed_6/conv` of the 2015 graph."""


class Inception(nn.Module):
    """Inception v3 of December 2015; its parameters are read from files. All float32.

    Not the Inception v3 of torchvision or Keras, whose features differ.

    Source:
      Szegedy et al., arXiv:1512.00567, table 1; the network in the graph that Salimans
      et al., arXiv:1606.03498, and Heusel et al., arXiv:1706.08500, measured with.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "b 299 299 3"]) -> Features:
        """Compute features of RGB images, `(level - 128) / 128` of 8-bit levels."""
        x = images
        for units in STEM:
            for unit in units:
                x = ConvUnit(unit, name=unit.name)(x)
            x = _pool(x, "halve")
        spatial = x
        for name, branches in BLOCKS.items():
            parts = Mixed(branches, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = parts[0][..., :NUM_SPATIAL]
            x = jnp.concatenate(parts, axis=-1)
        pooled = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, name="fc")(pooled)
        return Features(pooled, spatial.reshape(len(spatial), -1), logits)


class Mixed(nn.Module):
    """A block of parallel branches.

    Fields:
      branches: The branches.
    """

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> list[Float[Array, "b h2 w2 _"]]:
        """Return the output of each branch."""
        outputs: list[Array] = []
        for branch in self.branches:
            y = _pool(x, branch.pool)
            for unit in branch.units:
                y = ConvUnit(unit, name=unit.name)(y)
            forks = [ConvUnit(unit, name=unit.name)(y) for unit in branch.fork]
            outputs.append(jnp.concatenate(forks, axis=-1) if forks else y)
        return outputs


class ConvUnit(nn.Module):
    """A convolution, a norm with stored statistics, and a ReLU.

    Fields:
      unit: Sizes of the convolution.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Apply the unit."""
        bare = self.unit.halves or self.unit.shrinks
        sides = [0 if bare else n // 2 for n in self.unit.size]
        x = nn.Conv(
            self.unit.channels,
            self.unit.size,
            strides=2 if self.unit.halves else 1,
            padding=[(side, side) for side in sides],
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(StoredNorm(name="bn")(x))


class StoredNorm(nn.Module):
    """Normalise each channel by stored statistics, which are parameters.

    Source:
      Ioffe & Szegedy, arXiv:1502.03167, algorithm 2.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise a map."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        size = (x.shape[-1],)
        gamma = self.param("scale", ones, size, jnp.float32)
        beta = self.param("bias", zeros, size, jnp.float32)
        mean = self.param("mean", zeros, size, jnp.float32)
        variance = self.param("variance", ones, size, jnp.float32)
        scale = gamma * jax.lax.rsqrt(variance + EPSILON)
        return (x - mean) * scale + beta


def _pool(x: Float[Array, "b h w c"], pool: Pool) -> Float[Array, "b h2 w2 c"]:
    if pool == "none":
        return x
    if pool == "halve":
        return nn.max_pool(x, (3, 3), strides=(2, 2))
    around: Any = ((1, 1), (1, 1))
    if pool == "max":
        return nn.max_pool(x, (3, 3), padding=around)
    # The mean excludes pixels beyond the border.
    return nn.avg_pool(x, (3, 3), padding=around, count_include_pad=False)
