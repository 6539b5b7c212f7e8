"""The report on a small model's train step, and on its decoding."""

import dataclasses
import json

import pytest

from modjax.aot import memory, plan
from modjax.aot.compile import DRAWN, compile_step, mesh_for
from modjax.aot.memory import Buffer
from modjax.aot.plan import fits_of
from modjax.aot.program import Program
from modjax.aot.report import plain, report_on
from modjax.cli.aot import report_text
from modjax.errors import InputError
from modjax.specs import DataConfig, Execution, ModelSpec, RunSpec, TrainConfig
from modjax.training.fitting import DoesNotFit

D, L, S, V, B, CHIPS = 256, 2, 384, 640, 8, 4
MODEL = ModelSpec(V, D, L, 2, 2, 4 * D, dtype="bfloat16")
SPEC = RunSpec("dense", 1.0, MODEL, TrainConfig(B, S, 100, 1e-3, 10), DataConfig())
EXECUTION = Execution(fsdp=CHIPS, remat="full")
MATRICES = L * 12 * D * D + V * D  # with the head, without the embedding
NUMBERS = MATRICES + V * D + (2 * L + 1) * D  # with the embedding and the norms


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    return compile_step(SPEC, EXECUTION, "v5e:2x2")


@pytest.fixture(scope="module")
def report(compiled):
    return report_on(compiled)


def test_flops_are_those_counted_by_hand(report):
    attention = L * 4 * S * D  # scores and values, for a token
    tokens = B * S
    assert report.flops["full"] == 3 * tokens * (2 * MATRICES + attention)
    assert report.flops["causal"] == 3 * tokens * (2 * MATRICES + attention / 2)
    cycles = report.total_cycles
    assert report.share.full == pytest.approx(report.flops["full"] / (CHIPS * cycles * 131_072))
    cycles += sum(kernel.times * kernel.cycles for kernel in report.kernels)
    most = CHIPS * cycles * 131_072
    assert report.share_with_kernels.causal == pytest.approx(report.flops["causal"] / most)
    assert report.seconds == pytest.approx(cycles / 1.503e9, rel=1e-3)


