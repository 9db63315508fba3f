"""The vmm binary as a user runs it. VMM_BUILD names the build directory (default: build)."""
import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("VMM_BUILD", ROOT / "build")).resolve()
VMM = BUILD / "vmm"
GUEST = BUILD / "tests" / "guest"
PATIENCE = 60       # seconds: how long a condition may take to come true on a busy machine



def pytest_configure(config):
    config.addinivalue_line("markers", "release: needs what sanitizer builds are without (the sandbox, a small address space)")


class Run:
    def __init__(self, proc, result):
        self.status, self.out, self.err, self.result = proc.returncode, proc.stdout, proc.stderr, result


def read_result(path):
    return json.loads(Path(path).read_text()) if path and Path(path).exists() and Path(path).stat().st_size else None


def run_vmm(*args, result=None, timeout=PATIENCE, stdin=subprocess.DEVNULL, prefix=(), **kw):
    """Run vmm to its end; out and err are bytes. prefix: a command that runs vmm."""
    cmd = [*map(str, prefix), str(VMM), *map(str, args)]
    if result:
        cmd += ["--result", str(result)]
    if isinstance(stdin, bytes):
        kw["input"] = stdin
    else:
        kw["stdin"] = stdin
    proc = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout, **kw)
    return Run(proc, read_result(result))


@contextlib.contextmanager
def started_vmm(*args, prefix=(), **kw):
    """A vmm that runs meanwhile; killed at the end if it still does. Pipes by default."""
    for name in ("stdin", "stdout", "stderr"):
        kw.setdefault(name, subprocess.PIPE)
    with subprocess.Popen([*map(str, prefix), str(VMM), *map(str, args)], **kw) as proc:
        try:
            yield proc
        finally:
            if proc.poll() is None:
                proc.kill()


def until(condition, what):
    """Wait for a condition to come true; its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.005)
    return value


def read_until(stream, words):
    """Read a raw pipe up to and with these words; all that was read."""
    fd, got, end = stream.fileno(), b"", time.monotonic() + PATIENCE
    os.set_blocking(fd, False)
    while words not in got:
        assert time.monotonic() < end, f"no {words!r} in {got!r}"
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            time.sleep(0.005)
            continue
        assert part, f"the end came before {words!r}, after {got!r}"
        got += part
    os.set_blocking(fd, True)
    return got


@pytest.fixture
def vmm(tmp_path):
    def go(*args, **kw):
        kw.setdefault("result", tmp_path / "result.json")
        return run_vmm(*args, **kw)

    return go


@pytest.fixture(scope="session")
def kvm():
    """Tests that run a guest skip, by name, where there is no /dev/kvm."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm on this host")


@pytest.fixture(scope="session")
def doctor():
    """What vmm doctor finds: checks by name."""
    return json.loads(run_vmm("doctor", "--json").out)["checks"]


@pytest.fixture
def act(kvm, vmm):
    """Run actions.elf: act("poweroff"), act("value value=3", "--cpus", 2)."""
    def go(do, *args, **kw):
        return vmm("-k", guest("actions.elf"), "-m", "16M", "--net", "none", "-a", f"do={do}", *args, **kw)

    return go


@pytest.fixture
def acting(kvm):
    """The same, running meanwhile."""
    def go(do, *args, **kw):
        return started_vmm("-k", guest("actions.elf"), "-m", "16M", "--net", "none", "-a", f"do={do}", *args, **kw)

    return go


def guest(name):
    path = GUEST / name
    assert path.exists(), f"{path} was not built"
    return path
