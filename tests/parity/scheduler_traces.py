"""The schedulers of diffusers in double precision, call by call, and our tables.

diffusers keeps its tables, and in places the latents, in float32. After `widen` its
float32 is float64, so that the comparison is of the arithmetic without its rounding.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.schedules import EdmSchedule, FlowSchedule, Schedule
from ldm_jax.diffusion.solvers import Table
from ldm_jax.diffusion.timesteps import Levels
from ldm_jax.types import SamplerName, SpacingName
from tests.support.gaussian import BETAS, SCHEDULES, SIGMA_DATA

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra `parity`")

COUNTS = (10, 20, 25, 50, 999)
SHORT = COUNTS[:-1]
Network = Callable[[np.ndarray, float], np.ndarray]
# These work on x_t / alpha, and scale it for the network.
IN_UNITS_OF_THE_DATA = ("Euler", "Heun", "EDM")
# These take t - T // n as the next timestep, whatever their grid is.
STRIDE_BY_DIVISION = ("DDIM", "PNDM")
LDM, ZERO, FLOW, EDM = (
    SCHEDULES[name] for name in ("ldm_linear", "zero_snr", "flow", "edm")
)
COMMON = {
    "num_train_timesteps": BETAS["num_timesteps"],
    "beta_start": BETAS["beta_start"],
    "beta_end": BETAS["beta_end"],
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "skip_prk_steps": True,
    "lower_order_final": True,
    "sigma_data": SIGMA_DATA,
}
THEIR_PREDICTIONS = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
    "edm": "epsilon",
}
# Spacings of a scheduler, and for which numbers of steps `make_levels` gives its grid.
ROUNDED = {"trailing": SHORT, "leading": COUNTS, "linspace": (10, 20, 50, 999)}
UNROUNDED = {"trailing": SHORT, "leading": COUNTS, "linspace": (10,), "karras": COUNTS}
ONE_MORE = {"trailing": SHORT, "leading": (999,), "linspace": (), "karras": ()}
UNCHANGED: Mapping[str, Any] = {}


class Case(NamedTuple):
    """A scheduler of diffusers and our sampler.

    Attributes:
      theirs: Name of the class in diffusers, without "Scheduler".
      ours: Name of the sampler here.
      grids: Its spacings, and the numbers of steps for which they equal ours.
      predictions: The predictions that it supports.
      schedule: The noise levels.
      config: Of the class.
      eta: DDIM's.
    """

    theirs: str
    ours: SamplerName
    grids: dict[SpacingName, tuple[int, ...]]
    predictions: tuple[PredictionName, ...] = ("eps", "v", "x0")
    schedule: Schedule = LDM
    config: Mapping[str, Any] = UNCHANGED
    eta: float = 0.0


MULTI, SINGLE = "DPMSolverMultistep", "DPMSolverSinglestep"
# With offset 1, DPM-Solver's and UniPC's 999 leading timesteps pass the last one.
FROM_0, SDE = {"steps_offset": 0}, {"algorithm_type": "sde-dpmsolver++"}
ZERO_SNR, OVER_FLOW = {"rescale_betas_zero_snr": True}, {"use_flow_sigmas": True}
AT_FLOW = ({"linspace": ()}, ("flow",), FLOW)
AT_EDM = ({"karras": COUNTS}, ("edm",), EDM)
CASES = {
    "ddpm": Case("DDPM", "ddpm", ROUNDED),
    "ddim": Case("DDIM", "ddim", ROUNDED),
    "ddim_half": Case("DDIM", "ddim", {"leading": COUNTS}, eta=0.5),
    "ddim_one": Case("DDIM", "ddim", {"trailing": SHORT}, eta=1.0),
    "ddim_zero_snr": Case(
        "DDIM", "ddim", {"trailing": SHORT}, ("v", "x0"), ZERO, ZERO_SNR, eta=0.5
    ),
    "ddim_ldm": Case("DDIM", "ddim", {"ldm": SHORT}),
    "plms": Case("PNDM", "plms", ROUNDED, ("eps",)),
    "plms_ldm": Case("PNDM", "plms", {"ldm": SHORT}, ("eps",)),
    "euler": Case("EulerDiscrete", "euler", UNROUNDED),
    "ancestral": Case(
        "EulerAncestralDiscrete",
        "euler_ancestral",
        {name: UNROUNDED[name] for name in ROUNDED},
        ("eps", "v"),
    ),
    "heun": Case("HeunDiscrete", "heun", UNROUNDED),
    "2m": Case(MULTI, "dpmpp_2m", ONE_MORE, config=FROM_0),
    "2m_sde": Case(MULTI, "dpmpp_sde_2m", ONE_MORE, config={**FROM_0, **SDE}),
    "2s": Case(SINGLE, "dpmpp_2s", {"linspace": (), "karras": ()}),
    "unipc": Case("UniPCMultistep", "unipc", ONE_MORE, config=FROM_0),
    "lcm": Case("LCM", "lcm", {"trailing": (10, 25, 50)}),
    "flow": Case("FlowMatchEulerDiscrete", "euler", {"linspace": (10,)}, *AT_FLOW[1:]),
    "flow_shift": Case("FlowMatchEulerDiscrete", "euler", *AT_FLOW, {"shift": 3.0}),
    "flow_heun": Case(
        "FlowMatchHeunDiscrete", "heun", {"linspace": (10,)}, *AT_FLOW[1:]
    ),
    "flow_2m": Case(MULTI, "dpmpp_2m", *AT_FLOW, OVER_FLOW),
    "flow_2m_sde": Case(MULTI, "dpmpp_sde_2m", *AT_FLOW, {**OVER_FLOW, **SDE}),
    "flow_2s": Case(SINGLE, "dpmpp_2s", *AT_FLOW, OVER_FLOW),
    "flow_unipc": Case("UniPCMultistep", "unipc", *AT_FLOW, OVER_FLOW),
    "edm": Case("EDMEuler", "euler", *AT_EDM),
    "edm_2m": Case("EDMDPMSolverMultistep", "dpmpp_2m", *AT_EDM),
    "edm_2m_sde": Case("EDMDPMSolverMultistep", "dpmpp_sde_2m", *AT_EDM, SDE),
    # With data of unit variance, EDM's network is one that predicts v.
    "edm_v": Case(
        "EDMEuler",
        "euler",
        {"karras": COUNTS},
        ("v",),
        EDM._replace(sigma_data=1.0),
        {"sigma_data": 1.0},
    ),
}


def scheduler_of(
    case: Case, spacing: SpacingName, num_steps: int, prediction: PredictionName
) -> Any:
    """Return a scheduler of diffusers, with its timesteps set."""
    spacings = {"karras": "linspace", "ldm": "leading"}
    config = {
        **COMMON,
        **case.config,
        "prediction_type": THEIR_PREDICTIONS[prediction],
        "timestep_spacing": spacings.get(spacing, spacing),
        "use_karras_sigmas": spacing == "karras",
        "set_alpha_to_one": spacing != "ldm",
    }
    scheduler = getattr(diffusers, f"{case.theirs}Scheduler").from_config(config)
    options = {}
    if case.theirs == "LCM" and num_steps > 50:
        options = {"original_inference_steps": 1000}
    scheduler.set_timesteps(num_steps, **options)
    if case.theirs == SINGLE and num_steps % 2 == 0:
        # Even counts have two steps of first order; diffusers takes both last.
        scheduler.order_list = [1, *[1, 2] * (num_steps // 2 - 1), 1]
    return scheduler


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        setattr(self, name, getattr(self.module, name))
        return getattr(self, name)


class Gap:
    """A divisor n for which `T // n` is the distance to the next timestep."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def __rfloordiv__(self, _: int) -> int:
        return self.timesteps


