"""The penalty's weight in two processes, started by tests/test_distributed.py: what the states were multiplied by.

The loss says nothing of the states (alpha is 0), so in each step of plain gradient descent they become 1 - 2 lr lambda
times what they were, whatever the number of processes and accumulated batches.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from architectures import MAIN
from test_training import only_penalised, trainer_of
from trainers import copies, states, weights

from peft_s0 import S0Callback

STEPS = 2


def main(folder: str) -> None:
    """Both trainers, one with the callback and one without, and two numbers of accumulated batches."""
    torch.set_num_threads(1)
    found = []
    for architecture, (name, callback), accumulation in product(MAIN, (("sft", False), ("plain", True)), (1, 4)):
        model = only_penalised(architecture)
        start = copies(weights(model))
        trainer = trainer_of(
            name,
            model,
            Path(folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            callbacks=[S0Callback()] if callback else [],
        )
        with redirect_stdout(io.StringIO()):
            trainer.train()
        factors = torch.cat([(after / before).flatten() for before, after in zip(start, states(trainer), strict=True)])
        found.append(
            {
                "run": f"{architecture.name}, {name}, {accumulation} batches, callback {callback}",
                "processes": trainer.accelerator.num_processes,
                "wrapper": type(trainer.model_wrapped).__name__,
                "smallest": float(factors.min()),
                "greatest": float(factors.max()),
            }
        )
    Path(folder, f"{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
    # As in `runs.py`.
    os._exit(0)
