"""The `recipe:` section of an experiment (docs/recipes.md). Light to import: no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from skippipe.config.section import Section, Share

RouteLengths = dict[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=1)]]


class DepthPhase(Section):
    """A part of training whose routes have a length of their own; all else is as `pipeline` says."""

    share: Annotated[float, Field(gt=0, allow_inf_nan=False, examples=[1.0])]
    """Part of the steps, relative to the sum of the shares of all phases."""
    skip_ratio: Share | None = Field(default=None, examples=[0.5])
    """Share of the stages that each microbatch leaves out during this phase. Give this or route_lengths."""
    route_lengths: RouteLengths | None = Field(default=None, examples=[{6: 1, 4: 1, 3: 2}])
    """Shares of the microbatches by the number of stages that they visit, in place of skip_ratio."""
    max_swaps: Annotated[int, Field(ge=0)] | None = Field(default=None, examples=[1])
    """Swaps of a route; pipeline.max_swaps where not given."""

    @model_validator(mode="after")
    def _one_depth(self) -> Self:
        if (self.skip_ratio is None) == (self.route_lengths is None):
            raise ValueError("a phase has either skip_ratio or route_lengths; give one of the two")
        return self


class DropoutOptions(Section):
    """How often a part of a layer's work is left out in training; never in evaluation."""

    probability: Share = Field(default=0.0, examples=[0.2])
    """The highest probability over depth and steps; 0 turns it off."""
    over_depth: Literal["linear", "exponential", "alternating", "uniform"] = "exponential"
    """linear: l/(L-1) of it at layer l of L, exponential: 2^(l/(L-1)) - 1, so never at the first; alternating: all of
    it at every second layer, from layer 1; uniform: all of it everywhere."""
    over_steps: Literal["constant", "falling", "growing"] = "constant"
    """falling: 1 - t/(T-1) of it at step t of T, so nothing at last; growing: 2^(t/(T-1)) - 1, so nothing at first."""
    unit: Literal["sample", "microbatch"] = "sample"
    """Whether each sample of a microbatch is drawn for itself or all of them together."""


class LayerDropoutOptions(DropoutOptions):
    """How often whole layers are left out in training, and what becomes of the samples that run them."""

    rescale: bool = False
    """Whether what a layer adds is divided by the share of samples that run it, so that its mean stays what it is in
    evaluation, where nothing is left out and nothing rescaled."""


class RecipeOptions(Section):
    """What is varied in training so that the model works with parts left out. Nothing unless asked for."""

    full_depth_interval: Annotated[int, Field(ge=2)] | None = Field(default=None, examples=[10])
    """Every so many steps comes one in which all microbatches visit all stages in order; null: never."""
    redrawn_routes: Annotated[int, Field(ge=1, le=64)] = Field(default=1, examples=[4])
    """How many plans of the same kind there are, of which each step draws one."""
    depth_curriculum: tuple[DepthPhase, ...] = Field(
        default=(), examples=[[{"share": 1, "skip_ratio": 0}, {"share": 3, "route_lengths": {6: 1, 3: 2}}]]
    )
    """Phases of training by the length of their routes, in order."""
    rescale_stages: bool = False
    """Whether what a stage adds is divided by the share of the microbatches that visit it, among those of as many
    stages in the same plan. In evaluation nothing is rescaled."""
    layer_dropout: LayerDropoutOptions = LayerDropoutOptions()
    """Leave out whole layers."""
    ffn_dropout: DropoutOptions = DropoutOptions()
    """Leave out the feed-forward part of layers; their attention runs."""
    early_exit_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(default=0.0, examples=[0.1])
    """Weight of the loss right behind the origin's own layers, beside the loss at the route's end; 0 turns it off."""

    @property
    def needs_further_plans(self) -> bool:
        """Whether some step may run another plan than the main one."""
        return self.full_depth_interval is not None or self.redrawn_routes > 1 or bool(self.depth_curriculum)

    @property
    def leaves_out(self) -> bool:
        """Whether something is left out inside a stage."""
        return self.layer_dropout.probability > 0 or self.ffn_dropout.probability > 0

    @property
    def num_losses(self) -> int:
        """How many times the head and the loss run for each microbatch."""
        return 2 if self.early_exit_loss > 0 else 1
