"""Once a second: staleness, lag, resyncs, the state of each channel."""
