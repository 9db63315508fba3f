"""Where vmm is run: without a terminal, without root, without io_uring, short of descriptors; and what it leaves behind."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess

import pytest

from conftest import BUILD, PATIENCE, VMM, guest, read_result, read_until, run_vmm, started_vmm, until

pytestmark = pytest.mark.usefixtures("kvm")
NO_URING = [BUILD / "tests/e2e/no-uring"]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"vmm disk".ljust(65536, b"\0"))
    return path


@pytest.fixture
def nat(doctor):
    if not doctor["nat"]["ok"]:
        pytest.skip("no vmm-nat in this build")


@pytest.fixture
def root():
    if os.geteuid() != 0:
        pytest.skip("needs root")


def field(pid, name):
    with open(f"/proc/{pid}/status") as f:
        return re.search(rf"^{name}:\s*(.*)$", f.read(), re.M)[1]


def alive(pid):
    try:
        return field(pid, "State")[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError, TypeError):
        return False


def is_nat(pid):
    try:
        return alive(pid) and field(pid, "Name") == "vmm-nat"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                for child in f.read().split():
                    found += [int(child), *descendants(child)]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


# ---- who runs it ----

def test_no_terminal_no_environment_no_working_directory(act, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    r = act("poweroff", start_new_session=True, env={}, cwd="/")
    assert r.status == 0 and r.out == b"do=poweroff\n"
    r = act("poweroff", prefix=["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh"])
    assert r.status == 0


def own_dev(*argv):
    """Run a command where /dev has a kvm for everybody, and nothing else but null and urandom."""
    script = "mount -t tmpfs -o mode=755 none /dev && mknod -m 666 /dev/kvm c 10 232 && mknod -m 666 /dev/null c 1 3 && " \
             'mknod -m 666 /dev/urandom c 1 9 && exec "$@"'
    return ["unshare", "-m", "sh", "-c", script, "sh", *argv]


@pytest.fixture
def for_nobody(root, tmp_path_factory):
    """Files that nobody may use: the build tree and pytest's own directories may be out of its reach."""
    if subprocess.run(own_dev(*NOBODY, "head", "-c0", "/dev/kvm"), stdin=subprocess.DEVNULL,
                      stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no mount namespace with a /dev/kvm for everybody")
    path = tmp_path_factory.mktemp("nobody")
    for up in (path, path.parent, path.parent.parent):
        os.chmod(up, os.stat(up).st_mode | 0o755)
    for name in ("vmm", "vmm-nat"):
        if (BUILD / name).exists():
            shutil.copy(BUILD / name, path)
    for name in ("actions.elf", "virtio-blk.elf"):
        shutil.copy(guest(name), path)
    (path / "disk").write_bytes(b"vmm disk".ljust(65536, b"\0"))
    os.chown(path, 65534, 65534)
    os.chown(path / "disk", 65534, 65534)
    return path


def as_nobody(path, *args):
    return subprocess.run(own_dev(*NOBODY, path / "vmm", *map(str, args)), stdin=subprocess.DEVNULL, cwd=path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)


def test_nobody_can_run_a_machine_with_a_disk_and_nat(for_nobody, nat):
    p = as_nobody(for_nobody, "-k", "virtio-blk.elf", "-m", "16M", "-a", "pci msix", "-d", "disk", "-r", "result",
                  "-n", "user,fwd=tcp:0:22")
    assert p.returncode == 0 and p.stdout == b"ok\n", p.stderr
    assert (for_nobody / "disk").read_bytes()[512:520] == bytes(i * 7 & 0xff for i in range(8))
    assert read_result(for_nobody / "result")["devices"]["net0"]["forwards"][0]["port"] > 0


def test_nobody_may_not_write_a_disk_of_root(for_nobody):
    os.chown(for_nobody / "disk", 0, 0)
    os.chmod(for_nobody / "disk", 0o644)
    p = as_nobody(for_nobody, "-k", "actions.elf", "-m", "16M", "-a", "do=poweroff", "-d", "disk", "--net", "none")
    assert p.returncode == 125 and b"'disk'" in p.stderr and b"Permission denied" in p.stderr
    p = as_nobody(for_nobody, "-k", "actions.elf", "-m", "16M", "-a", "do=poweroff", "-d", "disk,ro", "--net", "none")
    assert p.returncode == 0, p.stderr


def test_row103_kvm_without_permission_says_the_remedy(for_nobody):
    if stat.S_IMODE(os.stat("/dev/kvm").st_mode) & 0o006:
        pytest.skip("/dev/kvm is open to everybody on this host")
    p = subprocess.run([*NOBODY, for_nobody / "vmm", "-k", for_nobody / "actions.elf", "--net", "none"], cwd="/",
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert p.returncode == 125 and p.stderr.count(b"\n") == 1
    assert b"/dev/kvm" in p.stderr and b"group" in p.stderr, p.stderr


@pytest.mark.release
def test_row106_root_does_not_run_the_guest(root, acting):
    with acting("spin") as p:
        read_until(p.stdout, b"do=spin")
        assert field(p.pid, "Uid").split() == ["65534"] * 4
        assert field(p.pid, "Gid").split() == ["65534"] * 4
        assert int(field(p.pid, "CapEff"), 16) == int(field(p.pid, "CapPrm"), 16) == 0
        assert field(p.pid, "NoNewPrivs") == "1"


def test_sandbox_off_leaves_the_process_as_it_was(acting):
    with acting("spin", "--sandbox", "off") as p:
        read_until(p.stdout, b"do=spin")
        assert field(p.pid, "Uid").split()[0] == str(os.geteuid()) and field(p.pid, "Seccomp") == field("self", "Seccomp")


# ---- without io_uring ----

def test_row103_epoll_takes_over_where_io_uring_is_refused(act):
    assert b"io_uring" in act("poweroff", "-v").err or not uring_here()
    r = act("poweroff", "-v", prefix=NO_URING)
    assert r.status == 0 and re.search(rb"^vmm: io/0: .*epoll", r.err, re.M), r.err
    assert r.result["loop"]["engine"] == "epoll"


def uring_here():
    return json.loads(run_vmm("doctor", "--json").out)["checks"]["io_uring"]["ok"]


def test_row103_asking_for_refused_io_uring_is_an_error_with_words(act):
    r = act("poweroff", "--engine", "io_uring", prefix=NO_URING)
    assert r.status == 125 and r.err.count(b"\n") == 1 and b"io_uring" in r.err and b"epoll" in r.err, r.err


def test_disk_rng_console_and_nat_work_without_io_uring(vmm, disk, tmp_path, nat):
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-a", "pci msix", "-d", disk, "-n", "user,fwd=tcp:0:22",
            prefix=NO_URING)
    assert r.status == 0, (r.out, r.err)
    assert disk.read_bytes()[512:520] == bytes(i * 7 & 0xff for i in range(8))
    r = vmm("-k", guest("virtio-rng.elf"), "-m", "16M", "-a", "pci msix", "--rng", "--net", "none", prefix=NO_URING)
    assert r.status == 0, r.out
    r = vmm("-k", guest("virtio-console.elf"), "-m", "16M", "-a", "pci blocks=4", "--console", f"file:{tmp_path}/c",
            "--net", "none", prefix=NO_URING)
    assert r.status == 0 and (tmp_path / "c").stat().st_size == 4 * 32768


def test_serial_and_endings_work_without_io_uring(act):
    assert act("echo", prefix=NO_URING, stdin=b"hello q").out == b"do=echo\nhello q"
    assert act("cli-hlt", prefix=NO_URING).status == 103
    assert act("spin", "-t", "500ms", prefix=NO_URING).status == 124
    assert act("run-hole", prefix=NO_URING).status == 105
    assert act("reboot", "--on-reboot", "restart", prefix=NO_URING).status == 0


def test_doctor_sees_that_io_uring_is_refused():
    facts = json.loads(run_vmm("doctor", "--json", prefix=NO_URING).out)
    assert facts["checks"]["io_uring"]["ok"] is False and facts["usable"] is True


# ---- what it needs ----

@pytest.mark.parametrize("limit", [4, 6, 8, 10, 12, 14, 16, 20, 24, 32])
def test_row102_few_descriptors_are_an_error_with_words_or_enough(act, disk, limit):
    r = act("poweroff", "--rng", "-d", disk, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    if r.status != 0:
        assert r.status == 125 and r.err.count(b"\n") == 1 and b"Too many open files" in r.err, (r.status, r.err)
    else:
        assert limit > 10


@pytest.mark.release
def test_row102_little_address_space_is_an_error_with_words(act):
    r = act("poweroff", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)))
    assert r.status == 125 and r.err.count(b"\n") == 1 and b"memory" in r.err, r.err


