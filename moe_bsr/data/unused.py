"""What lies among a task's images and is not used: counted by kind, each with an example."""

from collections.abc import Callable

from moe_bsr.runtime.names import printable


class Unused:
    """Counts by kind.

    Args:
        show: how an example is written, such as a path as seen from the task's folder.
    """

    def __init__(self, show: Callable[[str], str] = str) -> None:
        self._show = show
        self._kinds: dict[tuple[str, str], list] = {}

    def add(self, one: str, many: str, example: str, what_to_do: str = "", count: int = 1) -> None:
        """Count something that is called `one`, and `many` where there are several."""
        kind = self._kinds.setdefault((many, what_to_do), [0, one, example])
        kind[0] += count

    def merge(self, other: "Unused") -> None:
        for (many, what_to_do), (count, one, example) in other._kinds.items():
            self.add(one, many, example, what_to_do, count)

    def counts(self) -> list[tuple[str, str, str, str, int]]:
        """What was counted, as `add` takes it."""
        return [(one, many, example, hint, count) for (many, hint), (count, one, example) in self._kinds.items()]

    def lines(self) -> list[str]:
        return [f"not used: {line}" for line in self.found()]

    def found(self) -> list[str]:
        """As `lines`, without saying that it is not used."""
        return [
            f"{count} {one if count == 1 else many}, such as {printable(self._show(example))}"
            + (f" ({what_to_do})" if what_to_do else "")
            for (many, what_to_do), (count, one, example) in self._kinds.items()
        ]
