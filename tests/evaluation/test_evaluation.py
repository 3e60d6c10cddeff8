import numpy as np
import pytest

from ldm_jax.evaluation.features import read_arrays, write_arrays
from ldm_jax.evaluation.fid import Moments, frechet_distance, moments
from ldm_jax.types import InputError


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    m1, m2 = np.asarray([0.0, 1.0, 2.0]), np.asarray([1.0, 1.0, 0.0])
    s1, s2 = np.asarray([1.0, 2.0, 0.5]), np.asarray([3.0, 2.0, 0.1])
    wanted = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    a, b = Moments(m1, np.diag(s1**2)), Moments(m2, np.diag(s2**2))
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_is_symmetric_zero_for_equals_and_rotation_invariant():
    random = np.random.RandomState(0)
    roots = random.randn(2, 5, 5)
    a, b = (Moments(random.randn(5), root @ root.T) for root in roots)
    turn, _ = np.linalg.qr(random.randn(5, 5))

    def rotate(x):
        return Moments(turn @ x.mean, turn @ x.covariance @ turn.T)

    distance = frechet_distance(a, b)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(rotate(a), rotate(b)) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_is_finite_for_a_singular_covariance():
    flat = Moments(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    round_ = Moments(np.zeros(3), np.eye(3))
    assert frechet_distance(flat, round_) == pytest.approx(2.0, abs=1e-12)


def test_moments_are_unbiased_and_need_two_rows():
    rows = np.random.RandomState(0).randn(50, 3)
    found = moments(rows)
    centred = rows - rows.mean(axis=0)
    assert found.covariance == pytest.approx(centred.T @ centred / 49)
    with pytest.raises(ValueError, match="2 or more"):
        moments(rows[:1])


def test_kept_arrays_are_compared_with_their_digest(tmp_path):
    path = tmp_path / "x.npz"
    arrays = {"mean": np.arange(3.0), "covariance": np.eye(3)}
    write_arrays(path, arrays)
    found = read_arrays(path)
    assert found.keys() == arrays.keys()
    with np.load(path) as file:
        stored = dict(file)
    np.savez(path, **{**stored, "mean": np.ones(3)})  # intact for zip
    with pytest.raises(InputError, match="its arrays are not what was written"):
        read_arrays(path)
    np.savez(path, **arrays)  # of another program, or an older version
    assert read_arrays(path).keys() == arrays.keys()
