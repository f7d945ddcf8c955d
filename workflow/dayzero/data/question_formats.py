"""Formats that become a prompt and its completion: questions about a text (SQuAD) and multiple choice (HellaSwag)."""

from __future__ import annotations

import re
import string
from typing import Any

from dayzero.data.rows import Dropped, Example, Reader, as_text, from_json, scalar_text
from dayzero.errors import DataError

_LISTED = re.compile(r"""\s*(\{|\[\s*["'{\[\]])""")
"""How a list or an object begins that was to be JSON text, or was written as another language has it."""


def prompt_and_completion(
    prompt: str, completion: str, row_id: str | None, question: str | None = None
) -> Example | Dropped:
    """The example of the two, dropped where the completion is blank; `question` tells rows apart, else the prompt."""
    if not completion.strip():
        return Dropped("empty")
    columns = {"prompt": prompt, "completion": completion}
    return Example(columns, prompt if question is None else question, len(prompt) + len(completion), row_id)


def squad(reader: Reader) -> Example | Dropped:
    """`context`, `question` and `answers` (`{text: [...]}`, a list, or a text); the first answer is the one learnt."""
    context, question = reader.text("context"), reader.text("question")
    answers = _answers(reader)
    if isinstance(answers, dict):
        answers = answers.get("text")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise reader.fail("answers", "{text: [...]}, a list or a text")
    if not answers:
        return Dropped("no_answer")
    first: Any = answers[0]
    first = first.get("text") if isinstance(first, dict) else first
    answer = as_text(first, reader.origin, f"column {reader.name('answers')!r}").strip()
    prompt = f"{context}\n\nQuestion: {question}\nAnswer:"
    return (
        prompt_and_completion(prompt, f" {answer}", reader.id(), f"{question}\n{context}")
        if answer
        else Dropped("empty")
    )


def _answers(reader: Reader) -> Any:
    value = reader.value("answers")
    try:
        return from_json(value, reader.origin, f"column {reader.name('answers')!r}")
    except DataError:
        if _LISTED.match(value):
            raise
        return value  # a text that only begins with a bracket, like "[1] says so"


def multiple_choice(reader: Reader) -> Example | Dropped:
    """`question`, `choices` and `answer`; named `ctx` and `endings`, the right ending continues the context.

    The answer is the choice's number from 0, its letter or label, or its text. Other choices only stand in the prompt.
    """
    question = reader.text("question")
    choices, labels, are_texts = _choices(reader)
    at = _answer(reader, choices, labels, are_texts)
    if at is None:
        return Dropped("no_answer")
    if reader.name("choices") == "endings":
        return prompt_and_completion(question, f" {choices[at].strip()}", reader.id())
    listed = "".join(f"{label}. {choice}\n" for label, choice in zip(labels, choices, strict=True))
    return prompt_and_completion(f"{question}\n{listed}Answer:", f" {labels[at]}. {choices[at]}", reader.id(), question)


def _choices(reader: Reader) -> tuple[list[str], list[str], bool]:
    """The choices' texts, and their labels: those of `{text: [...], label: [...]}`, else A, B, C, ...

    Also whether the choices were all texts: a file can have numbers there.
    """
    where, name = reader.origin, f"column {reader.name('choices')!r}"
    found: Any = from_json(reader.value("choices"), where, name)
    labels: Any = None
    if isinstance(found, dict):
        found, labels = found.get("text"), found.get("label")
    if not isinstance(found, list) or len(found) < 2:
        raise reader.fail("choices", "a list of at least two texts")
    if None in found:
        raise DataError(f"{where}: {name} holds a choice that is null: write all of them out, or take the row out")
    texts = [scalar_text(choice, where, name) for choice in found]
    if labels is None:
        labels = list(string.ascii_uppercase[: len(texts)])
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise DataError(f"{where}: {name} has {len(texts)} choices, which have no label each (letters reach to Z)")
    for label in labels:
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise DataError(f"{where}: {name} has the label {label!r}, expected texts or integers")
    return texts, [str(label) for label in labels], all(isinstance(choice, str) for choice in found)


def _answer(reader: Reader, choices: list[str], labels: list[str], are_texts: bool) -> int | None:
    """The right choice's index; None where the row does not tell (a blank, null or -1, as in hidden test sets).

    Where labels are numbers, a number is one of them. Raises DataError for what could be a choice's number as well as
    its text: CSV has "2" for the number 2, and a file's choices may be numbers.
    """
    value = reader.value("answer")
    if value is None or value == -1 or (isinstance(value, str) and value.strip() in ("", "-1")):
        return None
    where = f"{reader.origin}: column {reader.name('answer')!r} holds {value!r}"
    text = isinstance(value, str)
    written = value if text else scalar_text(value, reader.origin, f"column {reader.name('answer')!r}")
    written = written.strip() if written.strip().isdecimal() else written
    if written in labels:
        return labels.index(written)
    found = [choices.index(written)] if (text or not are_texts) and written in choices else []
    numbered = any(map(str.isdecimal, labels))
    if not numbered and written.isdecimal() and int(written) < len(choices):
        found.append(int(written))
    if not found:
        wanted = f"one of the labels {', '.join(labels)}"
        wanted = wanted if numbered else f"a choice's number from 0 to {len(choices) - 1}, its label"
        raise DataError(f"{where}, expected {wanted} or its text")
    if found[0] != found[-1]:
        raise DataError(
            f"{where}, the text of one choice and the number of another, {choices[found[-1]]!r}: give its letter "
            f"({labels[found[0]]} or {labels[found[-1]]})"
        )
    return found[0]
