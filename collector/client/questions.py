"""When a reader asks for what a topic holds now, once it has lost messages of it. No I/O, no clock."""

import math

from collector.client.stream import MAX_TOPICS
from collector.messages import Topic

SHORTEST, LONGEST = 1.0, 60.0
"""Seconds between two questions for a topic: what a publisher has to answer, and the most while losses go on."""


class Questions:
    """What is asked for and not answered yet, and when it was asked for.

    Every reader of the topic gets the answer: one that is too slow for good must not have the others read, ever again,
    what they know already. So the pause of a topic doubles as long as it is used up. `put_off` says when what is wanted
    within a pause may be asked for.
    """

    def __init__(self) -> None:
        self.unanswered: set[Topic] = set()
        self.put_off: dict[Topic, float] = {}
        self._asked: dict[Topic, tuple[float, float]] = {}  # when, and the pause that follows; the longest ago first

    def want(self, topic: Topic, now: float) -> bool:
        """Want the answer for a topic. Returns whether to ask now (in seconds); else it is to be wanted again later."""
        self.unanswered.add(topic)
        asked, pause = self._asked.get(topic, (-math.inf, 0.0))
        if now < asked + pause:
            self.put_off[topic] = asked + pause
            return False
        self.put_off.pop(topic, None)
        self._asked.pop(topic, None)
        if len(self._asked) >= MAX_TOPICS:  # of topics that have ended since, no answer comes
            oldest = next(iter(self._asked))
            del self._asked[oldest]
            self.settle(oldest)
        self._asked[topic] = now, min(2 * pause, LONGEST) if now < asked + 2 * pause else SHORTEST
        return True

    def settle(self, topic: Topic) -> None:
        """The answer has come, or is not wanted any more."""
        self.unanswered.discard(topic)
        self.put_off.pop(topic, None)

    def list_due(self, now: float) -> list[Topic]:
        """What was put off and may be asked for now: its topic may be quiet, and then nothing else would."""
        return [topic for topic, due in self.put_off.items() if due <= now]
