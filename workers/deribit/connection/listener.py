"""What a client tells its owner."""


class Listener:
    """Override what is of use."""

    def take_frame(self, frame: bytes, receive_ts: int) -> None:
        """A data frame, read at `receive_ts` (ns)."""

    def take_malformed(self, frame: bytes, reason: str) -> None:
        """A frame that is not Deribit's protocol."""

    def end_burst(self, receive_ts: int) -> None:
        """All that was read at `receive_ts` has been handed out."""

    def change_state(self, state: str, reason: str) -> None:
        """The connection went into another state (words of lifecycle.CONNECTION)."""

    def confirm_channels(self, names: list[str]) -> None:
        """The exchange now sends these."""

    def refuse_channels(self, names: list[str], reason: str) -> None:
        """The exchange would not give these."""
