"""A tiny SQuAD v1.1 and a tiny BERT with random weights."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "house", "tree", "river", "hill")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *WORDS, "the", "is", "what", "where", "?", ".", "##s")
QUESTIONS = {"train-v1.1.json": 9, "dev-v1.1.json": 7}


def entry(context: str, key: str, question: str, *answers: str) -> dict[str, Any]:
    given = [{"text": text, "answer_start": context.index(text)} for text in answers]
    return {"context": context, "qas": [{"id": key, "question": question, "answers": given}]}


def file(*paragraphs: dict[str, Any]) -> dict[str, Any]:
    return {"version": "1.1", "data": [{"title": "all", "paragraphs": list(paragraphs)}]}


def write(data: Path) -> Path:
    """Contexts of 12 to 60 words, some of them longer than a window of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    data.mkdir(parents=True)
    for name, count in QUESTIONS.items():
        paragraphs = []
        for i in range(count):
            drawn = torch.randint(len(WORDS), (12 + 6 * i,), generator=generator).tolist()
            context = " ".join(WORDS[word] for word in drawn).capitalize() + "."
            words = context.split()
            texts = [" ".join(words[place : place + 2]).rstrip(".") for place in (i % 9 + 1, -3)]
            paragraphs.append(entry(context, f"{name}{i}", f"What is {words[0]} {words[1]}?", *texts))
        (data / name).write_text(json.dumps(file(*paragraphs)), encoding="utf-8")
    return data


def bert(folder: Path, dropout: float = 0.1) -> Path:
    """A folder as transformers saves it."""
    import transformers

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertForQuestionAnswering(config).save_pretrained(str(folder))
    return folder
