"""The confinement of the VM process and of vmm-nat, and starts on hosts that refuse things."""
import contextlib
import ctypes
import os
import pty
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from conftest import BUILD, VMM, guest, run_vmm

NOBODY = 65534
ENGINES = ["io_uring", "epoll"]
# Real mode: '!' to the serial port, then halt for good with interrupts on; the other ends with success.
IDLE = bytes.fromhex("ba f803 b021 ee fb f4 ebfc")
HELLO = bytes.fromhex("ba f803 b021 ee b000 e6f4 f4")



def poke(address, value):
    """mov dword [address], value"""
    return b"\xc7\x05" + struct.pack("<II", address, value)


# 32-bit: the first virtio-mmio device to DRIVER_OK (virtio 1.2, 3.1.1) with VERSION_1 and no queue, then as IDLE.
VIRTIO = 0xd0000000
NIC_UP = b"".join(poke(VIRTIO + r, v) for r, v in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)])
NIC_UP += bytes.fromhex("66ba f803 b021 ee fb f4 ebfd")
FLAT = ["--load-address", "0x7c00", "--kernel-entry", "flat16", "--mem", "16M"]

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def flat(tmp_path):
    """A guest that idles, one that ends at once, one that idles with its NIC up."""
    (tmp_path / "nic").write_bytes(NIC_UP)
    (tmp_path / "idle").write_bytes(IDLE)
    (tmp_path / "hello").write_bytes(HELLO)
    return tmp_path


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"vmm disk".ljust(1 << 20, b"\0"))
    return path


