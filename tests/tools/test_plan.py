"""Plans: compiled programs, estimates, remedies and the command."""

import json

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.cli.plan import parse
from ldm_jax.tools.plan.chips import CHIPS, GIB, chip_named, chip_of_kind, send_rate
from ldm_jax.tools.plan.estimate import estimate, scale_row
from ldm_jax.tools.plan.flops import count_flops
from ldm_jax.tools.plan.hlo import (
    Collective,
    Kernel,
    Shortage,
    collectives,
    estimated_cycles,
    kernels,
    num_bytes,
    parse_program,
    parse_shortage,
)
from ldm_jax.tools.plan.kernels import PRODUCTS, kernel_cycles
from ldm_jax.tools.plan.planner import plan
from ldm_jax.tools.plan.programs import sample_work
from ldm_jax.tools.plan.remedies import remedies
from ldm_jax.tools.plan.report import collective_rows, in_words
from ldm_jax.tools.plan.request import PlanRequest, change, resolve
from ldm_jax.tools.plan.topology import AXES_BY_CHIP, EXAMPLES, parse_topology
from ldm_jax.types import InputError
from tests.support.commands import ldm, succeeded
from tests.support.tiny import get_config

TINY = ["--config", "tests/support/tiny.py"]
# As libtpu 0.0.52 prints them, without attributes that the parser ignores.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_computation.7 (p: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.8 (p: bf16[8,4]) -> (f32[2], bf16[32,4]) {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  %all-gather.4 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%r), channel_id=5, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, \
frontend_attributes={chain_id="1"}
  ROOT %tuple = (f32[2]{0}, bf16[32,4]{1,0}) tuple(%q, %all-gather.2)
}

%all-reduce-scatter.2 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=9, \
replica_groups={{0,1,2,3}}, to_apply=%add.1
  ROOT %cut = f32[16]{0} dynamic-slice(%all-reduce.9, %i)
}

%body.1 (state: (s32[], f32[64])) -> (s32[], f32[64]) {
  %work = f32[64]{0} fusion(%state), kind=kLoop, calls=%add.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %scattered = f32[16]{0} fusion(%work), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %work)
}

%condition.1 (state: (s32[], f32[64])) -> pred[] {
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body.2 (state: (s32[])) -> (s32[]) {
  %more = f32[64]{0} add(%a, %b), backend_config={"estimated_cycles":"1000"}
}

%condition.2 (state: (s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(3)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.9), direction=LT
}

ENTRY %main.2_spmd (a: f32[64]) -> f32[64] {
  %a = f32[64]{0:T(128)} parameter(0)
  %copy.1 = f32[64]{0:T(128)S(1)} copy(%a), \
backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"7"}}
  %start = (bf16[8,4], bf16[32,4]) fusion(%a), kind=kCustom, calls=%fused_computation.7
  %on = (f32[2], bf16[32,4]) fusion(%start), kind=kOutput, \
calls=%async_collective_fusion.8, backend_config={"estimated_cycles":"30"}
  %loop = (s32[], f32[64]) while(%t), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"5"}}
  %scan = (s32[]) while(%t2), condition=%condition.2, body=%body.2
  %all-reduce.3 = (f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/f32[]{:T(128)}) \
