"""Features of images by a protocol's network, on all local devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ldm_jax.evaluation.classifier import classify
from ldm_jax.evaluation.features import FeatureSet
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.models.inception import INCEPTION_SIDE, Features, Inception
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.training.digest import tree_digest
from ldm_jax.types import PyTree


def resize_bilinearly(
    images: Float[Array, "b h w c"], *, side: int
) -> Float[Array, "b s s c"]:
    """Resize as TensorFlow 1 did: corners aligned, without antialiasing.

    Pixel i of the result is at `i * (size / side)` in the image, not at the middle of
    the area it replaces, so images move up and left by part of a pixel.

    Args:
      images: Levels of any range.
      side: Height and width of the result.

    Returns:
      The images, in their dtype.

    Source:
      TensorFlow 1's `ResizeBilinear` with `align_corners` and `half_pixel_centers` off;
      Parmar et al., arXiv:2104.11222, sec. 3.1, on the effect on scores.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        place = jnp.arange(side, dtype=jnp.float32) * jnp.float32(size / side)
        floor = jnp.floor(place)
        low = floor.astype(jnp.int32)
        shape = [1] * images.ndim
        shape[axis] = side
        weight = (place - floor).astype(images.dtype).reshape(shape)
        before = jnp.take(images, low, axis=axis)
        after = jnp.take(images, jnp.minimum(low + 1, size - 1), axis=axis)
        images = before + (after - before) * weight
    return images


def resize_cleanly(
    images: UInt8[np.ndarray, "b h w c"], *, side: int
) -> Float[np.ndarray, "b s s c"]:
    """Resize as clean-fid does: cubic, with antialiasing, never rounded.

    Args:
      images: 8-bit levels.
      side: Height and width of the result.

    Returns:
      Levels clipped to [0, 255], float32.

    Source:
      Parmar et al., arXiv:2104.11222, sec. 3.1 and 4; by Pillow, on the host.
    """
    size, cubic = (side, side), Image.Resampling.BICUBIC

    def one(channel: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "s s"]:
        return np.asarray(Image.fromarray(channel).resize(size, cubic))

    planes = images.astype(np.float32)
    resized = [
        np.stack([one(image[..., c]) for c in range(image.shape[-1])], axis=-1)
        for image in planes
    ]
    return np.clip(np.stack(resized), 0.0, 255.0)


BATCH_SIZE = 32
"""Images a device reads at once."""


@runtime_checkable
class Extract(Interface):
    """A function from images to features."""

    def __call__(self, images: UInt8[np.ndarray, "b h w c"]) -> FeatureSet:
        """Return the features of any number of 8-bit images, in order."""
        ...


class Extractor(NamedTuple):
    """A feature extractor."""

    extract: Extract
    """The function."""
    digest: str
    """Digest of its weights."""


def inception_extractor(protocol: Protocol, params: PyTree) -> Extractor:
    """Make the Inception network of a protocol an extractor."""
    params = jax.tree.map(jnp.asarray, params)
    on_host = protocol.resize == "clean"

    def features_of(
        params: PyTree, inputs: None, images: Float[Array, "b h w c"] | Array
    ) -> Features:
        del inputs
        levels = jnp.asarray(images, jnp.float32)
        levels = jnp.broadcast_to(levels, (*levels.shape[:3], 3))
        if not on_host:
            levels = resize_bilinearly(levels, side=INCEPTION_SIDE)
        features: Any = Inception().apply({"params": params}, (levels - 128.0) / 128.0)
        return features

    def extract(images: UInt8[np.ndarray, "b h w c"]) -> FeatureSet:
        found = apply(images)
        return FeatureSet(found.pooled, found.spatial, found.logits)

    resize = functools.partial(resize_cleanly, side=INCEPTION_SIDE)
    apply = _on_all_devices(features_of, params, resize if on_host else None)
    return Extractor(extract, tree_digest(params))


def classifier_extractor(params: PyTree, *, num_classes: int) -> Extractor:
    """Make the classifier of a data set an extractor."""

    def features_of(
        params: PyTree, inputs: None, images: UInt8[Array, "b h w c"]
    ) -> Any:
        del inputs
        return classify(params, images, num_classes=num_classes)

    apply = _on_all_devices(features_of, jax.tree.map(jnp.asarray, params))

    def extract(images: UInt8[np.ndarray, "b h w c"]) -> FeatureSet:
        found = apply(images)
        return FeatureSet(found.pooled, None, found.logits)

    return Extractor(extract, tree_digest(params))


def _on_all_devices(
    features_of: Callable[[PyTree, None, Any], Any],
    params: PyTree,
    prepare: Callable[[Any], Any] | None = None,
) -> Callable[[Any], Any]:
    """Apply a network to any number of images, in batches split over the devices.

    Each batch is prepared on the host first: all of them at once may exceed its memory.

    Every batch has one size, the last one padded, so that one program is compiled and
    an image's features do not depend on the number of images. In full float32: GPUs and
    TPUs else multiply with fewer bits, and scores would depend on the chip.
    """
    layout = PmapLayout()
    one = len(layout.devices) == 1
    run: Any = jax.jit(features_of) if one else layout.map_images(features_of)
    placed = params if one else layout.place(params)
    size = BATCH_SIZE * len(layout.devices)

    def apply(images: np.ndarray) -> Any:
        parts: list[Any] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            part = prepare(part) if prepare else part
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            with jax.default_matmul_precision("highest"):
                found = run(placed, None, filled)
            cut = functools.partial(_cut, num=len(part))
            parts.append(jax.tree.map(cut, found))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    return apply


def _cut(rows: Array | np.ndarray, *, num: int) -> np.ndarray:
    return np.asarray(rows)[:num]


def extractor_of(protocol: Protocol, params: PyTree, *, num_classes: int) -> Extractor:
    """Make the extractor of a protocol from its network's parameters."""
    if protocol.network == "classifier":
        return classifier_extractor(params, num_classes=num_classes)
    return inception_extractor(protocol, params)