@contextlib.contextmanager
def running(*args, **kw):
    """A vmm whose guest has said '!': the sandbox is shut."""
    kw.setdefault("stdin", subprocess.DEVNULL)
    child = subprocess.Popen([str(a) for a in (VMM, *FLAT, "--timeout", "60", *args)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, **kw)
    try:
        assert child.stdout.read(1) == b"!", child.stderr.read()
        yield child
    finally:
        child.kill()
        child.communicate()


def status_of(path):
    return dict(line.split(":\t", 1) for line in Path(path, "status").read_text().splitlines() if ":\t" in line)


def children(pid):
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def helper_of(vmm_pid):
    """The vmm-nat under vmm's spawner, or None."""
    for spawner in children(vmm_pid):
        for pid in children(spawner):
            with contextlib.suppress(OSError):
                if status_of(f"/proc/{pid}")["Name"] == "vmm-nat":
                    return pid
    return None


def gone(pid, seconds=10):
    """Wait for the end of a process that may be no child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(fd):
        return bool(select.select([fd], [], [], seconds)[0])


def assert_confined(status, nobody):
    assert status["Seccomp"] == "2", status
    assert status["NoNewPrivs"] == "1", status
    for caps in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[caps], 16) == 0, status
    if nobody:
        assert status["Uid"].split() == [str(NOBODY)] * 4, status
        assert status["Gid"].split() == [str(NOBODY)] * 4, status
        assert status["Groups"].split() == [], status


# ---- it is shut ----------------------------------------------------------------------------------------------


@pytest.mark.release
@pytest.mark.parametrize("engine", ENGINES)
def test_every_thread_of_a_running_vmm_is_confined(kvm, flat, disk, engine):
    with running("--kernel", flat / "idle", "--net", "none", "--disk", disk, "--cpus", "3", "--engine", engine) as vmm:
        tasks = [status_of(t) for t in Path(f"/proc/{vmm.pid}/task").iterdir()]
        assert {"vcpu/0", "vcpu/1", "vcpu/2", "io/0"} <= {t["Name"] for t in tasks}
        for task in tasks:
            assert_confined(task, nobody=os.geteuid() == 0)


def test_sandbox_off_loads_no_filter(kvm, flat):
    with running("--kernel", flat / "idle", "--net", "none", "--sandbox", "off") as vmm:
        assert status_of(f"/proc/{vmm.pid}")["Seccomp"] == "0"


@pytest.mark.release
def test_sandbox_log_confines_too(kvm, flat):
    with running("--kernel", flat / "idle", "--net", "none", "--sandbox", "log") as vmm:
        assert_confined(status_of(f"/proc/{vmm.pid}"), nobody=os.geteuid() == 0)


@pytest.mark.release
def test_vmm_nat_is_confined_by_a_filter_of_its_own(kvm, flat):
    with running("--kernel", flat / "idle", "--net", "user,fwd=tcp:0:22") as vmm:
        status = status_of(f"/proc/{helper_of(vmm.pid)}")
        assert_confined(status, nobody=os.geteuid() == 0)
        assert int(status["Seccomp_filters"]) == int(status_of("/proc/self")["Seccomp_filters"]) + 1


# ---- what must go on working behind it ---------------------------------------------------------------------------

MATRIX = [
    (0, ["actions.elf", "--cmdline", "do=poweroff"]),
    (100, ["actions.elf", "--cmdline", "do=reset-acpi"]),
    (102, ["actions.elf", "--cmdline", "do=triple-fault"]),
    (103, ["actions.elf", "--cmdline", "do=cli-hlt", "--cpus", "4"]),
    (101, ["actions.elf", "--cmdline", "do=pvpanic"]),
    (105, ["actions.elf", "--cmdline", "do=run-hole"]),
    (0, ["actions.elf", "--cmdline", "do=reboot", "--on-reboot", "restart", "--cpus", "2"]),
    (0, ["actions.elf", "--cmdline", "do=rtc"]),
    (0, ["actions.elf", "--cmdline", "do=pit"]),
    (0, ["smp.elf", "--cmdline", "cpus=4", "--cpus", "4"]),
    (0, ["virtio-rng.elf", "--rng", "--cmdline", "pci msix"]),
    (0, ["virtio-rng.elf", "--rng", "--machine", "microvm"]),
    (0, ["virtio-blk.elf", "--disk", "DISK", "--cmdline", "pci msix", "--console", "null", "--device", "balloon"]),
    (0, ["virtio-blk.elf", "--disk", "DISK,cache=none", "--cmdline", "pci"]),
    (0, ["virtio-blk.elf", "--disk", "DISK", "--machine", "microvm", "--console", "null"]),
]


def matrix_args(payload, disk, engine):
    rest = [a.replace("DISK", str(disk)) for a in payload[1:]]
    return ["--kernel", guest(payload[0]), "--mem", "16M", "--net", "none", "--engine", engine, "--timeout", "30", *rest]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("status, payload", MATRIX, ids=[" ".join(p) for _, p in MATRIX])
def test_payload_runs_in_the_sandbox(kvm, vmm, disk, engine, status, payload):
    r = vmm(*matrix_args(payload, disk, engine))
    assert r.status == status, r.err
    assert r.result["loop"]["engine"] == engine


@pytest.fixture(scope="session")
def as_user(kvm):
    """A prefix that runs vmm as an unprivileged user who may use /dev/kvm."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("needs setpriv and unshare")
    # The build tree, too, may lie where only root can go: it is at /mnt/build.
    place = "mount -t tmpfs -o mode=755 none /mnt && mknod -m 666 /mnt/kvm c 10 232 && mount --bind /mnt/kvm /dev/kvm && " \
            f"mkdir /mnt/build && mount --bind '{BUILD}' /mnt/build"
    prefix = ["unshare", "-m", "sh", "-c", f'{place} && exec setpriv --reuid=12345 --regid=12345 --clear-groups "$@"', "sh"]
    probe = subprocess.run([*prefix, "sh", "-c", "exec 3<>/dev/kvm && test -x /mnt/build/vmm"], stderr=subprocess.PIPE)
    if probe.returncode:
        pytest.skip(f"no /dev/kvm for another user: {probe.stderr.decode().strip()}")
    return prefix


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("status, payload", MATRIX, ids=[" ".join(p) for _, p in MATRIX])
def test_payload_runs_as_an_unprivileged_user(as_user, disk, engine, status, payload):
    disk.chmod(0o666)
    for above in list(disk.parents)[:-1]:
        if not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    argv = [*as_user, *(str(a).replace(str(BUILD), "/mnt/build") if as_user else str(a)
                        for a in (VMM, *matrix_args(payload, disk, engine)))]
    r = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert r.returncode == status, r.stderr


def test_a_killed_vmm_nat_is_started_again(kvm, flat):
    with running("--kernel-entry", "flat32", "--load-address", "0x100000", "--kernel", flat / "nic", "--net", "user",
                 "--machine", "microvm") as vmm:
        first = second = helper_of(vmm.pid)
        os.kill(first, signal.SIGKILL)
        assert b"starting it again" in vmm.stderr.readline()
        while vmm.poll() is None and second in (None, first):     # --timeout bounds it
            second = helper_of(vmm.pid)
        assert second not in (None, first)
        vmm.send_signal(signal.SIGQUIT)
        assert vmm.wait(20) == 128 + signal.SIGQUIT


def test_the_disassembler_is_started_from_the_sandbox(kvm, vmm):
    r = vmm("--mem", "16M", "--kernel", guest("actions.elf"), "--cmdline", "do=sse", "--net", "none")
    if r.result["software_kvm"] and (VMM.parent / "vmm-disasm").exists():
        assert r.status == 105 and b"xorps xmm0, xmm0" in r.err
    else:
        assert r.status in (0, 105)


def test_a_unix_chardev_accepts_in_the_sandbox(kvm, flat):
    path = flat / "serial"
    argv = [VMM, "--mem", "16M", "--kernel", guest("actions.elf"), "--cmdline", "do=echo", "--net", "none", "--timeout", "30",
            "--serial", f"unix:{path}"]
    child = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peer = socket.socket(socket.AF_UNIX)
    while child.poll() is None:
        with contextlib.suppress(OSError):
            peer.connect(str(path))
            break
    with peer, peer.makefile("rb") as lines:
        assert lines.readline() == b"do=echo\n"        # the serial port listens: before, nobody does
        peer.sendall(b"hello wq")
        assert b"hello wq" in lines.read()
    assert child.wait(20) == 0, child.stderr.read()
    child.stderr.close()


def test_the_terminal_is_restored_from_the_sandbox(kvm, flat):
    pid, fd = pty.fork()
    if not pid:
        os.execv(VMM, [str(a) for a in (VMM, *FLAT, "--kernel", flat / "idle", "--net", "none", "--timeout", "30")])
    with os.fdopen(fd, "r+b", buffering=0) as terminal:
        before = termios.tcgetattr(fd)[3]
        assert before & termios.ICANON
        assert b"!" in terminal.read(100)
        assert not termios.tcgetattr(fd)[3] & termios.ICANON
        terminal.write(b"\x01x")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
        assert termios.tcgetattr(fd)[3] == before


def test_row104_die_with_parent_works_for_one_who_became_nobody(kvm, flat):
    cmd = [VMM, *FLAT, "--kernel", flat / "idle", "--net", "none", "--die-with-parent", "--timeout", "60"]
    shell = subprocess.Popen(["sh", "-c", '"$@" & echo $! >&2; wait', "sh", *map(str, cmd)], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(shell.stderr.readline())
    assert shell.stdout.read(1) == b"!"
    shell.kill()
    shell.wait()
    try:
        assert gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        shell.stdout.close()
        shell.stderr.close()


# ---- refusals ----------------------------------------------------------------------------------------------------


def one_line(r):
    err = r.err.decode()
    assert r.status == 125, err
    assert err.startswith("vmm: ") and err.count("\n") == 1, err
    return err


@pytest.mark.release
@ROOT
def test_row106_a_setuid_vmm_is_refused(flat):
    copy = flat / "vmm"
    shutil.copy(VMM, copy)
    if os.statvfs(copy).f_flag & os.ST_NOSUID:
        pytest.skip("the test directory is mounted nosuid")
    os.chown(copy, 12345, 12345)
    copy.chmod(0o4755)
    r = subprocess.run([copy, "--version"], capture_output=True)
    assert r.returncode == 125 and r.stdout == b""
    assert r.stderr.startswith(b"vmm: refused: this program is set-user-ID") and r.stderr.count(b"\n") == 1


def quiet(*args, preexec_fn):
    return run_vmm("--quiet", *FLAT, *args, preexec_fn=preexec_fn)


def test_row102_any_limit_on_descriptors_is_one_line_or_a_run(kvm, flat, disk):
    ran = 0
    for files in range(4, 64, 3):
        r = quiet("--kernel", flat / "hello", "--net", "none", "--disk", disk, "--console", "null", preexec_fn=lambda:
                  resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
        if r.status:
            one_line(r)
        ran += not r.status
    assert ran and ran < 20, ran


@pytest.mark.release
def test_row102_any_limit_on_memory_is_one_line_or_a_run(kvm, flat, disk):
    for mib in (16, 24, 32, 48, 64, 128, 512, 4096, 8192, 9216, 1 << 20):
        r = quiet("--kernel", flat / "hello", "--net", "none", "--disk", disk, preexec_fn=lambda:
                  resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20)))
        if r.status:
            one_line(r)
    assert r.status == 0, r.err


def refuse(nr, error):
    """From now on system call nr fails with this errno: what a container's profile does."""
    ret, load, jeq = 0x06, 0x20, 0x15
    code = b"".join(struct.pack("HBBI", *i) for i in [
        (load, 0, 0, 0), (jeq, 0, 1, nr), (ret, 0, 0, 0x50000 | error), (ret, 0, 0, 0x7fff0000)])
    room = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(room)))
    libc = ctypes.CDLL(None)
    assert not libc.prctl(38, 1, 0, 0, 0)               # PR_SET_NO_NEW_PRIVS
    assert not libc.prctl(22, 2, program)               # PR_SET_SECCOMP


