"""Whatever a file or a text from outside holds, its reader returns, or refuses it with a message of one line."""

import json
import os
import random
import resource
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from mutations import mutated
from small_runs import write_run
from torch._C._distributed_c10d import HashStore

from skippipe.checkpoint.disks.disk_view import DiskView
from skippipe.checkpoint.held_files import HELD, note_held_files
from skippipe.checkpoint.layer_choice import LayerChoice, read_choice, write_choice
from skippipe.checkpoint.reader import METADATA, FileRecord, Metadata, read_metadata
from skippipe.checkpoint.report_board import FileReport, ReportBoard
from skippipe.checkpoint.soundness import newest_sound_checkpoint
from skippipe.checkpoint.writer import write_stages
from skippipe.cli.safe_output import one_line
from skippipe.cluster.run_trace import read_trace
from skippipe.config.experiment import WandbOptions
from skippipe.config.experiment_file import load_experiment, load_run
from skippipe.errors import SkipPipeError
from skippipe.membership.epoch import Member
from skippipe.membership.live_run import MEMBERS_FILE, Contacts
from skippipe.monitor.evaluation_results import read_evaluation
from skippipe.monitor.report import run_record
from skippipe.monitor.report.run_record import RankMemory
from skippipe.monitor.run_events import FILE_NAME, MembershipChange, read_changes
from skippipe.monitor.wandb_run import wandb_id
from skippipe.planning.churn.trace_files import load_trace
from skippipe.runtime.ranks.store_names import Board, store_of_board
from skippipe.training.joining.join_run import read_contacts
from skippipe.training.run_owner import Owner, read_owner
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan
from skippipe_scheduler.problem.cluster import load_cluster
from skippipe_scheduler.problem.problem import EvenMicrobatches, Problem, StageNodes, load_problem

SEED: Final = int(os.environ.get("MUTATION_SEED", "1"))
MUTATIONS: Final = int(os.environ.get("MUTATIONS", "150"))
"""Of each of 21 readers; that makes 3,150. To look further, give more of them and another seed in the environment."""
MOST_BYTES: Final = 2**30
"""What all of them together may make this process grow by."""
EXPERIMENT = b"""
name: case
cluster: cluster.yaml
seed: 3
model: {architecture: llama, options: {hidden_size: 32, rope_theta: 1e4}}
data: {source: text, paths: [corpus.txt], tokenizer: bytes, validation_fraction: 0.1}
pipeline: {num_stages: 3, skip_ratio: 0.33, pinned: {n-0: 0}, planner: {time_limit_s: 1.0, seed: 2}}
training: {max_steps: 3, num_microbatches: 4, sequence_length: 32, dtype: float32, compile: no}
optimizer: {lr: 3.0e-3, betas: [0.9, 0.95], fused: auto}
recipe: {depth_curriculum: [{share: 1, skip_ratio: 0}, {share: 3, route_lengths: {3: 1, 2: 2}}]}
checkpoint: {interval: 2, resume: auto}
logging: {wandb: {mode: disabled, tags: [a, b]}}
"""
CLUSTER = """
name: here
nodes:
  - {name: n, count: 3, region: here, compute_tflop_per_s: 0.01, memory_gib: 4, peak_tflop_per_s: 2}
  - {name: m, region: there, forward_s: 0.1, backward_s: 0.2, loss_s: 0.05, max_in_flight: 4}
links:
  contention: none
  within_region: {latency_ms: 0.05, gbit_per_s: 20}
  between_regions: [{regions: [here, there], latency_ms: 20, gbit_per_s: 0.5}]
  between_nodes: [{from: n-0, to: m, latency_ms: 9, gbit_per_s: 2}]
"""
OVERRIDES = (
    "training.max_steps=3",
    "name=x",
    "optimizer.betas=[0.9, 0.95]",
    "model.options={hidden_size: 32}",
    "pipeline.pinned.n-0=1",
    "data.paths=[corpus.txt, 'more/*.txt']",
    "run_dir=~/runs/x",
)
CHECKPOINT: Final = "checkpoints/step-00000003"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """A run with every file that something of ours reads."""
    folder = write_run(tmp_path_factory.mktemp("mutated") / "run", plan, "run")
    (folder / "experiment.yaml").write_bytes(EXPERIMENT)
    (folder / "cluster.yaml").write_text(CLUSTER)
    problem = Problem(
        nodes=plan.nodes,
        regions=plan.regions,
        stages=tuple(StageNodes(nodes=stage.nodes) for stage in plan.stages),
        microbatches_per_origin=EvenMicrobatches(even=4),
        costs=plan.costs,
        rules=plan.rules,
    )
    (folder / "problem.json").write_text(problem.model_dump_json(exclude_none=True))
    metadata = Metadata(
        step=3, tokens=96, elapsed_s=1.5, seed=3, dtype="float32", model={"a": 1}, data={}, plan_hash="x", files={}
    )
    write_stages(folder, metadata, [{}])
    note_held_files(folder / CHECKPOINT, ["model-stage-0.safetensors"])
    (folder / "owner.json").write_text(Owner.here().model_dump_json())
    ranks = [{"rank": 0, "node": "a"} | dict.fromkeys(list(RankMemory.model_fields)[2:], 7)]
    (folder / "memory.json").write_text(json.dumps({"ranks": ranks}))
    wait = {"step": 10, "source": "a", "destination": "b", "microbatch": 0, "direction": "forward"}
    lines = (folder / "trace" / f"{plan.nodes[0]}.jsonl").read_text()[:400]
    (folder / "trace" / "rank-0.jsonl").write_text(lines + "\n" + json.dumps(wait | {"start_s": 0.1, "end_s": 0.2}))
    (folder / "wandb_id").write_text("a1b2c3d4")
    write_changes(folder)
    own_nodes = f"time_s,node,event\n3.5,{plan.nodes[0]},lost\n20,{plan.nodes[0]},back\n3600,,end\n"
    (folder / "trace.csv").write_text(own_nodes)
    (folder / "machines.csv").write_text("2024-05-01,00:00:00,4\n2024-05-01,01:00:00,3\n2024-05-01,02:30:00,4\n")
    (folder / "trace.json").write_text(json.dumps([{"Time": 0, "GPUs": 4}, {"Time": 60, "GPUs": 3}]))
    choice = LayerChoice(
        model="tiny",
        checkpoint="step-00000003",
        policy="best",
        keep=0.5,
        share_computed=0.5,
        perplexity=9.5,
        num_layers=6,
        attention=(0, 1, 3),
        feed_forward=(0, 2, 3),
    )
    write_choice(choice, folder / "choice.json")
    return folder


