"""Error messages of a run that failed after its start: what happened, the last good checkpoint, and how to go on."""

from pathlib import Path

from moe_bsr.runs import checkpoint
from moe_bsr.runtime import files, memory


class TrainingFailed(RuntimeError):
    """A started run cannot go on. Its one-line message says what happened, which checkpoint is good and what to do."""


class NonFiniteLoss(TrainingFailed):
    """Training diverged. The message names the step, the task and the last good checkpoint."""


def explained(folder: Path, step: int, error: Exception) -> str | None:
    """Return one line on what ended training and how to go on, or None if memory and files were not the cause.

    Args:
        folder: the run folder. step: updates done.
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
    """Return one line that says which process was lost and how to go on.

    Args:
        first: whether this process writes the checkpoints. Another process may not see them on its disk.
    """
    good = last_good(folder) if first or checkpoint.steps(folder) else "the checkpoints are where rank 0 ran"
    return f"{folder}: training ended at step {step}: {error}; {good}; go on with resume=True"


def last_good(folder: Path) -> str:
    """Return a phrase that names the newest checkpoint of a run."""
    saved = checkpoint.steps(folder)
    return f"last good checkpoint: {folder / 'checkpoint' / str(saved[-1]) if saved else 'none was written yet'}"
