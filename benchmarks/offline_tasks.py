"""Questions with candidate answers, made from a text at hand, from templates and from a seed: nothing is downloaded.

A question is put as text; its answer is the candidate to which the model gives the largest likelihood after it. Every
function here is deterministic for its arguments.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offline_programs import Program, programs


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Words of context and of each candidate of a continuation.
CONTEXT, CONTINUATION = 16, 6
# Words before the last word of a sentence: at least, at most.
SENTENCE_CONTEXT = (40, 80)
# The most frequent words of a text are no candidates: their likelihood hangs on grammar alone.
FREQUENT = 100
NOUNS = _words(
    "river lamp stone garden window ladder candle bottle market forest village hammer mirror blanket pencil basket "
    "bridge ticket violin pocket saddle shovel carpet kettle"
)
COLOURS = _words("red blue green black white brown pink grey gold purple orange yellow")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prefix: text before the question, which neighbouring questions may share.
        question: the question itself, after the prefix.
        candidates: different texts that might follow.
        answer: the place of the right one.
    """

    prefix: str
    question: str
    candidates: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """Items of one kind. `chance`: share that a guess gets right, of programs 0."""

    name: str
    items: Sequence[Question] | Sequence[Program]

    @property
    def chance(self) -> float:
        first = self.items[0]
        return 1 / len(first.candidates) if isinstance(first, Question) else 0.0


def _question(rng: random.Random, prefix: str, question: str, right: str, wrong: Sequence[str]) -> Question:
    """The right candidate at a random place among the wrong ones."""
    candidates = list(wrong)
    place = rng.randint(0, len(wrong))
    candidates.insert(place, right)
    return Question(prefix, question, tuple(candidates), place)


# Text


def continuations(text: str, count: int, rng: random.Random) -> list[Question]:
    """Which of four pieces of the text follows? The wrong ones follow the next questions, so that all are alike."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    count = min(count, len(words) // (CONTEXT + CONTINUATION))
    starts = [i * (len(words) // max(count, 1)) for i in range(count)]
    edges = [(words[s][0], words[s + CONTEXT - 1][1], words[s + CONTEXT + CONTINUATION - 1][1]) for s in starts]
    pieces = [(text[begin:middle], text[middle:end]) for begin, middle, end in edges]
    if count < 4:
        return []
    return [
        _question(rng, context, "", right, [pieces[(i + step) % count][1] for step in (1, 2, 3)])
        for i, (context, right) in enumerate(pieces)
    ]


def last_words(text: str, count: int, rng: random.Random) -> list[Question]:
    """Which word ends the sentence, of five that have all occurred in the sentences before it?

    At most one question per paragraph; the word itself has occurred before too, as in the LAMBADA task.
    """
    frequent = {word for word, _ in Counter(re.findall(r"[a-z]+", text.lower())).most_common(FREQUENT)}
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?= )", text):
        words = paragraph.split()
        for end in range(len(words) - 1, SENTENCE_CONTEXT[0], -1):
            word = words[end].rstrip(".")
            # A sentence ends with "word." or, in tokenised text, with "word ."
            ends = words[end].endswith(".") or words[end + 1 : end + 2] == ["."]
            before = words[max(0, end - SENTENCE_CONTEXT[1]) : end]
            if not ends or not _is_content(word, frequent) or word not in before:
                continue
            others = {w for w in before if _is_content(w, frequent) and w.istitle() == word.istitle()} - {word}
            if len(others) >= 4:
                wrong = [f" {other}" for other in rng.sample(sorted(others), 4)]
                found.append(_question(rng, " ".join(before), "", f" {word}", wrong))
                break
    return _spread(found, count)


def _is_content(word: str, frequent: set[str]) -> bool:
    return word.isalpha() and len(word) >= 4 and word.lower() not in frequent


def _spread(questions: list[Question], count: int) -> list[Question]:
    """`count` of them at even distances."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


# Numbers


