"""Tokenise the splits of a data directory into packed, memory-mapped rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("tokenize", __doc__)
    parser.add_argument("--data", required=True, type=Path, help="directory with the splits' Parquet files")
    parser.add_argument("--tokenizer", required=True, type=Path, help="Hugging Face directory with the tokenizer")
    parser.add_argument("--output", required=True, type=Path, help="directory to make")
    parser.add_argument("--num-workers", type=int, default=1, help="processes (the result does not depend on it)")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Tokenise the splits of `args.data` into `args.output`."""
    from dayzero.config import Model, Tokenize
    from dayzero.data.tokenization import report_split, settled, tokenize_split
    from dayzero.data.tokenizer import TokenizerSource
    from dayzero.files import atomic_directory, read_json, sha256_file, write_json
    from dayzero.provenance import Clock

    clock = Clock()
    config = read_config(args.config)
    options = Tokenize.model_validate(config.get("tokenize", {}))
    model = Model.model_validate(config.get("model", {}))
    tokenizer = TokenizerSource(args.tokenizer, model.chat_template, model.trust_remote_code)
    data = read_json(args.data / "manifest.json")
    options = settled(options, data.get("source_format", "").split(", "))
    with atomic_directory(args.output) as output:
        splits = {}
        mixed = config.get("by_source") or (config.get("data") or {}).get("weights") is not None
        for name in ("train", "validation"):
            if name not in data["splits"]:
                continue
            splits[name] = tokenize_split(
                args.data / data["splits"][name]["file"],
                output / name,
                name=name,
                data_format=data["format"],
                tokenizer=tokenizer,
                options=options,
                num_workers=args.num_workers,
                reject=(config.get("data") or {}).get("on_bad_row") == "reject",
                sources=_sources(data) if mixed and name == "train" else None,
            )
            report_split(name, splits[name], options)
        manifest = {
            "format": data["format"],
            "seq_len": options.seq_len,
            "packing": options.packing,
            "splits": splits,
            "max_token_id": max(split.pop("max_token_id") for split in splits.values()),
            **tokenizer.describe(data["format"]),
            "files": {str(f.relative_to(output)): sha256_file(f) for f in sorted(output.glob("*/*"))},
            "provenance": clock.provenance(inputs={"data": sha256_file(args.data / "manifest.json")}),
        }
        write_json(output / "manifest.json", manifest)


def _sources(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Each of data.source and its training rows; the manifest names those of the other splits after them."""
    rows = data["splits"]["train"]["source_rows"]
    return [(source["source"], count) for source, count in zip(data["sources"], rows, strict=False)]


if __name__ == "__main__":
    sys.exit(main())
