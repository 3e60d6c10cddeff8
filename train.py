"""Train a latent diffusion model: both stages, or what is left of them.

python train.py --config configs/digits.py --workdir runs/digits
"""

import json

from ldm_jax.cli import parse_train, run_main


def main(args: list[str]) -> None:
    """Parse, train, say finished."""
    arguments = parse_train(args)
    # Only now: help and misspelt flags need not wait for JAX.
    from ldm_jax.describe import describe
    from ldm_jax.run import train
    from ldm_jax.training.parallel import PmapLayout

    if arguments.workdir is None:
        print(json.dumps(describe(arguments.config, PmapLayout())))
        return
    outcome = train(arguments.config, arguments.workdir)
    final = outcome.final
    if not outcome.trained:
        print(f"finished: {arguments.workdir} has nothing left to train")
    else:
        seconds = ", ".join(
            f"{name} {value:.0f} s" for name, value in final["seconds_by_stage"].items()
        )
        print(f"finished: {arguments.workdir} ({seconds})")
    print(f"digest {final['digest']}")


if __name__ == "__main__":
    run_main(main, "train.py")
