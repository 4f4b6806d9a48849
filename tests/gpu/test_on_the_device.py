"""What has to hold on a GPU: the same numbers as on the CPU, less memory where it is promised, bitwise resumes.

python -m pytest -m gpu                                 on a machine with a GPU
SKIPPIPE_GPU_TESTS_ON_CPU=1 python -m pytest -m gpu     the same tests on the CPU, to see that they run
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import losses, make_experiment, small_plan, train_alone

from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.generation import generate
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.activations.activation_checkpointing import MODES, Mode, enable
from skippipe.model.architecture import build_config
from skippipe.model.compilation import compile_stage
from skippipe.model.full_model import build_full
from skippipe.model.skeleton import find_parts
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.stage_compute import StageCompute
from skippipe.training.measurement.peak_memory import PeakMemory

ON_CPU = os.environ.get("SKIPPIPE_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU or not torch.cuda.is_available() else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 128}
SHAPE = (4, 32)
"""Samples and tokens."""
FLOAT32_TOLERANCE = 1e-4
"""Relative to the largest number. Sums of a few hundred products in another order, without TF32."""
BFLOAT16_TOLERANCE = 0.05
"""Likewise; bfloat16 has 8 bits, and errors add up over four layers and their backwards."""


def stage_of(architecture: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Stage:
    """Return a whole model as one stage; its weights are the same on every device."""
    config = build_config(architecture, SIZES)
    return build_stage(config, 0, 4, with_embedding_and_head=True, seed=1, device=device, dtype=dtype)


def batch() -> tuple[Tensor, Tensor]:
    text = torch.randint(0, SIZES["vocab_size"], (SHAPE[0], SHAPE[1] + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def results_of(stage: Stage) -> list[Tensor]:
    """Run forward, loss and backward; return the loss and all gradients, on the CPU in fp32."""
    device = next(stage.parameters()).device
    input_ids, labels = (part.to(device) for part in batch())
    loss = stage.loss(stage(stage.embed(input_ids)), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (loss, *gradients)]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert float((own - other).abs().max()) <= tolerance * max(float(other.abs().max()), 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)]
)
def test_loss_and_gradients_are_those_of_the_cpu(architecture: str, dtype: torch.dtype, tolerance: float) -> None:
    expected = results_of(stage_of(architecture, torch.device("cpu")))
    assert_near(results_of(stage_of(architecture, DEVICE, dtype)), expected, tolerance)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_checkpointing_changes_no_gradient(mode: Mode) -> None:
    plain, checkpointed = stage_of("llama", DEVICE), stage_of("llama", DEVICE)
    enable(checkpointed, mode)
    assert_near(results_of(checkpointed), results_of(plain), FLOAT32_TOLERANCE)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: on a CPU the allocator's own numbers are in the way")
def test_checkpointing_holds_less() -> None:
    config = build_config("llama", SIZES | {"hidden_size": 256, "num_hidden_layers": 8})
    peaks = []
    for mode in MODES:
        stage = build_stage(config, 0, 8, with_embedding_and_head=False, seed=1, device=DEVICE, dtype=torch.float32)
        enable(stage, mode)
        peak = PeakMemory(DEVICE)
        hidden = torch.randn(8, 256, 256, device=DEVICE, requires_grad=True)  # (B, T, D)
        stage(hidden).sum().backward()
        peaks.append(peak.read())
        del stage, hidden
        torch.cuda.empty_cache()
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.7 * peaks[0]


def test_a_compiled_stage_equals_the_plain_one() -> None:
    plain, compiled = stage_of("llama", DEVICE), stage_of("llama", DEVICE)
    compile_stage(compiled, "inductor" if DEVICE.type == "cuda" else "aot_eager")
    assert_near(results_of(compiled), results_of(plain), FLOAT32_TOLERANCE)


def test_a_split_backward_sums_to_the_whole_one() -> None:
    gradients = []
    for split in (frozenset[int](), frozenset({0, 2})):
        stage = stage_of("llama", DEVICE)
        compute = StageCompute(stage, DEVICE, split)
        compute.reset(3)
        for microbatch in range(3):
            compute.load(microbatch, *batch())
            gradient = compute.loss(microbatch, compute.forward(microbatch, None))
            assert gradient is not None
            compute.backward(microbatch, gradient)
        for microbatch in sorted(split):
            compute.weight(microbatch)
        gradients.append([parameter.grad for parameter in stage.parameters() if parameter.grad is not None])
    assert_near(gradients[1], gradients[0], FLOAT32_TOLERANCE)


def test_a_run_continues_bitwise(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, training={"device": DEVICE.type})
    train_alone(experiment, small_plan())
    whole = losses(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert train_alone(experiment, small_plan()).first_step == 2
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_makes_the_tokens_of_the_cpu(dtype: torch.dtype) -> None:
    config = build_config("llama", SIZES)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    made = []
    for device in (torch.device("cpu"), DEVICE):
        decoder = Decoder(find_parts(build_full(config, 3, device, torch.float32).to(dtype).eval()))
        policy = build_policy("exit", PolicyContext(decoder, 0.5, num_generated=8))
        made.append(generate(decoder, policy, prompts, max_new_tokens=8).tokens)
    if dtype == torch.float32:
        assert made[0] == made[1]
    else:  # near ties may fall the other way
        assert [len(row) for row in made[1]] == [8, 8]
