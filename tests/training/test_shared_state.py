"""State that replicas share out, on a group that loses one in the middle of a step, gets it back, and loses two."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from processes import preloaded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.training.optimizer import AdamW
from skippipe.training.optimizer.shared_adamw import SharedAdamW
from skippipe.training.optimizer.state_parts import WEIGHTS, Holding, Transfer, handover, state_parts

REPLICAS = 3
SHAPES = {"embedding": (8, 4), "up": (6, 4), "down": (4, 6), "gate": (6, 4), "norm": (4,), "last": (3,)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
OPTIONS = OptimizerOptions(lr=0.1)
SCHEDULE = SchedulerOptions(warmup_steps=2)
MAX_STEPS = 9
LIMIT_S = 100.0

Result = TypeVar("Result")


def make_parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def expected(dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of a single process after each step."""
    parameters = make_parameters(dtype)
    alone = AdamW(parameters, OPTIONS, SCHEDULE, MAX_STEPS)
    for step in range(1, MAX_STEPS):
        set_gradients(parameters, step)
        alone.step()
        yield {name: parameter.detach().clone() for name, parameter in parameters.items()}


def call(wanted: Callable[[], Result]) -> Result:
    return wanted()


class Replica:
    """One of the replicas, and what it had after each step."""

    def __init__(self, rank: int, dtype: torch.dtype, groups: dict[int, dist.ProcessGroup]) -> None:
        self.rank, self.dtype, self.groups = rank, dtype, groups
        self.notes: dict[str, Tensor] = {}
        self.parameters = make_parameters(dtype)
        self.optimizer = self.make(groups[REPLICAS])

    def make(self, group: dist.ProcessGroup | None) -> SharedAdamW:
        return SharedAdamW(self.parameters, OPTIONS, SCHEDULE, MAX_STEPS, group, call, keeps_copies=True)

    def step(self, step: int) -> None:
        set_gradients(self.parameters, step)
        self.optimizer.step()
        self.note(step)

    def note(self, step: int) -> None:
        prefix = f"{self.dtype}/{step}"
        self.notes |= {f"{prefix}/{name}": tensor.detach().clone() for name, tensor in self.parameters.items()}

    def walk(self) -> None:
        """Take steps among three, two, three and one."""
        three, two = self.groups[REPLICAS], self.groups[2]
        self.step(1)
        self.step(2)
        self.optimizer.leave()
        if self.rank != 1:  # that one is lost when the others know that the step is taken by all
            set_gradients(self.parameters, 3)
            self.optimizer.step()
            assert self.optimizer.join(two, call) == 0
            self.note(3)
            self.step(4)
            self.optimizer.leave()
        else:
            self.parameters = make_parameters(self.dtype, seed=1)
            self.optimizer = self.make(None)
            self.optimizer.lack_state(4)
        assert self.optimizer.join(three, call) == 0
        for parameter in self.parameters.values():  # as who comes fetches them
            dist.broadcast(parameter.detach(), 0, group=three)
        self.optimizer.take_weights()
        self.step(5)
        self.step(6)
        self.optimizer.leave()
        if self.rank == 0:
            assert self.optimizer.join(None, call) == sum(SIZES[name] for name in self.shares_of_the_others())
            self.note(6)
            self.step(7)

    def shares_of_the_others(self) -> tuple[str, ...]:
        """Return the parameters of which rank 0 has neither part nor copy."""
        return state_parts(SIZES, REPLICAS, copies=True)[2].own


def run_replica(rank: int, folder: Path) -> None:
    """Walk with both dtypes, in a process of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=REPLICAS)
    groups = {size: dist.new_group(ranks) for size, ranks in ((REPLICAS, [0, 1, 2]), (2, [0, 2]))}
    notes: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        replica = Replica(rank, dtype, groups)
        replica.walk()
        notes |= replica.notes
    save_file(notes, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Return what each replica noted."""
    folder = tmp_path_factory.mktemp("replicas")
    ranks = [preloaded().Process(target=run_replica, args=(rank, folder)) for rank in range(REPLICAS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_S)
    assert [rank.exitcode for rank in ranks] == [0] * REPLICAS
    return [load_file(folder / f"{rank}.safetensors") for rank in range(REPLICAS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_one_process_whoever_is_lost_and_comes(
    notes: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    for step, weights in zip(range(1, 7), expected(dtype), strict=False):
        there = [rank for rank in range(REPLICAS) if rank != 1 or step not in (3, 4)]
        for name, tensor in weights.items():
            assert all(notes[rank][f"{dtype}/{step}/{name}"].equal(tensor) for rank in there), (step, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_two_have_lost_begins_anew(notes: list[dict[str, Tensor]], dtype: torch.dtype) -> None:
    (*_, seventh) = (weights for _, weights in zip(range(7), expected(dtype), strict=False))
    gone = state_parts(SIZES, REPLICAS, copies=True)[2].own
    for name, tensor in seventh.items():
        found = notes[0][f"{dtype}/7/{name}"]
        assert found.equal(tensor) == (name not in gone)
        assert bool(found.isfinite().all())


def test_every_part_has_two_holders_of_about_the_same_size() -> None:
    found = state_parts(SIZES, REPLICAS, copies=True)
    assert sorted(name for share in found for name in share.own) == sorted(SIZES)
    assert sorted(name for share in found for name in share.copied) == sorted(SIZES)
    assert all(not {*share.own} & {*share.copied} for share in found)
    assert all(not share.copied for share in state_parts(SIZES, REPLICAS, copies=False))
    assert state_parts(SIZES, 1, copies=True)[0].copied == ()


def test_only_what_is_missing_is_sent() -> None:
    wanted = state_parts({"a": 3, "b": 2}, 2, copies=False)
    keys: dict[str, tuple[str, ...]] = {"a": ("step",), "b": ("step",)}
    first, second = ({name: keys[name]} for name in ("a", "b"))
    assert handover(
        ["a", "b"], [Holding(weights="right", keys=first), Holding(weights="right", keys=second)], wanted
    ) == ((), ())
    behind = handover(
        ["a", "b"], [Holding(weights="behind", keys=first), Holding(weights="right", keys=second)], wanted
    )
    assert behind.transfers == (Transfer("b", WEIGHTS, 1, 0),)
    comes = handover(["a", "b"], [Holding(weights="right", keys=keys), Holding(weights="given", keys={})], wanted)
    assert comes.transfers == (Transfer("b", "step", 0, 1),)
    lost = handover(["a", "b"], [Holding(weights="behind", keys=first), Holding(weights="given", keys={})], wanted)
    assert lost == ((Transfer("a", WEIGHTS, 0, 1), Transfer("b", WEIGHTS, 0, 1)), ("b",))
