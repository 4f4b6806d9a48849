"""What is done of a task, step by step, so that another process can go on with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tell = Callable[[int, Any, Tensor | None], None]
"""Called with the number of a step, what it gave (JSON) and the state of the generator of random numbers after it."""


class KnownSteps:
    """Steps that another process has done, as this one has heard of them."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        """What each gave (JSON)."""
        self.draws: Tensor | None = None
        """State of the generator of random numbers after the last one, if there is one."""

    def add(self, number: int, value: Any, draws: Tensor | None) -> None:
        """Take note of a step; nothing where one before it did not arrive, and is to be done again."""
        if number <= len(self.values):
            del self.values[number:]
            self.values.append(value)
            self.draws = draws


class TaskProgress:
    """The steps of one task. The process that does it asks for them in an order that every process would ask for.

    Examples:
        >>> known = KnownSteps()
        >>> known.add(0, 7, None)
        >>> progress = TaskProgress(known)
        >>> progress.step(lambda: 8), progress.step(lambda: 9)  # the first one is done
        (7, 9)
    """

    def __init__(self, known: KnownSteps | None = None, tell: Tell | None = None) -> None:
        """Begin after the `known` steps; each further one is told."""
        self._known, self._tell = known or KnownSteps(), tell
        self._number = 0

    @property
    def num_known(self) -> int:
        """How many steps another process has done."""
        return len(self._known.values)

    @property
    def knows_next(self) -> bool:
        """Whether the next step is done."""
        return self._number < self.num_known

    def step(self, do: Callable[[], Any], generator: torch.Generator | None = None) -> Any:
        """Return what the next step gives (JSON); do it where it is not done.

        A `generator` of random numbers goes on from where the last step that is done has left it.
        """
        number = self._number
        self._number += 1
        if number < self.num_known:
            if generator is not None and self._number == self.num_known and self._known.draws is not None:
                generator.set_state(self._known.draws)
            return self._known.values[number]
        value = do()
        if self._tell is not None:
            self._tell(number, value, None if generator is None else generator.get_state())
        return value
