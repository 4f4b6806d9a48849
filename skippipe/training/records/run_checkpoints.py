"""The checkpoints of a run as its trainer uses them: the one it begins from, and those that it saves."""

import logging
from pathlib import Path

from skippipe.checkpoint.disks.remote_folder import Uploads
from skippipe.checkpoint.model_tensors import check_adapters, load_parameters
from skippipe.checkpoint.reader import (
    BaseCheckpoint,
    Metadata,
    checkpoints_folder,
    latest_checkpoint,
    load_tensors,
    model_identity,
    read_metadata,
)
from skippipe.checkpoint.writer import CheckpointWriter, KeptStages, kept_base
from skippipe.data.samples import SampleOrder
from skippipe.errors import CheckpointError, ConfigError
from skippipe.model.architecture import experiment_model
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import on_all_ranks
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.records.run_records import RunRecords
from skippipe.training.run_directory import choose_checkpoint
from skippipe.training.startup import changed_settings, trained_settings
from skippipe.training.steps.training_state import TrainingState

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Reads and saves the checkpoints of one process."""

    def __init__(
        self, state: TrainingState, records: RunRecords, order: SampleOrder, kept: KeptStages | None = None
    ) -> None:
        self._state, self._records, self._order, self._kept = state, records, order, kept
        self._experiment = state.experiment
        self._config = experiment_model(state.experiment)
        self._base: BaseCheckpoint | None = None
        options = state.experiment.checkpoint
        folder = options.remote_save_folder
        self._uploads = None if folder is None else Uploads(folder, options.keep_last)
        self.writer = self._make_writer()

    def connect(self) -> None:
        """Save what the present runner and optimizer hold, with the present members."""
        self.writer = self._make_writer()

    def restore(self) -> None:
        """Go to where the checkpoint that the experiment names left the run, where there is one; all ranks together."""
        self._check_shared()
        context = self._state.context
        layers = [self._state.plans.main.stages[index].layers for index in self._state.runner.stages]
        checkpoint = choose_checkpoint(self._experiment, context, self._state.disks, self._state.peers, layers)
        if checkpoint is None:
            self._check_pretrained()
            return
        metadata = on_all_ranks(context, Topic.CHECKPOINT_LOADED, lambda: self._load(checkpoint))
        self._state.applied = self._state.contributed = self._records.reported = self._state.step
        # Another run's W&B run stays that one's alone.
        if checkpoint.parent.resolve() == checkpoints_folder(self._experiment.run_path).resolve():
            self._records.wandb_id = metadata.wandb_id

    def close(self, *, in_order: bool) -> None:
        """End the writing; where the run ended in order, wait until what is saved here is in the second place."""
        self.writer.close()
        if self._uploads is not None:
            self._uploads.close(self._experiment.checkpoint.timeout_s if in_order else time_limits.CHECKPOINT_GRACE_S)

    def save(self) -> None:
        """Begin to save the present step; all ranks together."""
        self.writer.save(self._metadata())

    def save_alone(self) -> bool:
        """Save the present step without any connection to other ranks; return whether it is complete."""
        return self.writer.save_alone(self._metadata())

    def _check_shared(self) -> None:
        """Raise `ConfigError` where hosts have disks of their own: the frozen weights lie once in the run directory."""
        if self._experiment.lora.enabled and not self._state.disks.shared:
            raise ConfigError(
                f"lora.r is {self._experiment.lora.r}, and the hosts do not share {self._experiment.run_path}, where "
                "the weights are that adapters stand beside; put run_dir on storage that all see, or set lora.r to 0"
            )

    def _check_pretrained(self) -> None:
        """Raise `ConfigError` where adapters would be trained beside weights that nobody has trained."""
        if self._experiment.lora.enabled:
            raise ConfigError(
                f"lora.r is {self._experiment.lora.r}, and {self._experiment.run_path} has no checkpoint with weights "
                "to train adapters for; make the run with skippipe import, or set lora.r to 0"
            )

    def _find_base(self) -> BaseCheckpoint | None:
        """Return where the weights are that are not trained; on rank 0, which writes it down."""
        if self._base is None and self._experiment.lora.enabled and self._state.context.rank == 0:
            newest = latest_checkpoint(self._experiment.run_path)  # of a process that has come lately
            if newest is None:
                raise CheckpointError(f"{self._experiment.run_path}: the weights that are not trained are gone")
            self._base = kept_base(newest, self._experiment.run_path)
        return self._base

    def _make_writer(self) -> CheckpointWriter:
        state, context = self._state, self._state.context
        run_dir, options = self._experiment.run_path, self._experiment.checkpoint
        return CheckpointWriter(
            run_dir,
            state.runner,
            state.optimizer,
            options,
            context.store,
            state.disks,
            state.peers,
            self._kept,
            self._uploads,
            lambda: context.may_write,
        )

    def _metadata(self) -> Metadata:
        state, training = self._state, self._experiment.training
        return Metadata(
            step=state.step,
            tokens=state.tokens,
            elapsed_s=state.elapsed_s,
            seed=self._experiment.seed,
            dtype=training.dtype,
            model=model_identity(self._config),
            data=self._order.cursor(state.step, training.num_microbatches, training.micro_batch_size),
            plan_hash=state.plans.hash,
            wandb_id=self._records.wandb_id,
            settings=trained_settings(self._experiment),
            lora=self._experiment.lora.identity() if self._experiment.lora.enabled else None,
            base=self._find_base(),
            layers=tuple(stage.layers for stage in state.plans.main.stages),
            files={},
        )

    def _load(self, checkpoint: Path) -> Metadata:
        """Put this rank's stages and optimizer where the checkpoint left them."""
        state, training = self._state, self._experiment.training
        check_adapters(checkpoint, read_metadata(checkpoint), self._experiment.lora)
        metadata = load_parameters(checkpoint, self._config, state.runner.stages.values())
        if metadata.step and metadata.dtype != training.dtype:
            raise CheckpointError(
                f"training.dtype: {training.dtype}, but {checkpoint} was trained in {metadata.dtype}; continue with "
                f"training.dtype={metadata.dtype}, or export the run and import it into a new one"
            )
        if self._experiment.lora.enabled and state.context.rank == 0:
            self._base = kept_base(checkpoint, self._experiment.run_path)
        if metadata.step and state.runner.rank == 0:
            self._say_what_changed(checkpoint, metadata)
        if metadata.step:
            self._order.check_cursor(metadata.data, metadata.step, training.num_microbatches, training.micro_batch_size)
        optimizer = load_tensors(checkpoint, metadata, "optimizer", state.optimizer.names)
        state.optimizer.load(optimizer, metadata.step)
        state.begin_after(metadata.step, metadata.elapsed_s)
        state.runner.iteration = state.step
        return metadata

    def _say_what_changed(self, checkpoint: Path, metadata: Metadata) -> None:
        """Say what is not as it was when the checkpoint was written, which nothing refuses."""
        plans = self._state.plans
        if metadata.plan_hash != plans.hash:
            logger.warning(
                "%s was written under plan %s, the run goes on under %s: its losses are not those of a run that never "
                "stopped",
                checkpoint,
                metadata.plan_hash,
                plans.hash,
            )
        changed = changed_settings(metadata.settings or {}, trained_settings(self._experiment))
        if changed:
            logger.warning("%s was trained with other settings, the run goes on with %s", checkpoint, changed)
