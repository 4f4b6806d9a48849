"""The rows of the table: what is measured, how often, and the bar that it has to meet."""

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from crew import Crew, Hosts
from long_run import train_long
from network import FOUR_NODES, SIX_NODES, Layout, Network, Wire, why_not
from probe import link_costs
from race import Race, check_equal_work, run_race
from setting import Setting, best_plan, full_shapes, measure_tasks, plans_of, skip_shapes

from skippipe_scheduler.plan.plan import Plan

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
DEEPSPEED = "DeepSpeed"
OURS, SKIPPING = "ours", "ours, 33% skip"


@dataclass(frozen=True)
class Case:
    """How to measure a row: where the scripts of shaped networks are, and whether to hurry."""

    netlab: Path | None = None
    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """One number of a row, a median, with its quartiles where it was measured often."""

    label: str
    value: float
    unit: str
    quartiles: tuple[float, float] | None = None

    @classmethod
    def of(cls, label: str, values: Sequence[float], unit: str) -> "Figure":
        """Return median and quartiles of `values`."""
        if len(values) < 2:
            return cls(label, values[0], unit)
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(label, statistics.median(values), unit, (first, third))


@dataclass(frozen=True)
class Measured:
    """One result. `met` says whether the bar was met; `details` are for programs."""

    figures: tuple[Figure, ...]
    met: bool
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table. `bar` puts into words what `measure` checks."""

    name: str
    bar: str
    measure: Callable[[Case], Measured]
    needs_network: bool = False

    def why_not(self, case: Case) -> str | None:
        """Return why the row cannot be measured here, or None."""
        return why_not(case.netlab) if self.needs_network else None


def local_links(case: Case, world_size: int) -> Measured:
    """Race on this machine's own links, without skips."""
    setting = Setting(world_size=world_size)
    rounds, steps = (2, 1) if case.quick else (30, 1)
    if case.quick:
        setting = replace(setting, hidden_size=64, num_microbatches=4, planner_s=0.5)
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        hosts = stack.enter_context(Hosts(world_size, folder))
        start = Start(hosts, setting, folder)
        found = plans_of(setting, folder, start.layer_s, full_shapes(setting))
        plans = {OURS: start.tried(found, rounds=2 if case.quick else 16)}
        return start.race(plans, rounds=rounds, steps=steps, bars={OURS: 1.0})


def shaped_network(case: Case, layout: Layout) -> Measured:
    """Race on a shaped network, without skips and with a third of the stages left out."""
    world_size = len(layout.regions)
    setting = Setting(
        world_size=world_size,
        num_layers=2 * world_size,
        hidden_size=128,
        num_microbatches=2 * world_size,
        regions=layout.regions,
    )
    rounds = 3
    if case.quick:
        setting, rounds = replace(setting, hidden_size=32, planner_s=0.5), 2
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        hosts = stack.enter_context(on_network(stack, case, layout, folder))
        start = Start(hosts, setting, folder)
        setting = start.on(layout)
        plans = {
            OURS: best_plan(setting, folder, start.layer_s, full_shapes(setting)),
            SKIPPING: best_plan(setting, folder, start.layer_s, skip_shapes(setting)),
        }
        return start.race(plans, rounds=rounds, steps=1, bars={OURS: 1.3, SKIPPING: 2.0}, warm_up=1)


def on_network(stack: ExitStack, case: Case, layout: Layout, folder: Path) -> Hosts:
    """Return hosts on the nodes of a network, which is up until the stack ends."""
    if case.netlab is None:
        raise RuntimeError("a shaped network needs its scripts")
    network = stack.enter_context(Network(layout, case.netlab, folder))
    return Hosts(len(layout.regions), folder, network.prefix)


