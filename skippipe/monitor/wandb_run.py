"""Weights & Biases on rank 0. Whatever happens to it, training goes on: a failure is one warning, then silence.

What records is a process of wandb's own, which a scheduler's SIGTERM to all processes of a job ends at once, with all
that it had not written. So it is started again where it is gone, and what it has not got of the steps in metrics.jsonl
is filled in whenever it starts.
"""

import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skippipe.config.experiment import Experiment, WandbOptions
from skippipe.errors import InputError
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.run_events import read_changes, size_of_changes
from skippipe.monitor.wandb_file import recorded_steps
from skippipe.monitor.wandb_place import WandbPlace
from skippipe_scheduler.files import read_text, write_atomically

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"
MEMBERSHIP = "membership"
"""Under which name W&B has the table of changes."""
COSTS = ("agreement", "planning", "state", "groups")
"""Parts of what a change costs; see `MembershipChange.durations_s`."""
RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
INIT_TIMEOUT_S = 10
FINISH_TIMEOUT_S = 30
MOST_RESTARTS = 2
"""How often a process of wandb's that is gone is started again."""


class WandbRun:
    """One W&B run for a run directory, continued whenever training is. Disabled, it never imports wandb."""

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        run_id: str,
        node_metrics: Callable[[], Mapping[str, float | str]] = dict,
    ) -> None:
        """`node_metrics` returns what is known of the nodes after the step that is logged."""
        self._run: Any = None
        self._node_metrics = node_metrics
        self._experiment, self._run_id = experiment, run_id
        self._run_dir, self._metrics_path = run_dir, run_dir / "metrics.jsonl"
        self._logged_bytes = 0
        self._place = WandbPlace.of(experiment.logging.wandb, run_dir)
        self._failed = self._place.mode == "disabled"
        self._restarts_left = MOST_RESTARTS
        self._guard("start", self._open)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step, what its nodes did, and where membership has changed since the last one, all changes of it."""
        entry: dict[str, Any] = {str(metric): value for metric, value in metrics.items()}

        def log() -> None:
            table, size_bytes = {}, size_of_changes(self._run_dir)
            if size_bytes != self._logged_bytes:
                table = {MEMBERSHIP: _membership_table(self._run_dir)}
            self._run.log(entry | dict(self._node_metrics()) | table, step=int(metrics[Metric.STEP]))
            self._logged_bytes = size_bytes

        self._guard("log", log)

    def log_plan(self, path: Path) -> None:
        """Store the plan file as an artifact of the run."""
        self._guard("store the plan", lambda: self._store(path, "plan"))

    def close(self) -> None:
        """Finish the run; wait for its last upload no longer than `FINISH_TIMEOUT_S`."""
        self._guard("finish", lambda: self._run.finish())

    def _open(self) -> None:
        import wandb

        try:
            self._run = _start(self._experiment, self._place, self._run_id)
        except (wandb.errors.CommError, wandb.errors.UsageError) as reason:
            logger.warning("wandb: cannot go online (%s); recording offline, upload later with: wandb sync", reason)
            self._let_go()  # else its process holds on to the id, and refuses it to the second start
            self._run = _start(self._experiment, self._place._replace(mode="offline"), self._run_id)
        self._fill_in()

    def _fill_in(self) -> None:
        """Log the steps of metrics.jsonl that W&B has not got: its server says how far it is, offline its files do."""
        if not self._metrics_path.exists():
            return
        got: Container[int] = range(self._run.starting_step)
        if self._run.offline:
            got = recorded_steps(self._place.directory / "wandb", self._run_id)
        missing = [entry for entry in read_metrics(self._metrics_path) if entry[Metric.STEP] not in got]
        for entry in missing:
            self._run.log(entry, step=entry[Metric.STEP])
        if missing:
            logger.info("wandb: %d steps that it had not got are filled in from metrics.jsonl", len(missing))

    def _store(self, path: Path, kind: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def _guard(self, action: str, call: Callable[[], None]) -> None:
        """Call unless something failed before; where wandb's process is gone, start it again first."""
        if self._failed:
            return
        try:
            try:
                call()
            except ConnectionError:
                if not self._restarts_left:
                    raise
                self._restarts_left -= 1
                self._let_go()
                self._open()
                call()
        except (Exception, SystemExit) as reason:  # a monitor must never end a run, and wandb raises whatever it likes
            self._failed = True
            logger.warning("wandb: cannot %s (%s); going on without it, metrics.jsonl has everything", action, reason)
            self._let_go()

    def _let_go(self) -> None:
        """Forget the process, which would else be asked to end when this one does, with a traceback.

        Where it has crashed, wandb wants this process to end with its exit code. One of another program, whose place
        was inherited, is left alone; the next start gets its own.
        """
        with suppress(Exception, SystemExit):
            import wandb

            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)


def _membership_table(run_dir: Path) -> Any:
    """Return who has left and come when and why, and what that cost."""
    import wandb

    rows = [
        [
            *(change.time, change.epoch, change.step + 1),
            ", ".join(f"{node} ({cause})" for node, cause in change.lost.items()),
            *(", ".join(change.joined), len(change.members), str(change)),
            *(change.durations_s.get(part, 0.0) for part in COSTS),
            change.total_s,
        ]
        for change in read_changes(run_dir)
    ]
    costs = [f"{part}_s" for part in (*COSTS, "total")]
    return wandb.Table(["UTC", "epoch", "next_step", "lost", "joined", "members", "what_happened", *costs], rows)


def wandb_id(run_dir: Path, options: WandbOptions, stored: str | None) -> str | None:
    """Return the W&B id of a run directory: the checkpoint's, else the directory's own, else a new one kept there."""
    if WandbPlace.of(options, run_dir).mode == "disabled":
        return stored
    path = run_dir / ID_FILE
    if stored is None and path.exists():
        stored = _kept_id(path)
    run_id = stored or uuid.uuid4().hex[:8]
    write_atomically(path, run_id + "\n")
    return run_id


def _kept_id(path: Path) -> str | None:
    """Return what an earlier start kept, None where that is no id."""
    try:
        kept = read_text(path, InputError).strip()
    except InputError as reason:
        logger.warning("wandb: %s; recording as a new run", reason)
        return None
    if not RUN_ID.fullmatch(kept):
        logger.warning("wandb: %s: %r is no id of a run; recording as a new run", path, kept[:40])
        return None
    return kept


def _start(experiment: Experiment, place: WandbPlace, run_id: str) -> Any:
    import wandb

    options = experiment.logging.wandb
    place.directory.mkdir(parents=True, exist_ok=True)
    # What wandb tells its makers about itself goes to the same server, and is of no concern here where it fails.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    with _nobody_to_ask():
        return wandb.init(
            mode=place.mode,
            dir=str(place.directory),
            id=run_id,
            resume="allow",
            project=place.project,
            entity=options.entity,
            name=options.name or experiment.name,
            group=options.group,
            tags=list(options.tags),
            config=experiment.model_dump(mode="json"),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                quiet=True,
                silent=place.mode == "offline",
                console="off",
            ),
        )


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Take the terminal away: without a key wandb asks for one there and waits for the answer for ever."""
    terminal = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
