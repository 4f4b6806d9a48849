"""The `recovery:` section of an experiment (docs/recovery.md). Light to import: no torch."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from skippipe.config.section import Section

LostStageWay = Literal["copy", "routes_around", "rebuild", "checkpoint", "stop"]
"""How a run goes on where a stage has lost its last node."""


def _as_list(given: object) -> object:
    """Return a single way as the list that it stands for: that way, else the run stops."""
    if not isinstance(given, str):
        return tuple(given) if isinstance(given, list) else given
    return ("stop",) if given == "stop" else (given, "stop")


class RecoveryOptions(Section):
    """What a run of several processes does when one of them is lost."""

    enabled: bool | Literal["auto"] = Field(default="auto", examples=[True])
    """Whether the others go on without it, with a new plan and from the same step, instead of ending. "auto": where
    each process has an agent of torchrun of its own, or none, enough nodes would be left, and all replicas have the
    whole optimizer state. Where not, the start of a run says why."""
    silence_s: Annotated[float, Field(ge=0.5, le=3600)] = Field(default=10.0, examples=[30.0])
    """Seconds without a sign of life after which a process counts as lost. One that died is noticed at once, and one
    that is busy gives signs of life all the time."""
    min_nodes: Annotated[int, Field(ge=2)] = Field(default=2, examples=[5])
    """With fewer nodes left, the run ends."""
    lost_stage: Annotated[tuple[LostStageWay, ...], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        default=("copy", "routes_around", "checkpoint", "stop"), examples=[["copy", "stop"]]
    )
    """What becomes of a stage without any node: the first of these that is possible. Another node takes it over, from
    its copy, rebuilt from the stages beside it, or from the last checkpoint; or all routes leave it out until one of
    its nodes is back (not for stage 0, which holds embedding and head); or the run stops. One word alone stands for
    that way, else stop."""
    copy_interval: Annotated[int, Field(ge=0)] = Field(default=20, examples=[5])
    """Steps from one copy of a stage that one node alone holds, in the memory of another node, to the next; 0: no
    copies. With 1 every step waits for its copy, and no loss of a single node costs more than the interrupted step."""
    planning_s: Annotated[float, Field(ge=0, le=3600)] = Field(default=1.0, examples=[5.0])
    """Seconds in which a plan for the nodes that are left is improved, while they wait for it."""
    plans_ahead: bool = True
    """Whether two of the processes make the plans for the loss of each single node in idle time, with the lowest
    priority and some 300 MB each, so that nobody waits for them after a loss."""

    @field_validator("lost_stage")
    @classmethod
    def _each_once(cls, ways: tuple[LostStageWay, ...]) -> tuple[LostStageWay, ...]:
        if len({*ways}) < len(ways):
            raise ValueError(f"{', '.join(ways)}: name every way once")
        if "stop" in ways[:-1]:
            raise ValueError(f"{', '.join(ways)}: nothing comes after stop; put it last")
        return ways
