"""Cycles, trips and collectives of compiled programs: products of known size, and texts by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from modjax.aot.cost import (
    Collective,
    Unestimated,
    cause_of,
    collectives,
    cycles_by_part,
    part_of,
    unestimated,
)
from modjax.aot.program import Program
from tests.aot.described import compiled_on

BY_HAND = (Path(__file__).parent / "by_hand.hlo").read_text()
ROWS, WIDTH = 16384, 4096
FLOPS = 2 * ROWS * WIDTH * WIDTH


def product(x, w):
    return x @ w


def layers(x, weights):
    """Two products a layer, in different parts of a model."""

    def layer(x, w):
        with jax.named_scope("attention"):
            x = x @ w
        with jax.named_scope("mlp"):
            return x @ w, None

    return jax.lax.scan(layer, x, weights)[0]


@pytest.mark.parametrize(
    "topology, flops_per_cycle",
    [("v5e:1x1", 128.1e3), ("v5p:1x1x1", 255.8e3), ("v6e:1x1", 477e3)],
)
def test_a_product_takes_the_cycles_of_the_matrix_units(topology, flops_per_cycle):
    compiled = compiled_on(topology, product, ((ROWS, WIDTH), None), ((WIDTH, WIDTH), None))
    program = Program(compiled.as_text())
    assert FLOPS / program.cycles == pytest.approx(flops_per_cycle, rel=0.01)


def test_a_loop_counts_each_of_its_trips_and_the_parts_share_its_cycles():
    compiled = compiled_on("v5e:1x1", layers, ((ROWS, WIDTH), None), ((7, WIDTH, WIDTH), None))
    program = Program(compiled.as_text())
    parts = cycles_by_part(program)
    assert parts["attention"] == parts["mlp"]
    # Weights that are cut out of a stack cost something.
    assert 100e3 < 7 * FLOPS / parts["mlp"] < 128.1e3
    assert parts["other"] < 0.05 * program.cycles
    assert program.unknown == []


def test_a_gradient_over_split_rows_is_reduced_once():
    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum((x @ w).astype(jnp.float32) ** 2))(w)

    compiled = compiled_on("v5e:2x2", gradient, ((4 * 512, 1024), 0), ((1024, 2048), None))
    found = collectives(Program(compiled.as_text()))
    assert found == [Collective("all-reduce", 1, 1024 * 2048 * 2, "backward other")]


def test_weights_split_over_devices_are_gathered_whole_in_each_layer():
    compiled = compiled_on("v5e:2x2", layers, ((4 * 512, 1024), 0), ((6, 1024, 1024), 2))
    (found,) = collectives(Program(compiled.as_text()))
    assert (found.kind, found.count, found.bytes) == ("all-gather", 6, 6 * 1024 * 1024 * 2)


def test_sorts_and_gathers_have_no_estimate():
    def sorted_rows(x):
        with jax.named_scope("top_k"):
            order = jnp.argsort(x, axis=1)
        return jnp.take_along_axis(x, order, axis=1)

    program = Program(compiled_on("v5e:1x1", sorted_rows, ((64, 1024), None)).as_text())
    assert set(unestimated(program)) == {
        Unestimated("sort", "top_k", 1),
        Unestimated("gather", "other", 1),
    }


def test_a_windowed_product_has_one_trip_for_each_group_of_its_windows():
    compiled = compiled_on("v5e:4x4", product, ((ROWS * 16, 1792), 0), ((1792, 7168), 0))
    program = Program(compiled.as_text())
    products = sum(
        times
        for _, one, times in program.executed(fused=True)
        if one.opcode == "convolution" and "window={size=2}" in one.text
    )
    assert products == 8  # of two windows each: 16 devices hold a window each


def test_a_text_by_hand_is_counted_by_trips_channels_and_branches():
    program = Program(BY_HAND)
    # From 1 below 11 by 2: five trips; the loop of unknown length counts once.
    assert program.cycles == 100 * (5 + 1) + 7000
    assert program.unknown == ["jit(step)/while"]
    # Both steps of the gather share its channel.
    assert collectives(program) == [
        Collective("reduce-scatter", 5, 5 * 64 * 32 * 2, "backward mlp"),
        Collective("all-gather", 5, 5 * 8 * 32 * 2, "other"),
    ]
    assert cycles_by_part(program) == {"other": 7000, "norm": 600}


def test_a_kernel_takes_several_lines_of_a_text():
    program = Program(BY_HAND)
    ((name, one, times), _) = [found for found in program.executed() if found[1].kernel]
    assert (name, one.kernel, times) == ("body", "kernel", 5)
    assert one.op_name == "jit(step)/jvp(attention)/pallas_call"
    assert [str(array) for array in one.arrays] == ["bf16[8,8]", "f32[8]"]
    assert [array.main for array in one.arrays] == [False, True]
    assert list(program.computations)[4] == "condition"


FETCHED = """HloModule step

%body (b: (s8[2], s8[2], s8[2])) -> (s8[2], s8[2], s8[2]) {
  %b = (s8[2], s8[2], s8[2]) parameter(0)
  %quick = s8[2]{0:S(1)} get-tuple-element(%b), index=0
  %slow = s8[2] get-tuple-element(%b), index=1
  %changes = s8[2] get-tuple-element(%b), index=2
  %used = s8[2] add(%quick, %changes)
  %start = (s8[2]{0:S(1)}, s8[2], u32[]) copy-start(%slow)
  %again = s8[2]{0:S(1)} copy-done(%start)
  ROOT %next = (s8[2], s8[2], s8[2]) tuple(%again, %slow, %quick)
}

%condition (c: (s8[2], s8[2], s8[2])) -> pred[] {
  %c = (s8[2], s8[2], s8[2]) parameter(0)
  ROOT %never = pred[] constant(false)
}

ENTRY %main () -> (s8[2], s8[2], s8[2]) {
  %mask = s8[2] constant({1, 2})
  %other = s8[2] constant({3, 4})
  %begin = (s8[2]{0:S(1)}, s8[2], u32[]) copy-start(%mask)
  %first = s8[2]{0:S(1)} copy-done(%begin)
  %carried = (s8[2], s8[2], s8[2]) tuple(%first, %mask, %other)
  ROOT %loop = (s8[2], s8[2], s8[2]) while(%carried), condition=%condition, body=%body
}
"""


def test_a_constant_is_found_through_loops_that_fetch_it_again_and_never_if_it_changes():
    program = Program(FETCHED)
    assert [program.constant("body", name).name for name in ("quick", "slow")] == ["mask"] * 2
    assert program.constant("body", "changes") is None


@pytest.mark.parametrize(
    "op_name, part, cause",
    [
        ("jit(f)/jvp(loss)/reduce_sum", "loss", "forward loss"),
        ("jit(f)/transpose(jvp(attention))/rotary/mul", "rotary", "backward rotary"),
        ("jit(f)/jvp()/while/body/mlp/rematted_computation/dot", "mlp", "recomputed mlp"),
        ("jit(f)/jit(gather)/vmap()/gather", "other", "other"),
        ("jit(f)/optimizer/mul", "optimizer", "optimizer"),
        ("", "other", "other"),
    ],
)
def test_an_operation_belongs_to_the_innermost_named_part(op_name, part, cause):
    assert (part_of(op_name), cause_of(op_name)) == (part, cause)
