"""A whole training step from the traces of its sections: bytes alive at every moment."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bsr.cost.sections import Event, Section


@dataclass(slots=True, eq=False)
class Shared:
    """Memory that crosses borders, and how many sections (and the model's output) hold it."""

    bytes: int
    maker: str
    section: str
    holders: int


class Placed:
    """A section at its place in a step; `shared` is the memory in its slots."""

    __slots__ = ("name", "section", "shared")

    def __init__(self, name: str, section: Section) -> None:
        self.name, self.section = name, section
        self.shared: list[Shared | None] = [None] * len(section.slots)

    def make(self, slot: int) -> Shared:
        about = self.section.slots[slot]
        self.shared[slot] = Shared(about.bytes, about.maker, self.name, 1 + about.reported)
        return self.shared[slot]

    def take(self, slots: Iterable[int], memory: Iterable[Shared]) -> None:
        """Hold what other sections made."""
        for slot, shared in zip(slots, memory, strict=True):
            if self.shared[slot] is None:  # one storage may be behind two tensors
                self.shared[slot] = shared
                shared.holders += 1 + self.section.slots[slot].reported

    def at(self, slots: Iterable[int]) -> list[Shared]:
        return [self.shared[slot] for slot in slots]

    def reported(self) -> list[Shared]:
        """What the model's output holds of it."""
        return [shared for shared, about in zip(self.shared, self.section.slots, strict=True) if about.reported]


class Timeline:
    """Attributes:
    live, live_without: bytes alive now over what lived before the step; without gradients of parameters.
    peaks, peaks_without: the most of these by phase (forward, backward, optimizer).
    """

    def __init__(self) -> None:
        self.live = self.live_without = 0
        self.peaks: Counter[str] = Counter()
        self.peaks_without: Counter[str] = Counter()

    def play(self, phase: str, place: Placed, part: str) -> None:
        """Let one of a section's PHASES happen in a phase of the step."""
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
        """One of its holders lets it go."""
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
        """The forward pass of one micro-batch; returns the bytes kept for backward, by section and maker.

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
        """The backward pass of the same micro-batch, to where no gradient is wanted."""
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
                self.release(shared)  # by the section that made it
            self.play("backward", place, "backward")
            arriving = place.at(section.gradient_out)
        self.play("backward", head, "after")

    def clear(self, places: list[Placed]) -> None:
        """The model's output is dropped, and with it the graph, which its logits hold."""
        for place in places:
            for shared in place.reported():
                self.release(shared)
            for part in ("clear",) if place is places[-1] else ("after", "clear"):
                self.play("optimizer", place, part)
