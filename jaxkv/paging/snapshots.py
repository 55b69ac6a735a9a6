"""Which slot of a pool keeps the state that follows the start of a prompt."""

import collections

from jaxkv.paging.prompt import Prompt

# Starts of prompts that were found in pages, and of which no state was: the latest of them.
_MOST_MISSED = 64

Name = tuple[bytes, bytes]


class Snapshots:
    """The books of snapshots: the least recently used one makes room for a new one.

    State is written over by each token, so that a prompt that begins as another can go on from
    where a snapshot was taken, and from nowhere else. Taken are: each ``every`` tokens; at the end
    of a prompt, and of its last whole chunk; and where an earlier prompt parted from this one.

    Args:
      num_slots: of the pool; 0 for no snapshots.
      every: tokens, a multiple of ``chunk``.
      chunk: tokens that are computed together.

    Attributes:
      num_evictions: snapshots that made room, so far.
    """

    def __init__(self, num_slots: int, every: int, chunk: int):
        self.num_slots, self.every, self.chunk = num_slots, every, chunk
        self.num_evictions = 0
        self._slots: collections.OrderedDict[Name, int] = collections.OrderedDict()
        self._missed: collections.OrderedDict[Name, None] = collections.OrderedDict()

    @property
    def num_held(self) -> int:
        return len(self._slots)

    def has(self, prompt: Prompt, length: int) -> bool:
        """Whether there is one after the first ``length`` tokens of a prompt."""
        return prompt.name(length) in self._slots

    def use(self, prompt: Prompt, length: int) -> int:
        """The slot of one that there is."""
        self._slots.move_to_end(prompt.name(length))
        return self._slots[prompt.name(length)]

    def miss(self, prompt: Prompt, length: int) -> None:
        """Pages held this start of a prompt, and no snapshot did: one is wanted there."""
        self._missed[prompt.name(length)] = None
        if len(self._missed) > _MOST_MISSED:
            self._missed.popitem(last=False)

    def wants(self, prompt: Prompt, length: int) -> bool:
        """Whether one is to be taken after the first ``length`` tokens, once they are computed."""
        if not self.num_slots or not prompt.reuse:
            return False
        end = prompt.num_shareable
        regular = length % self.every == 0 or length in (end, end - end % self.chunk)
        return regular or prompt.name(length) in self._missed

    def keep(self, prompt: Prompt, length: int) -> int | None:
        """The slot to write one to; None where it is there already."""
        name = prompt.name(length)
        self._missed.pop(name, None)
        if name in self._slots:
            self._slots.move_to_end(name)
            return None
        slot = len(self._slots)
        if slot == self.num_slots:
            _, slot = self._slots.popitem(last=False)
            self.num_evictions += 1
        self._slots[name] = slot
        return slot

    def forget(self) -> None:
        """Forget all, as after a change of weights."""
        self._slots.clear()
        self._missed.clear()
