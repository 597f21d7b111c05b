"""A tokenizer as GGUF files have it: byte-level BPE by the name of its splitting, or SentencePiece's by its scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from appliance.gguf_words import name_of
from appliance.release.gguf_layouts import unknown

_SPACE = "▁"
_REPLACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPENDS = {"type": "Prepend", "prepend": _SPACE}
_COMPOSES = {"type": "NFC"}
"""llama.cpp does not, which changes the few texts that have letters and their accents apart."""
_SPLITS_NOTHING = {**{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}}
"""Spaces, of which the normaliser has left none."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Write the tokenizer in `folder`, of a model with `size` embeddings. Raises InvalidInput for one not known."""
    described = json.loads((folder / "tokenizer.json").read_bytes())
    if described["model"]["type"] != "BPE":
        raise unknown(f"tokenizers of type {described['model']['type']}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = {id: word for word, id in tokenizer.get_vocab().items()}
    normal, unused = gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    types = [normal if id in words else unused for id in range(size)]
    of_pieces = bool(described["model"].get("byte_fallback"))
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.rstrip or token.lstrip or token.single_word:
            raise unknown(f"a token that takes the spaces beside it, such as {token.content}")
        if id >= size:
            continue
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        if of_pieces and not token.special:
            words[id] = words[id].replace(_SPACE, " ")
    tokens = [words.get(id, f"[PAD{id}]") for id in range(size)]
    if of_pieces:
        _add_pieces(writer, described, tokens, types)
    else:
        splitter = name_of(described)
        if splitter is None:
            raise unknown("this tokenizer's way of splitting words")
        if (described["normalizer"] or _COMPOSES) != _COMPOSES:
            raise unknown("this tokenizer's way of changing texts")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=not of_pieces).add_to_gguf(writer, quiet=True)


def _add_pieces(writer: Any, described: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """What SentencePiece's BPE has: of two pieces the one with the higher score is joined first."""
    normalizer = described["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if steps not in ([_REPLACES], [_PREPENDS, _REPLACES]):
        raise unknown("this tokenizer's way of writing spaces")
    if (described["pre_tokenizer"] or _SPLITS_NOTHING) != _SPLITS_NOTHING:
        raise unknown("this tokenizer's way of splitting words")
    merges = [tuple(one if isinstance(one, list) else one.split(" ")) for one in described["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    # It joins any two pieces that make a third.
    pieces = described["model"]["vocab"].keys() - {one["content"] for one in described["added_tokens"]}
    known = set(merges)
    parts = ((word[:at], word[at:]) for word in pieces if not _BYTE.fullmatch(word) for at in range(1, len(word)))
    if any(one not in known and one[0] in pieces and one[1] in pieces for one in parts):
        raise unknown("a tokenizer that joins fewer pieces than SentencePiece does")
    for id, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            types[id] = gguf.TokenType.BYTE
        elif token == described["model"].get("unk_token"):
            types[id] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_add_space_prefix(_PREPENDS in steps)
