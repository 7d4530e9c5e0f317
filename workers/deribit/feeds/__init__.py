"""From frames to messages: one feed for each channel, which checks and normalises what comes on it."""
