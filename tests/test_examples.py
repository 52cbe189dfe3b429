"""The examples, the README's scripts, and the runner of generated programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from miniature.execute import passes  # noqa: E402
from miniature.task import Problem, problems  # noqa: E402


def problem() -> Problem:
    return next(problems("test"))


def right(problem: Problem) -> str:
    """A right program, from the problem's own answer at every input of a small range."""
    answers = {x: problem.answer(x) for x in range(-200, 200)}
    return f"def {problem.name}(x):\n    return {answers!r}[x]\n"


HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "huge allocation": "x = bytearray(1 << 40)",
    "growing list": "x = [0]\nwhile True: x += x",
    "deep recursion": "def f(): f()\nf()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "exit": "raise SystemExit(0)",
    "hard exit": "import os\nos._exit(0)",
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "floods the output": "while True: print('x' * 1000)",
    "not Python": "def (",
    "nothing": "",
}


def test_right_and_wrong_programs() -> None:
    p = problem()
    wrong = f"def {p.name}(x):\n    return x + 12345\n"
    text = right(p).replace("return ", "return str(").replace("[x]", "[x])")
    assert passes([p] * 4, [right(p), wrong, text, "x = 1"]) == [True, False, False, False]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_alone(name: str) -> None:
    p, start = problem(), time.monotonic()
    attack = HOSTILE[name] + "\n" + right(p)
    if name in ("not Python", "nothing"):
        attack = HOSTILE[name]
    assert passes([p] * 3, [right(p), attack, right(p) + "# again"]) == [True, False, True]
    assert time.monotonic() - start < 30


def test_a_program_cannot_write_files_or_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    leak = "import os\nassert 'SECRET_OF_THE_PARENT' in os.environ\n" + right(p)
    target = tmp_path / "written"
    tmp_path.chmod(0o777)
    write = f"with open({str(target)!r}, 'w') as f: f.write('x')\n" + right(p)
    assert passes([p] * 2, [leak, write]) == [False, False]
    assert not target.exists() or target.stat().st_size == 0


def test_a_program_cannot_fake_a_verdict() -> None:
    """What it prints is not taken for a report, and other descriptors are closed to it."""
    p = problem()
    fake = 'import os\nfor i in range(64):\n    try: os.write(i, b\'\\n["", "[0]"]\\n\')\n    except OSError: pass'
    assert passes([p, p], [fake, right(p)]) == [False, True]


@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    """The whole story, as a newcomer runs it, in a folder of his own."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    methods = results["methods"]
    assert methods["S0"]["pass@1"] > methods["base"]["pass@1"] + 0.3
    assert results["pass@1 in a fresh process"] == methods["S0"]["pass@1"]
    for name in ("right", "one-line"):
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size < 60_000
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    tasks = results["tasks"]
    assert tasks["one-line"]["right in one line"] > tasks["right"]["right in one line"]


def test_base_model_is_small_and_real() -> None:
    folder = EXAMPLES / "models" / "tiny-qwen3.5"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]


def readme_scripts() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.timeout(300)
def test_the_scripts_of_the_readme_run(tmp_path: Path) -> None:
    """As they stand there, but for the model, which is the tiny one, and for the CPU."""
    tune, use = readme_scripts()
    model = str(EXAMPLES / "models" / "tiny-qwen3.5")
    rows = [{"prompt": "def f(x):", "completion": " return x"}, {"prompt": "def g(x):", "completion": " return x * x"}]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    tune = tune.replace("Qwen/Qwen3.5-4B", model).replace("bf16=True", "bf16=True, use_cpu=True, report_to='none'")
    again = tune.replace('"my-task"', '"other-task"')
    use = use.replace("Qwen/Qwen3.5-4B", model)
    for script in (tune, again, use):
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "my-task" / "adapter_model.safetensors").exists()
