"""Several processes on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import LAMBDA, RATE

SCRIPTS = Path(__file__).parent / "distributed"


def launch(script: str, folder: Path, processes: int) -> list:
    """Run a script in so many processes, on CPUs.

    Returns:
        What each of them wrote to `{rank}.json` in the folder.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, str(SCRIPTS / script), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def test_penalty_in_two_processes(tmp_path: Path) -> None:
    """In SFTTrainer without the callback, in the plain one with it, with one and four accumulated batches."""
    first, second = launch("penalty.py", tmp_path, processes=2)
    assert first == second
    assert len(first) == 8
    for run in first:
        assert (run["processes"], run["wrapper"]) == (2, "DistributedDataParallel")
        factor = pytest.approx((1 - 2 * RATE * LAMBDA) ** 2, rel=1e-5)
        assert (run["smallest"], run["greatest"]) == (factor, factor), run["run"]