def write_changes(folder: Path) -> None:
    """Write what a run leaves whose members change, and who they are: nobody that is there."""
    member = Member(name="n0", host="127.0.0.1", port=1, incarnation="0" * 32, data_port=1)
    Contacts(secret="the secret of this run", members=(member,)).keep(folder)
    MembershipChange(
        epoch=1,
        lost={"n1": "connection closed"},
        joined=(),
        members=("n0",),
        absent_stages=(2,),
        restored=(),
        reason="n1 lost",
        step=7,
        interrupted=True,
        durations_s={"planning": 0.5},
        total_s=1.5,
    ).append_to(folder)


READERS: Final[dict[str, Callable[[Path], Any]]] = {
    "experiment.yaml": lambda folder: load_experiment(folder / "experiment.yaml"),
    "cluster.yaml": lambda folder: load_cluster(folder / "cluster.yaml").graph(),
    "config.yaml": load_run,
    "plan.json": lambda folder: load_plan(folder / "plan.json"),
    "problem.json": lambda folder: load_problem(folder / "problem.json"),
    "evaluation.json": lambda folder: read_evaluation(folder / "evaluation.json").by_policy(),
    "metrics.jsonl": lambda folder: run_record._read_steps(folder / "metrics.jsonl"),
    "memory.json": lambda folder: run_record._read_memory(folder / "memory.json"),
    "trace/rank-0.jsonl": lambda folder: (
        run_record._read_trace(folder / "trace", ("n0", "n1")),
        read_trace(folder / "trace"),
    ),
    "owner.json": lambda folder: (
        read_owner(folder),
        str(read_owner(folder)),
        (read_owner(folder) or Owner.here()).alive,
    ),
    FILE_NAME: lambda folder: [str(change) for change in read_changes(folder)],
    MEMBERS_FILE: lambda folder: read_contacts(folder / MEMBERS_FILE),
    "trace.csv": lambda folder: load_trace(folder / "trace.csv", load_plan(folder / "plan.json")),
    "machines.csv": lambda folder: load_trace(folder / "machines.csv", load_plan(folder / "plan.json")),
    "trace.json": lambda folder: load_trace(folder / "trace.json", load_plan(folder / "plan.json")),
    "choice.json": lambda folder: read_choice(folder / "choice.json"),
    "wandb_id": lambda folder: wandb_id(folder, WandbOptions(), None),
    f"{CHECKPOINT}/{HELD}": lambda folder: (read_metadata(folder / CHECKPOINT), DiskView.of(folder / CHECKPOINT)),
    f"{CHECKPOINT}/{METADATA}": lambda folder: read_metadata(folder / CHECKPOINT),
    f"{CHECKPOINT}/model-stage-0.safetensors": lambda folder: newest_sound_checkpoint(folder),
}
"""What reads each file of a run, or beside it."""


def offence(read: Callable[[], Any]) -> str | None:
    """Call a reader; return what is wrong with how it refuses, None where it does so in one line or does not."""
    try:
        read()
    except SkipPipeError as reason:
        message = one_line(str(reason))
        if reason.exit_code not in (2, 3) or not message.isprintable() or not 0 < len(message) < 3000:
            return f"exit code {reason.exit_code}: {message}"
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}\n{''.join(traceback.format_exception(reason)[-3:])}"
    return None


@pytest.mark.parametrize("name", READERS)
def test_files(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    READERS[name](folder)
    offences = []
    for content in mutated(whole, MUTATIONS, seed=SEED + len(name)):
        path.write_bytes(content)
        offences.append(offence(partial(READERS[name], folder)))
    path.write_bytes(whole)
    assert [one for one in offences if one is not None] == []


def test_overrides(folder: Path) -> None:
    rng = random.Random(SEED)
    texts = [next(mutated(rng.choice(OVERRIDES).encode(), 1, seed=SEED + number)) for number in range(MUTATIONS)]
    path = folder / "experiment.yaml"
    offences = [offence(partial(load_experiment, path, [text.decode(errors="surrogateescape")])) for text in texts]
    assert [one for one in offences if one is not None] == []


def test_reports_of_ranks() -> None:
    whole = FileReport(files={"model-stage-0.safetensors": FileRecord(size_bytes=3, sha256="ab")}).model_dump_json()
    store = HashStore()
    board, ended = ReportBoard(store, 0), threading.Event()
    offences = []
    for step, content in enumerate(mutated(whole.encode(), MUTATIONS, seed=SEED)):
        store_of_board(store, Board.CHECKPOINT).set(f"{step}/files/1", content.decode(errors="replace"))
        board.post(step, FileReport(files={}))
        offences.append(offence(partial(board.collect, step, ended, 1.0, range(2))))
    assert [one for one in offences if one is not None] == []


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    """Measure by how much this process grows."""
    before_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_bytes < MOST_BYTES
