"""Train a byte-level BPE tokenizer on a data directory's training text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("train_tokenizer", __doc__)
    parser.add_argument("--data", required=True, type=Path, help="directory with the splits' Parquet files")
    parser.add_argument("--output", required=True, type=Path, help="directory to make")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Train the tokenizer that `config.model.tokenizer` asks for into `args.output`."""
    from dayzero.config import Model
    from dayzero.data.tokenizer_training import save_tokenizer, train_tokenizer, training_texts
    from dayzero.errors import ConfigError
    from dayzero.files import atomic_directory, sha256_file, write_json
    from dayzero.provenance import Clock

    clock = Clock()
    model = Model.model_validate(read_config(args.config).get("model", {}))
    if model.tokenizer is None:
        raise ConfigError("model.tokenizer is null: set model.tokenizer.vocab_size to train a tokenizer")
    tokenizer = train_tokenizer(training_texts(args.data), model.tokenizer.vocab_size)
    with atomic_directory(args.output) as output:
        save_tokenizer(tokenizer, output)
        manifest = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "files": {file.name: sha256_file(file) for file in sorted(output.iterdir())},
            "provenance": clock.provenance(inputs={"data": sha256_file(args.data / "manifest.json")}),
        }
        write_json(output / "manifest.json", manifest)


if __name__ == "__main__":
    sys.exit(main())