class Start:
    """The costs of a row, measured before the race, and the race itself."""

    def __init__(self, hosts: Hosts, setting: Setting, folder: Path) -> None:
        self.hosts, self.setting, self.folder = hosts, setting, folder
        self.experiment = setting.write(folder)
        self.rivals = (*SCHEDULES, DEEPSPEED) if find_spec("deepspeed") else SCHEDULES
        self.layer_s = measure_tasks(hosts, setting, self.experiment, repeats=30)

    def on(self, layout: Layout) -> Setting:
        """Measure every kind of link of the layout; return the setting with these links."""
        crew = self.hosts.start("probe", "probe", self.experiment, {})
        size_bytes = 4 * self.setting.hidden_size * self.setting.micro_batch_size * self.setting.sequence_length
        measured = {}
        for ends, (source, destination) in layout.examples().items():
            replies = crew.call("link", source=source, destination=destination, size_bytes=size_bytes)
            measured[ends] = Wire(*link_costs(replies[source], replies[destination], size_bytes))
        crew.close()
        self.setting = replace(self.setting, links=layout.cluster_links(measured))
        return self.setting

    def crew_of(self, name: str, contender: str, plan: Plan, **options: Any) -> Crew:
        """Start a contender that follows a plan."""
        file_name = name.replace(" ", "-").replace(",", "").replace("%", "")
        plan.save(self.folder / f"{file_name}.plan.json")
        files = {"plan": str(self.folder / f"{file_name}.plan.json"), "run_dir": str(self.folder / file_name)}
        return self.hosts.start(file_name, contender, self.experiment, {**files, **options}, title=name)

    def tried(self, plans: Sequence[Plan], rounds: int) -> Plan:
        """Return the plan whose steps are fastest in a short race of these plans alone.

        A plan takes nodes for machines; what processes that share cores and memory take from each other is not in it.
        """
        if len(plans) == 1:
            return plans[0]
        named = {f"{OURS}, {len(plan.stages)} stages": plan for plan in plans}
        crews = [self.crew_of(name, "ours", plan) for name, plan in named.items()]
        trial = run_race(crews, rounds=rounds, steps=1)
        for crew in crews:
            crew.close()
        return named[trial.fastest(list(named))]

    def race(
        self, plans: dict[str, Plan], *, rounds: int, steps: int, bars: dict[str, float], warm_up: int = 2
    ) -> Measured:
        """Run the race of `plans` against all rivals; check that all who skip nothing do equal work."""
        crews = [self.crew_of(name, "ours", plan) for name, plan in plans.items()]
        crews += [self.hosts.start(name, "torch", self.experiment, {"schedule": name}) for name in SCHEDULES]
        if DEEPSPEED in self.rivals:
            crews.append(self.hosts.start(DEEPSPEED, "deepspeed", self.experiment, {}))
        race = run_race(crews, rounds=rounds, steps=steps, warm_up=warm_up)
        difference = check_equal_work([crew for crew in crews if crew.name != SKIPPING])
        return self._result(race, plans, bars, difference)

    def _result(self, race: Race, plans: dict[str, Plan], bars: dict[str, float], difference: float) -> Measured:
        rival = race.fastest(self.rivals)
        label = {OURS: "", SKIPPING: "with skip"}
        figures = tuple(Figure.of(label[name], race.ratios(name, rival), "times") for name in plans)
        tokens, cores = self.setting.tokens_per_step, len(os.sched_getaffinity(0))
        speeds = {name: tokens / race.median_s(name) for name in race.seconds}
        ranking = sorted(speeds, key=lambda name: -speeds[name])
        note = f"of {rival}; tokens/s: " + ", ".join(f"{name} {speeds[name]:,.0f}" for name in ranking)
        note += f"; losses differ by at most {difference:.0e}"
        note += f"; {cores} cores for {self.setting.world_size} processes" * (cores < self.setting.world_size)
        note += "; DeepSpeed is not installed" * (DEEPSPEED not in self.rivals)
        for name, plan in plans.items():
            sizes = "+".join(str(len(stage.nodes)) for stage in plan.stages)
            predicted_s, measured_s = plan.predicted.iteration_s, race.median_s(name)
            note += f"; {name}: stages of {sizes} nodes, predicted {predicted_s:.2f} s, measured {measured_s:.2f} s"
        met = all(figure.value >= bars[name] for figure, name in zip(figures, plans, strict=True))
        details = {
            "step_s": {name: list(values) for name, values in race.seconds.items()},
            "setting": asdict(self.setting),
        }
        return Measured(figures, met, note, details)


def overhead(case: Case) -> Measured:
    """Compare what a saturated node does beside its tasks in an iteration with these tasks, waits left out.

    Both come from the same iteration: on a machine whose speed changes by the second, nothing else tells them apart.
    """
    setting = Setting(world_size=2, vocabulary=2048, micro_batch_size=4 if case.quick else 12)
    if case.quick:
        setting = replace(setting, num_microbatches=4, planner_s=0.5)
    with TemporaryDirectory() as name, Hosts(2, Path(name)) as hosts:
        start = Start(hosts, setting, Path(name))
        plan = best_plan(setting, start.folder, start.layer_s, full_shapes(setting))
        crew = start.crew_of("bare", "bare", plan)
        crew.steps(1)
        crew.call("alone")
        pairs = [(crew.call("busy"), crew.call("alone")) for _ in range(2 if case.quick else 12)]
    busiest = max(range(setting.world_size), key=lambda rank: sum(alone[rank]["tasks_s"] for _, alone in pairs))
    own = [(busy[busiest], alone[busiest]) for busy, alone in pairs]
    shares = {kind: [100 * busy[f"{kind}_s"] / busy["tasks_s"] for busy, _ in own] for kind in ("between", "threads")}
    both = [sum(parts) for parts in zip(*shares.values(), strict=True)]
    inside = Figure.of("", [100 * (busy["tasks_s"] / alone["tasks_s"] - 1) for busy, alone in own], "%")
    shortest_s = min(alone["shortest_s"] for _, alone in own)
    note = (
        f"of the busiest node's tasks, of {1000 * shortest_s:.0f} ms or more: program and transport between tasks "
        f"{statistics.median(shares['between']):.2f}%, processor time of the threads that move messages "
        f"{statistics.median(shares['threads']):.2f}%; the same tasks without messages differ by {inside.value:+.1f}%"
    )
    if inside.quartiles:
        note += f" (quartiles {inside.quartiles[0]:+.1f}% to {inside.quartiles[1]:+.1f}%: the machine's own changes)"
    figure = Figure.of("", both, "%")
    return Measured((figure,), figure.value <= 3.0, note, {"percent": shares})


