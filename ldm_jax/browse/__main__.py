"""A run looked through by hand: seed, class or text, guidance and steps as knobs.

    python -m ldm_jax.browse runs/digits

Serves a page on this machine (127.0.0.1, unless --host says otherwise). One program is
compiled at the start, and moving a knob compiles nothing. Under the images stands the
command of sample.py that makes them, and each is saved with its recipe.
"""

import logging

from ldm_jax.browse.request import PROG, parse
from ldm_jax.browse.serving import LOOPBACKS, address_of, open_socket, serve
from ldm_jax.cli import run_main
from ldm_jax.launch import PEER_TIMEOUT, start, use_huge_pages


def main(args: list[str]) -> None:
    """Listen, load, compile, serve."""
    request = parse(args, about=__doc__)
    taken = open_socket(request.host, request.port)
    start(request.launch, peer_timeout=PEER_TIMEOUT)
    print("loading the run and compiling one program ...", flush=True)  # noqa: T201
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.browse.easel import set_up
    from ldm_jax.browse.page import make_page

    easel = set_up(request)
    app = make_page(easel)
    if taken.getsockname()[0] not in LOOPBACKS:
        logging.getLogger(__name__).warning(
            "--host: whoever reaches this address may use the page"
        )
    where = address_of(taken)
    print(f"{where} (Ctrl-C ends it)", flush=True)  # noqa: T201
    try:
        serve(app, taken)
    except KeyboardInterrupt:
        print()  # noqa: T201


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
