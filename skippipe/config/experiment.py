"""The YAML experiment as typed, validated models. No I/O happens in validation.

Precedence: `key.sub=value` on the command line, then the YAML file, then its `base:` files, then the defaults here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from skippipe.config.data_options import DataOptions
from skippipe.config.lora_options import LoraOptions
from skippipe.config.optimizer_backends import (
    DEEPSPEED_BACKENDS,
    DEEPSPEED_ENDS,
    OPTIMIZER_BACKENDS,
    OptimizerBackendName,
    OptimizerBackendTraits,
)
from skippipe.config.recipe_options import RecipeOptions
from skippipe.config.recovery_options import RecoveryOptions
from skippipe.config.section import Section, Seed, Share

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
FaultPoint = Literal[
    "START",
    "BEGIN",
    "FORWARD",
    "LOSS",
    "BACKWARD",
    "WEIGHT",
    "REDUCE",
    "STEP",
    "UPDATED",
    "VALIDATION",
    "CHECKPOINT",
    "VOTE",
    "DECISION",
    "AGREED",
    "TAKE_STATE",
    "GIVE_STATE",
    "GROUPS",
    "EPOCH",
]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelOptions(Section):
    """The model: a Hugging Face decoder, from its configuration alone."""

    architecture: str = Field(default="llama", examples=["qwen3"])
    """Hugging Face model_type, see docs/models.md."""
    options: dict[str, Any] = Field(default_factory=dict, examples=[{"hidden_size": 1024, "num_hidden_layers": 24}])
    """Keys of that architecture's configuration class; what is left out has the class's default."""
    directory: str | None = Field(default=None, examples=["models/SmolLM2-135M"])
    """A Hugging Face directory to read config.json from, instead of architecture and options. A relative path starts
    at the file that names it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.directory is not None and self.options:
            raise ValueError("give either directory or options, not both")
        return self


class PlannerOptions(Section):
    """How long and from which seed the planner searches."""

    time_limit_s: PositiveFloat = Field(default=2.0, examples=[60.0])
    """Wall-clock seconds of the search; the baselines printed beside a plan share it equally with the plan."""
    seed: Seed = Field(default=0, examples=[1])
    """Seed of the search's random choices."""
    max_evaluations: PositiveInt | None = Field(default=None, examples=[20_000])
    """Steps of the search: a budget that does not depend on the machine's speed. Same seed and budget, same plan."""
    jitter_sigma: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = Field(default=0.0, examples=[0.3])
    """Above 0, plans are judged by their mean time under lognormal jitter of this sigma on every task and transfer."""


class PipelineOptions(Section):
    """Stages, routes and the rules that routes obey (docs/plan-file.md)."""

    num_stages: Annotated[int, Field(ge=2)] = 6
    """Into how many stages the model's layers are cut."""
    skip_ratio: Share = Field(default=0.33, examples=[0.5])
    """Share of the stages that each microbatch leaves out; 0 is the full pipeline."""
    route_lengths: dict[Annotated[int, Field(ge=2)], PositiveInt] | None = Field(
        default=None, examples=[{6: 1, 3: 1, 2: 3}]
    )
    """A mix instead of one skip ratio: shares of the microbatches by the number of stages they visit."""
    microbatches_per_origin: Literal["even", "auto"] = "even"
    """Whether every origin starts equally many microbatches or the planner chooses; the total is the same."""
    layers_per_stage: tuple[PositiveInt, ...] | Literal["auto"] | None = Field(default=None, examples=["auto"])
    """Layers of each stage; auto lets the planner choose them; as even as possible where not given."""
    stage_sizes: tuple[PositiveInt, ...] | Literal["auto"] | None = Field(default=None, examples=[[2, 1, 1, 1, 1, 1]])
    """Replicas of each stage; auto lets the planner choose them. Where not given they follow from the skip ratio, or
    are even or such that each stage lies in one region, where that makes the shorter plan."""
    placement: tuple[tuple[str, ...], ...] | None = Field(
        default=None, examples=[[["berlin-0", "iowa-0"], ["berlin-1"]]]
    )
    """Nodes of each stage, every node once; chosen by the planner where not given."""
    pinned: dict[str, NonNegativeInt] | None = Field(default=None, examples=[{"berlin-0": 0, "iowa-0": 2}])
    """Stage of single nodes; the planner chooses those of the others. Not beside placement."""
    max_swaps: NonNegativeInt = Field(default=0, examples=[1])
    """How many swaps a route may make: visits of a stage after a higher one. They shorten iterations and cost quality
    (docs/recipes.md)."""
    max_swap_distance: NonNegativeInt = Field(default=1, examples=[2])
    """How far a swap may lie behind the highest stage visited before it, in stage numbers; 0 turns swaps off."""
    max_forward_jump: PositiveInt = 4
    """How many stages past the furthest one visited a route may jump; one less can be left out in a row."""
    uniform_coverage: bool = True
    """Whether the stages that routes may leave out are all visited equally often in an iteration, to within one
    visit, so that each gets the same number of gradient samples."""
    protected_stages: tuple[NonNegativeInt, ...] = Field(default=(), examples=[[5]])
    """Stages that no route leaves out; stage 0 never is."""
    split_backward: bool = False
    """Whether weight gradients may run apart from their backward, where a node would be idle (docs/planning.md)."""
    reduction: Literal["ring", "tree", "direct", "hierarchical"] = "direct"
    """How the planner times the gradient reduction of a stage (docs/plan-file.md). With hierarchical a run sums within
    each region first, and then between them."""
    planner: PlannerOptions = PlannerOptions()


