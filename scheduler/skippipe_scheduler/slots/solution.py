"""A complete schedule as the search hands it on."""

from dataclasses import dataclass

from skippipe_scheduler.slots.slot_model import SlotPlacement, SlotRoute

Starts = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Solution:
    """Placement, routes and starts by slot, and what the search thinks of them."""

    placement: SlotPlacement
    routes: tuple[SlotRoute, ...]
    starts: Starts
    """Seconds at which every task of every microbatch starts."""
    iteration_s: float
    score: float
    relays: tuple[tuple[bool, ...], ...] = ()
    """Of every microbatch, hop by hop, whether the slot only relays; none where no slot does."""
    sequences: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of every slot its tasks in sequence, each a microbatch and the index in its chain, where relays have been timed:
    they take no time, so that `starts` do not tell which comes first."""

    @property
    def key(self) -> tuple[float, float]:
        """What of two solutions the better one has less of: its time and, of equals, its score."""
        return round(self.iteration_s, 9), self.score
