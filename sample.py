"""Make images with a trained run: every label with every seed.

python sample.py --workdir runs/digits --labels 0-9 --seeds 0-9 --out samples
"""

from ldm_jax.cli import parse_sample, run_main


def main(args: list[str]) -> None:
    """Parse, sample, say what was written."""
    request = parse_sample(args)
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.gallery import write_gallery

    for path in write_gallery(request):
        print(path)


if __name__ == "__main__":
    run_main(main, "sample.py")