def prediction(case: Case, layout: Layout) -> Measured:
    """Compare iterations on a shaped network, tasks stretched to the plan's times, with what the plan predicts."""
    world_size = len(layout.regions)
    setting = Setting(
        world_size=world_size,
        num_layers=world_size,
        hidden_size=64,
        num_microbatches=12,
        sequence_length=128,
        regions=layout.regions,
    )
    emulated_s = {"FORWARD": 0.03, "LOSS": 0.03, "BACKWARD": 0.06}
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        hosts = stack.enter_context(on_network(stack, case, layout, folder))
        start = Start(hosts, setting, folder)
        setting = start.on(layout)
        plans = {
            OURS: best_plan(setting, folder, [emulated_s] * world_size, full_shapes(setting)),
            SKIPPING: best_plan(setting, folder, [emulated_s] * world_size, skip_shapes(setting)),
        }
        figures, details = [], {}
        for title, plan in plans.items():
            crew = start.crew_of(title, "bare", plan, sections={"emulation": {"compute": True}})
            crew.steps(2)
            replies = crew.call("durations", count=5 if case.quick else 20)
            seconds = [max(reply[step] for reply in replies) for step in range(len(replies[0]))]
            predicted_s = plan.predicted.iteration_s
            figures.append(Figure.of(title, [100 * (second / predicted_s - 1) for second in seconds], "%"))
            details[title] = {"predicted_s": predicted_s, "measured_s": seconds}
    met = all(abs(figure.value) <= 5 for figure in figures)
    note = ", ".join(f"{title}: predicted {detail['predicted_s']:.2f} s" for title, detail in details.items())
    return Measured(tuple(figures), met, note, {**details, "setting": asdict(setting)})


def long_run(case: Case) -> Measured:
    """Train 2,000 steps on 6 processes; see that nothing grows."""
    steps = 60 if case.quick else 2000
    with TemporaryDirectory() as name:
        growth = train_long(Path(name), steps=steps, world_size=6, interval=20 if case.quick else 50)
    figures = tuple(Figure(label, last - first, unit) for label, (first, last, unit) in growth.medians.items())
    note = f"{growth.wall_s:.0f} s; " + ", ".join(
        f"{label} {first:.0f} to {last:.0f} {unit}" for label, (first, last, unit) in growth.medians.items()
    )
    return Measured(figures, growth.flat and growth.steps == steps, note, growth.details)


ROWS = {
    row.name: row
    for row in (
        Row("local links, 2 processes", "≥ 1.0 of the fastest rival", partial(local_links, world_size=2)),
        Row("local links, 4 processes", "≥ 1.0 of the fastest rival", partial(local_links, world_size=4)),
        Row(
            "shaped network, 4 nodes",
            "≥ 1.3 of the fastest rival, ≥ 2.0 with 33% skip",
            partial(shaped_network, layout=FOUR_NODES),
            needs_network=True,
        ),
        Row(
            "shaped network, 6 nodes in 3 regions",
            "≥ 1.3 of the fastest rival, ≥ 2.0 with 33% skip",
            partial(shaped_network, layout=SIX_NODES),
            needs_network=True,
        ),
        Row("overhead of the runtime", "≤ 3%", overhead),
        Row(
            "predicted against measured, 4 nodes",
            "within 5%",
            partial(prediction, layout=FOUR_NODES),
            needs_network=True,
        ),
        Row(
            "predicted against measured, 6 nodes in 3 regions",
            "within 5%",
            partial(prediction, layout=SIX_NODES),
            needs_network=True,
        ),
        Row("long run, 6 processes", "2,000 steps, no growth", long_run),
    )
}
