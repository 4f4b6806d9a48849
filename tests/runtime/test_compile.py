"""Compiled stages give the gradients of uncompiled ones; what cannot be compiled is refused before anything runs."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from random_plans import random_plan
from ranks import make_config, make_experiment
from test_local import ALONE, gradients_and_loss, make_local
from torch._C._distributed_c10d import HashStore

from skippipe.errors import ConfigError, SkipPipeError
from skippipe.model import chunked_loss, compilation
from skippipe.model.activations.activation_checkpointing import Mode, enable
from skippipe.model.compilation import check_compilable, compile_stage, warm_up
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_factory import compiled_together, make_runner

CPU = torch.device("cpu")


def make_stage(mode: Mode, *, num_layers: int = 2, with_embedding_and_head: bool = True) -> Stage:
    stage = build_stage(
        make_config(num_layers),
        0,
        num_layers,
        with_embedding_and_head=with_embedding_and_head,
        seed=1,
        device=CPU,
        dtype=torch.float32,
    )
    enable(stage, mode)
    return stage.train()


def step(stage: Stage) -> torch.Tensor:
    tokens = torch.arange(16).view(2, 8)
    loss = stage.loss(stage(stage.embed(tokens)), tokens)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("chunk_tokens", [chunked_loss.CHUNK_TOKENS, 6], ids=["one chunk", "chunks"])
def test_compiled_stage_with_checkpointing_equals_the_plain_one(
    chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's front end alone: what inductor makes of it takes too long for every case."""
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", chunk_tokens)
    torch._dynamo.reset()
    plain, compiled = make_stage("full"), make_stage("full")
    compile_stage(compiled, backend="aot_eager")
    warm_up(compiled, (2, 8, 32), CPU)
    assert all(parameter.grad is None for parameter in compiled.parameters())
    captured = dict(torch._dynamo.utils.counters["stats"])
    torch.testing.assert_close(step(compiled), step(plain))
    assert dict(torch._dynamo.utils.counters["stats"]) == captured, "the warm-up has compiled everything"
    expected = plain.global_parameters()
    for name, parameter in compiled.global_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_warm_up_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    warm_up(make_stage("none"), (2, 8, 32), CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_one_layer_made_by_inductor_equals_the_plain_one() -> None:
    torch._dynamo.reset()
    plain, compiled = (make_stage("none", num_layers=1, with_embedding_and_head=False) for _ in range(2))
    compile_stage(compiled)
    for stage in (plain, compiled):
        stage(torch.ones(2, 8, 32, requires_grad=True)).sum().backward()
    expected = plain.global_parameters()
    for name, parameter in compiled.global_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_run_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compile_stage", partial(compile_stage, backend="aot_eager"))
    plan = random_plan(3, num_stages=2, num_nodes=2, route_length=2, num_microbatches=2)
    gradients, loss = gradients_and_loss(make_local(plan))
    compiled, compiled_loss = gradients_and_loss(make_local(plan, compile=True))
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in compiled.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_compilation_that_fails_ends_all_ranks() -> None:
    store = HashStore()

    def compile_on(rank: int) -> str:
        context = DistributedContext(rank=rank, world_size=2, local_rank=rank, timeout_s=20.0, store=store)

        def build() -> Stage:
            if rank == 1:
                raise RuntimeError("the linker is gone\nand more lines")
            return make_stage("none", num_layers=1, with_embedding_and_head=False)

        with pytest.raises(SkipPipeError) as caught:
            compiled_together(build, context)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        told, failed = pool.map(compile_on, range(2))
    assert failed == "training.compile: the stage cannot be compiled: the linker is gone; set training.compile to false"
    assert told == f"rank 1: {failed}"


def test_selective_checkpointing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"selective: a compiled layer is one operation.*use full or none"):
        check_compilable(CPU, "selective")


def test_missing_compiler_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compilation, "compile_stage", lambda *_: pytest.fail("built all the same"))
    plan = random_plan(3)
    experiment = make_experiment(training={"compile": True})
    with pytest.raises(ConfigError, match=r"the C\+\+ compiler 'no-such-compiler'.*set training.compile to"):
        make_runner(experiment, plan, make_config(plan.num_layers), ALONE)


def test_split_plan_is_refused() -> None:
    plan = random_plan(3, split=1.0)
    experiment = make_experiment(training={"compile": True})
    with pytest.raises(ConfigError, match="the plan splits backwards, and a compiled backward is one piece"):
        make_runner(experiment, plan, make_config(plan.num_layers), ALONE)