all-reduce(%copy.1, %s), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add.1
  %collective-permute-start = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%copy.1), channel_id=1, source_target_pairs={{0,1},{1,2}}
  %collective-permute-done = f32[10]{0} collective-permute-done(%start.1)
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=1
}
"""
SHORT = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
    "memory required for HLO temporaries (16.77G) exceeds available HBM (15.75G). HLO "
    "module: jit__fun.\nSee https://openxla.org/xla/errors/error_1000 for more details."
)


def test_bytes_of_a_type_leave_out_the_padding_of_its_layout():
    text = "(f32[11,192]{1,0:T(8,128)S(1)}, /*index=5*/bf16[3]{0}, pred[8]{0}, u32[])"
    assert num_bytes(text) == 11 * 192 * 4 + 3 * 2 + 8 + 4


def test_each_collective_counts_once_a_loop_iteration():
    assert set(collectives(parse_program(PROGRAM))) == {
        Collective("all-gather", 32 * 4 * 2, 4, True, 1),
        Collective("all-gather", 64 * 4 * 2, 4, True, 1),
        Collective("reduce-scatter", 256, 4, False, 5),
        Collective("all-reduce", 28, 2, False, 1),
        Collective("collective-permute", 40, 2, True, 1),
    }
    assert len(collectives(parse_program(PROGRAM))) == 5


def test_cycles_of_a_loop_count_its_iterations():
    assert estimated_cycles(parse_program(PROGRAM)) == 7 + 30 + 5 * 100 + 3 * 1000


KERNELS = """
%body.1 (state: (s32[])) -> (s32[]) {
  %back = (bf16[2,8]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/transpose(jvp(attention_backward_16x64))/pallas_call"}, \
backend_config={"cost_estimate":{"flops":"1310720","transcendentals":"1024",\
"bytes_accessed":"9"}}
}

ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %there = bf16[2,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/attention_forward_512x4096/pallas_call"}, \
backend_config={"cost_estimate":{"flops":"671088640","transcendentals":"8388608"}}
  %other = bf16[2,8]{1,0} custom-call(%a), custom_call_target="Sharding"
  %loop = (s32[]) while(%t), condition=%c, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_kernels_have_their_stated_flops_and_cycles():
    found = kernels(parse_program(KERNELS))
    assert found == [
        Kernel("attention_forward_512x4096", 671_088_640, 8_388_608, 1),
        Kernel("attention_backward_16x64", 1_310_720, 1024, 3),
    ]
    # Four steps of 2048 x 1024 forward; three of 1024, the smallest, backward.
    assert kernel_cycles(chip_named("v5e"), found) == pytest.approx(
        4 * (170 + 2048 * 4.27) + 3 * 1900, abs=1
    )
    assert kernel_cycles(chip_named("v6e"), found) == pytest.approx(
        4 * (300 + 2048 * 2.91) + 3 * 1400, abs=1
    )
    assert kernel_cycles(chip_named("v5e"), [found[0]._replace(name="another")]) == 0


BUNDLES = {
    # (chip, head width): {1024 probabilities a step: (forward, backward)}
    ("v6e", 32): {64: (665, 1166), 512: (1773, 3333)},
    ("v6e", 40): {1024: (3222, 6015), 2048: (6241, 11334)},
    ("v6e", 64): {256: (1041, 1965), 512: (1770, 3333), 2048: (6243, 11335)},
    ("v6e", 80): {512: (1758, 3450)},
    ("v6e", 160): {64: (714, 1416)},
    ("v6e", 256): {512: (1762, 3510)},
    ("v6e", 512): {64: (679, 1368), 512: (2827, 6500), 2048: (10747, 24567)},
    ("v5e", 32): {64: (691, 1449), 512: (2302, 5994)},
    ("v5e", 40): {1024: (4390, 11500), 2048: (8852, 22496)},
    ("v5e", 64): {256: (1320, 3239), 512: (2301, 5993), 2048: (8842, 22505)},
    ("v5e", 80): {512: (2272, 5911)},
    ("v5e", 160): {64: (785, 1885)},
    ("v5e", 256): {512: (4092, 9707)},
    ("v5e", 512): {64: (1097, 2361), 512: (7304, 19702), 2048: (29138, 78574)},
}
"""Bundles that libtpu 0.0.52 schedules for one step of our kernels."""


@pytest.mark.parametrize("chip, width", BUNDLES)
def test_kernel_cycles_are_near_those_of_their_schedules(chip, width):
    for size, bundles in BUNDLES[chip, width].items():
        each, most = 1024 * size, 1.05 if width <= 80 and size >= 256 else 1.32
        for way, products, wanted in zip(PRODUCTS, (2, 5), bundles, strict=True):
            name = f"attention_{way}_512x{2 * size}"
            kernel = Kernel(name, 2 * products * width * each, each, 1)
            cycles = kernel_cycles(chip_named(chip), [kernel])
            assert 0.95 * wanted < cycles < most * wanted, (way, size)


def test_program_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_program("HloModule nothing")


def test_sent_bytes_are_those_of_a_ring():
    reduced = Collective("all-reduce", 1000, 4, False, 1)
    assert reduced.sent_bytes == 2 * 3 / 4 * 1000
    assert reduced._replace(kind="all-gather").sent_bytes == 3 / 4 * 1000
    assert reduced._replace(kind="collective-permute").sent_bytes == 1000


def test_equal_collectives_share_one_row():
    row = Collective("all-gather", 8, 4, True, 3)
    (row_of_both,) = collective_rows([row, row._replace(times=2)])
    assert (
        row_of_both["count"],
        row_of_both["bytes"],
        row_of_both["asynchronous"],
    ) == (5, 8, True)


def test_memory_shortage_is_read_from_the_compiler_error():
    assert parse_shortage(SHORT) == Shortage(16.77 * GIB, 15.75 * GIB)
    old = "Used 17.45G of 15.75G hbm. Exceeded hbm capacity by 1.70G."
    assert parse_shortage(old) == Shortage(17.45 * GIB, 15.75 * GIB)
    assert parse_shortage("INTERNAL: something else") is None


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_topology_is_parsed(name):
    topology = parse_topology(name)
    assert topology is not None
    assert topology.chip.name == name.split(":")[0]


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v9:2x2", "v5e:0x2", "V5E:2x2", "2x2", "v5e:2xx2", ""]
)
def test_unknown_topology_is_refused_with_the_list(name):
    with pytest.raises(InputError, match=r"--topology: got .* wanted one of local, v4"):
        parse_topology(name)


def test_topology_with_too_few_axes_is_refused_with_an_example():
    with pytest.raises(InputError, match=r"wanted 3 axes for v5p, as in v5p:2x2x1"):
        parse_topology("v5p:2x2")


def test_chip_table_is_consistent():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert set(AXES_BY_CHIP) == {chip.name for chip in CHIPS if chip.clock}
    for chip in CHIPS:
        assert 0.95 < chip.usable / chip.memory < 1.01
        assert chip_of_kind(chip.kind) == chip
    for name, axes in AXES_BY_CHIP.items():
        assert chip_named(name).ports == 2 * axes
    # Products of a cycle are a multiple of the size of the matrix units.
    for chip in CHIPS:
        if chip.clock:
            assert chip.peak / chip.clock / 2**17 == pytest.approx(
                round(chip.peak / chip.clock / 2**17), rel=5e-3
            )


def test_chip_is_found_by_its_device_kind():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
    }
    for kind, name in names.items():
        chip = chip_of_kind(kind)
        assert chip is not None
        assert chip.name == name
    assert chip_of_kind("cpu") is None


