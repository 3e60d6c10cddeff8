"""Scores of features: closed forms, equal distributions, and any batch size."""

import functools
import itertools

import jax
import numpy as np
import pytest

from ldm_jax.evaluation.extractors import resize_bilinearly, resize_cleanly
from ldm_jax.evaluation.fid import (
    Moments,
    frechet_distance,
    inception_score,
    merge_all,
    moments,
    moments_of,
    sums_of,
)
from ldm_jax.evaluation.image_quality import psnr, ssim
from ldm_jax.evaluation.kid import discrepancy, kernel_distance
from ldm_jax.evaluation.precision_recall import neighbourhoods
from ldm_jax.types import InputError


def draw(n, d, seed=0):
    return np.random.RandomState(seed).randn(n, d)


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_moments_do_not_depend_on_the_batch_size(size):
    features = draw(500, 6) * np.logspace(-3, 3, 6) + 1e4
    parts = [sums_of(features[i : i + size]) for i in range(0, 500, size)]
    got, wanted = moments_of(merge_all(parts)), moments(features)
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-12)
    scale = np.sqrt(np.diag(wanted.covariance))
    apart = (got.covariance - wanted.covariance) / np.outer(scale, scale)
    assert np.abs(apart).max() < 1e-9  # centred before squares are taken


def test_moments_of_parts_do_not_depend_on_their_order():
    parts = [sums_of(draw(5 + i, 3, seed=i)) for i in range(4)]
    found = [moments_of(merge_all(order)) for order in itertools.permutations(parts)]
    for other in found[1:]:
        np.testing.assert_allclose(other.covariance, found[0].covariance, rtol=1e-12)


def test_moments_of_too_few_features_are_refused():
    with pytest.raises(ValueError, match="got 1 features, wanted 2 or more"):
        moments_of(sums_of(draw(1, 3)))
    with pytest.raises(ValueError, match="got no features"):
        merge_all([])


def test_frechet_distance_is_accurate_for_ill_conditioned_gaussians():
    # They share their axes: the distance is between the roots of their variances.
    axes = np.linalg.qr(draw(12, 12))[0]
    small, large = np.logspace(-14, 2, 12), np.logspace(-12, 4, 12)
    a, b = (
        Moments(np.full(12, mean), axes * variances @ axes.T)
        for mean, variances in ((0.0, small), (0.5, large))
    )
    wanted = 12 * 0.25 + np.square(np.sqrt(small) - np.sqrt(large)).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(b, b) == pytest.approx(0.0, abs=1e-9)


def test_the_kernel_distance_is_unbiased_for_sets_of_two():
    # In one dimension the cubic kernel compares the first three moments.
    random = np.random.RandomState(3)
    shift, scale = 0.5, 1.5
    wanted = 3 * shift**2 + 3 * (scale**2 + shift**2 - 1) ** 2
    wanted += (shift**3 + 3 * shift * scale**2) ** 2
    found = [
        discrepancy(random.randn(2, 1) * scale + shift, random.randn(2, 1))
        for _ in range(8_000)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - wanted) < 4 * error
    assert error < 0.3 * wanted


def test_kernel_distance_is_zero_on_average_for_equal_distributions():
    found = [
        kernel_distance(
            draw(300, 8, 2 * i), draw(300, 8, 2 * i + 1), subsets=5, subset_size=100
        )
        for i in range(30)
    ]
    means = np.asarray([one.mean for one in found])
    assert abs(means.mean()) < 3 * means.std(ddof=1) / np.sqrt(len(means))
    assert min(means) < 0 < max(means)
    covers = [abs(one.mean) < one.half for one in found]
    assert np.mean(covers) > 0.8


def test_the_interval_of_a_kernel_distance_needs_two_subsets():
    distance = functools.partial(kernel_distance, subsets=10, subset_size=100)
    assert distance(draw(150, 3), draw(150, 3)).half is None
    with pytest.raises(InputError, match="got 50 and 200 features, wanted at least"):
        distance(draw(50, 3), draw(200, 3))


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    logits = 1000.0 * np.eye(8)[np.arange(80) % 8]
    score = functools.partial(inception_score, seed=None)
    assert score(logits, splits=5).mean == pytest.approx(8.0)
    assert score(logits[::8], splits=2).mean == pytest.approx(1.0)
    assert score(np.zeros((20, 8)), splits=2).mean == pytest.approx(1.0)
    with pytest.raises(InputError, match="got 3 images, wanted at least one for each"):
        score(np.zeros((3, 8)), splits=5)


def test_precision_and_recall_are_one_for_equal_and_zero_for_distant_sets():
    x = draw(200, 5)
    same = neighbourhoods(x, x, neighbours=3)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = neighbourhoods(x, x + 100.0, neighbours=3)
    assert far == (0.0, 0.0, 0.0, 0.0)


def test_precision_recall_density_and_coverage_equal_a_count_by_hand():
    # Radii of the real balls are 1, 1 and 2; of the made ones 8, 1 and 1.
    real, made = np.asarray([[0.0], [1.0], [3.0]]), np.asarray([[1.5], [9.5], [10.5]])
    found = neighbourhoods(made, real, neighbours=1)
    assert found.precision == pytest.approx(1 / 3)
    assert found.density == pytest.approx(2 / 3)  # 1.5 lies in two balls
    assert found.coverage == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(1.0)


def test_density_is_one_on_average_for_equal_distributions():
    found = neighbourhoods(draw(2000, 4, 0), draw(2000, 4, 1), neighbours=5)
    assert found.density == pytest.approx(1.0, abs=0.1)
    assert found.coverage == pytest.approx(1 - 2.0**-5, abs=0.02)  # their lemma 2


def test_neighbourhoods_of_too_few_features_are_refused():
    with pytest.raises(InputError, match="got 3 and 9 features, wanted more than 3"):
        neighbourhoods(draw(3, 2), draw(9, 2), neighbours=3)


def test_psnr_and_ssim_have_their_closed_forms():
    images = np.random.RandomState(0).randint(0, 250, (2, 20, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(psnr(images, images + 5), 20 * np.log10(255 / 5))
    assert np.all(np.isinf(psnr(images, images)))
    np.testing.assert_allclose(ssim(images, images), 1.0, rtol=1e-12)
    flat, other = np.full_like(images, 100), np.full_like(images, 120)
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    np.testing.assert_allclose(ssim(flat, other), wanted, rtol=1e-9)
    noise = np.random.RandomState(1).randint(0, 256, images.shape).astype(np.uint8)
    assert np.all(ssim(images, noise) < 0.2)
    with pytest.raises(InputError, match="got 8x16 pixels, wanted sides of at least"):
        ssim(images[:, :8], images[:, :8])


def test_resizing_to_the_same_size_changes_no_pixel():
    images = np.random.RandomState(0).randint(0, 256, (2, 9, 9, 3)).astype(np.uint8)
    floats = images.astype(np.float32)
    same = resize_bilinearly(jax.numpy.asarray(floats), side=9)
    np.testing.assert_array_equal(same, floats)
    np.testing.assert_allclose(resize_cleanly(images, side=9), floats, atol=1e-3)
    flat = np.full((1, 30, 40, 1), 77, np.uint8)
    np.testing.assert_allclose(resize_cleanly(flat, side=11), 77.0, atol=1e-3)
