"""What a record's docstring says about its fields, as help for the command line and for recipes."""

import inspect
import re


def documented(record: type) -> dict[str, str]:
    """Field → what the section `Args:` of a record's docstring says about it, on one line."""
    text = inspect.cleandoc(record.__doc__ or "").replace("\n    ", "\n        ")
    parts = re.split(r"\n {8}(\w+): ", text)
    return {name: " ".join(part.split("\n\n")[0].split()) for name, part in zip(parts[1::2], parts[2::2], strict=True)}
