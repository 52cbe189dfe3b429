"""The sandbox of generated programs: what a hostile one can do, as root and as others, with namespaces and without."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import sandbox  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only time is limited")

LIMITS = sandbox.Limits(seconds=2, cpu_seconds=1)
RIGHT = "def total(x):\n    return 3 * x\n"
CALLS = ("total(4)",)
VALUES = "[12]"

# Each is put before a right program, and does what its name says.
HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time\ntime.sleep(60)",
    "ignored signals": "import signal, time\nfor s in range(1, 20):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ntime.sleep(60)",
    "huge allocation": "x = bytearray(1 << 40)",
    "growing list": "x = [0]\nwhile True: x += x",
    "deep recursion": "def f(): f()\nf()",
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "other program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "child that outlives it": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)",
    "exit": "raise SystemExit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "printed report": "print('[12]')\nimport os\nos._exit(0)",
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "not Python": "def (",
    "floods the report": "def total(x): return 'x' * (1 << 20)\nraise SystemExit if total(1)[0] == 'y' else 0",
    "floods the pipe": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "floods the output": "while True: print('x' * 1000)",
    "larger limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
}
# What only namespaces keep programs from: an expression that is true where it worked.
REACHES = {
    "files of the system": "open('/etc/passwd').read() != ''",
    "other processes": "any(name.isdigit() and int(name) > 9 for name in os.listdir('/proc'))",
    "a place to write": "os.mkdir('/tmp/of-a-program') is None",
    "a server on this machine": "socket.create_connection(('127.0.0.1', {port}), 1) is not None",
    "the host's name": "socket.gethostname() != ''  and os.path.exists('/etc/hostname')",
    "namespaces of its own": "ctypes.CDLL(None).unshare(0x10000000) == 0",
}
LEAKS = {
    "the environment": "'SECRET_OF_THE_PARENT' in os.environ",
    "the parent's environment": "b'SECRET_OF_THE_PARENT' in open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "a huge file": "open('huge', 'wb').write(b'x' * (1 << 20)) > 0",
    "removing a file": "os.remove({file!r}) is None",
    "writing to a file": "open({file!r}, 'a').write('x' * 5000) > 0",
}

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sandbox
order = json.load(sys.stdin)
limits = sandbox.Limits(seconds=2, cpu_seconds=1)
programs = [(source, tuple(calls)) for source, calls in order]
print(json.dumps({"missing": sandbox.missing(), "reports": sandbox.run(programs, limits)}))
"""


def as_nobody(folder: Path) -> list[str] | None:
    """A command of an ordinary user's, if this is root, who can be one."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if os.geteuid() != 0 or shutil.which("setpriv") is None or python is None:
        return None
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    return [*user, python] if subprocess.run([*user, python, "-c", ""], cwd="/", check=False).returncode == 0 else None


def as_in_a_container(folder: Path) -> list[str] | None:
    """A command of a root who may not make namespaces, as in a container."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    return ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable]


WHO = {"me": lambda folder: [sys.executable], "nobody": as_nobody, "root in a container": as_in_a_container}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user can enter, with the sandbox in it and a file that any user can change."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(EXAMPLES / "sandbox", folder / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        (folder / "open" / "file").write_text("of the user")
        (folder / "open" / "file").chmod(0o666)
        yield folder


