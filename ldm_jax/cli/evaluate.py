"""How good is a run? Its samples against real images, by a named protocol.

    ldm evaluate --workdir runs/digits --num-images 1500
    ldm evaluate --workdir runs/digits --guidance-scale 1 1.5 2 3
    ldm evaluate --workdir RUN --ema-lengths 0.03 0.05 0.1 0.2
    ldm evaluate --workdir RUN --protocol adm --inception FILE.pth
    ldm evaluate --workdir runs/digits --reconstructions

Draws seeds 0, 1, 2 ... over all devices and prints FID, KID, Inception Score,
precision, recall, density and coverage, beside those of held-out real images. What
looks at the images is FID's Inception network, from a file, or a classifier taught on
the data set's own labels. An interrupted command, given again, goes on. metrics.json
has the scores and all that it takes to repeat them.
"""

from ldm_jax.config.flags import run_main
from ldm_jax.evaluation.request import PROG, parse
from ldm_jax.parallel.launch import PEER_TIMEOUT, start, use_huge_pages
from ldm_jax.sampling.sampling_config import SamplingConfig


def in_words(settings: SamplingConfig) -> str:
    """Say how samples were made, above their column."""
    scale = ",".join(f"{value:g}" for value in settings.guidance_scale)
    text = f"{settings.sampler} {settings.steps}, guidance {scale}"
    length = settings.ema_length
    return text if length is None else f"{text}, EMA {length:g}"


def main(args: list[str]) -> None:
    """Parse, measure, say what was found."""
    request = parse(args, about=__doc__)
    start(request.launch, peer_timeout=PEER_TIMEOUT)
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.evaluation.evaluate import evaluate, evaluate_first_stage

    if request.reconstructions:
        found = evaluate_first_stage(request)
        if found is not None:
            for name, value in found.quality._asdict().items():
                details = "not measured" if value is None else f"{value:.4g}"
                print(f"{name} {details}")  # noqa: T201
            print(found.path)  # noqa: T201
        return
    outcomes = evaluate(request)
    if not outcomes:
        return
    columns = {in_words(one.settings): one.scores for one in outcomes}
    if outcomes[0].held_out is not None:
        columns["held-out real"] = outcomes[0].held_out
    print(f"| {request.protocol.name} | {' | '.join(columns)} |")  # noqa: T201
    print(f"|---|{'---:|' * len(columns)}")  # noqa: T201
    for name in outcomes[0].scores:
        values = [scores.get(name) for scores in columns.values()]
        texts = ["" if value is None else f"{value:.4g}" for value in values]
        print(f"| {name} | {' | '.join(texts)} |")  # noqa: T201
    for outcome in outcomes:
        print(outcome.path)  # noqa: T201


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
