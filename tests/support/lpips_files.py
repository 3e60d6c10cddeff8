"""LPIPS' weights as random arrays, under the names that files give them."""

import functools

import numpy as np

CONV_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SLICE_OF = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4}


@functools.cache
def torchvision():
    """VGG16's convolutions, at a scale that keeps activations about 1."""
    random, arrays, channels_in = np.random.default_rng(0), {}, 3
    for index, channels in zip(CONV_INDICES, WIDTHS, strict=True):
        shape = (channels, channels_in, 3, 3)
        deviation = (2.0 / (9 * channels_in)) ** 0.5
        weight = random.standard_normal(shape, np.float32) * np.float32(deviation)
        arrays[f"features.{index}.weight"] = weight
        bias = 0.1 * random.standard_normal(channels, np.float32)
        arrays[f"features.{index}.bias"] = bias.astype(np.float32)
        channels_in = channels
    return arrays


def under_slices(arrays):
    """Rename the convolutions as the lpips package does."""
    renamed = {}
    for key, value in arrays.items():
        _, index, leaf = key.split(".")
        renamed[f"net.slice{SLICE_OF.get(int(index), 5)}.{index}.{leaf}"] = value
    return renamed


def heads():
    """The non-negative heads."""
    random = np.random.default_rng(1)
    widths = (64, 128, 256, 512, 512)
    return {
        f"lin{k}.model.1.weight": random.random((1, width, 1, 1), np.float32)
        for k, width in enumerate(widths)
    }
