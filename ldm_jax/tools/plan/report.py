"""The report of a plan as JSON and as text. Imports no JAX."""

import collections
import itertools
from typing import Any

from ldm_jax.tools.plan.hlo import Collective

NOTE = (
    "an estimate: the compiler's cycles, for kernels those of its schedule, and bytes "
    "over the links' bandwidth; nothing was run"
)
WIDTH = 16


def collective_rows(rows: list[Collective]) -> list[dict[str, Any]]:
    """Convert collectives to JSON; equal ones are counted together."""
    counts = collections.Counter[Collective]()
    for row in rows:
        counts[row._replace(times=1)] += row.times
    ordered = sorted(
        counts, key=lambda row: (row.kind, row.asynchronous, -row.num_bytes)
    )
    return [
        {
            "kind": row.kind,
            "asynchronous": row.asynchronous,
            "chips": row.group,
            "bytes": row.num_bytes,
            "sent_bytes": row.sent_bytes,
            "count": counts[row],
        }
        for row in ordered
    ]


def in_words(plan: dict[str, Any], *, scale: bool = False) -> str:
    """Format a plan as lines of text.

    Args:
      plan: Result of `planner.plan`.
      scale: Whether to add a table of a step on other numbers of chips.
    """
    lines = [_title(plan), "", *_memory_lines(plan)]
    lines += _pair("model FLOPs", f"{plan['model_flops'] / 1e12:.4g} T a step")
    if plan["fits"]:
        lines += _cost_lines(plan)
        lines += ["", *_collective_lines(plan["collectives"])]
    if plan["suggestions"]:
        lines += ["", *_suggestion_lines(plan["suggestions"])]
    if scale and plan["scale"]:
        lines += ["", *_scale_lines(plan["scale"])]
    return "\n".join(lines)


def _title(plan: dict[str, Any]) -> str:
    setting = plan["setting"]
    what = {
        "sample": f"{setting['sampler']}, {setting['num_steps']} steps, call of",
    }.get(plan["work"], f"{plan['work']} step of")
    parts = f" in {setting['accumulate']} parts" if setting["accumulate"] > 1 else ""
    how = "" if plan["work"] == "sample" else f", {setting['layout']}"
    return (
        f"{what} {plan['batch_per_device']} images a chip{parts}{how}, on "
        f"{plan['num_devices']} x {plan['chip']} ({plan['topology']})"
    )


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    needed, available = memory["needed"], memory["available"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    gap = abs(available - needed)
    rest = f"{_bytes(gap)} {'left' if plan['fits'] else 'missing'}"
    lines = [f"{verdict}: {_bytes(needed)} of {_bytes(available)}, {rest}"]
    lines += _pair("state", _bytes(memory["state"]))
    lines += _pair("frozen", _bytes(memory["frozen"]))
    lines += _pair("batch", _bytes(memory["batch"]))
    if plan["fits"]:
        lines += _pair("arguments", f"{_bytes(memory['arguments'])} (with padding)")
        lines += _pair("temporaries", _bytes(memory["temporaries"]))
        lines += _pair("program", _bytes(memory["code"]))
        lines += _pair("peak", f"{_bytes(memory['peak'])} in use at one time")
    return lines


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    compiler, estimate = plan["compiler"], plan["estimate"]
    lines = _pair("compiler's FLOPs", f"{compiler['flops'] / 1e12:.4g} T")
    lines += _pair("bytes moved", _bytes(compiler["bytes_moved"]))
    if estimate is None:
        floor = plan["roofline_seconds"]
        if floor is not None:
            lines += _pair("at least", f"{_seconds(floor)} (arithmetic or memory)")
        return lines
    lines += _pair(
        "time",
        f"{_seconds(estimate['seconds'])}: computing "
        f"{_seconds(estimate['compute_seconds'])}, waiting for links "
        f"{_seconds(estimate['waiting_seconds'])}, links overlapped "
        f"{_seconds(estimate['hidden_seconds'])}",
    )
    lines += _pair(
        "MFU",
        f"{estimate['mfu']:.1%}, {estimate['images_per_second_per_chip']:.3g} images/s "
        "a chip",
    )
    return [*lines, f"{'':{WIDTH + 4}}({NOTE})"]


def _collective_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no collectives"]
    lines = [
        f"{'collectives':22}{'':14}{'number':>8}{'bytes':>12}{'sent by a chip':>16}"
    ]
    for (kind, asynchronous), found in itertools.groupby(
        rows, key=lambda row: (row["kind"], row["asynchronous"])
    ):
        group = list(found)
        lines.append(
            f"  {kind:20}{'asynchronous' if asynchronous else 'waited for':14}"
            f"{sum(row['count'] for row in group):>8}"
            f"{_bytes(sum(row['count'] * row['bytes'] for row in group)):>12}"
            f"{_bytes(sum(row['count'] * row['sent_bytes'] for row in group)):>16}"
        )
    return lines


def _suggestion_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["tried instead:"]
    for row in rows:
        verdict = "fits" if row["fits"] else "does not fit"
        lines.append(
            f"  {row['change']:44}{verdict:14}{_bytes(row['needed']):>10} of "
            f"{_bytes(row['available'])}"
        )
    return lines


def _scale_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'chips':>6}{'images':>9}{'computing':>12}{'links':>12}{'network':>12}"
        f"{'a step':>12}{'efficiency':>12}"
    ]
    for row in rows:
        known = row["seconds"] is not None
        lines.append(
            f"{row['chips']:>6}{row['images']:>9}{_seconds(row['compute_seconds']):>12}"
            f"{_seconds(row['link_seconds']):>12}"
            f"{_seconds(row['network_seconds']) if known else '?':>12}"
            f"{_seconds(row['seconds']) if known else '?':>12}"
            f"{format(row['efficiency'], '.1%') if known else '?':>12}"
        )
    return lines


def _pair(name: str, value: str) -> list[str]:
    return [f"  {name:{WIDTH}}  {value}"]


def _bytes(number: float | int) -> str:
    """Format bytes in powers of 1024, as the compiler does."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"


def _seconds(seconds: float | int) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.3g} us"
