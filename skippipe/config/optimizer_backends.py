"""What each optimizer back-end does and holds: the one place for these facts, which needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

OptimizerBackendName = Literal["replicated", "zero_redundancy", "deepspeed_zero1", "deepspeed_zero2"]

DEEPSPEED_ENDS = (
    "a run ends with any of its nodes, as DeepSpeed leaves the summed gradients of a part to one replica alone"
)
MOMENT_BYTES = 8
"""AdamW keeps two fp32 moments for every parameter (Loshchilov and Hutter, arXiv 1711.05101)."""
MASTER_BYTES = 4
"""An fp32 copy of a parameter, which the update is made on."""


@dataclass(frozen=True)
class OptimizerBackendTraits:
    """What a back-end does and holds."""

    shards_state: bool
    """The replicas of a stage share out the state, instead of each keeping all of it."""
    zero_stage: int | None
    """Stage of DeepSpeed's ZeRO (arXiv 1910.02054, section 5); None where DeepSpeed has no part in it."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed does it: it sums gradients by itself, and it can keep the state in host memory."""
        return self.zero_stage is not None

    def state_bytes_per_parameter(self, parameter_bytes: int) -> int:
        """Return the bytes of state for one parameter of `parameter_bytes`, over all replicas that share it out.

        A master copy stands beside parameters narrower than fp32, and with DeepSpeed beside all.
        """
        has_master = parameter_bytes < MASTER_BYTES or self.is_deepspeed
        return MOMENT_BYTES + MASTER_BYTES * has_master


OPTIMIZER_BACKENDS: Mapping[OptimizerBackendName, OptimizerBackendTraits] = MappingProxyType(
    {
        "replicated": OptimizerBackendTraits(shards_state=False, zero_stage=None),
        "zero_redundancy": OptimizerBackendTraits(shards_state=True, zero_stage=None),
        "deepspeed_zero1": OptimizerBackendTraits(shards_state=True, zero_stage=1),
        "deepspeed_zero2": OptimizerBackendTraits(shards_state=True, zero_stage=2),
    }
)
DEEPSPEED_BACKENDS = tuple(name for name in get_args(OptimizerBackendName) if OPTIMIZER_BACKENDS[name].is_deepspeed)
