"""How good is a run? Its samples against real images, by a named protocol.

    python -m ldm_jax.evaluation --workdir runs/digits --num-images 1500
    python -m ldm_jax.evaluation --workdir RUN --protocol adm --inception FILE.pth

Draws seeds 0, 1, 2 ... over all devices and prints FID, KID, Inception Score,
precision, recall, density and coverage, beside those of held-out real images. What
looks at the images is FID's Inception network, from a file, or a classifier taught on
the data set's own labels. An interrupted command, given again, goes on. metrics.json
has the scores and all that it takes to repeat them.
"""

from ldm_jax.cli import run_main
from ldm_jax.evaluation.request import PROG, parse
from ldm_jax.launch import PEER_TIMEOUT, start


def main(args: list[str]) -> None:
    """Parse, measure, say what was found."""
    request = parse(args, about=__doc__)
    start(request.launch, peer_timeout=PEER_TIMEOUT)
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.scoring.evaluate import evaluate

    outcome = evaluate(request)
    if outcome is None:
        return
    both = outcome.held_out is not None
    print(f"| {request.protocol.name} | samples |{' held-out real |' * both}")  # noqa: T201
    print(f"|---|---:|{'---:|' * both}")  # noqa: T201
    for name, value in outcome.scores.items():
        cells = [value, *([outcome.held_out.get(name)] if outcome.held_out else [])]
        texts = ["" if cell is None else f"{cell:.4g}" for cell in cells]
        print(f"| {name} | {' | '.join(texts)} |")  # noqa: T201
    print(outcome.path)  # noqa: T201


if __name__ == "__main__":
    run_main(main, PROG)
