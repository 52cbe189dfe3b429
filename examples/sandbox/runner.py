"""The child process of the sandbox: runs programs, each in a process of its own, and reports what they return.

Started as `python -I -S runner.py`. It reads one JSON object from standard input,

    {"token": ..., "seconds": ..., "cpu_seconds": ..., "memory": ..., "report": ..., "readable": [...],
     "programs": [[source, calls], ...]}

and writes one JSON line for each program, in order, to standard output: `[token, report]`. The report is the JSON text,
with sorted keys, of the list of values of the program's `calls`, expressions such as `total(3)`, or something else if
the program failed. Which values are right is never known here.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import sys
import time

try:
    import resource
except ImportError:  # Windows: the parent still limits the time
    resource = None

_NOBODY = 65534

# From linux/sched.h, sys/mount.h, linux/mount.h and sys/prctl.h.
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _HERE, _WITH_SUBMOUNTS = 442, -100, 0x8000
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_CAPABILITIES_VERSION = 0x20080522


def _report(source: str, calls: list[str]) -> str:
    """Runs a program in this very process."""
    namespace: dict = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)
        return json.dumps([eval(call, namespace) for call in calls], sort_keys=True)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: whatever a program raises is its own failure
        return type(error).__name__


def _libc(function: str, *arguments: object) -> None:
    """Calls a function of the C library that gives 0 when it succeeds."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _make_read_only(path: str, with_submounts: bool) -> None:
    read_only_no_suid = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    flags = _WITH_SUBMOUNTS if with_submounts else 0
    _libc("syscall", _MOUNT_SETATTR, _HERE, path.encode(), flags, read_only_no_suid, len(read_only_no_suid))


def _bind(path: str, root: str) -> None:
    """Shows a file or folder in the new root, at its place in the old one; a link as the link it is."""
    target = root + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    _libc("mount", path.encode(), target.encode(), None, _BIND | _RECURSIVE, None)
    if not path.startswith("/dev/"):
        _make_read_only(target, with_submounts=True)


def _enter_namespaces(readable: list[str]) -> None:
    """Leaves the network, other processes, and all files but Python's own and `readable`, which can only be read.

    Root may do this, and any other user where the system lets users have namespaces.

    Raises:
        OSError: If the system does not allow it. Then this process may have left a part of what it should leave.
    """
    user, group = os.geteuid(), os.getegid()
    flags = _NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS | _NEW_NET
    _libc("unshare", flags if user == 0 else flags | _NEW_USER)
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    root = os.getcwd()
    _libc("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    _libc("mount", b"tmpfs", root.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, b"size=1m,nr_inodes=1k,mode=755")
    python = [sys.base_prefix, os.path.realpath(sys.base_prefix)]
    libraries = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"]
    for path in [*readable, *python, *libraries, os.devnull, "/dev/urandom"]:
        if os.path.lexists(path):
            _bind(path, root)
    _make_read_only(root, with_submounts=False)
    os.chroot(root)
    os.chdir("/")


def _give_up_privileges() -> None:
    """No program gets the rights that the namespaces were made with, or root's, whom the limit on processes spares."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # containers may not know the user; then the check of the sandbox says so
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    if sys.platform == "linux":
        _libc("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _libc("capset", struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24))


def _limit(name: str, value: int) -> None:
    """Sets a resource limit where the platform has it; macOS refuses some."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        resource.setrlimit(getattr(resource, name), (value, value))


def _confine(pipe: int, order: dict) -> None:
    """Takes from this process what a program has no use for; of the descriptors only the pipe is left, as number 3."""
    os.setsid()
    os.dup2(pipe, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(4, 256)
    _give_up_privileges()
    if sys.platform == "linux":  # after the change of user, which would take it back
        _libc("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _limit("RLIMIT_CPU", order["cpu_seconds"])
    _limit("RLIMIT_AS", order["memory"])
    _limit("RLIMIT_DATA", order["memory"])
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NPROC", 0)


def _report_of_fork(source: str, calls: list[str], order: dict) -> str:
    """Runs a program in a fork of this process and kills whatever is left of it when it has reported or is late."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _confine(writer, order)
            longest, order["token"] = order["report"], None
            report = _report(source, calls).encode()
            os.write(3, b"too long") if len(report) > longest else _write_all(report)
        finally:  # a program may have closed the pipe; in no case may its process go on as if it were the runner
            os._exit(0)
    os.close(writer)
    report = b""
    deadline = time.monotonic() + order["seconds"]
    while len(report) <= order["report"]:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(reader, 1 << 16) if ready else b""
        if not part:
            break
        report += part
    os.close(reader)
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return report.decode(errors="replace")


def _write_all(report: bytes) -> None:
    while report:
        report = report[os.write(3, report) :]


def _run(order: dict) -> None:
    for source, calls in order["programs"]:
        forks = hasattr(os, "fork")
        report = _report_of_fork(source, calls, order) if forks else _report(source, calls)
        # The line break first: where there is no fork, a program's own output may stand before it.
        sys.__stdout__.write("\n" + json.dumps([order["token"], report]) + "\n")
        sys.__stdout__.flush()


def _run_in_namespaces(order: dict) -> None:
    """Runs the programs as process 1 of the namespaces, with which all their other processes end."""
    child = os.fork()
    if child == 0:
        try:
            _libc("prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
            _run(order)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _namespaces_allowed(readable: list[str]) -> bool:
    """Tries it in a fork, for what was left half-way cannot be returned to."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            _enter_namespaces(readable)
            if os.fork() == 0:  # the first process in them, which some systems refuse only now
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    """Reads the order, runs the programs, writes the reports."""
    os.umask(0o022)  # so that nobody finds his way
    order = json.load(sys.stdin)
    if sys.platform == "linux" and _namespaces_allowed(order["readable"]):
        _enter_namespaces(order["readable"])
        _run_in_namespaces(order)
    else:
        _run(order)


if __name__ == "__main__":
    main()
