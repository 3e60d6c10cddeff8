"""The compiler's counts for our programs, compared with stored counts.

Counts, not seconds: they are the same on every machine with these versions. A number
that falls is an improvement: store it. One that rises needs a reason.
"""

import dataclasses
from typing import Any

import pytest

from ldm_jax.run import train
from ldm_jax.tools.plan.compiling import Compiled, compile_program
from ldm_jax.tools.plan.programs import sample_work, step_work
from ldm_jax.tools.plan.request import PlanRequest, resolve
from tests.support.tiny import get_config

NUM_DEVICES = 8
SLACK = 1.05
STORED = {
    # flops, bytes moved, bytes of temporaries, collectives
    ("autoencoder", "pmap"): (3_188_813, 3_447_956, 168_520, 1),
    ("diffusion", "pmap"): (1_702_524, 3_550_448, 211_248, 1),
    ("diffusion", "fsdp"): (1_492_565, 2_560_732, 161_840, 1),
    ("sample", "pmap"): (899_425, 473_591, 34_072, 0),
}
"""On 8 CPU devices with one example each; the sampler has 4 examples on one device."""


def compiled(work: str, layout: str) -> Compiled:
    config = get_config()
    parallel = dataclasses.replace(config.parallel, layout=layout)
    config = dataclasses.replace(config, parallel=parallel)
    request = PlanRequest(
        config=config,
        topology=None,
        work=work,
        batch_per_device=None,
        sampler="ddim",
        num_steps=4,
        suggest=False,
    )
    prepare = sample_work if work == "sample" else step_work
    lower = prepare(resolve(request, NUM_DEVICES), None).lower
    return compile_program(lower, label="", say=lambda _: None)


@pytest.mark.parametrize("work, layout", STORED)
def test_no_program_exceeds_its_stored_counts(work, layout):
    found = compiled(work, layout)
    assert found.memory is not None
    names = ("FLOPs", "bytes moved", "bytes of temporaries", "collectives")
    counts = (
        found.flops,
        found.moved,
        found.memory.temporaries,
        sum(row.times for row in found.collectives),
    )
    grown = [
        f"{name}: {count:,.0f}, stored {stored:,}"
        for name, count, stored in zip(names, counts, STORED[work, layout], strict=True)
        if count > SLACK * stored
    ]
    assert not grown, "; ".join(grown)


@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_the_step_updates_its_state_in_place(layout):
    # The state is parameters, EMA and moments; newly allocated outputs are smaller
    # than any of them.
    config = get_config()
    parallel = dataclasses.replace(config.parallel, layout=layout)
    config = dataclasses.replace(config, parallel=parallel)
    request = PlanRequest(config, None, "diffusion", None, "ddim", 4, False)
    work = step_work(resolve(request, NUM_DEVICES), None)
    stats: Any = work.lower().compile().memory_analysis()
    anew = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.alias_size_in_bytes >= 0.99 * work.state_bytes
    assert anew < 0.02 * work.state_bytes


def test_a_longer_run_compiles_no_more_programs(lowered, tmp_path):
    def programs(num_steps: int) -> int:
        tiny = get_config()
        first = dataclasses.replace(tiny.autoencoder, steps=num_steps)
        before = len(lowered)
        config = dataclasses.replace(
            tiny,
            stages=("autoencoder",),
            autoencoder=first,
            log=dataclasses.replace(tiny.log, images_every=num_steps),
            checkpoint=dataclasses.replace(tiny.checkpoint, every=num_steps),
        )
        train(config, tmp_path / str(len(lowered)))
        return len(lowered) - before

    programs(2)  # compiles what all runs of this process share
    short, long = programs(2), programs(6)
    assert 0 < long <= short
