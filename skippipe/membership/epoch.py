"""Members, and epochs: the times between two changes of membership."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator


class Checked(BaseModel):
    """What is sent among members: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Member(Checked):
    """One process of the run. A process that is started again is another member of the same name."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    host: Annotated[str, Field(min_length=1, max_length=255)]
    """Name or address of its machine, not of a service in front of it: a refused connection counts as its death."""
    port: Annotated[int, Field(ge=1, le=65535)]
    incarnation: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """Random, new for each process."""
    data_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where its `Exchange`, or what it serves, is reached on the same host; 0 where it has none."""


class Epoch(Checked):
    """Who is in the run from one change of membership to the next, and what they decided with it."""

    number: Annotated[int, Field(ge=0)]
    members: Annotated[tuple[Member, ...], Field(min_length=1)]
    decision: dict[str, JsonValue] = {}
    """The application's: all members of the epoch have the same."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Epoch":
        if len(set(self.names)) < len(self.members):
            raise ValueError(f"two members of one name among {', '.join(self.names)}")
        return self

    @property
    def names(self) -> Sequence[str]:
        """The members' names in order."""
        return [member.name for member in self.members]
