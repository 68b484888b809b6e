"""How a run that had begun is told to have failed: what happened, which checkpoint is good, how to go on."""

from pathlib import Path

from moe_bsr.runs import checkpoint
from moe_bsr.runtime import files, memory


class TrainingFailed(RuntimeError):
    """A run that had begun cannot go on. One line says what happened, which checkpoint is good and what to do."""


class NonFiniteLoss(TrainingFailed):
    """Training diverged; the message names the step, the task and the last good checkpoint."""


def explained(folder: Path, step: int, error: Exception) -> str | None:
    """What ended training and how to go on, in a line; None for what is no trouble of the machine's.

    Args:
        folder: of the run. step: updates done.
    """
    ended, good = f"{folder}: training ended at step {step}", last_good(folder)
    if memory.is_short(error):
        return (
            f"{ended}: out of memory ({memory.described(error)}); {good}; with more memory free go on with "
            f"resume=True, or in another folder {memory.REMEDY}"
        )
    if isinstance(error, OSError):
        said = str(error) if error.errno is None else f"{error.filename or 'a file'}: {files.reason(error)}"
        return f"{ended}: {said}; {good}; then go on with resume=True"
    return None


def lost(folder: Path, step: int, error: Exception, first: bool) -> str:
    """Which other process was lost and how to go on, in a line.

    Args:
        first: whether this process writes the checkpoints; the disk of another may not have them.
    """
    good = last_good(folder) if first or checkpoint.steps(folder) else "checkpoints are where rank 0 ran"
    return f"{folder}: training ended at step {step}: {error}; {good}; go on with resume=True"


def last_good(folder: Path) -> str:
    """Which checkpoint of a run is good."""
    saved = checkpoint.steps(folder)
    return f"last good checkpoint: {folder / 'checkpoint' / str(saved[-1]) if saved else 'none was written yet'}"