def widen(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Make float32 mean float64 in the modules of these schedulers."""
    for name in names:
        module = module_of(getattr(diffusers, name))
        patch.setattr(module, "torch", Double(torch))
        patch.setattr(module, "np", Double(np), raising=False)


def module_of(scheduler: type) -> Any:
    return importlib.import_module(scheduler.__module__)


def network(x: Any, t: Any, xp: Any = np) -> Any:
    """Compute a stand-in network: smooth, nonlinear, and dependent on the time."""
    s = t / 1000.0
    return 0.7 * xp.tanh(0.9 * x + 0.4 - 1.1 * s) + 0.3 * xp.sin(1.7 * x + 2.0 * s)


def starts(scheduler: Any, names: tuple[str, ...]) -> bool:
    return type(scheduler).__name__.startswith(names)


def timesteps_of(scheduler: Any, schedule: Schedule) -> np.ndarray:
    """Return the timestep of each network call, in our units."""
    t = scheduler.timesteps.numpy().astype(np.float64)
    return t * schedule.num_timesteps if isinstance(schedule, EdmSchedule) else t


def levels_of(scheduler: Any, schedule: Schedule) -> Levels:
    """Read the levels that a scheduler visits from its tables."""
    t = timesteps_of(scheduler, schedule)
    sigma = getattr(scheduler, "sigmas", None)
    if starts(scheduler, ("PNDM", "Heun", "FlowMatchHeun")):
        # A level of two network calls is listed twice.
        t = np.unique(t)[::-1]
        sigma = None if sigma is None else torch.unique(sigma).flip(0)
    if sigma is None:
        abar = scheduler.alphas_cumprod.numpy()[t.astype(int)]
        end = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).item()
        alpha = np.sqrt(np.append(abar, end))
        sigma = np.sqrt(1.0 - alpha**2)
    elif isinstance(schedule, FlowSchedule):
        sigma = sigma.numpy()
        alpha = 1.0 - sigma
    else:
        ratio = sigma.numpy()
        data = schedule.sigma_data if isinstance(schedule, EdmSchedule) else 1.0
        alpha = np.where(ratio == 0.0, 1.0, 1.0 / np.hypot(data, ratio))
        sigma = ratio * alpha
    straight = isinstance(schedule, FlowSchedule)
    return Levels(np.append(t, 0.0), alpha, sigma, straight=straight)


def gap_after(call: int, scheduler: Any, grid: np.ndarray) -> int | None:
    """Return the distance to the grid's next timestep if it is not `T // n`."""
    step = max(call - 1, 0) if starts(scheduler, ("PNDM",)) else call
    here = int(grid[step])
    there = int(grid[step + 1]) if step + 1 < len(grid) else -1
    assumed = here - scheduler.config.num_train_timesteps // len(grid)
    return None if max(assumed, -1) == there else here - there


def follow_theirs(
    scheduler: Any,
    schedule: Schedule,
    denoise: Network,
    x_start: np.ndarray,
    fresh: np.ndarray,
    **options: float,
) -> np.ndarray:
    """Run a scheduler.

    Args:
      scheduler: With its timesteps set.
      schedule: Our schedule of the same levels.
      denoise: The network, of x_t and t.
      x_start: The first latent, at the scale of the network.
      fresh: Unit-variance noise of each network call.
      options: Of a step.

    Returns:
      The latents after each network call, in the scheduler's units.
    """
    scaled = starts(scheduler, IN_UNITS_OF_THE_DATA)
    levels = levels_of(scheduler, schedule)
    sample = torch.from_numpy(x_start / levels.alpha[0] if scaled else x_start)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    states, now = [], {"fresh": torch.empty(0)}
    with pytest.MonkeyPatch.context() as patch:
        module = module_of(type(scheduler))
        patch.setattr(
            module, "randn_tensor", lambda *_, **__: now["fresh"], raising=False
        )
        grid, timesteps = levels.t[:-1], timesteps_of(scheduler, schedule)
        steps = scheduler.num_inference_steps
        for i, t in enumerate(scheduler.timesteps):
            now["fresh"] = torch.from_numpy(fresh[i])
            if starts(scheduler, STRIDE_BY_DIVISION):
                gap = gap_after(i, scheduler, grid)
                scheduler.num_inference_steps = steps if gap is None else Gap(gap)
            seen = scheduler.scale_model_input(sample, t) if scaled else sample
            output = torch.from_numpy(denoise(seen.numpy(), timesteps[i]))
            sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
            states.append(sample.numpy())
    return np.stack(states)


def follow_ours(
    table: Table, denoise: Network, x_start: np.ndarray, fresh: np.ndarray
) -> np.ndarray:
    """Run a table in NumPy, and return its first register after each network call."""
    num = table.num_registers
    terms = np.zeros((table.mix.shape[2], *x_start.shape))
    terms[:num] = x_start
    states = np.empty((table.num_calls, *x_start.shape))
    for i in range(table.num_calls):
        output = denoise(terms[0], table.t[i])
        terms[num + 1 :] = terms[num:-1]
        terms[num] = table.read[i, 0] * terms[0] + table.read[i, 1] * output
        terms[:num] = np.einsum("rk,k...->r...", table.mix[i], terms)
        terms[0] += table.noise[i, 0] * fresh[i]
        states[i] = terms[0]
    return states


def in_their_units(states: np.ndarray, table: Table, scheduler: Any) -> np.ndarray:
    """Return latents in the units of a scheduler."""
    if not starts(scheduler, IN_UNITS_OF_THE_DATA):
        return states
    return states / table.alpha[:, 0].reshape(-1, *[1] * (states.ndim - 1))


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest error of a step, over the largest value of that step."""
    axes = tuple(range(1, theirs.ndim))
    error = np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)
    return float(error.max())
