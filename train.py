"""Train a latent diffusion model: both stages, or what is left of them.

python train.py --config configs/digits.py --workdir runs/digits
"""

import json

from ldm_jax.config.flags import parse_train, run_main
from ldm_jax.parallel.launch import start, use_huge_pages

WORTH_DRAWING = 60.0
"""Seconds of training after which drawing samples for the report is no long wait."""


def main(args: list[str]) -> None:
    """Parse, train, say finished."""
    arguments = parse_train(args)
    # Only now: help and misspelt flags need not wait for JAX.
    parallel = arguments.config.parallel
    start(
        arguments.launch,
        peer_timeout=parallel.peer_timeout,
        cpu_devices=parallel.cpu_devices,
    )
    import jax

    from ldm_jax.parallel.make_layout import make_layout
    from ldm_jax.parallel.multihost import is_first
    from ldm_jax.run import train
    from ldm_jax.tools.report.run_summary import read_run_summary
    from ldm_jax.tools.report.writing import write_report
    from ldm_jax.training.dry_run import describe

    config, workdir = arguments.config, arguments.workdir
    if workdir is None:
        print(json.dumps(describe(config, make_layout(config.parallel))))
        return
    outcome = train(config, workdir, profile=arguments.profile)
    if not is_first():
        return
    final = outcome.final
    by_stage = final["seconds_by_stage"]
    if outcome.trained:
        # Of several processes the others are gone, and samples are drawn by all.
        draws = sum(by_stage.values()) > WORTH_DRAWING and jax.process_count() == 1
        write_report(read_run_summary(workdir), workdir / "report.html", draws=draws)
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in by_stage.items())
        print(f"finished: {workdir} ({seconds})")
    else:
        print(f"finished: {workdir} has nothing left to train")
    print(f"digest {final['digest']}")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, "train.py")
