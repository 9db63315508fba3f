"""What serial ports and consoles are connected to: pipes, files, nothing at all, and a terminal."""
import fcntl
import os
import pty
import signal
import socket
import subprocess
import termios
import time

import pytest

from conftest import PATIENCE, VMM, guest, read_result, read_until, started_vmm, until

pytestmark = pytest.mark.usefixtures("kvm")


def args_for(do, *more):
    return ["-k", guest("actions.elf"), "-m", "16M", "--net", "none", "-a", f"do={do}", *map(str, more)]


# ---- pipes and files ----

def test_bytes_go_both_ways_through_pipes(acting):
    with acting("echo") as p:
        read_until(p.stdout, b"do=echo\n")
        for word in (b"one", b"two\x00\xff", b"three"):
            p.stdin.write(word)
            p.stdin.flush()
            read_until(p.stdout, word)
        p.stdin.write(b"q")
        p.stdin.close()
        assert p.wait(PATIENCE) == 0
        assert p.stdout.read() == b"q" and p.stderr.read() == b""


def test_input_from_a_pipe_has_no_escape_key(act):
    r = act("echo", stdin=b"\x01x\x01c q")
    assert r.status == 0 and r.out == b"do=echo\n\x01x\x01c q"


def test_end_of_input_does_not_end_the_run(act):
    r = act("echo", "-t", "1500ms", stdin=b"no key that ends it")
    assert r.status == 124 and r.out.endswith(b"ends it")


