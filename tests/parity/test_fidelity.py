"""Our scores and Inception features equal those of torch-fidelity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer

from ldm_jax.evaluation.extractors import resize_bilinearly, resize_cleanly
from ldm_jax.evaluation.fid import frechet_distance, inception_score, moments
from ldm_jax.evaluation.kid import kernel_distance
from ldm_jax.evaluation.precision_recall import neighbourhoods
from ldm_jax.files import write_safetensors
from ldm_jax.models.inception import Inception
from ldm_jax.pretrained.metric_networks import load_inception
from tests.parity.fidelity import fidelity

QUIET = {"verbose": False}


@pytest.fixture(scope="module")
def features():
    random = np.random.RandomState(0)
    mix = random.randn(24, 24)
    made = random.randn(1200, 24) @ mix * 0.9 + 0.1
    return made, random.randn(1100, 24) @ mix


def test_frechet_distance_equals_torch_fidelity(features):
    theirs = fidelity("metric_fid")
    stats = [theirs.fid_features_to_statistics(torch.from_numpy(x)) for x in features]
    wanted = theirs.fid_statistics_to_metric(*stats, verbose=False)
    got = frechet_distance(*map(moments, features))
    assert got == pytest.approx(wanted["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("size", [50, 1000])
def test_kernel_distance_equals_torch_fidelity(features, size):
    settings = {"kid_subsets": 20, "kid_subset_size": size, "rng_seed": 2020, **QUIET}
    wanted = fidelity("metric_kid").kid_features_to_metric(
        *map(torch.from_numpy, features), **settings
    )
    got = kernel_distance(*features, subsets=20, subset_size=size)
    assert got.mean == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-6)
    assert got.std == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("shuffle, seed", [(True, 2020), (False, None)])
def test_inception_score_equals_torch_fidelity(features, shuffle, seed):
    wanted = fidelity("metric_isc").isc_features_to_metric(
        torch.from_numpy(features[0]), splits=7, shuffle=shuffle
    )
    got = inception_score(features[0], splits=7, seed=seed)
    assert got.mean == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert got.std == pytest.approx(wanted["inception_score_std"], rel=1e-6)


def test_precision_and_recall_equal_torch_fidelity(features):
    wanted = fidelity("metric_prc").prc_features_to_metric(
        *map(torch.from_numpy, features),
        prc_neighborhood=3,
        prc_batch_size=500,
        save_cpu_ram=False,
        **QUIET,
    )
    got = neighbourhoods(*features, neighbours=3)
    assert 0.05 < got.recall < 0.999  # neither trivial value
    assert got.precision == pytest.approx(wanted["precision"], rel=1e-6)
    assert got.recall == pytest.approx(wanted["recall"], rel=1e-6)


def test_resize_bilinearly_equals_tensorflow_1():
    theirs = fidelity("interpolate_compat_tensorflow")
    images = np.random.RandomState(1).randint(0, 256, (2, 32, 45, 3))
    images = images.astype(np.float32)
    for side in (299, 17):
        wanted = theirs.interpolate_bilinear_2d_like_tensorflow1x(
            torch.from_numpy(images.transpose(0, 3, 1, 2)),
            size=(side, side),
            align_corners=False,
        )
        got = resize_bilinearly(jnp.asarray(images), side=side)
        wanted = wanted.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def random_state(module):
    """Draw weights that keep the size of activations, and non-trivial norms."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            state[key] = value
        elif key.endswith(("running_var", "bn.weight")):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        else:
            fan = value[0].numel() if value.ndim > 1 else 16
            noise = torch.randn(value.shape, generator=generator)
            state[key] = noise * (2.0 / fan) ** 0.5
    return state


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_inception_features_equal_torch_fidelity(tmp_path, monkeypatch, kind):
    module = fidelity("feature_extractor_inceptionv3")
    blank = lambda *args, **kwargs: {}  # noqa: E731
    monkeypatch.setattr(module, "load_state_dict_from_url", blank)
    cls = module.FeatureExtractorInceptionV3
    names = ["2048", "logits_unbiased"]
    with monkeypatch.context() as patch:
        patch.setattr(cls, "load_state_dict", lambda self, state: None)
        theirs = cls("inception", names)
    state = random_state(theirs)
    theirs.load_state_dict(state)
    path = tmp_path / f"inception.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        floating = {k: v.numpy() for k, v in state.items() if v.is_floating_point()}
        write_safetensors(path, floating)
    images = np.random.RandomState(2).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    maps = {}
    first = theirs.Mixed_6d.branch1x1
    first.register_forward_hook(lambda m, i, out: maps.update(spatial=out.numpy()))
    pooled, logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))

    @jax.jit
    def ours(params, images):
        resized = resize_bilinearly(images.astype(jnp.float32), side=299)
        return Inception().apply({"params": params}, (resized - 128.0) / 128.0)

    got = ours(load_inception(path), images)
    spatial = maps["spatial"][:, :7].transpose(0, 2, 3, 1).reshape(2, -1)
    wanted = {"pooled": pooled.numpy(), "logits": logits.numpy(), "spatial": spatial}
    for name, value in wanted.items():
        scale = np.abs(value).max()
        assert np.abs(getattr(got, name) - value).max() < 1e-4 * scale, name
    assert wanted["pooled"].std() > 1e-3


@pytest.mark.parametrize("height, width", [(8, 8), (32, 32), (256, 256), (700, 410)])
def test_resize_cleanly_equals_clean_fid(height, width):
    images = np.random.RandomState(1).randint(0, 256, (2, height, width, 3), np.uint8)
    theirs = np.stack([build_resizer("clean")(image) for image in images])
    np.testing.assert_array_equal(resize_cleanly(images, side=299), theirs)
