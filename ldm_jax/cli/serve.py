"""A run looked through by hand: seed, class or text, guidance and steps as knobs.

    ldm serve runs/digits

Serves a page on this machine (127.0.0.1, unless --host says otherwise). One program is
compiled at the start, and moving a knob compiles nothing. Under the images stands the
command of sample.py that makes them, and each is saved with its recipe.
"""

import logging

from ldm_jax.config.flags import run_main
from ldm_jax.parallel.launch import PEER_TIMEOUT, start, use_huge_pages
from ldm_jax.tools.demo.arguments import PROG, parse
from ldm_jax.tools.demo.server import LOOPBACKS, address_of, open_socket, serve


def main(args: list[str]) -> None:
    """Listen, load, compile, serve."""
    request = parse(args, about=__doc__)
    port_in_use = open_socket(request.host, request.port)
    start(request.launch, peer_timeout=PEER_TIMEOUT)
    print("loading the run and compiling one program ...", flush=True)  # noqa: T201
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.tools.demo.page import make_page
    from ldm_jax.tools.demo.renderer import set_up

    renderer = set_up(request)
    app = make_page(renderer)
    if port_in_use.getsockname()[0] not in LOOPBACKS:
        logging.getLogger(__name__).warning(
            "--host: whoever reaches this address may use the page"
        )
    where = address_of(port_in_use)
    print(f"{where} (Ctrl-C ends it)", flush=True)  # noqa: T201
    try:
        serve(app, port_in_use)
    except KeyboardInterrupt:
        print()  # noqa: T201


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
