"""What a client tells its owner."""


class Listener:
    """Override what is of use."""

    def take_frames(self, frames: list[bytes], receive_ts: int) -> None:
        """The data frames that were read together at `receive_ts` (ns), in order."""
        for frame in frames:
            self.take_frame(frame, receive_ts)

    def take_frame(self, frame: bytes, receive_ts: int) -> None:
        """One data frame, read at `receive_ts` (ns)."""

    def take_malformed(self, frame: bytes, reason: str) -> None:
        """A frame that is not Deribit's protocol."""

    def change_state(self, state: str, reason: str) -> None:
        """The connection went into another state (words of lifecycle.CONNECTION)."""

    def confirm_channels(self, names: list[str]) -> None:
        """The exchange now sends these."""

    def refuse_channels(self, names: list[str], reason: str) -> None:
        """The exchange would not give these."""