@pytest.mark.parametrize("who", WHO)
def test_hostile_programs_fail_alone(who: str, folder: Path) -> None:
    command = WHO[who](folder)
    if command is None:
        pytest.skip("needs root, and setpriv")
    file = folder / "open" / "file"
    right = f"import ctypes, os, socket\n{RIGHT}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempts = {
            name: f"bool({text.replace('{port}', str(port)).replace('{file!r}', repr(str(file)))})"
            for name, text in (REACHES | LEAKS).items()
        }
        # A right program between any two: no hostile one may disturb what comes after it.
        order: list[tuple[str, Any]] = [(RIGHT, CALLS)]
        for number, attack in enumerate(HOSTILE.values()):
            order += [(f"{attack}\n{RIGHT}", CALLS), (f"{RIGHT}# {number}", CALLS)]
        order += [(right, (attempt,)) for attempt in attempts.values()]
        start = time.monotonic()
        process = subprocess.run(
            [*command, "-c", SCRIPT, str(folder)],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            cwd="/",
            env={"SECRET_OF_THE_PARENT": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
    assert process.returncode == 0, process.stderr[-3000:]
    assert time.monotonic() - start < 120
    answer = json.loads(process.stdout)
    reports, missing = answer["reports"], answer["missing"]
    rights, attacks = reports[: 2 * len(HOSTILE) + 1 : 2], reports[1 : 2 * len(HOSTILE) : 2]
    assert rights == [VALUES] * len(rights)
    passed = {name for name, report in zip(HOSTILE, attacks, strict=True) if report == VALUES}
    assert passed <= {"kill the parent"}  # which nothing dies of, as process 1 of a namespace

    worked = [name for name, report in zip(attempts, reports[-len(attempts) :], strict=True) if report == "[true]"]
    assert {*worked}.isdisjoint(LEAKS if not missing else {*LEAKS} - {"removing a file"})
    assert file.exists() or "files" in missing
    if who == "root in a container":
        assert "files" in missing
        assert "files of the system" in worked or "library" in missing  # without namespaces, as the sandbox says
    if not missing:
        assert worked == []
        assert file.read_text() == "of the user"
    assert "processes" not in missing
    assert "memory" not in missing


def test_no_process_is_left() -> None:
    """Not even of programs that were killed in the midst of their work."""
    assert sandbox.run([("import time\ntime.sleep(60)", ("1",)), (RIGHT, CALLS)], LIMITS) == ["", VALUES]
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            # Those of other tests that run at the same time have parents of their own.
            if str(EXAMPLES / "sandbox" / "runner.py") in process.cmdline() and process.ppid() in (1, os.getpid()):
                left.append(process)
    assert not left


SLEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.run([("import time\\ntime.sleep(300)", ("1",))], sandbox.Limits(seconds=300))
"""


@pytest.mark.parametrize("who", WHO)
def test_no_program_outlives_an_interrupt(who: str, folder: Path) -> None:
    """Ctrl-C ends the runner, which then cannot stop a program that sleeps."""
    command = WHO[who](folder)
    if command is None:
        pytest.skip("needs root, and setpriv")
    with subprocess.Popen([*command, "-c", SLEEPER, str(folder)], cwd="/", stderr=subprocess.DEVNULL) as process:
        try:
            deadline, sleeps = time.monotonic() + 60, False
            while not sleeps:  # the last of them, which runs the program
                assert time.monotonic() < deadline
                time.sleep(0.2)
                with contextlib.suppress(psutil.Error, IndexError):  # those that try for namespaces end again
                    runner = psutil.Process(process.pid).children()[0]
                    below = runner.children(recursive=True)
                    sleeps = below[-1].cpu_percent(0.5) == 0
            runner.send_signal(signal.SIGINT)
            left = psutil.wait_procs([runner, *below], timeout=20)[1]
        finally:
            process.kill()
        for each in left:
            each.kill()
    assert not left


def test_values_reports_and_repeats() -> None:
    programs = [
        (RIGHT, ("total(1)", "[total('a'), None]")),
        ("x = (", ("x",)),
        (RIGHT, ("total(1)", "[total('a'), None]")),
    ]
    assert sandbox.run(programs, LIMITS) == ['[3, ["aaa", null]]', "SyntaxError", '[3, ["aaa", null]]']
    assert sandbox.run([("", ("'x' * 100000",))], LIMITS) == ["too long"]
    long = sandbox.run([("", ("'x' * 1000000",))], sandbox.Limits(report=1 << 21))
    assert long == [json.dumps(["x" * 1000000])]


def test_a_folder_that_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("content")
    if "files" in sandbox.missing():
        pytest.skip("no namespaces here")
    reading = f"open({str(tmp_path / 'data' / 'file')!r}).read()"
    writing = f"open({str(tmp_path / 'data' / 'file')!r}, 'w') is None"
    assert sandbox.run([("", (reading,)), ("", (writing,))], LIMITS) == ["FileNotFoundError", "FileNotFoundError"]
    given = sandbox.run([("", (reading,)), ("", (writing,))], LIMITS, readable=[tmp_path / "data"])
    assert given[0] == '["content"]'
    assert given[1] in ("OSError", "PermissionError")


def test_checks_are_passed_by_those_that_get_through() -> None:
    check = "def check(f):\n    assert f(4) == 12\n    assert f(0) == 0\n"
    programs = {
        "right": RIGHT,
        "wrong": RIGHT.replace("3", "2"),
        "exit in the call": "def total(x): raise SystemExit(0)\n",
        "hard exit in the call": "import os\ndef total(x): os._exit(0)\n",
        "own report": "import os\nos.write(3, b'[null]')\nos._exit(0)\n",
        "blind report": "import os\nos.write(3, b'[null, \"\"]')\nos._exit(0)\n",
        "stops the clock": "import time\ntime.sleep(30)\n",
        "eval of its own": "import builtins\nbuiltins.eval = lambda call, _: call[1:-1]\ndef total(x): return 0\n",
        "JSON of its own": "import json\njson.dumps = lambda _: '[null, \"\"]'\ndef total(x): return 0\n",
    }
    verdicts = sandbox.run_checks([(f"{source}\n{check}", ("check(total)",)) for source in programs.values()], LIMITS)
    assert dict(zip(programs, verdicts, strict=True)) == {name: name == "right" for name in programs}


@pytest.mark.parametrize("end", ["if False: \\", "f = lambda: \\", 'text = """', "if False:", "# \\", "(", "pass;"])
def test_a_last_line_takes_no_check_in(end: str) -> None:
    assert sandbox.run_checks([(f"def total(x): return 0\n{end}", ("undefined(total)",))], LIMITS) == [False]


def test_permission(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError, match="--allow-code-execution"):
        sandbox.allow(allowed=False, unconfined=True)
    monkeypatch.setattr(sandbox, "missing", lambda: ("network",))
    with pytest.raises(PermissionError, match=r"programs can reach the network.*--unconfined"):
        sandbox.allow(allowed=True, unconfined=False)
    sandbox._warn_once.cache_clear()
    sandbox.allow(allowed=True, unconfined=True)
    sandbox.allow(allowed=True, unconfined=True)
    warning = capsys.readouterr().err
    assert warning.count("WARNING") == 1
    assert "NOT ALL IS KEPT FROM THEM: programs can reach the network" in warning
    monkeypatch.setattr(sandbox, "missing", lambda: ())
    sandbox.allow(allowed=True, unconfined=False)
    assert "a hole in the kernel" in capsys.readouterr().err
