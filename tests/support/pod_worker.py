"""One process of a run: trains the toy stage with checkpoints, prints its digest.

python -m tests.support.pod_worker WORKDIR LAYOUT NUM_STEPS COORDINATOR NUM ID
    [SECONDS_A_STEP [SAVE_EVERY]]
"""

import time
from pathlib import Path

import jax

from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config.launch import Launch
from ldm_jax.parallel.launch import start


def main(args):
    workdir, layout, num_steps, coordinator, num, this = args[:6]
    slow = float(args[6]) if len(args) > 6 else 0.0
    together = coordinator != "none"
    launch = Launch()
    if together:
        launch = Launch(
            coordinator=coordinator, num_processes=int(num), process_id=int(this)
        )
    start(launch, peer_timeout=10)
    from ldm_jax.config import CheckpointConfig, ParallelConfig
    from ldm_jax.parallel.make_layout import FsdpLayout, PmapLayout
    from ldm_jax.training import loop
    from tests.support.toys import run_toy, toy_stage

    add = loop.MetricsBuffer.add

    def slowly(self, dispatch):
        add(self, dispatch)
        print("step", dispatch.step, flush=True)
        time.sleep(slow)

    loop.MetricsBuffer.add = slowly
    kept = [count_kept(layout_class) for layout_class in (FsdpLayout, PmapLayout)]
    stage = toy_stage(num_steps=int(num_steps))
    every = int(args[7]) if len(args) > 7 else int(num_steps) // 3
    found = run_toy(
        Path(workdir),
        stage,
        parallel=ParallelConfig(layout=layout),
        checkpoint=CheckpointConfig(every=every, keep=3),
    )
    print("kept", sum(map(sum, kept)), "in", sum(map(len, kept)), "steps", flush=True)
    print("digest", found.digest, flush=True)


def count_kept(layout_class):
    """Record for every step whether some of its input state was not donated."""
    map_step, kept, last = layout_class.map_step, [], [None]

    def counted(self, step, *, accumulate=1):
        mapped = map_step(self, step, accumulate=accumulate)

        def call(state, *rest):
            after = mapped(state, *rest)
            if state is last[0]:  # not a state just restored from a checkpoint
                kept.append(not all(x.is_deleted() for x in jax.tree.leaves(state)))
            last[0] = after[0]
            return after

        call.lower = mapped.lower
        return call

    layout_class.map_step = counted
    return kept


if __name__ == "__main__":
    run_main(main, "pod_worker.py")