def test_output_to_a_file(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        p = subprocess.run([VMM, *args_for("flood kib=8")], stdin=subprocess.DEVNULL, stdout=out, timeout=PATIENCE)
    data = (tmp_path / "out").read_bytes()
    assert p.returncode == 0 and len(data) == len(b"do=flood\n") + 8192 + 4 and data.endswith(b"end\n")


@pytest.mark.parametrize("closed, out", [("<&-", b"do=poweroff\n"), (">&-", b""), ("2>&-", b"do=poweroff\n"),
                                         ("<&- >&- 2>&-", b"")])
def test_closed_standard_descriptors_are_no_error(tmp_path, closed, out):
    """Nor does a file opened by vmm take their place: a disk there would get the guest's words."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"\0" * 65536)
    cmd = ["sh", "-c", f'exec "$@" {closed}', "sh", VMM, *args_for("poweroff", "-d", disk, "-r", tmp_path / "r")]
    p = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert (p.returncode, p.stdout, p.stderr) == (0, out, b"")
    assert read_result(tmp_path / "r")["cause"] == "poweroff"
    assert disk.read_bytes() == b"\0" * 65536


def test_dev_null_everywhere():
    null = subprocess.DEVNULL
    assert subprocess.run([VMM, *args_for("poweroff")], stdin=null, stdout=null, stderr=null, timeout=PATIENCE).returncode == 0


def test_row56_reader_that_left_is_no_error(acting):
    with acting("flood kib=64") as p:
        p.stdout.close()
        assert p.wait(PATIENCE) == 0
        assert p.stderr.read() == b""


def console(*more):
    return ["-k", guest("virtio-console.elf"), "-m", "16M", "--net", "none", "--serial", "null", "--console", "stdio",
            *map(str, more)]


def test_row56_reader_that_stalls_does_not_hold_the_guest(tmp_path):
    """4 MiB to a pipe nobody reads: what the ring cannot hold goes, and is counted; the run ends all the same."""
    args = console("-a", "pci msix blocks=128", "-r", tmp_path / "r", "-t", "50")
    with started_vmm(*args, stdin=subprocess.DEVNULL) as p:
        assert p.wait(PATIENCE) == 0
    r = read_result(tmp_path / "r")
    port = r["devices"]["console0"]["ports"][0]
    assert port["bytes_out"] == 4 << 20
    assert 2 << 20 < port["bytes_dropped"] < 4 << 20
    assert r["peak_rss_kib"] < 32 << 10


def pipe_bytes(stream):
    buf = bytearray(4)
    fcntl.ioctl(stream.fileno(), termios.FIONREAD, buf)
    return int.from_bytes(buf, "little")


def test_slow_reader_gets_every_byte(tmp_path):
    """512 KiB fit into the ring: the guest has ended when reading starts."""
    with started_vmm(*console("-a", "pci msix blocks=16"), stdin=subprocess.DEVNULL) as p:
        until(lambda: pipe_bytes(p.stdout) >= 65536, "the pipe is full")
        data = p.stdout.read()
        assert p.wait(PATIENCE) == 0
    assert [data[i * 32768:i * 32768 + 11] for i in range(16)] == [b"block %04x\n" % i for i in range(16)]
    assert len(data) == 16 * 32768


@pytest.mark.parametrize("machine, words", [("pc", "pci msix"), ("pc", "pci line"), ("microvm", "line")])
def test_console_output_reaches_its_file(vmm, tmp_path, machine, words):
    r = vmm("-k", guest("virtio-console.elf"), "-m", "16M", "--net", "none", "-M", machine, "-a", f"{words} blocks=8",
            "--console", f"file:{tmp_path}/hvc0")
    assert r.status == 0, r.out
    assert (tmp_path / "hvc0").stat().st_size == 8 * 32768


def test_file_is_truncated_and_append_is_not(act, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"old\n")
    assert act("poweroff", "-s", f"append:{log}").status == 0
    assert log.read_bytes() == b"old\ndo=poweroff\n"
    assert act("poweroff", "-s", f"file:{log}").status == 0
    assert log.read_bytes() == b"do=poweroff\n"


def test_serial_on_a_pair_of_fifos(acting, tmp_path):
    os.mkfifo(tmp_path / "com.in")
    os.mkfifo(tmp_path / "com.out")
    with acting("echo", "-s", f"pipe:{tmp_path}/com") as p:
        with open(tmp_path / "com.out", "rb", buffering=0) as out, open(tmp_path / "com.in", "wb", buffering=0) as into:
            read_until(out, b"do=echo\n")
            into.write(b"through a fifo q")
            read_until(out, b"through a fifo q")
        assert p.wait(PATIENCE) == 0


def test_serial_on_a_unix_socket_keeps_what_was_said_before_the_client_came(acting, tmp_path):
    path = str(tmp_path / "sock")
    with acting("echo", "-s", f"unix:{path}") as p, socket.socket(socket.AF_UNIX) as s:
        s.settimeout(PATIENCE)
        until(lambda: s.connect_ex(path) == 0, "the socket listens")
        assert os.stat(path).st_mode & 0o777 == 0o600
        s.sendall(b"hello q")
        got = b""
        while not got.endswith(b"hello q"):
            part = s.recv(4096)
            assert part, got
            got += part
        assert got == b"do=echo\nhello q"
        assert p.wait(PATIENCE) == 0


def test_serial_none_is_silent(act):
    r = act("poweroff", "-s", "none")
    assert r.status == 0 and r.out == b""


def test_panic_is_seen_on_a_port_nobody_listens_to(act):
    assert act("panic", "-s", "null").status == 101


# ---- a terminal ----

class Terminal:
    """A vmm on a terminal of its own: the leader of a session whose foreground it is."""

    def __init__(self, *args, background=False):
        self.master, self.slave = pty.openpty()
        attributes = termios.tcgetattr(self.slave)
        attributes[1] &= ~termios.OPOST                     # what is written is what is read
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)
        self.before = termios.tcgetattr(self.slave)
        cmd = [str(VMM), *map(str, args)]
        if background:
            # A shell with job control leads the session; what it starts with & is not in the foreground.
            cmd = ["bash", "-c", 'set -m; "$@" & wait $!', "bash", *cmd]
        self.proc = subprocess.Popen(cmd, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE,
                                     start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.set_blocking(self.master, False)
        self.got = b""

    def raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def type(self, keys):
        os.write(self.master, keys)

    def read(self):
        try:
            self.got += os.read(self.master, 65536)
        except BlockingIOError:
            pass
        return self.got

    def expect(self, words):
        end = time.monotonic() + PATIENCE
        while words not in self.read():
            assert time.monotonic() < end, f"no {words!r} in {self.got!r}"
            time.sleep(0.005)

    def ready(self, words):
        self.expect(words)
        until(self.raw, "raw mode")
        return self

    def wait(self):
        status = self.proc.wait(PATIENCE)
        self.read()
        assert termios.tcgetattr(self.slave) == self.before, "the terminal was not restored"
        return status

    def hang_up(self):
        os.close(self.slave)
        os.close(self.master)
        self.slave = self.master = -1

    def close(self):
        if self.proc.poll() is None:
            self.proc.kill()
            self.proc.wait()
        self.proc.stderr.close()
        if self.slave >= 0:
            self.hang_up()


@pytest.fixture
def terminal():
    made = []

    def go(do, *more, **kw):
        made.append(Terminal(*args_for(do, *more), **kw))
        return made[-1]

    yield go
    for t in made:
        t.close()


def test_terminal_is_raw_while_the_guest_runs_and_restored_after(terminal):
    t = terminal("echo").ready(b"do=echo")
    t.type(b"\x03\x1a\x1c\x13\r")                           # keys a cooked terminal would keep for itself
    t.expect(b"\x03\x1a\x1c\x13\r")
    t.type(b"q")
    assert t.wait() == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], ids=lambda s: s.name)
def test_terminal_is_restored_after_a_signal(terminal, sig):
    t = terminal("spin").ready(b"do=spin")
    t.proc.send_signal(sig)
    assert t.wait() == 128 + sig


@pytest.mark.parametrize("do, more, status", [
    ("spin", ["-t", "500ms"], 124), ("run-hole", [], 105), ("reset-cf9", [], 100), ("pvpanic", [], 101),
    ("triple-fault", [], 102), ("cli-hlt", [], 103), ("value value=9", [], 9),
])
def test_terminal_is_restored_however_the_run_ends(terminal, do, more, status):
    assert terminal(do, *more).wait() == status


def test_terminal_is_left_alone_on_errors_of_vmm(terminal):
    assert terminal("poweroff", "-d", "/nonexistent/disk").wait() == 125


def test_ctrl_a_x_ends_the_run_as_signal_2(terminal, tmp_path):
    t = terminal("spin", "-r", tmp_path / "r").ready(b"do=spin")
    t.type(b"\x01x")
    assert t.wait() == 128 + signal.SIGINT
    assert read_result(tmp_path / "r")["cause"] == "signal"


def test_ctrl_a_h_lists_the_commands(terminal):
    t = terminal("echo").ready(b"do=echo")
    t.type(b"\x01h")
    t.expect(b"Ctrl-A x")
    t.type(b"q")
    assert t.wait() == 0


def test_ctrl_a_twice_sends_one_to_the_guest(terminal):
    t = terminal("echo").ready(b"do=echo")
    t.type(b"<\x01\x01>q")
    assert t.wait() == 0
    assert b"<\x01>q" in t.got


def test_ctrl_a_c_moves_the_keyboard(terminal):
    t = terminal("which", "-s", "stdio", "-s", "stdio").ready(b"ready")
    t.type(b"a")
    t.expect(b"1:a")
    t.type(b"\x01cb")
    t.expect(b"2:b")
    t.type(b"\x01cq")
    t.expect(b"1:q")
    assert t.wait() == 0


def test_ctrl_a_b_sends_a_break(terminal):
    t = terminal("break").ready(b"ready")
    t.type(b"\x01b")
    assert t.wait() == 0


def test_keys_typed_before_the_start_reach_the_guest(terminal):
    t = terminal("echo")
    t.type(b"hello q\n")                                    # the line end: the terminal may be cooked still
    assert t.wait() == 0
    assert b"hello q" in t.got.partition(b"do=echo")[2]


def test_background_job_leaves_the_keyboard_to_the_shell(terminal):
    t = terminal("poweroff", background=True)
    assert t.wait() == 0
    assert b"do=poweroff" in t.got


def test_terminal_stays_cooked_where_no_port_reads_it(terminal, tmp_path):
    log = tmp_path / "log"
    t = terminal("spin", "-s", f"file:{log}")
    until(lambda: log.exists() and b"do=spin" in log.read_bytes(), "the guest runs")
    assert not t.raw()
    t.type(b"\x03")                                         # Ctrl-C is a signal then
    assert t.wait() == 128 + signal.SIGINT


def test_row104_terminal_that_goes_away_ends_the_run(terminal, tmp_path):
    t = terminal("spin", "-r", tmp_path / "r").ready(b"do=spin")
    t.hang_up()
    assert t.proc.wait(PATIENCE) == 128 + signal.SIGHUP
    assert read_result(tmp_path / "r")["status"] == 129
