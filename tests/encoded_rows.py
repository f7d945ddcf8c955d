"""Texts to encode, and the documents that the encoder makes of rows."""

import numpy as np
from dayzero.config import Tokenize
from dayzero.data.documents import DocumentEncoder

WORDS = [
    *[
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "worst",
        "best",
        "times",
        "answer",
        "what",
        "is",
        "42",
        "☃",
    ],
    "\n\n",
]


def sentences(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for _ in range(count)]


def documents(tokenizer, data_format, rows, **options):
    encoder = DocumentEncoder(tokenizer, data_format, Tokenize(**{"seq_len": 64, **options}))
    return [[(ids.tolist(), mask.tolist()) for ids, mask in encoder.encode(row)] for row in rows], encoder.counts
