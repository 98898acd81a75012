"""transformers' Trainer on a quantized model: one line more than in float.

    pip install transformers accelerate
    python -m examples.trainer

A small BERT learns whether a text has more letters of the first half of the alphabet than of the second.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

import octav_fx
from octav_fx import zoo

LENGTH, FIRST = 16, 5


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return texts of 26 letters, the numbers from FIRST on, and their labels."""
    letters = torch.randint(26, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = (letters < 13).sum(1) > LENGTH // 2
    return [{"input_ids": row + FIRST, "labels": label.long()} for row, label in zip(letters, labels, strict=True)]


def main(folder: Path | None = None, steps: int = 300) -> dict[str, float]:
    """Train and evaluate; return the accuracy in float mode's keys and of the model that from_pretrained reads."""
    # Where torch is a build for CPUs, transformers wants two schemas of torchvision.
    zoo.torchvision()
    import transformers

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=FIRST + 26, num_attention_heads=4, **size)
    model = transformers.BertForSequenceClassification(config)
    train, test = texts(2048, seed=1), texts(512, seed=2)

    batch = {key: torch.stack([row[key] for row in train[:8]]) for key in train[0]}
    q = octav_fx.quantize(model, batch, octav_fx.Config(weight_bits=4, activation_bits=8))  # the line more

    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        arguments = transformers.TrainingArguments(
            output_dir=str(place),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=2e-3,
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=q, args=arguments, train_dataset=train, eval_dataset=test, compute_metrics=_accuracy
        )
        trainer.train()
        found = {"quantized": trainer.evaluate()["eval_accuracy"]}
        # The float model's own format, with the trained weights; quantize it again to go on.
        trainer.save_model(str(place / "saved"))
        saved = transformers.BertForSequenceClassification.from_pretrained(place / "saved").eval()
    ids = torch.stack([row["input_ids"] for row in test])
    with torch.no_grad():
        right = saved(input_ids=ids).logits.argmax(1) == torch.stack([row["labels"] for row in test])
    found["its weights in float"] = float(right.float().mean())
    print(octav_fx.coverage(q))
    print(", ".join(f"{name}: {value:.1%}" for name, value in found.items()))
    return found


def _accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


if __name__ == "__main__":
    main()