class TrainingOptions(Section):
    """One iteration and how many of them."""

    max_steps: PositiveInt = 1000
    """Steps of the whole training; the learning rate and a recipe's phases are spread over them."""
    num_microbatches: Annotated[int, Field(ge=1, le=100_000)] = 12
    """Microbatches of one iteration over all origins."""
    micro_batch_size: PositiveInt = 4
    """Samples in one microbatch."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in one sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights, activations and gradients; with bfloat16 the optimizer keeps a master copy in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What every rank computes on; auto: a GPU where there is one."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Global gradient norm to clip at; null turns clipping off."""
    gradient_normalization: Literal["global", "visits"] = "global"
    """`global` divides by the iteration's microbatches, `visits` by those that visited the stage."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a layer keeps for its backward: everything, matrix products and attention, or its input alone."""
    compile: bool = False
    """Compile each stage with torch.compile before the first iteration; not beside pipeline.split_backward."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(default=None, examples=[1])
    """CPU threads of each rank; null leaves torch's own choice (or OMP_NUM_THREADS)."""


class OptimizerOptions(Section):
    """AdamW (decoupled weight decay on matrices only)."""

    backend: OptimizerBackendName = "replicated"
    """Whether all replicas of a stage keep the whole state, or share it out: by whole tensors, or by DeepSpeed's ZeRO-1
    or ZeRO-2."""
    offload: bool = False
    """Keep the state in host memory and update there, with DeepSpeed's CPU Adam; for its back-ends."""
    fused: bool | Literal["auto"] = Field(default="auto", examples=[True])
    """One kernel for the whole update; auto: on a GPU. On a CPU it is faster too, but there the last bits depend on
    where a number lies in its tensor, so back-ends and replicas of another split differ by rounding."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean, against division by zero."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, times the learning rate at each step; on matrices only, not on norms and biases."""

    @property
    def traits(self) -> OptimizerBackendTraits:
        """What the back-end does and holds."""
        return OPTIMIZER_BACKENDS[self.backend]

    @model_validator(mode="after")
    def _offload_needs_deepspeed(self) -> Self:
        if self.offload and not self.traits.is_deepspeed:
            raise ValueError(
                f"offload is done by DeepSpeed, backend is {self.backend}; use {', '.join(DEEPSPEED_BACKENDS)} or "
                "offload: false"
            )
        return self


class SchedulerOptions(Section):
    """Learning rate: linear warm-up, then a cosine to `min_lr_ratio` of the peak at the last step."""

    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises linearly to its peak, optimizer.lr."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step as a share of the peak."""


class CheckpointOptions(Section):
    """When to save, what to keep, where to continue from."""

    interval: NonNegativeInt = 500
    """Steps between checkpoints; 0 saves only at the end and on SIGTERM."""
    keep_last: PositiveInt = 3
    """How many of the newest checkpoints stay; older ones are deleted."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written; it stands still for a copy in memory only."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds until a checkpoint must be written; afterwards the storage counts as hanging and the run ends."""
    patience_s: PositiveFloat = 20.0
    """Seconds that a step may still take after a signal; then it is given up, and what was finished before is saved."""
    resume: Literal["auto", "never"] | str = "auto"
    """auto: the newest complete checkpoint of the run, if any; never; one of the run's by its name (step-00000010); or
    the path of a checkpoint directory, from the working directory."""
    remote_save_folder: str | None = Field(default=None, examples=["s3://bucket/runs/tiny"])
    """A second place for checkpoints, of this run alone: a URL that fsspec reads (s3, gs, sftp and others), or a path.
    They are brought there in the background, and a start goes on from there where the run directory has less."""


