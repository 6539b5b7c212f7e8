"""The train step of the paper's models compiles for TPUs, by the TPU compiler and without a TPU."""

import dataclasses

import pytest

from modjax.aot.compile import compile_step
from modjax.flops import train_flops
from modjax.specs import (
    Attention,
    DataConfig,
    Dense,
    Execution,
    MoD,
    ModelSpec,
    MoE,
    RunSpec,
    Seq,
    TokenChoice,
    TrainConfig,
)
from tests.training.test_sharding import count_collectives

# 220M, the size of the paper's Figure 3; the batch of one slice of 16 chips.
DENSE = ModelSpec(32_128, 1024, 16, 8, 8, 4096, dtype="bfloat16")
TRAIN = TrainConfig(128, 2048, 1000, 1e-3, 20)
EXECUTION = Execution(data=4, fsdp=4, layer_loop="scan", remat="full")


def compile_for_tpu(config: ModelSpec, train=TRAIN, execution=EXECUTION, topology="v5e:4x4"):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    spec = RunSpec("run", 1.0, config, train, DataConfig())
    return compile_step(spec, execution, topology).executable


@pytest.mark.slow
def test_routing_adds_no_collective_and_no_memory_on_a_tpu_slice():
    dense = compile_for_tpu(DENSE)
    mod = compile_for_tpu(dataclasses.replace(DENSE, layers=(Dense(), MoD())))
    assert set(count_collectives(mod)) <= set(count_collectives(dense))
    used, budget = (
        c.memory_analysis().temp_size_in_bytes + c.memory_analysis().argument_size_in_bytes
        for c in (mod, dense)
    )
    assert used <= budget < 16e9  # of a v5e chip


@pytest.mark.slow
def test_experts_travel_by_all_to_all_on_a_tpu_slice_and_no_expert_moves():
    moe = MoE(8, TokenChoice(2))
    small = ModelSpec(1024, 512, 2, 4, 4, 2048, Seq(Attention(), moe), dtype="bfloat16")
    train = TrainConfig(16, 1024, 1000, 1e-3, 10)
    execution = Execution(data=1, expert=8, layer_loop="unroll")
    compiled = compile_for_tpu(small, train, execution, "v5e:2x4")
    # There and back in two layers, and the same in the gradient.
    assert count_collectives(compiled)["all-to-all"] == 8
    useful = train_flops(
        dataclasses.replace(
            small, layers=Seq(Attention(), dataclasses.replace(moe, capacity_factor=1.0))
        ),
        train.seq_len,
        train.batch_size,
    )
    assert compiled.cost_analysis()["flops"] * 8 / useful <= 1.30
