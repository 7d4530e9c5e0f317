"""Seeded cases of everything that can be lost, judged against what really happened: `python -m tests.faults`."""
