"""DeepSpeed's ZeRO-1 and ZeRO-2 over the replicas of a stage, with its optimizer on the CPU where asked for.

DeepSpeed never sees the model. Its engine gets parameters of its own that share the stage's memory, so none of its
hooks runs inside a microbatch: gradients gather in the stage's `.grad` and are handed over at REDUCE. There DeepSpeed
sums them; at STEP each replica updates its part of the flattened parameters and all send theirs to the others. Clipping
happens between the two, on the parts, by the norm of the whole model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.errors import CheckpointError
from skippipe.training.optimizer.clipping import clip_factor, squared_norm_of
from skippipe.training.optimizer.interface import Guard
from skippipe.training.optimizer.master_adamw import LR_SCALE, MASTER, MOMENTS, STEP
from skippipe.training.optimizer.settings import factor_of, is_fused, parameter_groups, schedule_after, stored_state

BUCKET_NUMBERS = 16 * 2**20
"""Numbers that DeepSpeed reduces and gathers at a time; it holds one such buffer."""
NEVER = 10**9
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class DeepSpeedZero:
    """AdamW whose state, and for stage 2 also the gradients after REDUCE, are shared out among `replicas`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        scheduler: SchedulerOptions,
        max_steps: int,
        replicas: dist.ProcessGroup,
        guard: Guard,
    ) -> None:
        self._parameters = dict(parameters)
        self._replicas = replicas
        self._guard = guard
        # Numbers are the stage's own: the same storage under a second parameter.
        self._shadows: dict[str, Any] = {
            name: nn.Parameter(parameter.detach()) for name, parameter in self._parameters.items()
        }
        self._options = options
        self._factor = factor_of(scheduler, max_steps)

    def connect(self) -> None:
        """Share out the state among the replicas, which do this together, before anything else."""
        self._guard(self._start)
        for name, shadow in self._shadows.items():  # DeepSpeed has moved them into one flat tensor
            self._parameters[name].data = shadow.data
        self._schedule = LambdaLR(self._inner, self._factor)

    def _start(self) -> None:
        import deepspeed

        options = self._options
        inner = _inner_optimizer(self._shadows.values(), options)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=nn.ParameterList(self._shadows.values()),
            optimizer=inner,
            config=_engine_options(next(iter(self._shadows.values())).dtype, options),
            mpu=_Replicas(self._replicas),
            dist_init_required=False,
        )
        held = torch.tensor([0 if place is None else place.numel for place in map(self._place, self._shadows)])
        by_rank = [torch.empty_like(held) for _ in range(self._replicas.size())]
        dist.all_gather(by_rank, held, group=self._replicas)
        self._held = dict(zip(self._shadows, torch.stack(by_rank, 1).tolist(), strict=True))

    @property
    def _inner(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self._zero.optimizer
        return inner

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of which a part is updated here."""
        return tuple(name for name in self._shadows if self._place(name) is not None)

    @property
    def sharded(self) -> bool:
        """True: the other replicas update other parts."""
        return True

    @property
    def reduce(self) -> Callable[[float], None] | None:
        """DeepSpeed's own sum over the replicas."""
        return self._reduce

    @property
    def resharing(self) -> None:
        """None: a replica keeps the summed gradients of its own part alone, and the engine stays with its group."""
        return None

    def _reduce(self, factor: float) -> None:
        # Leaving the block reduces once what was gathered in it.
        with self._engine.coalesce_grad_reduction():
            for name, shadow in self._shadows.items():
                shadow.grad, self._parameters[name].grad = self._parameters[name].grad, None
        if factor != 1.0:
            self._scale(factor)

    def squared_norm(self, owned: Iterable[nn.Parameter]) -> float:
        """Return the squared norm of the part of the gradient that is here; over the replicas it is the stage's."""
        return squared_norm_of(self._gradients())

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients where the global norm is too large; see `OptimizerBackend`."""
        factor = clip_factor(norm, max_norm)
        if factor < 1.0:
            self._scale(factor)

    def step(self) -> None:
        """Update the part that is here and send it to the other replicas; see `OptimizerBackend`."""
        self._guard(self._engine.step)
        self._schedule.step()

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the state of those of the parameters `names` whose first number is updated here, on the CPU.

        Parameters that lie across the border of two replicas' parts are put together, so all replicas call this.
        """
        return self._guard(lambda: dict(self._collected(names)))

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`.

        Raises `CheckpointError` where a parameter has a learning rate of its own: parameters lie in flat tensors here.
        """
        scaled = [name for name in state if name.endswith(f".{LR_SCALE}")]
        if scaled:
            raise CheckpointError(
                f"optimizer: {scaled[0]}: this stage was rebuilt after a loss, and its learning rate is multiplied by "
                f"{float(state[scaled[0]]):g}, which {self._options.backend} cannot; continue with "
                "optimizer.backend=zero_redundancy or replicated"
            )
        self._zero.refresh_fp32_params()
        self._inner.state.clear()
        for name in self.names:
            found = stored_state(state, name, self._shadows[name].shape, step)
            if step:
                self._prepare(name, found.pop(STEP))
            for key, tensor in found.items():
                self._part(name, key).copy_(_cut(tensor, self._shadows[name]._hp_mapping.lp_fragment_address))
        self._schedule = schedule_after(self._inner, self._factor, step)

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down."""
        self._engine.destroy()

    def _place(self, name: str) -> Any:
        """Return which numbers of a parameter are updated here, as `start` and `numel`; None where none is."""
        mapping = self._shadows[name]._hp_mapping
        return None if mapping is None else mapping.lp_fragment_address

    def _flat(self, name: str) -> Tensor:
        """Return the fp32 tensor of this replica in which the part of a parameter lies."""
        flat: Tensor = self._zero.single_partition_of_fp32_groups[self._shadows[name]._hp_mapping.param_group_index]
        return flat

    def _part(self, name: str, key: str) -> Tensor:
        """Return this replica's part (n,) of a parameter's state."""
        flat = self._flat(name)
        whole: Tensor = flat.detach() if key == MASTER else self._inner.state[flat][key]
        return _cut(whole, self._shadows[name]._hp_mapping.hp_fragment_address)

    def _prepare(self, name: str, step: Tensor) -> None:
        """Make room for the loaded state of the flat tensor that a parameter is in."""
        flat = self._flat(name)
        if flat not in self._inner.state:
            count: Tensor | int = int(step)
            if isinstance(self._inner, torch.optim.AdamW):
                count = step.to(flat.device if self._inner.defaults["fused"] else "cpu", copy=True)
            moments = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
            self._inner.state[flat] = {STEP: count, **moments}

    def _gradients(self) -> Iterator[Tensor]:
        """Yield this replica's parts of the summed gradients."""
        for name in self.names:
            shadow = self._shadows[name]
            yield shadow._hp_mapping.get_lp_grad_fragment(shadow._index_in_param_group)

    @torch.no_grad()
    def _scale(self, factor: float) -> None:
        for gradient in self._gradients():
            gradient.mul_(factor)

    def _collected(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        rank = dist.get_rank(self._replicas)
        begun = any(self._inner.state.values())
        for name in names:
            parameter, held = self._shadows[name], self._held[name]
            keys = (*(MOMENTS if begun else ()), *(() if parameter.dtype == torch.float32 else (MASTER,)))
            first = next(other for other, numbers in enumerate(held) if numbers)
            whole = held[first] == parameter.numel()
            for key in keys:
                if whole and rank == first:
                    yield f"{name}.{key}", self._part(name, key).cpu().view(parameter.shape)
                elif not whole:
                    tensor = self._put_together(name, key, first)
                    if rank == first:
                        yield f"{name}.{key}", tensor.view(parameter.shape)
            if begun and rank == first:
                yield f"{name}.{STEP}", torch.tensor(float(self._inner.state[self._flat(name)][STEP]))

    def _put_together(self, name: str, key: str, rank: int) -> Tensor:
        """Return all numbers (n,) of a parameter's state on one replica; all call this."""
        full = torch.zeros(self._shadows[name].numel())
        place = self._place(name)
        if place is not None:
            _cut(full, place).copy_(self._part(name, key))
        dist.reduce(full, dist.get_global_rank(self._replicas, rank), group=self._replicas)
        return full


class _Replicas:
    """Tells DeepSpeed over which ranks it works: the replicas, and no split of a layer."""

    def __init__(self, replicas: dist.ProcessGroup) -> None:
        self._replicas = replicas

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._replicas

    def get_data_parallel_world_size(self) -> int:
        return self._replicas.size()

    def get_data_parallel_rank(self) -> int:
        return self._replicas.rank()

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _inner_optimizer(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    held = list(parameters)
    groups = parameter_groups(held, options)
    if not options.offload:
        fused = is_fused(options, held[0].device)
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    on_cpu: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    return on_cpu


def _engine_options(dtype: torch.dtype, options: OptimizerOptions) -> dict[str, Any]:
    """Return DeepSpeed's configuration: sums, no clipping of its own, no loss scale, nothing printed."""
    zero: dict[str, Any] = {
        "stage": options.traits.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_bucket_size": BUCKET_NUMBERS,
        "allgather_bucket_size": BUCKET_NUMBERS,
    }
    if options.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": DTYPE_NAMES[dtype]},
        "steps_per_print": NEVER,
    }


def _cut(tensor: Tensor, address: Any) -> Tensor:
    return tensor.detach().view(-1).narrow(0, address.start, address.numel)
