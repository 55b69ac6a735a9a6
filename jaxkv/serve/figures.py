"""What an engine did so far."""

import dataclasses

from jaxkv.paging import Usage


@dataclasses.dataclass
class Figures:
    """Counts over the life of an engine, and the pool as the ends of its dispatches found it.

    Attributes:
      prefilled_tokens: prompt tokens that were computed; what was found is not among them.
      prefill_steps: in which they were.
      generated_tokens: tokens of answers.
      repeated_tokens: of answers, that were computed again after a preemption.
      preemptions: requests that gave their pages back to wait.
      swaps: of them, those that kept their pages in host memory.
      swapped_bytes: of host memory that holds such pages now.
      most_swapped_bytes: at any time so far.
      snapshot_bytes: of device memory for snapshots of states; ``pages.usage()`` has their number.
      dispatches: of decode.
      steps, checked_guesses, right_guesses: with a draft, steps of decode per request, and guesses.
    """

    prefilled_tokens: int = 0
    prefill_steps: int = 0
    generated_tokens: int = 0
    repeated_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    swapped_bytes: int = 0
    most_swapped_bytes: int = 0
    snapshot_bytes: int = 0
    dispatches: int = 0
    steps: int = 0
    checked_guesses: int = 0
    right_guesses: int = 0
    _held_slots: int = 0
    _wasted_slots: int = 0
    _occupancy: float = 0.0

    def look(self, usage: Usage) -> None:
        """Count a dispatch, with the pool as it is."""
        self.dispatches += 1
        self._held_slots += usage.held_pages * usage.page_size
        self._wasted_slots += usage.wasted_slots
        self._occupancy += usage.occupancy

    @property
    def waste(self) -> float:
        """The mean share of held slots that hold no token."""
        return self._wasted_slots / self._held_slots if self._held_slots else 0.0

    @property
    def occupancy(self) -> float:
        """The mean share of the pool's pages that requests hold."""
        return self._occupancy / self.dispatches if self.dispatches else 0.0
