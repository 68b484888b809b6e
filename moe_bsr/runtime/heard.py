"""Whether this process prints. Of the processes of one run only rank 0 does, so that nothing is printed twice.

If rank 0 may be gone, another process has to print.
"""

_silent = False


def be_silent() -> None:
    """Print nothing from now on, not even errors: another process prints them."""
    global _silent
    _silent = True


def is_heard() -> bool:
    """Return whether this process prints."""
    return not _silent


def speak() -> None:
    """Print from now on, whatever this process's rank."""
    global _silent
    _silent = False
