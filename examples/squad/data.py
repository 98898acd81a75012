"""SQuAD v1.1's JSON, and the windows over a context that BERT is shown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from octav_fx import OctavError

# Of BERT's own recipe for SQuAD: tokens of a question, and from one window to the next.
MAX_QUESTION: Final = 64
DOC_STRIDE: Final = 128

LAYOUT: Final = """expected, as in train-v1.1.json and dev-v1.1.json:
  {"data": [{"paragraphs": [{"context": TEXT, "qas": [
    {"id": TEXT, "question": TEXT, "answers": [{"text": TEXT, "answer_start": CHARACTER}]}]}]}]}"""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its context, and the answers that people gave: (text, its first character in the context)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Window:
    """What BERT sees at once: [CLS] question [SEP] part of the context [SEP], padded."""

    # Place of the question in the file.
    question: int
    # [3, max_seq]: input_ids, token_type_ids, attention_mask.
    inputs: Tensor
    # [max_seq, 2]: first and behind the last character of each token in the context; (-1, -1) outside of it.
    characters: Tensor
    # First and last token of the answer; (0, 0) where it is not in this window.
    answer: tuple[int, int]


class Windows(Dataset[tuple[Tensor, Tensor, int]]):
    """(inputs [3, max_seq], first and last token of the answer [2], place of the window)."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        window = self.windows[index]
        return window.inputs.long(), torch.tensor(window.answer), index


def read(path: Path) -> list[Question]:
    """Return the questions of a file. Raises OctavError, with the place, where it is not as LAYOUT says."""
    if not path.is_file():
        raise OctavError(f"no file {path}\n{LAYOUT}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OctavError(f"{path}: no JSON: {error}\n{LAYOUT}") from error
    questions = []
    where = str(path)
    for i, article in enumerate(_get(found, "data", list, where)):
        where = f"{path}: data[{i}]"
        for j, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            context = _get(paragraph, "context", str, where)
            for k, entry in enumerate(_get(paragraph, "qas", list, where)):
                questions.append(_question(entry, context, f"{where}.qas[{k}]"))
    if not questions:
        raise OctavError(f"{path}: no question\n{LAYOUT}")
    return questions


def windows(questions: list[Question], tokenizer: Any, max_seq: int, *, is_training: bool) -> list[Window]:
    """Return the windows of all questions; in training with the first answer, and an OctavError where one is empty.

    tokenizer: a fast one of transformers. Windows begin DOC_STRIDE tokens apart, or one behind the other where the
    question leaves less room than that.
    """
    found = []
    for place, question in enumerate(questions):
        if is_training and not (question.answers and question.answers[0][0].strip()):
            raise OctavError(f"question {question.id}: a training question needs an answer")
        found += _of_question(place, question, tokenizer, max_seq, is_training)
    return found


def _question(entry: Any, context: str, where: str) -> Question:
    answers = []
    for n, answer in enumerate(_get(entry, "answers", list, where)):
        text = _get(answer, "text", str, f"{where}.answers[{n}]")
        start = _get(answer, "answer_start", int, f"{where}.answers[{n}]")
        if start < 0 or context[start : start + len(text)] != text:
            raise OctavError(f"{where}.answers[{n}]: the context does not have {text!r} at character {start}")
        answers.append((text, start))
    return Question(_get(entry, "id", str, where), _get(entry, "question", str, where), context, tuple(answers))


def _get(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise OctavError(f"{where}: no {key!r} that is a {kind.__name__}\n{LAYOUT}")
    return value[key]


def _of_question(place: int, question: Question, tokenizer: Any, max_seq: int, is_training: bool) -> list[Window]:
    asked = tokenizer(question.question, add_special_tokens=False, return_offsets_mapping=True)
    offsets = asked["offset_mapping"][:MAX_QUESTION]
    # As much text as the first tokens stand for.
    text = question.question[: offsets[-1][1]] if offsets else ""
    room = max_seq - len(offsets) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise OctavError(f"question {question.id}: {len(offsets)} tokens leave no room for a context in {max_seq}")
    encoded = tokenizer(
        text,
        question.context,
        truncation="only_second",
        max_length=max_seq,
        # What two windows have in common.
        stride=max(0, room - DOC_STRIDE),
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    found = []
    for i in range(len(encoded["input_ids"])):
        rows = [encoded[name][i] for name in ("input_ids", "token_type_ids", "attention_mask")]
        pairs = zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
        characters = [pair if part == 1 else (-1, -1) for pair, part in pairs]
        answer = _answer(question, encoded, i) if is_training else (0, 0)
        # 88 000 windows of the training set: half the memory of what they are given as.
        int32 = torch.int32
        found.append(Window(place, torch.tensor(rows, dtype=int32), torch.tensor(characters, dtype=int32), answer))
    return found


def _answer(question: Question, encoded: Any, window: int) -> tuple[int, int]:
    text, start = question.answers[0]
    first = start + len(text) - len(text.lstrip())
    last = start + len(text.rstrip()) - 1
    tokens = [encoded.char_to_token(window, character, sequence_index=1) for character in (first, last)]
    return (tokens[0], tokens[1]) if None not in tokens else (0, 0)
