"""Words for people that several programs use: in logs and errors, and on the terminal."""


def say_count(number: int, thing: str) -> str:
    """How many there are, in words: 1 channel, 2,000 channels."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
