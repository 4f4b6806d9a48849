"""The `lora:` section of an experiment (docs/lora.md). Light to import: no torch."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from skippipe.config.section import Section, Share

ALL_LINEAR = "all-linear"
"""In place of names of modules: every linear layer of the decoder's layers, as in peft."""


class LoraOptions(Section):
    """Train low-rank adapters beside frozen weights; names and meanings are those of peft's LoraConfig."""

    r: Annotated[int, Field(ge=0)] = Field(default=0, examples=[8])
    """Rank of the adapters. 0 turns them off: then all weights are trained."""
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(default=8.0, examples=[16])
    """What an adapter adds is multiplied by lora_alpha / r."""
    use_rslora: bool = False
    """Multiply by lora_alpha divided by the root of r instead."""
    lora_dropout: Share = Field(default=0.0, examples=[0.05])
    """Probability with which numbers of an adapter's input are left out in training."""
    target_modules: tuple[str, ...] | str = Field(default=ALL_LINEAR, examples=[["q_proj", "v_proj"]])
    """Linear layers that get an adapter: the ends of their names; or one regular expression for whole names; or
    all-linear."""
    modules_to_save: tuple[str, ...] = Field(default=(), examples=[["norm"]])
    """Modules that are trained whole and saved beside the adapters, by the ends of their names."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.r > 0

    @property
    def scaling(self) -> float:
        """By what the product of an adapter's two matrices is multiplied."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def identity(self) -> dict[str, Any]:
        """Return what determines the function and the tensors of the adapters."""
        return self.model_dump(mode="json", exclude={"lora_dropout"})

    @field_validator("target_modules")
    @classmethod
    def _some(cls, given: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not given:
            raise ValueError(f"names no module; leave it out for {ALL_LINEAR}, or set r to 0 to train all weights")
        return given
