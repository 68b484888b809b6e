"""The message of a refusal, in a form that suits a terminal."""

import pytest

from moe_bsr.config import ConfigError


def refusal(act, *arguments) -> str:
    """Return the message of the ConfigError that `act(*arguments)` raises: one line of bounded length."""
    with pytest.raises(ConfigError) as error:
        act(*arguments)
    message = str(error.value)
    assert len(message) <= 700 and "\n" not in message and message.isprintable(), message
    return message
