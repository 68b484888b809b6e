"""Put a training step together from the traces of its sections, and track the bytes alive at every moment."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bsr.cost.sections import Event, Section


@dataclass(slots=True, eq=False)
class Shared:
    """Memory that crosses borders. `holders` counts the sections that hold it, and the model's output."""

    bytes: int
    maker: str
    section: str
    holders: int


class Placed:
    """A section at its place in a step. `shared` has the memory of each slot, None before it is allocated."""

    __slots__ = ("name", "section", "shared")

    def __init__(self, name: str, section: Section) -> None:
        self.name, self.section = name, section
        self.shared: list[Shared | None] = [None] * len(section.slots)

    def make(self, slot: int) -> Shared:
        about = self.section.slots[slot]
        self.shared[slot] = Shared(about.bytes, about.maker, self.name, 1 + about.reported)
        return self.shared[slot]

    def take(self, slots: Iterable[int], memory: Iterable[Shared]) -> None:
        """Put memory that other sections allocated into the section's slots."""
        for slot, shared in zip(slots, memory, strict=True):
            if self.shared[slot] is None:  # one storage may be behind two tensors
                self.shared[slot] = shared
                shared.holders += 1 + self.section.slots[slot].reported

    def at(self, slots: Iterable[int]) -> list[Shared]:
        return [self.shared[slot] for slot in slots]


class Timeline:
    """Memory of a step over time, in bytes relative to its start.

    Attributes:
        live: bytes alive now. live_without: the same without gradients of parameters.
        peaks, peaks_without: their maxima by phase (forward, backward, optimizer).
    """

    def __init__(self) -> None:
        self.live = self.live_without = 0
        self.peaks: Counter[str] = Counter()
        self.peaks_without: Counter[str] = Counter()

    def play(self, phase: str, place: Placed, part: str) -> None:
        """Replay one of a section's PHASES (`part`) as a part of a phase of the step."""
        self._note(phase)
        for event in place.section.phases[part]:
            if isinstance(event, Event):
                if event.made:
                    self.add(place.make(event.slot).bytes)
                    self._note(phase)
                else:
                    self.release(place.shared[event.slot])
            else:
                self._note(phase, event.rise, event.rise_without)
                self.live += event.net
                self.live_without += event.net_without

    def release(self, shared: Shared) -> None:
        """Remove one holder; the memory is released with the last one."""
        shared.holders -= 1
        if not shared.holders:
            self.add(-shared.bytes)

    def add(self, size: int) -> None:
        self.live += size
        self.live_without += size

    def _note(self, phase: str, rise: int = 0, rise_without: int = 0) -> None:
        self.peaks[phase] = max(self.peaks[phase], self.live + rise)
        self.peaks_without[phase] = max(self.peaks_without[phase], self.live_without + rise_without)

    def forward(self, places: list[Placed]) -> dict[str, dict[str, int]]:
        """Replay the forward pass of a micro-batch, and return the bytes kept for backward by section and operator.

        Args:
            places: the embedding, the blocks, the head.
        """
        reports: list[Shared] = []
        for before, place in zip([None, *places], places, strict=False):
            if before is not None:
                reports += before.at(before.section.reports)
                entering = [*before.at(before.section.outputs), *(reports if place is places[-1] else ())]
                place.take(place.section.inputs, entering)
                self.play("forward", before, "handover")
            self.play("forward", place, "forward")
        kept = {place.name: Counter(place.section.kept) for place in places}
        for shared in dict.fromkeys(s for place in places for s in place.at(place.section.kept_slots)):
            kept[shared.section][shared.maker] += shared.bytes
        return {name: dict(makers) for name, makers in kept.items()}

    def backward(self, places: list[Placed]) -> None:
        """Replay the backward pass of the same micro-batch, down to the first section of the gradient path."""
        *before, head = places
        self.play("backward", head, "backward")
        arriving, balance = head.at(head.section.gradient_out), head.at(head.section.routing_in)
        for place in reversed(before):
            if not arriving:
                break
            section = place.section
            mine = [balance.pop() for _ in section.routing_in][::-1]
            place.take((*section.gradient_in, *section.routing_in), [*arriving, *mine])
            for shared in (*arriving, *mine):
                self.release(shared)  # the section that allocated it no longer holds it
            self.play("backward", place, "backward")
            arriving = place.at(section.gradient_out)
        self.play("backward", head, "after")
