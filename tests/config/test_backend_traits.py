"""What the optimizer back-ends hold, as the planner counts it."""

from typing import get_args

import pytest

from skippipe.config.optimizer_backends import OPTIMIZER_BACKENDS, OptimizerBackendName


def test_every_backend_has_its_facts() -> None:
    assert tuple(OPTIMIZER_BACKENDS) == get_args(OptimizerBackendName)


@pytest.mark.parametrize(
    ("name", "parameter_bytes", "state_bytes"),
    [
        ("replicated", 4, 8),
        ("replicated", 2, 12),
        ("zero_redundancy", 4, 8),
        ("zero_redundancy", 2, 12),
        ("deepspeed_zero1", 4, 12),
        ("deepspeed_zero2", 2, 12),
    ],
)
def test_moments_and_a_master_copy_where_one_is_kept(
    name: OptimizerBackendName, parameter_bytes: int, state_bytes: int
) -> None:
    assert OPTIMIZER_BACKENDS[name].state_bytes_per_parameter(parameter_bytes) == state_bytes