def test_without_its_helpers_it_says_which_one_is_missing(tmp_path):
    alone = tmp_path / "vmm"
    shutil.copy(VMM, alone)
    base = [alone, "-k", guest("actions.elf"), "-m", "16M"]
    io = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    if subprocess.run([alone, "-k", "/", "-n", "user"], **io).stderr.find(b"vmm-nat") >= 0:
        p = subprocess.run([*base, "-a", "do=poweroff", "-n", "user"], **io)
        assert p.returncode == 125 and p.stderr.count(b"\n") == 1 and b"--net" in p.stderr
        p = subprocess.run([*base, "-a", "do=poweroff"], **io)          # nobody asked for a network
        assert p.returncode == 0 and p.stderr.count(b"\n") == 1 and b"no network: vmm-nat" in p.stderr
    assert subprocess.run([*base, "-a", "do=poweroff", "--net", "none"], **io).returncode == 0
    p = subprocess.run([*base, "-a", "do=run-hole", "--net", "none"], **io)
    assert p.returncode == 105 and b"rip 00000000d8000000" in p.stderr


def test_row104_stopped_and_continued_guest_goes_on(acting):
    with acting("echo") as p:
        read_until(p.stdout, b"do=echo")
        p.send_signal(signal.SIGSTOP)
        until(lambda: field(p.pid, "State")[0] == "T", "stopped")
        p.stdin.write(b"while stopped q")
        p.stdin.flush()
        p.send_signal(signal.SIGCONT)
        read_until(p.stdout, b"while stopped q")
        assert p.wait(PATIENCE) == 0


