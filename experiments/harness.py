"""GSM8K and MATH-500 by lm-evaluation-harness: its generation, its extraction of answers, its scores.

The harness's own file for a task is taken as it is, but for the prompt, which is the one that adapters are trained on,
and for the place of the data. Adapters need nothing here: a PeftModel is a model to the harness.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from answers import Answer, Sampling, Student
from tasks import Task, local_file


def answer(
    student: Student,
    task: Task,
    split: str,
    problems: Sequence[int],
    sampling: Sampling,
    seed: int,
    data: Path | None = None,
) -> list[Answer]:
    """One graded answer to each of the `problems`, which are places in a split.

    Raises:
        ModuleNotFoundError: If lm-evaluation-harness is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{task.name} is scored by lm-evaluation-harness: pip install "peft-s0[experiments]".'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # that a model is given as one, for each call
    assert task.harness is not None
    assert task.metric is not None
    name = f"s0_{task.name}"
    own = Path(lm_eval.__file__).parent / "tasks" / task.harness
    config = {
        "include": str(own),
        "task": name,
        "tag": None,
        "training_split": None,
        "fewshot_split": None,
        "test_split": split,
        "doc_to_text": task.prompt if student.chat else task.text,
        "num_fewshot": 0,
        "repeats": 1,
        "generation_kwargs": {
            "until": [] if student.chat else [task.stop],
            "max_gen_toks": student.new_tokens or task.new_tokens,
            **sampling.arguments,
        },
    }
    if data is not None:
        files = {split: str(local_file(task, split, data).resolve())}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    student.model.eval()
    language_model = HFLM(
        pretrained=student.model,
        tokenizer=student.tokenizer,
        batch_size=student.batch_size,
        enable_thinking=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
        results = lm_eval.simple_evaluate(
            model=language_model,
            tasks=[name],
            task_manager=TaskManager(include_defaults=False, include_path=folder),
            samples={name: sorted(problems)},  # in another order it mistakes one for another
            apply_chat_template=student.chat,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    metric, _, extraction = task.metric.partition(",")
    scored = {
        sample["doc_id"]: Answer(sample["doc_id"], sample["resps"][0][0], bool(sample[metric]))
        for sample in results["samples"][name]
        if sample["filter"] == extraction
    }
    return [scored[problem] for problem in problems]
