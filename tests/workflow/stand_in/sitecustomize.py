"""A stand-in for the stages where only the graph of jobs is under test: on PYTHONPATH it makes every Python started as
`python -m dayzero.stages.X` write X's declared outputs, with its command line as content, and end.

resolve_config is cheap and runs for real. The stage whose output folder is STAND_IN_FAILS fails instead.
"""

import os
import sys
import time
from pathlib import Path

PLOTS = ("loss", "scores", "throughput", "memory", "stage_time", "document_lengths", "label_share", "languages")
OUTPUTS = {
    "fetch_data": ["manifest.json"],
    "fetch_model": ["manifest.json"],
    "check_data": ["manifest.json"],
    "train_tokenizer": ["manifest.json"],
    "tokenize": ["manifest.json"],
    "train": ["metrics.jsonl", "summary.json"],
    "export": ["manifest.json"],
    "evaluate": ["results.json", "samples.jsonl"],
    "verify_serving": ["parity.json"],
    "report": ["index.html", "results.csv", "results.tex"] + [f"{plot}.svg" for plot in PLOTS],
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><!-- {} --></svg>'

argv = sys.orig_argv
stage = argv[2].rpartition(".")[2] if argv[1:2] == ["-m"] and argv[2].startswith("dayzero.stages.") else ""
if stage in OUTPUTS:
    folder = Path(argv[argv.index("--output") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    log = Path(argv[argv.index("--log") + 1])
    if str(folder) == os.environ.get("STAND_IN_FAILS"):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("2026-01-01 00:00:00,000 ERROR error: made to fail\n")
        os._exit(1)
    for name in OUTPUTS[stage]:
        text = f"{stage} {time.time_ns()}"
        (folder / name).write_text(SVG.format(text) if name.endswith(".svg") else f'"{text}"\n')
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join(argv))
    os._exit(0)