class EvaluationOptions(Section):
    """Validation loss during training, through the same runtime, at full depth."""

    interval: NonNegativeInt = 100
    """Steps between validations; 0 turns them off."""
    batches: PositiveInt = 4
    """Iterations' worth of microbatches in one validation."""


class WandbOptions(Section):
    """Weights & Biases, on rank 0 only. Environment variables WANDB_* are honoured where a key is null."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """online sends while the run goes on; offline writes what `wandb sync` sends later; disabled does neither."""
    project: str = "skippipe"
    """Project that the run belongs to."""
    entity: str | None = Field(default=None, examples=["my-team"])
    """User or team that owns the project; the user's default where not given."""
    name: str | None = Field(default=None, examples=["baseline"])
    """Name shown for the run; the experiment's name where not given."""
    group: str | None = Field(default=None, examples=["skip-ratios"])
    """Group that the run is shown in, beside others of one comparison."""
    tags: tuple[str, ...] = Field(default=(), examples=[["three-regions"]])
    """Labels to filter runs by."""


class LoggingOptions(Section):
    """What is printed and recorded."""

    interval: PositiveInt = 1
    """Steps between printed lines; metrics.jsonl always has every step."""
    wandb: WandbOptions = WandbOptions()


class PowerSgdOptions(Section):
    """PowerSGD (comm.gradient_compression: powersgd)."""

    rank: PositiveInt = 4
    """Columns of the two factors as which a matrix travels: more are nearer to it, and larger."""
    start_iteration: Annotated[int, Field(ge=2)] = 10
    """Iterations at the start of a process that sum exactly."""


class CommunicationOptions(Section):
    """What travels between ranks, in what form, and for how long they wait for each other."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries activations between stages; auto takes nccl where every rank has a GPU of its own, else gloo."""
    executor: Literal["static", "dynamic"] = "static"
    """Whether ranks keep to the plan's order or run what has arrived when the plan's next task is late (gloo only)."""
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = Field(default=120.0, examples=[300.0])
    """A rank that hears nothing for so long stops and says whom it waited for."""
    receive_window: PositiveInt = 16
    """Receives posted ahead of the instruction that needs them."""
    activation_dtype: Literal["float32", "bfloat16"] | None = Field(default=None, examples=["bfloat16"])
    """In what activations and their gradients travel; training.dtype where not given."""
    gradient_dtype: Literal["float32", "bfloat16"] | None = Field(default=None, examples=["bfloat16"])
    """In what gradients travel between the replicas of a stage; training.dtype where not given. Sums are in fp32."""
    activation_compression: Literal["none", "int8"] = "none"
    """int8: activations and their gradients travel as one byte a number and a scale for each token."""
    gradient_compression: Literal["none", "int8", "powersgd"] = "none"
    """int8: gradients travel as one byte a number and a scale for each 1024; powersgd: as products of thin matrices."""
    error_feedback: bool = True
    """Add what a compressed sum of gradients left out to the next one."""
    powersgd: PowerSgdOptions = PowerSgdOptions()

    @model_validator(mode="after")
    def _compressed_or_rounded(self) -> Self:
        for kind in ("activation", "gradient"):
            compression, dtype = getattr(self, f"{kind}_compression"), getattr(self, f"{kind}_dtype")
            if compression != "none" and dtype is not None:
                raise ValueError(
                    f"{kind}_compression is {compression} and {kind}_dtype is {dtype}; what is compressed has no other "
                    "dtype on its way: give one of the two"
                )
        return self

    @model_validator(mode="after")
    def _tags_for_the_dynamic_executor(self) -> Self:
        if self.executor == "dynamic" and self.backend == "nccl":
            raise ValueError("executor: dynamic needs backend: gloo; NCCL knows messages by their order alone")
        return self


