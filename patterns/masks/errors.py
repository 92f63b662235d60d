"""The one error of the mask prover."""

__all__ = ["NotProven"]


class NotProven(Exception):
    """What the mask means could not be proven; the attention is left alone.

    Attributes:
        reason: why, in words for the user.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
