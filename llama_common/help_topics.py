"""The texts that Python itself brings: the default text of training and of comparisons."""

from collections.abc import Iterator


def help_topics() -> Iterator[str]:
    """Yield the texts of Python's help topics, without indentation and runs of spaces.

    GPT-2 encodes each space as a token; the loss would be dominated by predictable indentation.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        lines = (" ".join(line.split()) for line in topics[name].splitlines())
        yield "\n".join(lines)
