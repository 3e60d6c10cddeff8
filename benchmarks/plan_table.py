"""Plan every recipe, one after the other, and print the table of the benchmarks.

    python benchmarks/plan_table.py --out plans --topology v5e:4x4 --batch-per-device 4

Each plan is a process of its own with a limit of its own, and leaves a file of JSON in
the folder; those that are there already are not made again, so that the command can be
stopped and repeated. With --table nothing is compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command import make_parser

from ldm_jax.cli.exit_codes import run_main
from ldm_jax.types import InputError

PROG = "benchmarks/plan_table.py"
ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "configs/autoencoder", "configs/ldm")
GIB = 2**30
NICE = 19
HEAD = (
    "| recipe | stage | images a chip | layout | fits | needs | state | temporaries "
    "| model TFLOP | moved | estimated time | estimated MFU | sent over links "
    "| compiled in |",
    "|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def recipes() -> list[Path]:
    """Return the config files, the small ones first."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def make(path: Path, out: Path, own: argparse.Namespace, extra: list[str]) -> None:
    """Plan a recipe into a file; what stops it goes into the file too."""
    name = path.relative_to(ROOT / "configs").with_suffix("")
    target = out / f"{str(name).replace('/', '-')}.json"
    if target.exists():
        return
    command = [
        sys.executable,
        "-m",
        "ldm_jax.cli",
        "plan",
        "--json",
        "--config",
        str(path),
    ]
    command += ["--topology", own.topology, *extra]
    command += ["--batch-per-device", str(own.batch_per_device)]
    start = time.perf_counter()
    sys.stderr.write(f"{name}\n")
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=own.limit,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.nice(NICE),
        )
        plan = json.loads(done.stdout) if done.stdout else {"failed": done.returncode}
    except subprocess.TimeoutExpired:
        plan = {"failed": f"not compiled in {own.limit} s"}
    plan |= {"recipe": str(name), "seconds": time.perf_counter() - start}
    target.write_text(json.dumps(plan, indent=1))


def row(plan: dict[str, Any]) -> str:
    """Write a plan as a row of the table."""
    if "failed" in plan:
        return f"| `{plan['recipe']}` | {plan['failed']} |" + " |" * 12
    memory, estimate, setting = plan["memory"], plan["estimate"], plan["setting"]
    sent = sum(r["count"] * r["sent_bytes"] for r in plan["collectives"])
    missing = (memory["needed"] - memory["available"]) / GIB
    verdict = "yes" if plan["fits"] else f"no, by {missing:.2f} GiB"
    if plan["suggestions"]:
        last = plan["suggestions"][-1]
        verdict += f"; `{last['change']}` does" if last["fits"] else "; nothing tried"
    cells = [
        f"`{plan['recipe']}`",
        plan["work"],
        f"{plan['batch_per_device']}",
        setting["layout"],
        verdict,
        f"{memory['needed'] / GIB:.2f} GiB",
        f"{memory['state'] / GIB:.2f} GiB",
        f"{memory['temporaries'] / GIB:.2f} GiB" if plan["fits"] else "",
        f"{plan['model_flops'] / 1e12:.3g}",
        f"{plan['compiler']['bytes_moved'] / 1e9:.4g} GB" if plan["fits"] else "",
        f"{estimate['seconds'] * 1e3:.4g} ms" if estimate else "",
        f"{estimate['mfu']:.1%}" if estimate else "",
        f"{sent / 1e9:.3g} GB" if plan["fits"] else "",
        f"{plan['compile_seconds'] / 60:.1f} min",
    ]
    return f"| {' | '.join(cells)} |"


def main(args: list[str]) -> None:
    """Plan what is not planned yet, and print the table."""
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the plans")
    add("--topology", default="v5e:4x4", help="as of ldm plan")
    add("--batch-per-device", type=int, default=4, help="images of a chip")
    add("--limit", type=int, default=1800, help="seconds for each recipe")
    add("--only", nargs="+", help="recipes by name, as ldm/sd15; all by default")
    add("--table", action="store_true", help="compile nothing, print what there is")
    own, extra = parser.parse_known_args(args)
    own.out.mkdir(parents=True, exist_ok=True)
    known = {str(p.relative_to(ROOT / "configs").with_suffix("")): p for p in recipes()}
    names = own.only or list(known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only: got {unknown[0]!r}, wanted some of {list(known)}")
    if not own.table:
        for name in names:
            make(known[name], own.out, own, extra)
    print("\n".join(HEAD))
    for path in sorted(own.out.glob("*.json")):
        print(row(json.loads(path.read_text())))


if __name__ == "__main__":
    run_main(main, PROG)