class FaultOptions(Section):
    """One death of a process, to try what the others do."""

    node: str = Field(examples=["berlin-0"])
    """Node whose process dies, as by kill -9."""
    step: PositiveInt = Field(examples=[10])
    """Step in which it dies, counted from 1; in a recovery that with which the others go on."""
    at: FaultPoint = Field(examples=["BACKWARD"])
    """Where in the step: when it begins, at the first task of a kind, at the reduction, right before or right after the
    sum by which all processes take the step, or when it begins to validate or to save. `START` is before the first
    step, when all know of each other and are not yet connected. In a recovery: before it votes (`VOTE`), where it has
    decided for all and nobody has heard of it (`DECISION`), when it has heard what was decided (`AGREED`), before it
    takes the state of a stage (`TAKE_STATE`) or when it is asked for its own (`GIVE_STATE`), while all connect
    (`GROUPS`), or when the new epoch has begun (`EPOCH`)."""


class PaceOptions(Section):
    """One change of the pace of a node or a link, to try what a run does about it."""

    node: str = Field(examples=["berlin-0"])
    """Node whose tasks take longer or shorter."""
    to: str | None = Field(default=None, examples=["turin-1"])
    """Another node: not tasks, but messages between the two take longer or shorter, both ways."""
    step: PositiveInt = Field(examples=[10])
    """Step from which on they do, counted from 1."""
    factor: Annotated[float, Field(gt=0, le=1000)] = Field(examples=[3.0])
    """How many times as long they take as planned when the run began; 1 ends an earlier change."""


class EmulationOptions(Section):
    """Make a run on one machine behave like the cluster file. Off unless asked for."""

    links: bool = False
    """Deliver each message after the plan's latency + bytes / bandwidth, queueing on each directed link."""
    compute: bool = False
    """Stretch each task to the plan's time for its node."""
    jitter_sigma: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = Field(default=0.0, examples=[0.3])
    """Above 0, emulated tasks and transfers take their planned time by a lognormal factor of this sigma (median 1)."""
    seed: Seed = Field(default=0, examples=[1])
    """Seed of the jitter: the same factors for the same seed and iteration, whatever executor runs."""
    faults: tuple[FaultOptions, ...] = Field(
        default=(), examples=[[{"node": "berlin-0", "step": 10, "at": "BACKWARD"}]]
    )
    """Deaths of processes; they happen in the first start of a run alone, not in one that continues it."""
    paces: tuple[PaceOptions, ...] = Field(default=(), examples=[[{"node": "berlin-0", "step": 10, "factor": 3.0}]])
    """Nodes that become slower or faster in the middle of a run, which needs `compute`, and links (`to`), which needs
    `links`. Of several changes of one node or link the latest that has begun counts."""

    @model_validator(mode="after")
    def _paces_of_what_is_emulated(self) -> Self:
        if any(each.to is None for each in self.paces) and not self.compute:
            raise ValueError("paces change how long emulated tasks take; set compute: true")
        if any(each.to is not None for each in self.paces) and not self.links:
            raise ValueError("paces with to change how long emulated messages take; set links: true")
        return self


