import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import pytest

from ldm_jax import config as config_lib
from ldm_jax.build import build_model
from ldm_jax.config import Config
from ldm_jax.config.load_config import load_config
from ldm_jax.config.presets import (
    RDM_LATENT_SCALE,
    SD_LATENT_SCALE,
    first_stage,
)
from ldm_jax.latent_diffusion import (
    init_autoencoder,
    init_conditioner,
    init_unet,
    param_shapes,
)
from ldm_jax.types import PyTree
from tests.support.commands import LDM, ROOT, run, succeeded
from tests.support.counts import AUTOENCODERS, LDMS

CONFIGS = sorted((ROOT / "configs").glob("*/*.py"))
LARGEST = ("text2img256_kl8_1p4b",)
MAX_BYTES = 4 * 2**30
slow = pytest.mark.skipif("LDM_JAX_SLOW" not in os.environ, reason="make recipes")
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
every_ldm = pytest.mark.parametrize("name", sorted(LDMS))

# A small process: the peak memory of a child starts from the size of its parent.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
sys.exit(code)
"""


def load(name: str) -> Config:
    (path,) = (path for path in CONFIGS if path.stem == name)
    return load_config(str(path))


def count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def dry_run(path: Path) -> tuple[dict, int]:
    """Dry-run a config; return its report and its peak memory in bytes."""
    command = [*LDM, "train", "--config", path.relative_to(ROOT), "--dry-run"]
    result = run("-c", LAUNCHER, sys.executable, *command)
    return json.loads(succeeded(result)), int(result.stderr.splitlines()[-1])


def test_every_published_model_has_a_config_and_every_config_a_count():
    assert {path.stem for path in CONFIGS} == {*AUTOENCODERS, *LDMS}


@every_config
def test_a_shipped_config_reads_back_from_json_equal(path):
    config = load_config(str(path))
    assert config_lib.from_json(config_lib.to_json(config)) == config


@every_config
def test_a_shipped_config_documents_its_command_and_results(path):
    text = path.read_text().split('"""')[1]
    name = path.relative_to(ROOT / "configs").with_suffix("")
    assert f"--config {name} " in text
    assert f"--workdir runs/{path.stem}" in text
    assert "Hours: not measured here." in text
    assert "Published" in text
    if path.stem in LDMS:
        assert f"--first-stage runs/{LDMS[path.stem].first_stage}" in text


@every_config
def test_a_shipped_config_documents_its_batch_size_learning_rate_and_steps(path):
    config = load_config(str(path))
    stage = config.diffusion if "diffusion" in config.stages else config.autoencoder
    text = path.read_text().split('"""')[1]
    words = " ".join(text.split())
    assert f"batch {stage.batch_size}" in words or f"of {stage.batch_size}" in words
    rates = re.findall(r"\d[\d.]*e-\d", words)
    assert stage.optim.lr in map(float, rates)
    if not path.stem.startswith(
        "sd"
    ):  # Their steps are the sum of those that the text lists.
        assert f"{stage.steps:,}" in words


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_a_first_stage_has_the_published_learning_rate_per_image(name):
    config = load(name).autoencoder
    assert config.optim.lr == pytest.approx(4.5e-6 * config.batch_size, rel=1e-12)
    assert config.adversary.optim.lr == config.optim.lr


@every_ldm
def test_a_diffusion_config_has_the_autoencoder_of_its_first_stage(name):
    config, named = load(name), LDMS[name].first_stage
    size = config.data.image_size
    wanted = dataclasses.replace(
        first_stage(named, image_size=size),
        latent_scale=config.autoencoder.latent_scale,
    )
    assert config.autoencoder == wanted
    levels = load(named).autoencoder.attention_levels(256)
    assert config.autoencoder.attention_levels(size) == levels


@every_ldm
def test_latents_have_the_published_scale(name):
    published = {"rdm768": RDM_LATENT_SCALE, "lsun_churches256_kl8": None}
    otherwise = SD_LATENT_SCALE if LDMS[name].first_stage == "kl_f8" else 1.0
    scale = load(name).autoencoder.latent_scale
    assert scale == published.get(name, otherwise)


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_a_first_stage_has_the_published_number_of_parameters(name):
    config = load(name)
    model = build_model(config)
    params = param_shapes(init_autoencoder, model)
    assert count(params) == AUTOENCODERS[name]


@every_ldm
def test_a_unet_has_the_published_number_of_parameters(name):
    config = load(name)
    model = build_model(config)
    params = param_shapes(init_unet, model)
    assert count(params) == LDMS[name].unet


@every_ldm
def test_a_conditioner_has_the_published_number_of_parameters(name):
    config = load(name)
    model = build_model(config)
    params = param_shapes(init_conditioner, model)
    assert count(params) == LDMS[name].conditioner


@slow
@pytest.mark.parametrize("name", LARGEST)
def test_a_dry_run_of_the_largest_config_stays_below_4_gib(name):
    (path,) = (path for path in CONFIGS if path.stem == name)
    report, peak = dry_run(path)
    assert peak < MAX_BYTES
    assert report["parameters"]["unet"] == LDMS[name].unet


@slow
@every_config
def test_a_dry_run_of_every_config_stays_below_4_gib(path, capsys):
    start = time.monotonic()
    report, peak = dry_run(path)
    seconds = time.monotonic() - start
    total = sum(report["parameters"].values())
    with capsys.disabled():
        memory = f"{peak / 2**20:7,.0f} MiB"
        sys.stdout.write(
            f"\n{path.stem:22} {total:>13,} parameters {seconds:5.1f} s {memory}\n"
        )
    assert peak < MAX_BYTES


def table_rows() -> dict[str, list[str]]:
    """Read the tables of docs/reference/models.md: cells by the config's name."""
    lines = (ROOT / "docs/reference/models.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return {cells[0].strip("`"): [cell.strip() for cell in cells] for cells in rows}


@every_config
def test_the_table_of_models_equals_the_configs(path):
    config, cells = load_config(str(path)), table_rows()[path.stem]
    latent = "x".join(map(str, config.latent_shape))
    if path.stem in AUTOENCODERS:
        stage = config.autoencoder
        assert cells[1] == latent
        assert cells[3] == f"{AUTOENCODERS[path.stem]:,}"
        batch, rate, steps = cells[4:7]
    else:
        stage, counts = config.diffusion, LDMS[path.stem]
        assert cells[1:3] == [f"`{counts.first_stage}`", latent]
        wanted = [f"{counts.unet:,}", f"{counts.conditioner:,}"]
        assert cells[3:5] == wanted
        batch, rate, steps = cells[6:9]
    assert int(batch) == stage.batch_size
    assert float(rate) == stage.optim.lr
    assert int(steps.split()[0].replace(",", "")) == stage.steps
