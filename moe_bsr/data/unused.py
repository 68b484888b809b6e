"""Count what is found among a task's images and not used, by kind, with an example of each."""

from collections.abc import Callable

from moe_bsr.runtime.names import printable


class Unused:
    """Counter of unused things, by kind.

    Args:
        show: formats an example for messages, such as a path relative to the task's folder.
    """

    def __init__(self, show: Callable[[str], str] = str) -> None:
        self._show = show
        self._kinds: dict[tuple[str, str], list] = {}

    def add(self, one: str, many: str, example: str, what_to_do: str = "", count: int = 1) -> None:
        """Count `count` things of a kind.

        Args:
            one, many: name of the kind in singular and plural.
            example: one such thing; the first of a kind is shown.
            what_to_do: advice for the user.
        """
        kind = self._kinds.setdefault((many, what_to_do), [0, one, example])
        kind[0] += count

    def merge(self, other: "Unused") -> None:
        for (many, what_to_do), (count, one, example) in other._kinds.items():
            self.add(one, many, example, what_to_do, count)

    def counts(self) -> list[tuple[str, str, str, str, int]]:
        """Return the arguments of `add` that restore these counts."""
        return [(one, many, example, hint, count) for (many, hint), (count, one, example) in self._kinds.items()]

    def lines(self) -> list[str]:
        return [f"not used: {line}" for line in self.found()]

    def found(self) -> list[str]:
        """Return `lines` without the prefix."""
        return [
            f"{count} {one if count == 1 else many}, such as {printable(self._show(example))}"
            + (f" ({what_to_do})" if what_to_do else "")
            for (many, what_to_do), (count, one, example) in self._kinds.items()
        ]