MEMFD_CREATE, SECCOMP, IO_URING_SETUP, LANDLOCK = 319, 317, 425, 444
EPERM, ENOSYS = 1, 38


def test_row102_refused_memfd_is_one_line(kvm, flat):
    r = quiet("--kernel", flat / "hello", "--net", "none", preexec_fn=lambda: refuse(MEMFD_CREATE, EPERM))
    assert "guest RAM" in one_line(r)


@pytest.mark.release
def test_row103_refused_seccomp_is_one_line_with_the_remedy(kvm, flat):
    r = quiet("--kernel", flat / "hello", "--net", "none", preexec_fn=lambda: refuse(SECCOMP, ENOSYS))
    assert "--sandbox off" in one_line(r)


@pytest.mark.release
def test_row103_without_landlock_the_filter_is_enough(kvm, flat):
    r = run_vmm("--verbose", *FLAT, "--kernel", flat / "hello", "--net", "none",
                preexec_fn=lambda: refuse(LANDLOCK, ENOSYS))
    assert r.status == 0, r.err
    assert b"no Landlock here" in r.err


def test_row103_without_io_uring_it_runs_on_epoll(kvm, flat, disk):
    result = flat / "result"
    r = run_vmm(*FLAT, "--kernel", flat / "hello", "--net", "none", "--disk", disk, result=result,
                preexec_fn=lambda: refuse(IO_URING_SETUP, EPERM))
    assert r.status == 0, r.err
    assert r.result["loop"]["engine"] == "epoll"
