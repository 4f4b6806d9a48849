"""The secret that the ranks of a start share: that of their hosts, or one that rank 0 makes."""

import secrets
from collections.abc import Sequence
from typing import Any

from skippipe.errors import ConfigError
from skippipe.membership.shared_secret import SECRET, derived_key
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

_CHECK = "skippipe.check/1"
"""Purpose of the key that ranks show each other, which opens nothing."""


def agreed_secret(context: DistributedContext, topic: Topic, own: str | None) -> str:
    """Return the secret with which all ranks know each other; all of them call this together.

    It is their `own_secret` where all have one: it stays on the hosts, and the store carries only what shows that they
    have the same. Else rank 0 makes one, and whoever reads the store knows it.

    Raises:
        ConfigError: on all ranks, where the secret is not the same on all of them, or too short.
    """

    def show() -> dict[str, str]:
        if own is not None:
            return {"check": derived_key(own, _CHECK).hex()}
        return {"made": secrets.token_hex(32)} if context.rank == 0 else {}

    told = all_gather_json(context, topic, show, check=_check_same)
    return own if own is not None else str(told[0]["made"])


def _check_same(told: Sequence[dict[str, Any]]) -> None:
    checks = [each.get("check") for each in told]
    for rank, check in enumerate(checks):
        if check == checks[0]:
            continue
        if None in (check, checks[0]):
            without, having = (rank, 0) if check is None else (0, rank)
            what = f"rank {having} has {SECRET}, rank {without} has none"
        else:
            what = f"rank {rank} has another {SECRET} than rank 0"
        raise ConfigError(f"{what}; set the same one on all hosts, or none")
