"""Text of two domains that is at hand everywhere: Python's own documentation and source code."""

import sysconfig
from itertools import chain
from pathlib import Path
from typing import Literal

from minisp.errors import CalibrationError
from minisp.text.corpora import DOCUMENT_SEPARATOR, Corpus, open_file

BUILTIN_PREFIX = "builtin:"
# Characters at the start of the source code that are for evaluation.
CODE_HELD_OUT = 200_000

# Large modules of different subjects that every CPython ships as source; first those that read like a program.
_CODE_MODULES = (
    "argparse.py",
    "asyncio/base_events.py",
    "calendar.py",
    "collections/__init__.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "datetime.py",
    "difflib.py",
    "email/message.py",
    "enum.py",
    "fractions.py",
    "functools.py",
    "heapq.py",
    "http/client.py",
    "inspect.py",
    "json/decoder.py",
    "logging/__init__.py",
    "pathlib.py",
    "pickle.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "textwrap.py",
    "threading.py",
    "tokenize.py",
    "typing.py",
    "urllib/parse.py",
    "xml/etree/ElementTree.py",
    "zipfile.py",
)


def open_builtin(name: str) -> Corpus:
    """`builtin:documentation` or `builtin:code`: what every Python carries, without the half or the start that
    evaluation uses.

    Raises:
        CalibrationError: another name.
    """
    if name == f"{BUILTIN_PREFIX}documentation":
        return Corpus("the documentation that comes with Python", iter([documentation_text("even")]))
    if name == f"{BUILTIN_PREFIX}code":
        text = "".join(_code().pieces)
        return Corpus("the source code that comes with Python", iter([text[CODE_HELD_OUT:]]))
    raise CalibrationError(
        f"Expected {BUILTIN_PREFIX}documentation, {BUILTIN_PREFIX}code or {BUILTIN_PREFIX}model, got {name!r}. Name "
        "one of these, or a file."
    )


def documentation_text(part: Literal["all", "even", "odd"] = "all") -> str:
    """Documentation of the Python language, from `pydoc_data.topics` (every Python carries it).

    `even` and `odd` take every second topic by sorted name, so that one half calibrates and the other evaluates.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    chosen = {"all": names, "even": names[::2], "odd": names[1::2]}[part]
    return DOCUMENT_SEPARATOR.join(topics[name].strip() for name in chosen)


def code_text(num_chars: int) -> str:
    """The first `num_chars` characters of Python source code, from a fixed list of standard library modules.

    Raises:
        CalibrationError: this Python ships fewer characters of source (an interpreter without its library's sources).
    """
    text, _ = _code().prefix(num_chars)
    if len(text) < num_chars:
        raise CalibrationError(
            f"Expected {num_chars} characters of source code in the standard library, got {len(text)}. Ask for less or "
            "read a file."
        )
    return text


def _code() -> Corpus:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / name for name in _CODE_MODULES if (folder / name).is_file()]
    return Corpus("the standard library", chain.from_iterable(open_file(file).pieces for file in files))
