"""What a library's exception says, short enough to stand inside one of our messages."""

from __future__ import annotations

LONGEST_REASON = 240


def reason(error: BaseException) -> str:
    """The exception's text on one line, or its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
