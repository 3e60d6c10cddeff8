"""What cannot fit the memory is refused in one line, before it is allocated."""

import dataclasses
import types

import jax
import pytest

from ldm_jax.build import build_model
from ldm_jax.latent_diffusion import autoencoder_bytes, unet_bytes
from ldm_jax.parallel import memory
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.memory import check_fits, memory_of
from ldm_jax.training import dry_run
from ldm_jax.training.dry_run import check_memory, describe
from ldm_jax.types import InputError
from tests.support.commands import TINY, error_line, ldm, refusal, train, write_run
from tests.support.tiny import get_config

CPU = jax.local_devices(backend="cpu")[0]


def gpu(**stats):
    return types.SimpleNamespace(
        platform="gpu", device_kind="H200", memory_stats=lambda: stats or None
    )


def test_a_need_is_compared_with_the_memory_of_its_device():
    check_fits(10**9, gpu(bytes_limit=10**9), what="x: got", remedy="y")
    check_fits(10**30, gpu(), what="x: got", remedy="y")  # its memory is not known
    with pytest.raises(
        InputError, match=r"x: got 1\.5 GB .* the 1\.0 GB .*H200; try y"
    ):
        check_fits(1_500_000_000, gpu(bytes_limit=10**9), what="x: got", remedy="y")


@pytest.mark.parametrize(
    "text, limit", [("1000000\n", 1_000_000), ("max\n", None), ("9" * 19, None)]
)
def test_a_container_has_less_memory_than_its_machine(
    tmp_path, monkeypatch, text, limit
):
    (tmp_path / "memory.max").write_text(text)
    places = (str(tmp_path / "memory.max"), str(tmp_path / "nothing"))
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ())
    machine = memory_of(CPU)
    monkeypatch.setattr(memory, "CGROUP_LIMITS", places)
    assert memory_of(CPU) == (limit or machine) > 0


def test_the_largest_arrays_of_an_image_are_counted():
    model = build_model(get_config())  # 8x8 pixels, latents of 4x4, 8 channels
    assert autoencoder_bytes(model, "gpu") == 8 * 8 * 8 * 4
    assert unet_bytes(model, "gpu") == 4 * 4 * 8 * 4
    large = model._replace(latent_shape=(64, 32, 2))
    assert autoencoder_bytes(large, "cpu") == 4 * (64 * 32) ** 2  # attention
    assert unet_bytes(large, "cpu") == 4 * (32 * 16) ** 2
    plain = large._replace(autoencoder=large.autoencoder.clone(mid_attention=False))
    assert autoencoder_bytes(plain, "cpu") == 128 * 64 * 8 * 4


def test_a_run_needs_its_state_and_gradients(monkeypatch):
    config, layout = get_config(), PmapLayout(jax.devices()[:1])
    model = build_model(config)
    report = describe(config, layout)
    parameters = report["parameters"]
    needed = max(
        report["state_bytes"][stage] + 4 * parameters[network]
        for stage, network in (("autoencoder", "autoencoder"), ("diffusion", "unet"))
    )
    refused = []
    monkeypatch.setattr(dry_run, "NARROW", 0)
    for most in (needed // 2, 2 * needed):
        monkeypatch.setattr(memory, "memory_of", lambda device, most=most: most)
        try:
            check_memory(config, model, layout)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) == 1 and ".channels: got networks" in refused[0]
    monkeypatch.setattr(memory, "memory_of", lambda device: 100 * needed)
    second = dataclasses.replace(config.diffusion, batch_size=2**20)
    with pytest.raises(InputError, match=r"diffusion\.batch_size: got 1048576"):
        check_memory(dataclasses.replace(config, diffusion=second), model, layout)


HUGE = ("--diffusion.channels", 65536)
"""Needs terabytes, the sizes below petabytes: more than any machine has."""


def test_networks_beyond_the_memory_leave_no_run(tmp_path):
    line = error_line(train(tmp_path / "run", *HUGE))
    assert "diffusion.channels: got networks" in line and "wanted at most" in line
    assert not (tmp_path / "run").exists()
    ldm("train", "--config", TINY, "--dry-run", *HUGE).check_returncode()


@pytest.mark.parametrize(
    "flags", [("--size", 16384, 4096), ("--size", 16384, 4096, "--tile", 64)]
)
def test_images_beyond_the_memory_are_not_begun(tmp_path, capsys, flags):
    run = write_run(get_config(), tmp_path / "run")
    line = refusal(capsys, "--workdir", run, "--out", tmp_path / "out", *flags)
    assert "--size: got 16384x4096 pixels" in line and "try smaller images" in line
    assert not (tmp_path / "out").exists()