def test_collective_of_all_chips_uses_the_links_of_every_axis():
    chip = chip_named("v5e")
    assert send_rate(chip, (16, 16), 256) == 4 * chip.link
    assert send_rate(chip, (16, 16), 16) == 2 * chip.link
    assert send_rate(chip, (2, 2), 4) == 2 * chip.link


def test_only_asynchronous_collectives_overlap_computation():
    chip = chip_named("v5e")
    row = Collective("all-gather", int(400e9), 256, True, 1)
    second = 255 / 256 * 2
    hidden = estimate(chip, (16, 16), cycles=6 * 10**9, collectives=[row], flops=0)
    assert hidden.seconds == pytest.approx(4.0)
    waited = row._replace(asynchronous=False)
    not_hidden = estimate(
        chip, (16, 16), cycles=6 * 10**9, collectives=[waited], flops=0
    )
    assert not_hidden.seconds == pytest.approx(4.0 + second)
    full = int(4.0 * chip.peak)
    best = estimate(chip, (16, 16), cycles=6 * 10**9, collectives=[], flops=full)
    assert best.mfu == pytest.approx(1.0)


def test_scale_row_is_an_all_reduce_within_and_between_pods():
    chip = chip_named("v5e")
    gradients = 4e9
    row = scale_row(
        chip, chips=256, images=2, compute_seconds=0.5, ring_bytes=2 * gradients
    )
    assert row.images == 512
    assert row.link_seconds == pytest.approx(2 * gradients * 255 / 256 / 200e9)
    assert row.network_seconds == 0.0
    between = scale_row(
        chip, chips=1024, images=2, compute_seconds=0.5, ring_bytes=2 * gradients
    )
    assert between.network_seconds == pytest.approx(
        2 * gradients / 256 * 3 / 4 / chip.network
    )
    unknown = scale_row(
        chip_named("v6e"), chips=512, images=2, compute_seconds=0.5, ring_bytes=1e9
    )
    assert unknown.seconds is None


def test_flops_of_products_and_loops_equal_their_formula():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
    product = 2 * 3 * 4 * 5 * 7
    assert count_flops(jnp.matmul, a, b) == product

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c, jnp.matmul(a, b)), 0, None, length=6)

    assert count_flops(jax.jit(loop), a, b) == 6 * product
    branches = (lambda: jnp.matmul(a, b).sum(), lambda: jnp.float32(0))
    chosen = count_flops(lambda i: jax.lax.switch(i, branches), jnp.int32(0))
    assert chosen == product


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_flops_of_convolution_gradients_are_three_times_the_forward(stride, groups):
    image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4 // groups, 6))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    pixels = (8 // stride) ** 2
    forward = 2 * 2 * pixels * 9 * (4 // groups) * 6
    assert count_flops(convolve, image, kernel) == forward

    def loss(image, kernel):
        return (convolve(image, kernel) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    assert count_flops(gradients, image, kernel) == 3 * forward


def test_flops_of_a_custom_gradient_are_counted():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(
        lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
    )
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert count_flops(product, a, b) == 2 * 3 * 4 * 5
    gradients = jax.grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))
    assert count_flops(gradients, a, b) == 3 * 2 * 3 * 4 * 5


