"""Words for people that several programs use: in the log, in errors, on the terminal."""


def say_count(number: int, thing: str) -> str:
    """How many there are, in words: 1 channel, 2,000 channels."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