# ---- what it leaves behind ----

@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_die_with_parent(tmp_path, sandbox):
    # More follows the wait, or the shell might become its last command.
    script = '"$@" & echo $!; wait; echo gone'
    p = subprocess.Popen(["sh", "-c", script, "sh", VMM, "-k", guest("actions.elf"), "-m", "16M", "-a", "do=spin", "-n",
                          "none", "--die-with-parent", "--sandbox", sandbox, "-s", f"file:{tmp_path}/log"],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    pid = int(p.stdout.readline())
    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size, "the guest runs")
    assert alive(pid)
    p.kill()
    p.wait()
    try:
        until(lambda: not alive(pid), "it died with its parent")
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        p.stdout.close()


def test_run_outlives_its_parent_by_default(tmp_path):
    args = ["-k", guest("actions.elf"), "-m", "16M", "-a", "do=echo", "-n", "none", "-s", f"pipe:{tmp_path}/com",
            "-r", tmp_path / "r"]
    os.mkfifo(tmp_path / "com.in")
    os.mkfifo(tmp_path / "com.out")
    p = subprocess.Popen(["sh", "-c", '"$@" & echo $!; wait', "sh", VMM, *map(str, args)], stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE)
    pid = int(p.stdout.readline())
    with open(tmp_path / "com.out", "rb", buffering=0) as out, open(tmp_path / "com.in", "wb", buffering=0) as into:
        read_until(out, b"do=echo")
        p.kill()
        p.wait()
        into.write(b"still here q")
        read_until(out, b"still here q")
        until(lambda: not alive(pid), "it ends by itself")
    assert read_result(tmp_path / "r")["status"] == 0
    p.stdout.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_no_helper_outlives_the_run(nat, end):
    args = ["-k", guest("actions.elf"), "-m", "16M", "-a", "do=spin", "-n", "user", "-n", "user,mac=52:54:00:00:00:02"]
    with started_vmm(*args) as p:
        read_until(p.stdout, b"do=spin")
        family = descendants(p.pid)
        names = [field(pid, "Name") for pid in family]
        assert len(family) == 3 and names.count("vmm-nat") == 2, names
        p.send_signal(end)
        p.wait(PATIENCE)
    until(lambda: not any(map(alive, family)), "the spawner and the NAT helpers are gone")


def test_nat_helper_that_dies_is_replaced_and_the_run_goes_on(nat, tmp_path):
    args = ["-k", guest("virtio-net.elf"), "-m", "16M", "-a", "pci", "-r", tmp_path / "r"]
    with started_vmm(*args) as p:
        read_until(p.stdout, b"started")

        def helpers():
            return [pid for pid in descendants(p.pid) if is_nat(pid)]

        seen = until(helpers, "a NAT helper")
        for _ in range(2):
            os.kill(seen[-1], signal.SIGKILL)
            seen += until(lambda: [pid for pid in helpers() if pid not in seen], "another NAT helper")
        p.stdin.write(b"q")
        p.stdin.close()
        assert p.wait(PATIENCE) == 0
        assert p.stderr.read().count(b"starting it again") >= 1
    # One that is killed before it says that it serves is not counted.
    assert read_result(tmp_path / "r")["devices"]["net0"]["restarts"] <= 2


def test_forwarded_port_listens_while_the_guest_runs_and_not_after(nat):
    args = ["-k", guest("actions.elf"), "-m", "16M", "-a", "do=spin", "-n", "user,fwd=tcp:0:22"]
    with started_vmm(*args) as p:
        read_until(p.stdout, b"do=spin")
        line = read_until(p.stderr, b"guest 22").decode()
        port = int(re.search(r"127\.0\.0\.1:(\d+) -> guest 22", line)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
            pass
        # Another run cannot have it, and says so.
        other = run_vmm("-k", guest("actions.elf"), "-m", "16M", "-n", f"user,fwd=tcp:{port}:22")
        assert other.status == 125 and str(port).encode() in other.err and b"in use" in other.err, other.err
        p.terminate()
        p.wait(PATIENCE)

    def closed():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) != 0

    until(closed, "nobody listens any more")


def test_forward_is_bound_to_the_address_asked_for(nat):
    args = ["-k", guest("actions.elf"), "-m", "16M", "-a", "do=spin", "-n", "user,fwd=tcp:127.0.0.2:0:22"]
    with started_vmm(*args) as p:
        port = int(re.search(r"127\.0\.0\.2:(\d+) -> ", read_until(p.stderr, b"guest 22").decode())[1])
        with socket.create_connection(("127.0.0.2", port), timeout=PATIENCE):
            pass
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", port)) != 0
