"""Formats that become a prompt and its completion: questions about a text (SQuAD) and multiple choice (HellaSwag)."""

from __future__ import annotations

import string
from typing import Any

from dayzero.data.rows import Dropped, Example, Reader, as_text, from_json
from dayzero.errors import DataError


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
    answers = from_json(reader.value("answers"), reader.origin, f"column {reader.name('answers')!r}")
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


def multiple_choice(reader: Reader) -> Example | Dropped:
    """`question`, `choices` and `answer`; named `ctx` and `endings`, the right ending continues the context.

    The answer is the choice's number from 0, its letter or label, or its text. Other choices only stand in the prompt.
    """
    question = reader.text("question")
    choices, labels = _choices(reader)
    at = _answer(reader, choices, labels)
    if at is None:
        return Dropped("no_answer")
    if reader.name("choices") == "endings":
        return prompt_and_completion(question, f" {choices[at].strip()}", reader.id())
    listed = "".join(f"{label}. {choice}\n" for label, choice in zip(labels, choices, strict=True))
    return prompt_and_completion(f"{question}\n{listed}Answer:", f" {labels[at]}. {choices[at]}", reader.id(), question)


def _choices(reader: Reader) -> tuple[list[str], list[str]]:
    """The choices' texts and their labels: those of `{text: [...], label: [...]}`, else A, B, C, ..."""
    where, name = reader.origin, f"column {reader.name('choices')!r}"
    found: Any = from_json(reader.value("choices"), where, name)
    labels: Any = None
    if isinstance(found, dict):
        found, labels = found.get("text"), found.get("label")
    if not isinstance(found, list) or len(found) < 2:
        raise reader.fail("choices", "a list of at least two texts")
    texts = [as_text(choice, where, name) for choice in found]
    if labels is None:
        labels = list(string.ascii_uppercase[: len(texts)])
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise DataError(f"{where}: {name} has {len(texts)} choices, which have no label each (letters reach to Z)")
    return texts, [str(label) for label in labels]


def _answer(reader: Reader, choices: list[str], labels: list[str]) -> int | None:
    """The right choice's index; None where the row does not tell (a blank, null or -1, as in hidden test sets).

    Raises DataError where a text could be either a choice's number or its text: CSV has "2" for the number 2.
    """
    value = reader.value("answer")
    if value is None or value == -1 or (isinstance(value, str) and value.strip() in ("", "-1")):
        return None
    if isinstance(value, str) and value.strip().isdecimal() and value in choices and value not in labels:
        at, number = choices.index(value), int(value)
        if at != number and number < len(choices):
            raise DataError(
                f"{reader.origin}: column {reader.name('answer')!r} holds {value!r}, the text of one choice and the "
                f"number of another, {choices[number]!r}: give its letter ({labels[at]} or {labels[number]})"
            )
    if isinstance(value, str):
        for options in (labels, choices):
            if value in options:
                return options.index(value)
        value = int(value) if value.strip().isdecimal() else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise DataError(
            f"{reader.origin}: column {reader.name('answer')!r} holds {value!r}, expected a choice's number from 0 to "
            f"{len(choices) - 1}, its label or its text"
        )
    return value
