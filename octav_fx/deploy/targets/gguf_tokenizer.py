"""The tokenizer of transformers in a GGUF file, so that llama.cpp splits a text as transformers does."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from octav_fx.deploy.runtimes import optional
from octav_fx.errors import OctavError

_CUT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before pairs are merged, and whether a part that is a token is taken whole; what llama.cpp calls it.
CUTS: Final[dict[tuple[str | None, bool], str]] = {
    (_CUT.replace("DIGITS", r"\p{N}{1,3}"), True): "llama-bpe",
    (_CUT.replace("DIGITS", r"\p{N}"), False): "qwen2",
    ("", False): "gpt-2",
}


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write the tokens of a tokenizer, their pairs, and the special ones; None: that there are none.

    size: of the vocabulary of the model, which may have room for more. Raises OctavError for a tokenizer that does not
    merge bytes, or that cuts a text in a way that llama.cpp has no name for here.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    gguf, vocab = optional("gguf", "gguf"), optional("gguf.vocab", "gguf")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        described = _described(folder)
        cut = _cut(described)
        try:
            tokens = vocab.BpeVocab(folder)
        except (FileNotFoundError, ValueError) as error:
            raise OctavError(f"this tokenizer is not written into GGUF files: {error}") from error
        special = vocab.SpecialVocab(folder, load_merges=True, n_vocab=size)
    # llama.cpp takes what it knows of a kind of tokenizers where a file does not say.
    special.add_special_token = {kind: _is_added(tokenizer, kind) for kind in ("bos", "eos")}
    texts, scores, _ = zip(*tokens.all_tokens(), strict=True)
    room = size - len(texts)
    if room < 0:
        raise OctavError(f"the tokenizer has {len(texts)} tokens, and the model knows {size}")
    kinds = [gguf.TokenType.NORMAL] * len(texts) + [gguf.TokenType.UNUSED] * room
    for token in described["added_tokens"]:
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model(tokens.tokenizer_model)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([*texts, *(f"[PAD{index}]" for index in range(len(texts), size))])
    writer.add_token_scores([*scores, *([0.0] * room)])
    writer.add_token_types(kinds)
    special.add_to_gguf(writer, quiet=True)


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise OctavError("this tokenizer is not written into GGUF files: it has no tokenizer.json, give the fast one")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _is_added(tokenizer: Any, kind: str) -> bool:
    """Tell whether a tokenizer puts its token for the begin, or the end, around every text."""
    place, token = {"bos": 0, "eos": -1}[kind], getattr(tokenizer, f"{kind}_token_id")
    return token is not None and [token] == tokenizer("a")["input_ids"][place:][:1]


def _cut(described: Mapping[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a tokenizer cuts a text."""
    # It normalizes nothing: text is in the composed form already, as nearly all is.
    is_as_written = (described.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"}
    takes_whole = bool(described["model"].get("ignore_merges"))
    if is_as_written and (found := CUTS.get((_pattern(described.get("pre_tokenizer") or {}), takes_whole))):
        return found
    raise OctavError(
        "this tokenizer cuts a text otherwise than those of Llama 3, Qwen and GPT-2, and llama.cpp would cut it in a "
        "way of its own: export without a tokenizer, and give llama.cpp tokens"
    )


def _pattern(before: Mapping[str, Any]) -> str | None:
    """Return the pattern that cuts a text into parts of bytes; "" for that of GPT-2, None for another way."""
    steps = before.get("pretokenizers", [before])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return "" if last.get("use_regex", True) else None
    (first, *more), isolated = splits, {"behavior": "Isolated", "invert": False}
    if more or first.get("type") != "Split" or last.get("use_regex", True) or not isolated.items() <= first.items():
        return None
    pattern: str | None = first["pattern"].get("Regex")
    return pattern
