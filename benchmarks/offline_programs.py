"""Small programs to complete, and a place to run them: what `downstream_offline.py` asks of a model's code.

A prompt shows three finished functions and the head of a fourth, which its docstring describes. The completion counts
as right where the function gives the right value for every input of its checks. The expected values come from a
solution that stands beside each docstring here, not from the model.
"""

import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

SECONDS = 5.0
SHOTS = '''def f(x):
    """Return x minus 4."""
    return x - 4


def f(items):
    """Return the number of elements of items."""
    return len(items)


def f(s):
    """Return the last character of s."""
    return s[-1]


'''
NUMBERS, STRINGS = (17, 5, -8, 30), ("banana bread", "minimal", "Road and sea")
LISTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 8], [7, -2, 12, 0, 6, 6, 41, 3, 9, 10])

# Argument, what to return ({n} is a number from 2 to 6), the solution.
TEMPLATES: tuple[tuple[str, str, Callable[[Any, int], Any]], ...] = (
    ("x", "x plus {n}", lambda x, n: x + n),
    ("x", "x times {n}", lambda x, n: x * n),
    ("x", "x to the power of {n}", lambda x, n: x**n),
    ("x", "the remainder of x divided by {n}", lambda x, n: x % n),
    ("x", "x divided by {n}, rounded down", lambda x, n: x // n),
    ("x", "True if x is larger than {n}", lambda x, n: x > n),
    ("x", "True if x is a multiple of {n}", lambda x, n: x % n == 0),
    ("x", "the larger of x and {n}", lambda x, n: max(x, n)),
    ("x", "the smaller of x and {n}", lambda x, n: min(x, n)),
    ("x", "the absolute value of x", lambda x, n: abs(x)),
    ("s", "the first {n} characters of s", lambda s, n: s[:n]),
    ("s", "the last {n} characters of s", lambda s, n: s[-n:]),
    ("s", "s repeated {n} times", lambda s, n: s * n),
    ("s", "the character of s at index {n}", lambda s, n: s[n]),
    ("s", "s in upper case", lambda s, n: s.upper()),
    ("s", "s in lower case", lambda s, n: s.lower()),
    ("s", "s backwards", lambda s, n: s[::-1]),
    ("s", "the length of s", lambda s, n: len(s)),
    ("s", "the words of s as a list", lambda s, n: s.split()),
    ("s", "True if s ends with 'ad'", lambda s, n: s.endswith("ad")),
    ("s", "how often 'a' occurs in s", lambda s, n: s.count("a")),
    ("items", "the element of items at index {n}", lambda items, n: items[n]),
    ("items", "the first {n} elements of items", lambda items, n: items[:n]),
    ("items", "the sum of items", lambda items, n: sum(items)),
    ("items", "the largest element of items", lambda items, n: max(items)),
    ("items", "the smallest element of items", lambda items, n: min(items)),
    ("items", "the elements of items in sorted order", lambda items, n: sorted(items)),
    ("items", "how often {n} occurs in items", lambda items, n: items.count(n)),
    ("items", "every element of items times {n}, as a list", lambda items, n: [item * n for item in items]),
    (
        "items",
        "the elements of items that are larger than {n}, as a list",
        lambda items, n: [i for i in items if i > n],
    ),
)

# Runs what it reads in a process without imports, files and room to grow, and prints a word that the program does not
# know when all checks have passed. It keeps mistakes in; it is no sandbox for code that means harm.
_RUNNER = """
import builtins, resource, sys
for limit, value in ((resource.RLIMIT_CPU, 2), (resource.RLIMIT_AS, 2**29), (resource.RLIMIT_FSIZE, 0)):
    resource.setrlimit(limit, (value, value))
source, word = sys.stdin.read().rsplit("\\n", 1)
names = "abs all any bool dict divmod enumerate filter float int isinstance len list map max min pow range repr "
names += "reversed round set slice sorted str sum tuple zip AssertionError Exception IndexError KeyError ValueError"
exec(source, {"__builtins__": {name: getattr(builtins, name) for name in names.split()}})
print(word)
"""


@dataclass(frozen=True)
class Program:
    """A function to complete.

    Attributes:
        prompt: finished functions, and the head of this one up to the end of its docstring.
        checks: lines that run after the function, and raise where it is wrong.
    """

    prompt: str
    checks: str

    @property
    def head(self) -> str:
        """The head of the function alone."""
        return self.prompt.removeprefix(SHOTS)


def programs(count: int, seed: int) -> list[Program]:
    """At most `count` different functions to complete, every template about equally often."""
    rng = random.Random(seed)
    found: dict[str, Program] = {}
    rounds = [(template, number) for number in rng.sample(range(2, 7), 5) for template in TEMPLATES]
    for (argument, wanted, solve), number in rounds:
        prompt = f'{SHOTS}def f({argument}):\n    """Return {wanted.format(n=number)}."""'
        values: tuple[Any, ...] = {"x": (*NUMBERS, number, 6 * number), "s": STRINGS, "items": LISTS}[argument]
        checks = "\n".join(f"assert f({value!r}) == {solve(value, number)!r}" for value in values)
        found.setdefault(prompt, Program(prompt, checks))
    return list(found.values())[:count]


def body(completion: str) -> str:
    """What of a completion, which begins behind the docstring, belongs to the function: up to the first line that is
    empty or not indented."""
    first, *lines = completion.split("\n")
    return "\n".join([first, *takewhile(_inside, lines)])


def ended(completion: str) -> bool:
    """Whether more text behind it would leave the body as it is."""
    # The last line may go on.
    *lines, last = completion.split("\n")
    return not all(map(_inside, lines[1:])) or (bool(lines) and last[:1].strip() != "")


def _inside(line: str) -> bool:
    return line.startswith(" ") and line.strip() != ""


def passes(program: Program, completion: str, seconds: float = SECONDS) -> bool:
    """Whether the completed function passes its checks, in a process of its own, within `seconds`."""
    word = secrets.token_hex(8)
    text = f"{program.head}{body(completion)}\n{program.checks}\n{word}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _RUNNER],
                input=text.encode("utf-8", "replace"),
                capture_output=True,
                cwd=folder,
                env={},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode(errors="replace").strip() == word


def check_runner() -> None:
    """SystemExit where this machine does not run a right program: all programs would count as wrong."""
    if not passes(Program("def f(x):", "assert f(1) == 1"), "\n    return x"):
        raise SystemExit(f"Programs: expected {sys.executable} -I -S to run a program, got a failure. Run it by hand.")