def sums(count: int, rng: random.Random, *, sign: str, largest: int) -> list[Question]:
    """a + b or a − b with numbers up to `largest`, after four examples; the wrong answers are near misses."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1) if sign == "+" or a >= b]
    value: Callable[[int, int], int] = (lambda a, b: a + b) if sign == "+" else (lambda a, b: a - b)
    chosen = rng.sample(pairs, min(count + 4, len(pairs)))
    examples, asked = chosen[:4], chosen[4:]
    steps = (-2, -1, 1, 2, 3) if largest < 10 else (-10, -2, -1, 1, 2, 10)
    prefix = "".join(f"{a} {sign} {b} = {value(a, b)}\n" for a, b in examples)
    questions = []
    for a, b in asked:
        right = value(a, b)
        near = [right + step for step in steps if right + step >= 0]
        wrong = [f" {number}" for number in rng.sample(near, 3)]
        questions.append(_question(rng, prefix, f"{a} {sign} {b} =", f" {right}", wrong))
    return questions


def comparisons(count: int, rng: random.Random) -> list[Question]:
    """Which of two numbers is larger, after six examples?"""

    def ask(a: int, b: int) -> str:
        return f"Question: Which number is larger, {a} or {b}?\nAnswer:"

    pairs = [rng.sample(range(1, 100), 2) for _ in range(count + 6)]
    prefix = "".join(f"{ask(a, b)} {max(a, b)}\n\n" for a, b in pairs[:6])
    return [_question(rng, prefix, ask(a, b), f" {max(a, b)}", [f" {min(a, b)}"]) for a, b in pairs[6:]]


# What stands earlier in the context


def lookups(count: int, rng: random.Random) -> list[Question]:
    """The colour of one of eight things, named once before; the wrong answers are colours of others."""
    questions = []
    for _ in range(count):
        things, colours = rng.sample(NOUNS, 8), rng.sample(COLOURS, 8)
        place = rng.randrange(8)
        told = " ".join(f"The {thing} is {colour}." for thing, colour in zip(things, colours, strict=True))
        wrong = [f" {colour}" for colour in rng.sample(colours[:place] + colours[place + 1 :], 3)]
        prefix = f"{told} Remember: the {things[place]} is"
        questions.append(_question(rng, prefix, "", f" {colours[place]}", wrong))
    return questions


def repetitions(count: int, rng: random.Random) -> list[Question]:
    """The next word of a list that is said a second time; the wrong answers are its other words."""
    questions = []
    for _ in range(count):
        words = rng.sample(NOUNS, 12)
        place = rng.randrange(3, 11)
        prefix = f"{' '.join(words)}\n{' '.join(words[:place])}"
        wrong = [f" {word}" for word in rng.sample(words[:place] + words[place + 1 :], 3)]
        questions.append(_question(rng, prefix, "", f" {words[place]}", wrong))
    return questions


# Grammar: two continuations of one beginning, of which one is a sentence

PEOPLE = _words("teacher farmer doctor writer singer lawyer driver painter soldier sailor")
THINGS = _words("picture letter report story painting drawing book statue")
MALE, FEMALE = _words("boy man king uncle brother father"), _words("girl woman queen aunt sister mother")
VERBS = _words("hurt saw taught praised introduced reminded")
PARTICIPLES = tuple(
    pair.split("/")
    for pair in _words(
        "eaten/ate broken/broke written/wrote taken/took forgotten/forgot hidden/hid stolen/stole chosen/chose "
        "drawn/drew given/gave"
    )
)


def agreements(count: int, rng: random.Random) -> list[Question]:
    """The verb follows the subject, not the noun of the other number that stands between."""
    questions = []
    for _ in range(count):
        head, other = rng.choice(PEOPLE), rng.choice(THINGS)
        plural = rng.random() < 0.5
        subject = f"{head}s" if plural else head
        between = f"{other}" if plural else f"{other}s"
        linked = rng.choice(
            [f"near the {between}", f"with the {between}", f"that the {between} {'shows' if plural else 'show'}"]
        )
        verbs = rng.choice([(" is", " are"), (" was", " were"), (" has", " have")])
        end = rng.choice([" not", " always", " never"])
        right, wrong = (verbs[1], verbs[0]) if plural else verbs
        questions.append(_question(rng, "", f"The {subject} {linked}", right + end, [wrong + end]))
    return questions


def reflexives(count: int, rng: random.Random) -> list[Question]:
    """himself or herself, by the subject, with someone of the other kind nearby."""
    questions = []
    for _ in range(count):
        kinds = [(rng.choice(MALE), " himself"), (rng.choice(FEMALE), " herself")]
        rng.shuffle(kinds)
        (subject, right), (other, wrong) = kinds
        verb = rng.choice(VERBS)
        person = rng.choice(PEOPLE)
        question = f"The {subject} who met the {other} of the {person} {verb}"
        questions.append(_question(rng, "", question, f"{right}.", [f"{wrong}."]))
    return questions


def participles(count: int, rng: random.Random) -> list[Question]:
    """has eaten, not has ate."""
    questions = []
    for _ in range(count):
        right, wrong = rng.choice(PARTICIPLES)
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        have = rng.choice(["has already", "has never", "had often", "has"])
        question = f"The {person} {have}"
        questions.append(_question(rng, "", question, f" {right} the {thing}.", [f" {wrong} the {thing}."]))
    return questions


def make_tasks(text: str, neutral: dict[str, str], count: int, seed: int) -> list[Task]:
    """All tasks, about `count` items each."""

    def rng(name: str) -> random.Random:
        # A task's items do not depend on which other tasks there are.
        return random.Random(zlib.crc32(f"{seed} {name}".encode()))

    makers: dict[str, Callable[[random.Random], list[Question]]] = {
        "continuation": lambda r: continuations(text, count, r),
        "last word": lambda r: last_words(text, count, r),
        "addition, one digit": lambda r: sums(count, r, sign="+", largest=9),
        "addition, two digits": lambda r: sums(count, r, sign="+", largest=99),
        "subtraction, one digit": lambda r: sums(count, r, sign="-", largest=9),
        "subtraction, two digits": lambda r: sums(count, r, sign="-", largest=99),
        "comparison": lambda r: comparisons(count, r),
        "lookup": lambda r: lookups(count, r),
        "repetition": lambda r: repetitions(count, r),
        "agreement": lambda r: agreements(count, r),
        "reflexive": lambda r: reflexives(count, r),
        "participle": lambda r: participles(count, r),
    }
    if neutral:
        each = count // len(neutral)
        makers["continuation, neutral texts"] = lambda r: [
            question for foreign in neutral.values() for question in continuations(foreign, each, r)
        ]
    made = [Task(name, maker(rng(name))) for name, maker in makers.items()]
    if empty := [task.name for task in made if not task.items]:
        raise SystemExit(f"Tasks: expected text enough for {count} items each, got none for {empty}. Pass more text.")
    return [*made, Task("programs", programs(count, seed))]