def request_of(work: str) -> PlanRequest:
    return change(PlanRequest(get_config(), None, work, None, "ddim", 50, True))


def names_of(request: PlanRequest, **fields) -> list[str]:
    arguments = {
        "shortage": Shortage(20.0 * GIB, 16.0 * GIB),
        "kept_bytes": 4.0 * GIB,
        "num_devices": 4,
        "batch_per_device": 8,
        **fields,
    }
    return [remedy.name for remedy in remedies(request, **arguments)]


def test_remedies_reduce_temporaries_before_the_batch():
    names = names_of(request_of("diffusion"))
    assert names == [
        "--diffusion.remat",
        "--accumulate 2",
        "--accumulate 4",
        "--layout fsdp",
        "--batch-per-device 4",
        "--batch-per-device 2",
    ]


def test_remedy_for_a_state_that_is_too_large_is_fsdp():
    names = names_of(
        request_of("diffusion"),
        shortage=Shortage(30.0 * GIB, 16.0 * GIB),
        kept_bytes=20.0 * GIB,
    )
    assert names[0] == "--layout fsdp"
    assert all(name.startswith("--layout fsdp") for name in names)


def test_remedy_for_the_sampler_is_a_smaller_batch():
    found = remedies(
        request_of("sample"),
        shortage=Shortage(20.0 * GIB, 16.0 * GIB),
        kept_bytes=2.0 * GIB,
        num_devices=1,
        batch_per_device=8,
    )
    assert [remedy.request.batch_per_device for remedy in found] == [4, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config: not given"),
        (TINY, "--topology: not given"),
        ([*TINY, "--topology", "moon:2x2"], "wanted one of local"),
        ([*TINY, "--topology", "local", "--stage", "third"], "--stage"),
        ([*TINY, "--topology", "local", "--layout", "star"], "layout: got 'star'"),
        ([*TINY, "--topology", "local", "--accumulate", "0"], "--accumulate: got 0"),
        ([*TINY, "--topology", "local", "--sampler", "dim"], "did you mean ddim"),
        ([*TINY, "--topology", "local", "--topolgy", "x"], "did you mean --topology"),
    ],
)
def test_bad_plan_arguments_are_refused_in_one_line(flags, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(flags)
    assert "\n" not in str(caught.value)


def test_missing_libtpu_is_refused_with_its_extra(monkeypatch):
    from ldm_jax.tools.plan import topology

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[plan\]'"):
        topology.prepare_environment()


def test_batch_that_accumulation_does_not_divide_is_refused():
    request, _ = parse(
        [*TINY, "--topology", "local", "--batch-per-device", "3", "--accumulate", "2"]
    )
    with pytest.raises(InputError, match=r"diffusion.batch_size: got 24"):
        plan(request, lambda line: None)


def test_local_plan_fits_and_counts_its_gradients():
    flags = ["--topology", "local", "--stage", "autoencoder", "--json"]
    request, output = parse([*TINY, *flags])
    messages: list[str] = []
    found = plan(request, messages.append)
    assert output.json
    assert found["fits"] is True
    assert found["num_devices"] == 8
    assert found["memory"]["needed"] > found["memory"]["state"] > 0
    assert found["model_flops"] > 0
    assert found["estimate"] is None
    assert any("compiling" in line for line in messages)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "fits" in in_words(found)
    reduced = sum(row["bytes"] * row["count"] for row in found["collectives"])
    # All gradients except those known to be zero, and a few metrics.
    assert reduced == pytest.approx(found["memory"]["gradients"], rel=0.02)


def test_sampler_plan_counts_every_step():
    work = ["--topology", "local", "--sample", "--batch-per-device", "1"]
    flops = []
    for steps in ("2", "4"):
        request, _ = parse([*TINY, *work, "--steps", steps])
        flops.append(sample_work(resolve(request, 1), None).flops)
    # The decoder runs once.
    assert 1.5 < flops[1] / flops[0] < 2.0


def test_train_step_is_compiled_for_a_pod_that_is_not_attached():
    pytest.importorskip("libtpu")
    small = "--autoencoder.channel-multipliers 1 --autoencoder.no-mid-attention"
    wide = "--stage autoencoder --autoencoder.channels 32"
    flags = f"--topology v5e:2x2 --layout fsdp --json {wide} {small}"
    found = json.loads(succeeded(ldm("plan", *TINY, *flags.split(), devices=1)))
    assert found["fits"] is True
    assert found["num_devices"] == 4
    assert 0.0 < found["estimate"]["mfu"] < 1.0
    kinds = {(row["kind"], row["asynchronous"]) for row in found["collectives"]}
    assert {("all-gather", True), ("reduce-scatter", False)} <= kinds
