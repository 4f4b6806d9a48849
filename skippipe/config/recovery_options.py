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


class ReplanOptions(Section):
    """When nodes and links that have become slower or faster for good get another plan."""

    enabled: bool = Field(default=False, examples=[True])
    """Whether they do. Off by default: where processes share cores or a network with others, how long tasks take
    depends on what runs beside them, and so on the plan itself."""
    window: Annotated[int, Field(ge=3)] = Field(default=20, examples=[50])
    """Steps over whose median a node's pace is taken, and for which it has to be off before anything is done."""
    threshold: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(default=1.3, examples=[1.5])
    """From which factor on a node's pace is off, beside what the plan assumes and the median of all nodes."""
    gain: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, examples=[0.1])
    """Share of an iteration that another plan has to save. What nodes do differently from one window to the next seems
    to be worth a few percent, too, and a change costs some seconds."""
    pause: Annotated[int, Field(ge=0)] = Field(default=100, examples=[500])
    """Steps for which a plan stays at least, once one has replaced another; as many between two searches."""
    search_s: Annotated[float, Field(ge=0, le=3600)] = Field(default=20.0, examples=[60.0])
    """Seconds for which a plan is searched, in the background."""
    niceness: Annotated[int, Field(ge=0, le=19)] = Field(default=10, examples=[5])
    """Niceness of the search on the host of the first rank. On cores that are all busy, a process of niceness 19 gets a
    hundredth of one, and one of 10 a tenth."""


class RecoveryOptions(Section):
    """What a run of several processes does when one of them is lost."""

    enabled: bool | Literal["auto"] = Field(default="auto", examples=[True])
    """Whether the others go on without it, with a new plan and from the same step, instead of ending. "auto": where
    each process has an agent of torchrun of its own, or none, enough nodes would be left, and the optimizer is not
    DeepSpeed's. Where not, the start of a run says why."""
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
    """Steps from one copy of a stage that one node alone holds, in the memory of another node, to the next, more where
    sending a copy takes longer; 0: no copies. With 1 every step waits for its copy, and no loss of a single node costs
    more than the interrupted step. Where replicas share out the optimizer state, each also keeps that of another one's
    part, never behind; with 0 what a lost one held begins anew."""
    planning_s: Annotated[float, Field(ge=0, le=3600)] = Field(default=1.0, examples=[5.0])
    """Seconds in which a plan for the nodes that are left is improved, while they wait for it."""
    plans_ahead: bool = True
    """Whether two of the processes make the plans for the loss of each single node in idle time, with the lowest
    priority and some 300 MB each, so that nobody waits for them after a loss."""

    replan: ReplanOptions = ReplanOptions()

    @field_validator("lost_stage")
    @classmethod
    def _each_once(cls, ways: tuple[LostStageWay, ...]) -> tuple[LostStageWay, ...]:
        if len({*ways}) < len(ways):
            raise ValueError(f"{', '.join(ways)}: name every way once")
        if "stop" in ways[:-1]:
            raise ValueError(f"{', '.join(ways)}: nothing comes after stop; put it last")
        return ways
