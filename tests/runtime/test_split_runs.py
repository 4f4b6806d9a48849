"""A backward in two parts gives the gradients of a whole one, in every model and with every way to save memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from random_plans import random_plan
from ranks import make_batch
from test_local import gradients_and_loss, make_local
from torch import Tensor

from skippipe.errors import ProgramError
from skippipe.model.activations.activation_checkpointing import MODES, Mode, enable
from skippipe.model.architecture import build_config
from skippipe.model.linear.weight_gradients import is_deferrable
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.program.program import Opcode, Program, compile_programs
from skippipe.runtime.program.verifier import prove
from skippipe.runtime.stage_compute import StageCompute

CPU = torch.device("cpu")
SIZES = {
    "llama": {"intermediate_size": 48, "attention_bias": True},
    "gpt2": {},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make_stage(architecture: str, mode: Mode) -> Stage:
    """Return two layers in training, in which a bias is not zero."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = build_config(architecture, sizes | SIZES[architecture])
    stage = build_stage(config, 1, 3, with_embedding_and_head=False, seed=1, device=CPU, dtype=torch.float32)
    enable(stage, mode)
    return stage.train()


def inputs(seed: int) -> Tensor:
    return torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_two_parts_equal_the_whole(architecture: str, mode: Mode) -> None:
    whole, parts = (make_stage(architecture, mode) for _ in range(2))
    at_once, later = StageCompute(whole, CPU), StageCompute(parts, CPU, frozenset({0, 2}))
    for compute in (at_once, later):
        for microbatch in range(3):
            compute.forward(microbatch, inputs(microbatch))
    sent = [[compute.backward(number, inputs(9 + number)) for number in range(3)] for compute in (at_once, later)]
    for expected, measured in zip(*sent, strict=True):
        assert expected is not None
        assert measured is not None
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-8)
    later.weight(2)
    later.weight(0)
    expected_gradients = {name: parameter.grad for name, parameter in whole.global_parameters().items()}
    for name, parameter in parts.global_parameters().items():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", SIZES)
def test_matrices_get_their_gradients_with_the_weight_instruction(architecture: str) -> None:
    stage = make_stage(architecture, "none")
    compute = StageCompute(stage, CPU, frozenset({0}))
    compute.forward(0, inputs(0))
    compute.backward(0, inputs(1))
    matrices = [module.weight for module in stage.body.modules() if is_deferrable(module)]
    assert len(matrices) >= 8
    assert all(weight.grad is None for weight in matrices)
    compute.weight(0)
    assert all(weight.grad is not None and weight.grad.any() for weight in matrices)


def test_frozen_weights_stay_without_gradients() -> None:
    stage = make_stage("llama", "none")
    frozen = next(module for module in stage.body.modules() if is_deferrable(module))
    frozen.weight.requires_grad_(False)
    compute = StageCompute(stage, CPU, frozenset({0}))
    compute.forward(0, inputs(0))
    compute.backward(0, inputs(1))
    compute.weight(0)
    assert frozen.weight.grad is None


@given(st.integers(0, 500), st.booleans(), st.sampled_from(MODES))
@settings(max_examples=5)
def test_one_process_gives_the_same_with_a_split_plan(seed: int, tied: bool, mode: Mode) -> None:
    shape = {"num_microbatches": 3, "layers_per_stage": 2}
    whole = gradients_and_loss(make_local(random_plan(seed, **shape), tied=tied))  # type: ignore[arg-type]
    plan = random_plan(seed, split=0.7, **shape)  # type: ignore[arg-type]
    runner = make_local(plan, tied=tied, activation_checkpointing=mode)
    gradients, loss = gradients_and_loss(runner)
    assert loss == whole[1]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[0][name], rtol=1e-6, atol=1e-7, msg=name)
    spans = runner.train_iteration(make_batch, lambda: None).spans
    assert {(span.node, span.operation, span.microbatch) for span in spans} == {
        (node, task.operation, task.microbatch) for node, tasks in plan.order.items() for task in tasks
    }


def split_plan(seed: int = 1):  # type: ignore[no-untyped-def]
    return random_plan(seed, num_nodes=5, num_stages=3, route_length=3, num_microbatches=6, split=1.0)


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=30)
def test_split_plans_compile_to_proved_programs(seed: int, memory: int) -> None:
    plan = random_plan(seed, split=0.6, memory=memory)
    programs = compile_programs(plan, activation_bytes=128)
    prove(programs, plan)
    assert sum(len(program.select(Opcode.WEIGHT)) for program in programs) == sum(map(len, plan.split_of.values()))


def damaged(move: str) -> tuple[tuple[Program, ...], int]:
    """Return programs in which the first WEIGHT of a rank is gone or comes first, and the rank."""
    programs = list(compile_programs(split_plan(), 128))
    rank = next(rank for rank, program in enumerate(programs) if program.select(Opcode.WEIGHT))
    instructions = list(programs[rank].instructions)
    weight = instructions.pop([instruction.opcode for instruction in instructions].index(Opcode.WEIGHT))
    if move == "first":
        instructions.insert(0, weight)
    programs[rank] = replace(programs[rank], instructions=tuple(instructions))
    return tuple(programs), rank


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ("first", r"WEIGHT of microbatch \d hop \d comes before its BACKWARD"),
        ("gone", "does not run the plan's tasks: look at WEIGHT of microbatch"),
    ],
)
def test_misplaced_weight_gradients_are_refused(move: str, message: str) -> None:
    programs, rank = damaged(move)
    with pytest.raises(ProgramError, match=rf"rank {rank} \(node-\d\).*{message}"):
        prove(programs, split_plan())


def test_proof_holds_microbatches_until_their_weight_gradient() -> None:
    plan = split_plan()
    node = next(node for node, tasks in plan.order.items() if any(task.operation == "W" for task in tasks))
    last = tuple(sorted(plan.order[node], key=lambda task: task.operation == "W"))
    later = plan.model_copy(update={"order": {**plan.order, node: last}})
    peak = sum(task.operation == "F" for task in last)
    limit = {**plan.costs.memory, node: peak - 1}
    tight = later.model_copy(update={"costs": plan.costs.model_copy(update={"memory": limit})})
    with pytest.raises(ProgramError, match=f"holds {peak} microbatches between forward and backward"):
        prove(compile_programs(tight, 128), tight)
