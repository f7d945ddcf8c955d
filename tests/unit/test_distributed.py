"""What a rank's process is set to by joining the process group."""

from __future__ import annotations

import os
import subprocess
import sys

from dayzero.engine.distributed import KERNELS_KEPT

from tests.distributed.launch import REPOSITORY

PRODUCTS = """
import psutil, torch
from dayzero.engine.distributed import process_group

def grown(lengths):
    before = psutil.Process().memory_info().rss
    for length in lengths:
        rows[:length] @ weight.T
    return psutil.Process().memory_info().rss - before

torch.set_num_threads(1)
with process_group():
    weight, rows = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(1000, 512, dtype=torch.bfloat16)
    grown(range(50, 350))
    print(grown(range(350, 950)) // 2**20)
"""


def test_rows_of_ever_new_lengths_take_no_ever_new_memory() -> None:
    """On a CPU with products in bfloat16, 600 shapes took 250 MiB."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = os.pathsep.join([str(REPOSITORY / "workflow"), str(REPOSITORY)])
    environment = {name: value for name, value in os.environ.items() if name not in KERNELS_KEPT}
    environment |= {**one, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    made = subprocess.run([sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True, check=True)
    assert int(made.stdout) < 60
