"""SQuAD v1.1: the answer that a window's logits give, exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from examples.squad.data import Question, Window

# Starts and ends that are tried, and the longest answer in tokens: those of BERT's own recipe.
N_BEST: Final = 20
MAX_ANSWER: Final = 30

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def answer(window: Window, context: str, start: Tensor, end: Tensor) -> tuple[float, str] | None:
    """Return the best span of a window: (sum of its two logits, its text); None where no pair of the n best is a span.

    start, end [max_seq]: logits. A span lies in the context, ends where it begins or later, and is not too long.
    """
    inside = window.characters[:, 0] >= 0
    n_best = min(N_BEST, int(inside.sum()))
    firsts = start.float().masked_fill(~inside, -torch.inf).topk(n_best)
    lasts = end.float().masked_fill(~inside, -torch.inf).topk(n_best)
    scores = firsts.values[:, None] + lasts.values
    length = lasts.indices - firsts.indices[:, None] + 1
    scores = scores.masked_fill((length < 1) | (length > MAX_ANSWER), -torch.inf)
    if not n_best or not torch.isfinite(scores.max()):
        return None
    i, j = divmod(int(scores.argmax()), n_best)
    first, last = window.characters[firsts.indices[i]], window.characters[lasts.indices[j]]
    return scores[i, j].item(), context[int(first[0]) : int(last[1])]


def normalized(text: str) -> str:
    """Return the text as the official script does: lower case, no punctuation, no articles, words one blank apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(found: str, truth: str) -> float:
    """Return 1 where both are the same when normalized, else 0."""
    return float(normalized(found) == normalized(truth))


def f1(found: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the normalized words, each as often as it occurs."""
    ours, theirs = normalized(found).split(), normalized(truth).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def scores(questions: Sequence[Question], found: Mapping[int, str]) -> dict[str, float]:
    """Return percentages over all questions, each against the answer that fits best; one that has no answer counts 0.

    found: place of a question -> text.
    """
    totals = [0.0, 0.0]
    for place, question in enumerate(questions):
        for i, metric in enumerate((exact_match, f1)):
            if place in found:
                totals[i] += max((metric(found[place], text) for text, _ in question.answers), default=0.0)
    exact, mean = (100 * total / len(questions) for total in totals)
    return {"exact_match": exact, "f1": mean, "questions": len(questions)}
