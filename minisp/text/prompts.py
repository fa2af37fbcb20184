"""What a model is asked for, or given to go on from, so that it writes text of many kinds.

One whose tokenizer has a chat template is asked for each kind of text, and the answer is begun for it; another one
continues an opening of that kind.
"""

from typing import Any

KINDS = (
    ("Write a short story.", "Once upon a time there was"),
    ("Write an encyclopedia article about a town.", "The town lies in the north of the province. Its history begins"),
    ("Write a program in C.", "#include <stdio.h>\n#include <stdlib.h>\n\n"),
    ("Schreibe einen langen Aufsatz auf Deutsch.", "In diesem Aufsatz geht es um die Frage, ob"),
    ("Write the minutes of a meeting.", "Minutes of the meeting\n\nPresent:"),
    ("Write a contract between two companies.", "THIS AGREEMENT is made between the parties below. 1. Definitions"),
    ("State a theorem and prove it.", "Theorem 1. Let"),
    ("Write a news report.", "The government said on Tuesday that"),
    ("Write a Python module with several functions.", 'import os\nimport sys\n\n\ndef main():\n    """'),
    ("Écris un long article en français.", "Depuis plusieurs années, la question de"),
    ("Write a chapter of a novel.", "Chapter 1\n\nIt was late in the evening when"),
    ("Explain how an engine works.", "An engine converts fuel into motion. The main parts are"),
    ("Write a letter to a friend.", "Dear friend,\n\nThank you for your letter."),
    ("Write a scientific paper with abstract and introduction.", "Abstract. In this paper we study"),
    ("Write a recipe.", "Ingredients:\n\n- 2 cups of flour\n-"),
    ("Write a web page in HTML.", "<!DOCTYPE html>\n<html>\n<head>\n<title>"),
    ("Write a dialogue between two people.", "— Where have you been?\n— I was"),
    ("Write the biography of a scientist.", "She was born in 1871, the daughter of a teacher, and"),
    ("Escribe un ensayo largo en español.", "La historia de este país comienza con"),
    ("Write the documentation of a programming library.", "Usage\n=====\n\nInstall the library and import it:\n\n"),
    ("Write an essay about history.", "The causes of the war have been discussed ever since. First,"),
    ("Write a school exercise in mathematics with its solution.", "Exercise 1. Solve the equation"),
    ("Write a poem.", "O wind that comes across the sea,\n"),
    ("Write a review of a film.", "The film begins slowly, but"),
    ("Write a law.", "Section 1. Short title. This Act may be cited as"),
    ("Write SQL statements for a database.", "CREATE TABLE customers (\n    id INTEGER PRIMARY KEY,\n"),
    ("Give advice on health and nutrition.", "Doctors recommend a balanced diet. To stay healthy,"),
    ("请用中文写一篇长文章。", "中国是一个历史悠久的国家，"),
    ("Write a speech.", "Ladies and gentlemen, we have come together today because"),
    ("Write the rules of a sports club.", "Rules of the club. 1. Membership is open to"),
    ("Write a table of data as CSV.", "date,name,city,amount\n2019-03-01,"),
    ("Write a question and its answers from an internet forum.", "Q: How do I"),
)
"""What the model is asked for, and how such a text opens. Every run of a few differs in subject, form and language."""


def prompts_of(tokenizer: Any, vocab_size: int) -> tuple[str | None, list[list[int]]]:
    """What the prompts are, and the tokens of one for each of `KINDS`: instructions, else openings, else none.

    A kind is left out where the tokenizer has no tokens for it, or tokens that the model does not have.
    """
    for how, prompts in (
        ("instructions in its chat template, each with the opening of its answer", _asked),
        ("openings of texts", _opened),
    ):
        found = [] if tokenizer is None else prompts(tokenizer)
        if known := [prompt for prompt in found if prompt and max(prompt) < vocab_size]:
            return how, known
    return None, []


def _asked(tokenizer: Any) -> list[list[int]]:
    """Chats as tokens: each kind's instruction, and its opening as the start of the answer, which keeps small models
    from answering in English, or about the instruction. None without a template, or where it leaves instructions out.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    texts = []
    for instruction, opening in KINDS:
        chat = [{"role": "user", "content": instruction}]
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        # A template is a program that comes with the model: it may raise anything.
        except Exception:
            return []
        if instruction not in text:
            return []
        texts.append(text + opening)
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def _opened(tokenizer: Any) -> list[list[int]]:
    """The openings as tokens, with what the tokenizer puts before a text and without the end that it may put behind."""
    prompts = [tokenizer(opening, verbose=False)["input_ids"] for _, opening in KINDS]
    end = getattr(tokenizer, "eos_token_id", None)
    return [prompt[:-1] if prompt[-1:] == [end] else prompt for prompt in prompts]
