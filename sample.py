"""Make images with a trained run: every label with every seed.

python sample.py --workdir runs/digits --labels 0-9 --seeds 0-9 --out samples
"""

import sys

from ldm_jax.cli.sample import parse_sample
from ldm_jax.config.flags import run_main
from ldm_jax.parallel.launch import PEER_TIMEOUT, start, use_huge_pages
from ldm_jax.sampling.request import ReplayRequest
from ldm_jax.types import RunError


def main(args: list[str]) -> None:
    """Parse, sample, print the files that were written."""
    command = parse_sample(args)
    # Only now: help and bad input need not wait for JAX.
    if isinstance(command, ReplayRequest):
        compare(command)
        return
    settings, request, launch = command
    start(launch, peer_timeout=PEER_TIMEOUT)
    if request.as_dataset is not None:
        from ldm_jax.sampling.synthetic_dataset import write_dataset

        outcome = write_dataset(settings, request)
        for line in (*outcome.written, *outcome.notes):
            print(line)
        return
    from ldm_jax.sampling.outputs import write_images

    for path in write_images(settings, request):
        print(path)


def compare(request: ReplayRequest) -> None:
    """Make an image again, and print whether every pixel is the same."""
    from ldm_jax.sampling.metadata import replay

    found = replay(request)
    for warning in found.warnings:
        print(f"sample.py: warning: {warning}", file=sys.stderr)
    if found.num_different:
        raise RunError(
            f"--replay: {found.num_different} of {found.num_pixels} pixels differ, by "
            f"at most {found.largest} grey levels"
        )
    print(f"{request.image}: every one of {found.num_pixels} pixels is the same")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, "sample.py")
