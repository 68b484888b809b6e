"""Which of the processes of a run a person hears: the first alone. The others are silent once they have joined it.

Where that one may be gone, another has to speak.
"""

_silent = False


def be_silent() -> None:
    """From here on another process tells what this one would, its errors too."""
    global _silent
    _silent = True


def is_heard() -> bool:
    """Whether what this process has to say is said."""
    return not _silent


def speak() -> None:
    """From here on this process tells what it has to, whichever it is."""
    global _silent
    _silent = False