def test_memory_is_that_of_parameters_moments_and_batch(report):
    sizes = {buffer.what: buffer.bytes for buffer in report.inputs}
    weights = 4 * NUMBERS / CHIPS
    assert sizes["parameters"] == pytest.approx(weights, rel=0.01)  # some are on every chip
    assert sizes["moments of the optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert sizes["batch"] == 4 * 4 * B * S / CHIPS
    memory = report.memory
    assert memory.arguments == pytest.approx(sum(sizes.values()), rel=0.02)
    assert memory.total == memory.arguments + memory.temporaries + memory.outputs
    assert memory.fits and memory.available == 15.75 * 2**30


def test_time_and_collectives_are_reported_by_part(report):
    assert sum(report.cycles.values()) == pytest.approx(report.total_cycles)
    kinds = {one.kind for one in report.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert report.unknown == []
    assert report.mesh == {"data": 1, "fsdp": CHIPS, "tensor": 1, "expert": 1}


def test_the_report_is_json_and_text(report):
    values = json.loads(json.dumps(plain(report)))
    assert values["memory"]["fits"] is True and values["share"]["causal"] == report.share.causal
    text = report_text(report)
    assert "estimated cycles" in text and "estimated share of peak" in text
    assert f"{report.share.causal:.3f} by causal FLOPs" in text


CARRIED = f"""HloModule step

%body (b: ()) -> () {{
  %b = (s32[]) parameter(0)
  ROOT %same = (s32[]) tuple(%b)
}}

%condition (c: ()) -> pred[] {{
  %c = (s32[]) parameter(0)
  ROOT %never = pred[] constant(false)
}}

ENTRY %main (a: f32[{L},{D // CHIPS},{4 * D}]) -> () {{
  %a = f32[{L},{D // CHIPS},{4 * D}] parameter(0)
  %zero = f32[] constant(0)
  %cast = bf16[{L},{D},{4 * D}] fusion(%zero), kind=kLoop, calls=%body
  %logits = f32[{S},{B // CHIPS},{V}] fusion(%zero), kind=kLoop, calls=%body, \
metadata={{op_name="jit(step)/jvp(loss)/dot"}}
  %grads = f32[{L},{D // CHIPS},{4 * D}] broadcast(%zero), dimensions={{}}
  %saved = bf16[{L},{B // CHIPS},{S},{D}] broadcast(%zero), dimensions={{}}
  %also = bf16[{L},{B // CHIPS},2,{S},128] broadcast(%zero), dimensions={{}}
  %quick = bf16[{L},{B // CHIPS},{S},{D}]{{3,2,1,0:T(8,128)S(1)}} broadcast(%zero), dimensions={{}}
  %carried = () tuple(%a, %grads, %saved, %also, %quick)
  ROOT %loop = (f32[{L},{D // CHIPS},{4 * D}], f32[{L},{D // CHIPS},{4 * D}], \
bf16[{L},{B // CHIPS},{S},{D}], bf16[{L},{B // CHIPS},2,{S},128], \
bf16[{L},{B // CHIPS},{S},{D}]{{3,2,1,0:T(8,128)S(1)}}) while(%carried), condition=%condition, \
body=%body, metadata={{op_name="jit(step)/jvp(attention)/while"}}
}}
"""


def test_temporaries_are_named_by_shape_and_inputs_are_none_of_them(compiled, monkeypatch):
    monkeypatch.setattr(memory, "SMALLEST", 1e-6)
    found = memory.temporaries(compiled, Program(CARRIED))
    rows = B // CHIPS
    saved, cast, weights = 2 * L * rows * S * D, 2 * L * D * 4 * D, 4 * L * D * D
    logits = 4 * S * rows * V
    expected = [
        Buffer("parameters as bf16", f"bf16[{L},{D},{4 * D}]", 1, cast),
        Buffer("logits", f"f32[{S},{rows},{V}]", 1, logits),
        Buffer("saved activations", f"bf16[{L},{rows},2,{S},128]", 2, 2 * saved),
        Buffer("gradients", f"f32[{L},{D // CHIPS},{4 * D}]", 1, weights),
    ]
    assert sorted(found) == sorted(expected)


def test_a_program_without_room_is_one_line_with_the_remedy():
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    train = dataclasses.replace(SPEC.train, batch_size=2**17)
    large = dataclasses.replace(SPEC, train=train)
    remedy = r"take .* GiB of 15\.75 per chip: raise execution\.fsdp"
    with pytest.raises(DoesNotFit, match=remedy) as error:
        compile_step(large, EXECUTION, "v5e:2x2")
    assert error.value.needed > 15.75 * 2**30
    fit = fits_of([large], EXECUTION, "v5e:2x2", 1, lambda line: None)[large.run_id]
    assert fit == (False, error.value.needed, None)


@pytest.mark.parametrize(
    "execution, field",
    [
        (Execution(fsdp=3), r"execution\.fsdp"),
        (Execution(data=8), r"execution\.data"),
        (Execution(data=3), r"execution\.data"),
        (Execution(tensor=4), r"execution\.tensor = 4"),  # there are two heads
        (Execution(data=4, log_every=1), None),
    ],
)
def test_a_mesh_that_does_not_suit_the_topology_or_the_model_is_refused(execution, field):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    if field is None:
        assert mesh_for(SPEC, execution, "v5e:2x2").size == CHIPS
        return
    with pytest.raises(InputError, match=field):
        mesh_for(SPEC, execution, "v5e:2x2")


def test_runs_that_differ_in_their_schedule_share_a_compilation(monkeypatch):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    changes = (
        {},
        {"learning_rate": 0.1},
        {"seed": 3},
        {"steps": 7, "warmup_steps": 1},
        {"b1": 0.8},
    )
    specs = [
        dataclasses.replace(SPEC, train=dataclasses.replace(SPEC.train, **each)) for each in changes
    ]
    compiled = []
    monkeypatch.setattr(plan, "_fit", lambda spec, *sizes: compiled.append(spec) or len(compiled))
    lines = []
    found = fits_of(specs, EXECUTION, "v5e:2x2", 1, lines.append)
    assert [found[spec.run_id] for spec in specs] == [1, 1, 1, 1, 2]
    assert len(lines) == 2 and "compiling 1 of 2" in lines[0]


def test_decoding_reports_its_weights_and_caches():
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    compiled = compile_step(SPEC, Execution(data=CHIPS), "v5e:2x2", decode=True)
    report = report_on(compiled)
    sizes = {buffer.what: buffer.bytes for buffer in report.inputs}
    assert sizes["parameters"] == 4 * NUMBERS  # on every chip
    keys = 2 * 2 * L * (B // CHIPS) * S * D  # and values, in bfloat16
    assert keys < sizes["caches"] < 1.05 * keys  # and positions
    assert report.token_seconds == report.seconds / DRAWN
    assert report.read_seconds == report.memory.arguments / 819e9
    assert "estimated time of a token" in report_text(report)
    assert report.share is None and report.flops.keys() == {"xla"}
    # The loop of tokens has known trips.
    program = Program(compiled.executable.as_text())
    loops = [
        program.trips(where, one) for where, one, _ in program.executed() if one.opcode == "while"
    ]
    assert DRAWN in loops