class Experiment(Section):
    """Everything that a run needs to know.

    The configuration reference lists every key with its unit and default. An experiment does not change; a changed
    copy is read again, with overrides.

    Examples:
        >>> experiment.name, experiment.training.max_steps, str(experiment.run_path)
        ('tiny', 2, 'runs/tiny')
        >>> load_experiment(Path("configs/experiments/tiny.yaml"), ["pipeline.skip_ratio=0"]).pipeline.skip_ratio
        0.0
    """

    name: str = Field(default="skippipe", examples=["tiny"])
    """Name of the run: of its directory below runs/, and of its Weights & Biases run."""
    run_dir: str | None = Field(default=None, examples=["runs/tiny-second-try"])
    """Directory of the run; runs/NAME where not given. A relative path starts at the working directory."""
    seed: Seed = Field(default=0, examples=[1])
    """Seed of the initial weights, the held-out documents, the order of samples, and what a recipe draws."""
    cluster: str = Field(examples=["clusters/three-regions.yaml"])
    """Cluster file, see docs/clusters.md; a relative path starts at the file that names it."""
    model: ModelOptions = ModelOptions()
    data: DataOptions
    pipeline: PipelineOptions = PipelineOptions()
    recipe: RecipeOptions = RecipeOptions()
    training: TrainingOptions = TrainingOptions()
    lora: LoraOptions = LoraOptions()
    optimizer: OptimizerOptions = Field(
        default=OptimizerOptions(), examples=[{"lr": 3e-3, "backend": "zero_redundancy"}]
    )
    lr_scheduler: SchedulerOptions = SchedulerOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    logging: LoggingOptions = LoggingOptions()
    comm: CommunicationOptions = CommunicationOptions()
    recovery: RecoveryOptions = RecoveryOptions()
    emulation: EmulationOptions = EmulationOptions()

    @field_validator("name")
    @classmethod
    def _name_stays_below_runs(cls, name: str) -> str:
        if not name.strip("./ ") or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(
                f"{name!r} would put the run outside of runs/; give a plain name, and run_dir to put the run elsewhere"
            )
        return name

    @model_validator(mode="after")
    def _one_way_to_run_a_backward(self) -> Self:
        if self.training.compile and self.pipeline.split_backward:
            raise ValueError(
                "training.compile and pipeline.split_backward exclude each other (a compiled backward is one piece); "
                "turn one of them off"
            )
        return self

    @model_validator(mode="after")
    def _exact_sums_by_region(self) -> Self:
        if self.pipeline.reduction == "hierarchical" and self.comm.gradient_compression != "none":
            raise ValueError(
                f"pipeline.reduction is hierarchical and comm.gradient_compression {self.comm.gradient_compression}: "
                "compressed sums go from everyone to everyone; use pipeline.reduction: direct or no compression"
            )
        return self

    @model_validator(mode="after")
    def _recipe_fits(self) -> Self:
        recipe, skips = self.recipe, self.pipeline.skip_ratio > 0 or self.pipeline.route_lengths is not None
        if recipe.full_depth_interval is not None and not (skips or recipe.depth_curriculum):
            raise ValueError(
                f"recipe.full_depth_interval is {recipe.full_depth_interval} and pipeline.skip_ratio is 0: every step "
                "has full depth already; leave one of the two out"
            )
        if self.training.compile and recipe.ffn_dropout.probability > 0:
            raise ValueError(
                "training.compile and recipe.ffn_dropout exclude each other (a compiled layer is one piece); turn one "
                "of them off"
            )
        dropout = recipe.layer_dropout
        if self.training.compile and dropout.probability > 0 and dropout.unit == "sample":
            raise ValueError(
                "training.compile is for one shape of activations, recipe.layer_dropout.unit: sample makes many; use "
                "unit: microbatch, or turn compile off"
            )
        return self

    @model_validator(mode="after")
    def _gloo_for_emulation(self) -> Self:
        if self.comm.backend == "nccl" and (self.emulation.links or self.emulation.compute):
            raise ValueError("emulation needs comm.backend: gloo, or neither emulation.links nor emulation.compute")
        return self

    @model_validator(mode="after")
    def _deepspeed_sums_by_itself(self) -> Self:
        if self.optimizer.traits.is_deepspeed:
            remedy = f"use optimizer.backend zero_redundancy or replicated; {self.optimizer.backend} sums by itself"
            if self.comm.gradient_compression != "none":
                raise ValueError(f"comm.gradient_compression is {self.comm.gradient_compression}: {remedy}")
            if self.comm.gradient_dtype not in (None, self.training.dtype):
                raise ValueError(f"comm.gradient_dtype is {self.comm.gradient_dtype}: {remedy}")
        return self

    @model_validator(mode="after")
    def _state_outlives_a_replica(self) -> Self:
        if self.recovery.enabled is True and self.optimizer.traits.is_deepspeed:
            raise ValueError(
                f"recovery.enabled: with optimizer.backend {self.optimizer.backend} {DEEPSPEED_ENDS}; use "
                "zero_redundancy or replicated, or turn recovery off"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_not_rebuilt(self) -> Self:
        if self.lora.enabled and "rebuild" in self.recovery.lost_stage:
            raise ValueError(
                "recovery.lost_stage: rebuild takes the mean of other layers' weights, and lora.r > 0 keeps those of "
                "each layer; leave rebuild out"
            )
        return self

    def recovery_obstacle(self, num_nodes: int) -> str | None:
        """Return why these settings end a run on so many nodes with any of them; None where it may outlive them."""
        recovery, backend = self.recovery, self.optimizer.backend
        if recovery.enabled != "auto":
            return None if recovery.enabled else "recovery.enabled is false"
        if self.optimizer.traits.is_deepspeed:
            return f"with optimizer.backend {backend} {DEEPSPEED_ENDS} (zero_redundancy and replicated can)"
        if num_nodes <= recovery.min_nodes:
            return f"of {num_nodes} nodes fewer than recovery.min_nodes ({recovery.min_nodes}) would be left"
        return None

    @property
    def run_path(self) -> Path:
        """Directory of the run."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name
