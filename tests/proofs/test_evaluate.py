"""Evaluation of a run by a named protocol: complete, resumed, and refused."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest

from ldm_jax.cli.evaluate import main, parse
from ldm_jax.config import ConditionConfig
from ldm_jax.data.sources import Source, open_source
from ldm_jax.evaluation import classifier as classifiers
from ldm_jax.evaluation import dataset_statistics, extractors, samples
from ldm_jax.evaluation import reconstruction as reconstructions
from ldm_jax.evaluation.classifier import (
    ClassifierOutput,
    accuracy,
    classifier,
    classify,
    fit_classifier,
    train_classifier,
)
from ldm_jax.evaluation.dataset import (
    Dataset,
    data_digest,
    dataset_of,
    load_images,
)
from ldm_jax.evaluation.dataset_statistics import measure_real, real_statistics
from ldm_jax.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    inception_extractor,
)
from ldm_jax.evaluation.features import (
    FeatureSet,
    Provenance,
    Reference,
    check_comparable,
    join,
    read_reference,
    write_reference,
)
from ldm_jax.evaluation.fid import moments
from ldm_jax.evaluation.protocols import PROTOCOLS
from ldm_jax.images import write_png
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.metric_networks import inception_shapes
from ldm_jax.training.latent_cache import made_of
from ldm_jax.types import InputError
from tests.support import tiny
from tests.support.commands import ldm, succeeded, train, write_run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run folder with random parameters."""
    return write_run(tiny.get_config(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def short_classifier_training(monkeypatch):
    """Train the classifier for 5 steps; store the features of 32 images a file."""
    short = functools.partial(train_classifier, num_steps=5)
    monkeypatch.setattr(classifiers, "train_classifier", short)
    monkeypatch.setattr(samples, "SHARD", 32)


def measure(tiny_run, out, *flags):
    args = ["--workdir", tiny_run, "--steps", 2, "--num-images", 70, "--out", out]
    main([str(arg) for arg in (*args, *flags, "--compilation-cache", "none")])
    (path,) = out.glob("*/metrics.json")
    return path


def assert_alike(one, other):
    wanted_scores = {k: v for k, v in other["scores"].items() if v is not None}
    assert one["scores"].keys() == other["scores"].keys()
    assert {k: one["scores"][k] for k in wanted_scores} == pytest.approx(
        wanted_scores, rel=1e-5
    )


def test_evaluate_writes_scores_and_their_settings(tiny_run, tmp_path, capsys):
    path = measure(tiny_run, tmp_path / "out")
    report = json.loads(path.read_text())
    scores = report["scores"]
    names = {"fid", "kid", "inception_score", "precision", "recall", "coverage"}
    assert names <= scores.keys()
    assert scores["fid"] > report["held_out_scores"]["fid"]  # the run is not trained
    assert report["protocol"]["name"] == "dataset-classifier"
    assert report["num_held_out"] == 70
    assert report["settings"]["steps"] == 2 and report["seeds"] == "0-69"
    assert report["real"]["num_images"] == 1500 and len(report["real"]["data"]) == 64
    printed = capsys.readouterr().out
    assert "| dataset-classifier | ddim 2, guidance 1 | held-out real |" in printed
    assert str(path) in printed
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "features_000000.npz",
        "features_000001.npz",
        "features_000002_6.npz",
        "metrics.json",
        "samples.png",
    ]


def test_an_interrupted_evaluation_resumes_without_drawing_twice(
    tiny_run, tmp_path, monkeypatch
):
    whole = json.loads(measure(tiny_run, tmp_path / "whole").read_text())
    out, written = tmp_path / "cut", []

    def write(path, arrays):
        if path.name.startswith("features_"):
            if written:
                raise KeyboardInterrupt
            written.append(path)
        real_write(path, arrays)

    real_write = samples.write_arrays
    with monkeypatch.context() as patch:
        patch.setattr(samples, "write_arrays", write)
        with pytest.raises(KeyboardInterrupt):
            measure(tiny_run, out)
    (first,) = written
    before = first.stat().st_mtime_ns
    drawn = []
    real_make = samples.sample_images
    monkeypatch.setattr(
        samples,
        "sample_images",
        lambda pipeline, specs: drawn.extend(specs) or real_make(pipeline, specs),
    )
    resumed = json.loads(measure(tiny_run, out).read_text())
    assert first.stat().st_mtime_ns == before
    assert [job.seed for job in drawn] == list(range(32, 70))
    assert resumed["scores"] == whole["scores"]
    drawn.clear()
    more = json.loads(measure(tiny_run, out, "--num-images", 80).read_text())
    assert [job.seed for job in drawn] == list(range(70, 80))
    assert more["images_drawn"] == 10
    fresh = json.loads(
        measure(tiny_run, tmp_path / "fresh", "--num-images", 80).read_text()
    )
    assert_alike(more, fresh)
    drawn.clear()
    fewer = json.loads(measure(tiny_run, out, "--num-images", 70).read_text())
    assert not drawn
    assert_alike(fewer, whole)


def test_an_evaluation_resumes_from_a_partial_shard(tiny_run, tmp_path, monkeypatch):
    whole = json.loads(measure(tiny_run, tmp_path / "whole").read_text())
    monkeypatch.setattr(samples, "PART", 8)
    real_extract, seen = samples.join, []

    def stop(parts):
        seen.append(parts)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real_extract(parts)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            measure(tiny_run, tmp_path / "cut")
    left = [path.name for path in tmp_path.rglob("cut/*/features_*.npz")]
    assert left == ["features_000000_16.npz"]
    found = json.loads(measure(tiny_run, tmp_path / "cut").read_text())
    assert found["images_drawn"] == 70 - 16
    assert_alike(found, whole)


def test_evaluate_measures_every_combination_of_settings(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--workdir", tiny_run, "--num-images", 66, "--out", out, "--steps", 1, 2]
    args += ["--guidance-scale", 1, 3, "--compilation-cache", "none"]
    main([str(arg) for arg in args])
    found = [json.loads(path.read_text()) for path in out.glob("*/metrics.json")]
    settings = {
        (f["settings"]["steps"], *f["settings"]["guidance_scale"]) for f in found
    }
    assert settings == {(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)}
    assert len({f["scores"]["fid"] for f in found}) == 4
    assert "| ddim 2, guidance 3 | held-out real |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run trained for a few steps."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    succeeded(train(workdir, "--stages", "autoencoder"))
    return workdir


def test_evaluate_scores_reconstructions(trained_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ["--workdir", trained_run, "--reconstructions", "--out", out]
    main([str(arg) for arg in (*args, "--compilation-cache", "none")])
    printed = capsys.readouterr().out
    report = json.loads((out / "reconstructions_dataset-classifier.json").read_text())
    found = report["reconstructions"]
    assert found["num_images"] == 297 and found["lpips"] is None
    assert found["ssim"] is None  # the SSIM window is larger than the images
    assert 3.0 < found["psnr"] < 40.0
    assert found["rfid"] > 0.0 and f"psnr {found['psnr']:.4g}" in printed
    # An identity autoencoder has no reconstruction error.
    monkeypatch.setattr(
        reconstructions, "make_reconstruct", lambda model: lambda params, x: x
    )
    main([str(arg) for arg in (*args, "--compilation-cache", "none")])
    report = json.loads((out / "reconstructions_dataset-classifier.json").read_text())
    found = report["reconstructions"]
    assert found["psnr"] == 100.0
    assert found["rfid"] == pytest.approx(0.0, abs=1e-6)


def images(num, side=16, channels=1, seed=0):
    shape = (num, side, side, channels)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def test_features_do_not_depend_on_devices_or_batches():
    assert jax.device_count() == 8
    params = train_classifier(images(64), np.arange(64) % 4, num_classes=4, num_steps=3)
    extractor = classifier_extractor(params, num_classes=4)
    pixels = images(300, seed=1)
    alone = jax.jit(functools.partial(classify, num_classes=4))(params, pixels)
    for size in (300, 37):
        found = join(
            [extractor.extract(pixels[i : i + size]) for i in range(0, 300, size)]
        )
        assert found.spatial is None
        for name in ("pooled", "logits"):
            wanted = np.asarray(getattr(alone, name))
            error = np.abs(getattr(found, name) - wanted).max()
            assert error < 1e-6 * np.abs(wanted).max(), (name, size)


def test_features_are_the_same_bits_on_any_number_of_devices(monkeypatch):
    params = train_classifier(images(64), np.arange(64) % 4, num_classes=4, num_steps=3)
    pixels, found = images(300, seed=1), []
    for devices in (1, 2, 8):
        layout = PmapLayout(jax.devices()[:devices])
        monkeypatch.setattr(extractors, "PmapLayout", lambda made=layout: made)
        found.append(classifier_extractor(params, num_classes=4).extract(pixels))
    for other in found[1:]:
        np.testing.assert_array_equal(other.pooled, found[0].pooled)
        np.testing.assert_array_equal(other.logits, found[0].logits)


def test_metric_networks_multiply_in_float32_on_any_chip(monkeypatch):
    seen = []

    def precision_of(params, images, *, num_classes):
        seen.append(jax.config.jax_default_matmul_precision)
        return ClassifierOutput(images[:, 0, 0], images[:, 0, 0])

    monkeypatch.setattr(extractors, "classify", precision_of)
    classifier_extractor({"w": np.ones(1)}, num_classes=4).extract(images(3))
    assert set(seen) == {"highest"}


def test_kept_features_cover_all_classes(monkeypatch, tmp_path):
    by_class = sorted(
        open_source("tfds:digits", "train", directory=None).examples,
        key=lambda example: int(example["label"]),
    )
    source = Source(by_class, tuple("0123456789"), 1)
    monkeypatch.setattr(dataset_statistics, "MAX_FEATURES", 80)
    label_by_image = {x["image"].tobytes(): int(x["label"]) for x in by_class}

    def label_features(images):
        labels = [label_by_image[image.tobytes()] for image in images]
        return np.stack([labels, labels], axis=1).astype(np.float32)

    extractor = extractor_of(label_features, digest="d")
    dataset = Dataset(tiny.get_config().data, lambda split: source)
    protocol = PROTOCOLS["dataset-classifier"]
    found = measure_real(dataset, protocol, extractor, folder=tmp_path)
    kept = found.features[:, 0]
    everything = np.array([label_by_image[x["image"].tobytes()] for x in by_class])
    assert np.isclose(found.pooled.mean[0], everything.mean(), rtol=1e-12)
    assert len(kept) == 80
    assert set(kept[:60]) == set(range(10))  # every prefix covers all classes


def extractor_of(function, *, digest):
    """Make an extractor of a function from images to features."""
    return Extractor(lambda x: FeatureSet(function(x), None, None), digest)


def levels_of(pixels):
    """Return three features of each image, in place of Inception's."""
    return pixels.reshape(len(pixels), -1)[:, :3].astype(np.float32)


def test_an_adm_reference_batch_is_read_in_its_published_format(tmp_path):
    pixels = images(40, side=8, channels=3)
    path = tmp_path / "VIRTUAL_things.npz"
    mu, sigma = np.arange(3.0), np.diag([1.0, 4.0, 9.0])
    np.savez(path, arr_0=pixels, mu=mu, sigma=sigma, mu_s=mu, sigma_s=2.0 * sigma)
    extractor = extractor_of(levels_of, digest="d" * 64)
    read = functools.partial(
        real_statistics, dataset_of(tiny.get_config()), given=path, folder=tmp_path
    )
    found = read(PROTOCOLS["adm"], extractor)
    again = read(
        PROTOCOLS["adm"], extractor._replace(extract=None)
    )  # read from its file
    for one in (found, again):
        assert np.array_equal(one.pooled.covariance, sigma)
        assert np.array_equal(one.spatial.covariance, 2.0 * sigma)
        assert np.array_equal(one.features, levels_of(pixels))
        assert one.provenance.num_images == 40
    np.savez(path, arr_0=pixels)
    plain = read(PROTOCOLS["adm"], extractor)
    assert np.allclose(plain.pooled.mean, levels_of(pixels).mean(axis=0))
    with pytest.raises(InputError, match=r"wanted statistics of torch-fidelity"):
        read(PROTOCOLS["torch-fidelity"], extractor)
    np.savez(path, arr_0=pixels[..., 0])
    with pytest.raises(InputError, match=r"uint8 of shape \(40, 8, 8\), wanted"):
        read(PROTOCOLS["adm"], extractor)


def test_a_classifier_with_another_number_of_classes_is_refused():
    config = tiny.get_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, num_classes=7),
        diffusion=dataclasses.replace(config.diffusion, condition=ConditionConfig()),
    )
    with pytest.raises(InputError, match=r"has 10 classes, but data\.num_classes is 7"):
        fit_classifier(dataset_of(config))


def test_the_data_digest_of_a_folder_depends_on_its_images_only(tmp_path):
    config = tiny.get_config()
    data = dataclasses.replace(config.data, source=f"folder:{tmp_path}")
    config = dataclasses.replace(config, data=data)
    write_png(tmp_path / "a.png", images(1)[0])
    before = data_digest(config.data), made_of(config)
    os.utime(tmp_path / "a.png", (0, 0))
    (tmp_path / "notes.md").write_text("no image")
    assert (data_digest(config.data), made_of(config)) == before
    write_png(tmp_path / "a.png", images(1, side=20)[0])
    after = data_digest(config.data), made_of(config)
    assert all(new != old for new, old in zip(after, before, strict=True))


def test_the_classifier_learns_digits_deterministically():
    dataset = dataset_of(tiny.get_config())
    train, test = (
        load_images(dataset, split, limit=2000) for split in ("train", "test")
    )
    params, again = (
        train_classifier(train.image, train.label, num_classes=10, num_steps=n)
        for n in (150, 150)
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    right = accuracy(params, test.image, test.label, num_classes=10)
    assert right > 0.9


def test_the_classifier_accepts_images_of_any_size():
    for side in (4, 7, 8, 31, 64):
        pixels = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        seen, _ = jax.eval_shape(classifier(3).init_with_output, key, pixels)
        assert seen.pooled.shape == (2, 64) and seen.logits.shape == (2, 3)


@pytest.mark.parametrize("name", ["adm", "clean-fid"])
def test_inception_accepts_grey_images(name, monkeypatch):
    alone = PmapLayout(jax.devices()[:1])
    monkeypatch.setattr(extractors, "PmapLayout", lambda: alone)
    monkeypatch.setattr(extractors, "BATCH_SIZE", 2)
    flat = lambda leaf: np.full(leaf.shape, 0.02, np.float32)  # noqa: E731
    params = jax.tree.map(flat, inception_shapes())
    found = inception_extractor(PROTOCOLS[name], params).extract(images(2))
    assert found.pooled.shape == (2, 2048)
    assert found.spatial.shape == (2, 2023)
    assert found.logits.shape == (2, 1008)
    assert np.isfinite(found.logits).all()


def reference(**fields):
    provenance = {
        "protocol": "adm",
        "network": "abc",
        "source": "tfds:digits",
        "split": "train",
        "num_images": 30,
        "image_size": 16,
        "data": "d" * 64,
    }
    rows = np.random.RandomState(0).randn(30, 4).astype(np.float32)
    return Reference(Provenance(**provenance | fields), moments(rows), None, rows)


def test_a_reference_reads_back_with_its_provenance(tmp_path):
    path = tmp_path / "real.npz"
    write_reference(path, reference())
    found = read_reference(path)
    assert found.provenance == reference().provenance
    np.testing.assert_array_equal(found.features, reference().features)
    np.testing.assert_array_equal(found.pooled.covariance, reference().pooled[1])


@pytest.mark.parametrize("name", ["protocol", "network"])
def test_references_of_another_protocol_or_network_are_not_comparable(tmp_path, name):
    ours, theirs = reference(), reference(**{name: "other"})
    with pytest.raises(InputError, match=f"of {name} other, wanted .* never compared"):
        check_comparable(ours.provenance, theirs.provenance, path=tmp_path)


def test_evaluate_refuses_a_reference_of_another_protocol(tiny_run, tmp_path):
    path = tmp_path / "real.npz"
    write_reference(path, reference())
    out = tmp_path / "out"
    with pytest.raises(InputError, match="got statistics of protocol adm, wanted"):
        measure(tiny_run, out, "--reference", path)


def test_cached_statistics_are_not_used_for_another_data_set(tiny_run, tmp_path):
    out = tmp_path / "out"
    measure(tiny_run, out)
    config = tiny.get_config()
    fewer = dataclasses.replace(
        config.data, train_split="train[:700]", num_train_examples=700
    )
    other = write_run(dataclasses.replace(config, data=fewer), tmp_path / "other")
    args = ["--workdir", other, "--steps", 2, "--num-images", 70, "--out", out]
    main([str(arg) for arg in (*args, "--compilation-cache", "none")])
    found = [json.loads(path.read_text()) for path in out.glob("*/metrics.json")]
    assert sorted(one["real"]["num_images"] for one in found) == [700, 1500]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--protocol", "adm"], "--inception: not given, but protocol adm measures"),
        (["--protocol", "amd"], "did you mean adm"),
        (["--inception", "w.pth", "--protocol", "dataset-classifier"], "reads none"),
        (["--num-images", "1"], "--num-images: got 1, wanted 2 or more"),
        (["--guidance-scale", "x"], "guidance"),
        (["--sampler", "ddmi"], "ddim"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tiny_run, flags, wanted):
    with pytest.raises(InputError, match=wanted) as caught:
        parse(["--workdir", str(tiny_run), *flags])
    assert "\n" not in str(caught.value)


def test_too_few_images_for_a_covariance_are_refused(tiny_run, tmp_path):
    with pytest.raises(InputError, match="got 20 images, wanted more than the 64"):
        measure(tiny_run, tmp_path / "out", "--num-images", 20)


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"[]"])
def test_read_reference_refuses_other_files(tmp_path, content):
    path = tmp_path / "real.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"real\.npz: not a file of arrays"):
        read_reference(path)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(InputError, match="no protocol, or parts are missing"):
        read_reference(path)


def test_evaluate_refuses_a_folder_that_is_not_a_run(tmp_path):
    found = ldm("evaluate", "--workdir", tmp_path)
    assert found.returncode != 0
    assert "is not a run" in found.stderr and found.stderr.count("\n") <= 2
