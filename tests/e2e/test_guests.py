"""Every bare-metal payload on the real /dev/kvm: how a kernel is entered, how a run ends, and the devices."""
import gzip
import lzma
import os
import re
import shutil
import signal
import subprocess

import pytest

from conftest import guest, read_result, read_until, started_vmm, until

pytestmark = pytest.mark.usefixtures("kvm")
MACHINES = ["pc", "microvm"]
ENGINES = ["io_uring", "epoll"]


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "module"
    path.write_bytes(b"vmm module: sixteen and more bytes\n")
    return path


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"vmm disk".ljust(65536, b"\0"))
    return path


# ---- how a kernel is entered ----

def ends_well(r, *words):
    assert r.status == 0, (r.status, r.out, r.err)
    for word in words:
        assert word in r.out, r.out


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("payload, args, says", [
    ("multiboot1.elf", ["-m", "64M", "-a", "test=1 ram=64 modules=2", "--module", "{m},arg one", "--module", "{m}"],
     [b"hello multiboot1\n", b"module arg one\n", b"ok\n"]),
    ("multiboot1-64.elf", ["-m", "64M", "-a", "test=1 ram=64 modules=1", "--module", "{m},arg one"],
     [b"hello multiboot1 ELF64\n", b"module arg one\n"]),
    ("multiboot2.elf", ["-m", "64M", "-a", "test=1 ram=64 modules=1", "--module", "{m},arg one"],
     [b"hello multiboot2\n", b"module arg one\n"]),
    ("pvh.elf", ["-m", "64M", "-a", "test=1 ram=64 modules=1", "--initrd", "{m}"], [b"hello pvh\n", b"ok\n"]),
    ("linux64.elf", ["-m", "64M", "-a", "test=1 ram=64 modules=1", "--initrd", "{m}"], [b"hello linux64\n", b"ok\n"]),
    ("bzimage.bin", ["-a", "test=1"], [b"hello bzimage 64-bit entry"]),
    ("bzimage.bin", ["-a", "test=1", "--kernel-entry", "bzimage32"], [b"hello bzimage 32-bit entry"]),
    ("flat16.bin", ["-m", "1M", "--kernel-entry", "flat16"], [b"hello flat16"]),
    ("flat32.bin", ["-m", "5G", "-a", "test=1 ram=5120", "--kernel-entry", "flat32"], [b"hello flat32\n", b"ok\n"]),
    ("flat64.bin", ["-m", "64M", "-a", "test=1 ram=64", "--kernel-entry", "flat64"], [b"hello flat64\n", b"ok\n"]),
], ids=lambda v: v if isinstance(v, str) else None)
def test_kernel_is_recognised_entered_and_told_the_truth(vmm, module, machine, payload, args, says):
    r = vmm("-k", guest(payload), "--net", "none", "-M", machine, *[a.format(m=module) for a in args])
    ends_well(r, *says)
    assert r.result["machine"] == machine and r.err == b""


PACKERS = {
    "gzip": lambda path: gzip.compress(path.read_bytes()),
    "xz": lambda path: lzma.compress(path.read_bytes()),
    # What mkimage scripts and the kernel's own build use.
    "xz-crc32": lambda path: lzma.compress(path.read_bytes(), check=lzma.CHECK_CRC32),
    "zstd": lambda path: tool(["zstd", "-19", "-c", path]),
    "lz4": lambda path: tool(["lz4", "-9", "-c", path]),
    "lz4-legacy": lambda path: tool(["lz4", "-l", "-c", path]),
}


def tool(argv):
    if not shutil.which(argv[0]):
        pytest.skip(f"no {argv[0]} on this host")
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("payload, says", [("pvh.elf", b"hello pvh\n"), ("linux64.elf", b"hello linux64\n"),
                                           ("multiboot1.elf", b"hello multiboot1\n")])
def test_compressed_kernel_boots(vmm, tmp_path, packer, payload, says):
    path = tmp_path / "name-says-nothing"
    path.write_bytes(PACKERS[packer](guest(payload)))
    ends_well(vmm("-k", path, "-m", "64M", "-a", "test=1 ram=64", "--net", "none"), says, b"ok\n")


def test_kernel_comes_through_a_pipe_name_and_a_symlink(vmm, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(guest("pvh.elf"))
    ends_well(vmm("-k", link, "-m", "64M", "-a", "test=1", "--net", "none"), b"ok\n")
    with open(guest("pvh.elf"), "rb") as f:
        ends_well(vmm("-k", "/dev/stdin", "-m", "64M", "-a", "test=1", "--net", "none", "-s", "fd:1", stdin=f), b"ok\n")


@pytest.mark.parametrize("payload", ["pvh.elf", "linux64.elf"])
def test_initrds_are_joined_in_order(vmm, tmp_path, payload):
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"vmm module: the first of two....")
    second.write_bytes(b"the second, up to here: Z" + b"\0" * 6 + b"~")
    length = first.stat().st_size + second.stat().st_size
    r = vmm("-k", guest(payload), "-m", "64M", "--net", "none", "-i", first, "-i", second,
            "-a", f"test=1 modules=1 length={length} last={ord('~')}")
    ends_well(r, b"ok\n")


def test_flat_binary_goes_to_its_load_address(vmm, tmp_path):
    """Real mode: call next; next: pop bx; mov ax, cs; shl ax, 4; add ax, bx; mov al, ah; out 0xf4, al; hlt."""
    path = tmp_path / "boot"
    path.write_bytes(bytes.fromhex("e80000" "5b" "8cc8" "c1e004" "01d8" "88e0" "e6f4" "f4"))
    r = vmm("-k", path, "--load-address", "0x7c00", "-m", "1M", "--net", "none")
    assert r.status == 0x7c, r.err


# ---- how a run ends ----

@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("do, status, cause, says", [
    ("poweroff", 0, "poweroff", None),
    ("value value=0", 0, "guest-value", None),
    ("value value=42", 42, "guest-value", None),
    ("value value=255", 255, "guest-value", None),
    ("reset-cf9", 100, "reset", b"reset"),
    ("reset-acpi", 100, "reset", b"reset"),
    ("reset-8042", 100, "reset", b"reset"),
    ("panic", 101, "panic", b"Attempted to kill init"),
    ("pvpanic", 101, "panic", b"pvpanic"),
    ("triple-fault", 102, "triple-fault", b"triple fault"),
    ("cli-hlt", 103, "halted", b"halted"),
])
def test_run_ends_with_its_status_and_cause(act, machine, do, status, cause, says):
    r = act(do, "-M", machine, "-t", "50")
    assert (r.status, r.result["status"], r.result["cause"]) == (status, status, cause), r.err
    if says is None:
        assert r.err == b""
    else:
        assert r.err.startswith(b"vmm: ") and r.err.count(b"\n") == 1 and says in r.err
        assert says.decode() in r.result["reason"]


def test_guest_value_is_in_the_result(act):
    assert act("value value=42").result["guest_value"] == 42
    assert act("poweroff").result["guest_value"] is None


@pytest.mark.parametrize("value, status", [(0, 1), (16, 33), (127, 255)])
def test_debug_exit_speaks_qemu(act, value, status):
    assert act(f"value value={value}", "--debug-exit", "0xf4,qemu").status == status


def test_debug_exit_port_moves_and_goes(act):
    # The payload halts for good after its report was not heard.
    assert act("value value=3", "--debug-exit", "0x501").status == 103
    assert act("value value=3", "--debug-exit", "off").status == 103


def test_quiet_says_nothing_of_the_guest(act):
    r = act("triple-fault", "--quiet")
    assert r.status == 102 and r.err == b""


@pytest.mark.parametrize("cpus", [1, 4])
def test_halted_cpus_are_found_without_a_timeout(act, cpus):
    r = act("cli-hlt", "--cpus", cpus)
    assert r.status == 103 and r.result["cpus"] == cpus


@pytest.mark.parametrize("do", ["sti-hlt", "spin"])
def test_timeout_ends_idle_and_busy_guests(act, do):
    r = act(do, "--timeout", "700ms")
    assert r.status == 124 and r.result["cause"] == "timeout"
    assert 0.7 <= r.result["wall_seconds"] < 30


def test_kvm_failure_shows_registers_of_code_where_no_memory_is(act):
    r = act("run-hole")
    assert r.status == 105 and r.result["cause"] == "kvm-failure"
    assert re.search(rb"rip 00000000d8000000\b", r.err) and b"cr0" in r.err


@pytest.mark.parametrize("do, code, words", [("int3", b"cc ", b"int3"), ("sse", b"0f 57 c0", b"xorps xmm0, xmm0")])
def test_kvm_failure_shows_the_instruction_and_its_bytes(act, doctor, do, code, words):
    r = act(do)
    if r.status == 0:
        assert not os.path.exists("/sys/module/kvm_pvm")
        return
    assert r.status == 105 and r.result["software_kvm"]
    assert b"code " + code in r.err and words in r.err
    assert r.err.count(b"software") == 1                    # and why


def test_restart_on_reboot_counts_resets(act):
    r = act("reboot", "--on-reboot", "restart")
    assert r.status == 0, r.err
    assert re.findall(rb"start (0x\d)", r.out) == [b"0x1", b"0x2", b"0x3"]
    assert r.result["resets"] == 2


def test_restart_on_microvm_starts_a_virtio_driver_again(vmm, disk):
    """Without an RTC the guest cannot count: it is the reset that must leave the run alive until the timeout."""
    r = vmm("-k", guest("actions.elf"), "-m", "16M", "--net", "none", "-M", "microvm", "-a", "do=reset-8042",
            "--on-reboot", "restart", "-t", "1", "-d", disk)
    assert r.status == 124 and r.result["resets"] >= 2
    assert r.out.count(b"do=reset-8042") in (r.result["resets"], r.result["resets"] + 1)


def test_reboot_ends_the_run_unless_asked(act):
    r = act("reboot")
    assert r.status == 100 and r.out.count(b"start") == 1


@pytest.mark.parametrize("do", ["panic", "pvpanic"])
def test_ignored_panic_is_the_guests_own_affair(act, do):
    r = act(do, "--on-panic", "ignore", "-t", "1500ms")
    assert r.status == 124 and r.result["cause"] == "timeout"


def test_panic_lets_the_last_words_out(act):
    assert b"---[ end Kernel panic" in act("panic").out


def test_row57_words_of_a_guest_reach_stderr_without_control_characters(act):
    r = act("panic-escape")
    assert r.status == 101 and b"\x1b" in r.out             # what the guest writes is its own
    assert b"owned" in r.err
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", r.err) and b"\xc2\x9b" not in r.err


# ---- ended from outside ----

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("sig", SIGNALS, ids=lambda s: s.name)
def test_signal_ends_a_guest_that_does_not_listen(acting, tmp_path, sig):
    with acting("spin", "-r", tmp_path / "r") as p:
        read_until(p.stdout, b"do=spin")
        p.send_signal(sig)
        assert p.wait(60) == 128 + sig
        assert b"power button" in p.stderr.read()
    assert read_result(tmp_path / "r")["cause"] == "signal"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("sig", SIGNALS, ids=lambda s: s.name)
def test_signal_presses_the_power_button(acting, tmp_path, sig, machine):
    with acting("button", "-M", machine, "-r", tmp_path / "r") as p:
        read_until(p.stdout, b"listening")
        p.send_signal(sig)
        assert p.wait(60) == 128 + sig
        assert b"pressed" in p.stdout.read()
    r = read_result(tmp_path / "r")
    assert r["cause"] == "signal" and "powered off" in r["reason"]


def test_second_signal_ends_at_once(acting, tmp_path):
    with acting("button stay", "--grace", "1h", "-r", tmp_path / "r") as p:
        read_until(p.stdout, b"listening")
        p.terminate()
        read_until(p.stdout, b"pressed")
        p.send_signal(signal.SIGINT)
        assert p.wait(60) == 128 + signal.SIGTERM
    assert "again" in read_result(tmp_path / "r")["reason"]


def test_grace_runs_out(acting, tmp_path):
    with acting("button stay", "--grace", "300ms", "-r", tmp_path / "r") as p:
        read_until(p.stdout, b"listening")
        p.terminate()
        assert p.wait(60) == 128 + signal.SIGTERM
    assert "in time" in read_result(tmp_path / "r")["reason"]


def test_no_grace_means_at_once(acting):
    with acting("button", "--grace", "0") as p:
        read_until(p.stdout, b"listening")
        p.terminate()
        assert p.wait(60) == 128 + signal.SIGTERM
        assert b"pressed" not in p.stdout.read()


# ---- CPUs and devices ----

@pytest.mark.parametrize("machine", MACHINES)
def test_four_cpus_start(vmm, machine):
    r = vmm("-k", guest("smp.elf"), "-m", "16M", "-c", "4", "-a", "cpus=4", "-M", machine, "--net", "none")
    assert r.status == 0 and b"started 0x3" in r.out, r.out


VIRTIO = [("microvm", ""), ("microvm", "line"), ("pc", "pci"), ("pc", "pci msix"), ("pc", "pci line")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("machine, words", VIRTIO)
def test_virtio_rng_gives_random_bytes(vmm, machine, words, engine):
    r = vmm("-k", guest("virtio-rng.elf"), "-m", "16M", "--rng", "-M", machine, "-a", words, "--net", "none",
            "--engine", engine)
    assert r.status == 0 and b"ok" in r.out, r.out
    assert r.result["devices"]["rng0"]["bytes"] == 128
    assert r.result["loop"]["engine"] == engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cache", ["writeback", "none", "unsafe"])
@pytest.mark.parametrize("machine, words", VIRTIO)
def test_virtio_blk_reads_writes_and_persists(vmm, disk, machine, words, engine, cache):
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", f"{disk},cache={cache}", "-M", machine, "-a", words,
            "--net", "none", "--engine", engine)
    if cache == "none" and r.status == 125 and b"O_DIRECT" in r.err:
        pytest.skip("no O_DIRECT on this file system")
    assert r.status == 0 and b"ok" in r.out, (r.out, r.err)
    data = disk.read_bytes()
    assert data[:8] == b"vmm disk" and len(data) == 65536
    assert data[512:1024] == bytes(i * 7 & 0xff for i in range(512))
    assert data[1024:] == b"\0" * (65536 - 1024)
    d = r.result["devices"]["blk0"]
    assert (d["reads"], d["writes"], d["flushes"]) == (2, 1, 1) and d["bytes_written"] == 512
    assert not d["needs_reset"]


def test_disks_on_threads_of_their_own(vmm, disk, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(b"\0" * 131072)
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", f"{disk},iothread=1,poll_us=0", "-d", f"{other},iothread=2",
            "-M", "microvm", "--net", "none")
    assert r.status == 0 and b"ok" in r.out, (r.out, r.err)
    assert r.result["iothread1"]["turns"] > 0 and "iothread2" in r.result and "iothread3" not in r.result
    assert disk.read_bytes()[512:1024] == bytes(i * 7 & 0xff for i in range(512))


@pytest.mark.parametrize("keys, words", [(["iothread=8"], b"iothread"), (["poll_us=7"], b"--poll-us"),
                                         (["iothread=1,poll_us=1", "iothread=1,poll_us=2"], b"already looks")])
def test_impossible_threads_are_refused(vmm, tmp_path, keys, words):
    args = []
    for n, k in enumerate(keys):
        (tmp_path / f"d{n}").write_bytes(bytes(4096))
        args += ["-d", f"{tmp_path}/d{n},{k}"]
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "--net", "none", *args)
    assert r.status == 125 and words in r.err and r.err.count(b"\n") == 1, r.err


def test_read_only_disk_is_not_written(vmm, disk):
    os.chmod(disk, 0o444)
    before = disk.read_bytes()
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", f"{disk},ro", "-M", "microvm", "--net", "none")
    assert r.status == 1 and b"failed: request(&d, BLK_OUT" in r.out
    assert disk.read_bytes() == before


def test_disks_keep_their_order(vmm, disk, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(b"\0" * 131072)
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", disk, "-d", other, "-a", "pci", "--net", "none")
    assert r.status == 0
    devices = r.result["devices"]
    assert devices["blk0"]["file"] == str(disk) and devices["blk1"]["file"] == str(other)
    assert devices["blk1"]["driver_ok_seconds"] is None and other.read_bytes() == b"\0" * 131072


def test_row83_disk_of_a_running_machine_is_refused(acting, act, disk):
    with acting("spin", "-d", disk) as p:
        read_until(p.stdout, b"do=spin")
        r = act("poweroff", "-d", disk)
        assert r.status == 125 and str(disk).encode() in r.err and b"in use" in r.err, r.err
        ro = act("poweroff", "-d", f"{disk},ro")
        assert ro.status == 125 and b"in use" in ro.err
        p.kill()
        p.wait(60)
        assert until(lambda: act("poweroff", "-d", disk).status == 0, "the lock is gone with its owner")


def test_row83_readers_share_a_disk(acting, act, disk):
    with acting("spin", "-d", f"{disk},ro") as p:
        read_until(p.stdout, b"do=spin")
        assert act("poweroff", "-d", f"{disk},ro").status == 0
        assert act("poweroff", "-d", disk).status == 125


def test_row83_the_same_disk_twice_is_refused(act, disk):
    r = act("poweroff", "-d", disk, "-d", disk)
    assert r.status == 125 and str(disk).encode() in r.err


@pytest.mark.parametrize("first, last", [(i * 0x4000, i * 0x4000 + 0x3fff) for i in range(4)], ids=lambda v: f"{v:#x}")
def test_row34_all_ports_in_three_widths_do_no_harm(act, first, last):
    r = act(f"ports first={first} last={last}", "--testdev")
    assert r.status == 0, (r.out[-200:], r.err)


def test_row34_ports_of_microvm_do_no_harm(act):
    assert act("ports first=0 last=4095", "-M", "microvm").status == 0


def test_row34_holes_in_memory_read_as_ones(act):
    assert act("mmio").status == 0
    assert act("mmio", "--rng", "--balloon").status == 0


def test_row34_unclaimed_accesses_are_counted(act):
    e = act("mmio").result["exits"]
    assert e["mmio_unclaimed"] >= 4 * 48 and e["mmio"] > 0


@pytest.mark.parametrize("do", ["rtc", "pit"])
def test_clock_and_timer(act, do):
    assert act(do).status == 0


def test_testdev_is_there_on_request_only(act):
    assert act("testdev", "--testdev").status == 0
    assert act("testdev").status == 1


def test_fw_cfg_tells_memory_cpus_and_the_command_line(act):
    r = act("fw-cfg ram=16 cpus=2", "--cpus", 2)
    assert r.status == 0, r.out


def test_debugcon_goes_to_its_file(act, tmp_path):
    assert act("debugcon", "--debugcon", f"file:{tmp_path}/log").status == 0
    assert (tmp_path / "log").read_bytes() == b"through 0xe9\n"
    assert act("debugcon").status == 1                     # nobody answers at 0xe9


def test_second_serial_port_goes_to_its_file(act, tmp_path):
    r = act("com2", "-s", "stdio", "-s", f"file:{tmp_path}/log")
    assert r.status == 0 and r.out == b"do=com2\n"
    assert (tmp_path / "log").read_bytes() == b"second port\n"


@pytest.mark.parametrize("mem", ["1M", "3M", "4G", "6G"])
def test_memory_from_the_smallest_to_beyond_the_hole(vmm, mem):
    if mem == "1M":
        r = vmm("-k", guest("flat16.bin"), "--kernel-entry", "flat16", "-m", mem, "--net", "none")
        assert r.status == 0
    else:
        mib = int(mem[:-1]) * (1024 if mem.endswith("G") else 1)
        r = vmm("-k", guest("pvh.elf"), "-m", mem, "-a", f"test=1 ram={mib}", "--net", "none")
        ends_well(r, b"ok\n")
    assert r.result["peak_rss_kib"] < 64 << 10


def test_balloon_and_console_start_with_everything_else(act, tmp_path):
    r = act("poweroff", "--balloon", "--rng", "--console", f"file:{tmp_path}/hvc0", "--console",
            f"file:{tmp_path}/log,name=log")
    assert r.status == 0 and {"balloon0", "rng0", "console0"} <= set(r.result["devices"])


def test_kernel_too_large_for_memory_names_both_sizes(vmm):
    r = vmm("-k", guest("multiboot1.elf"), "-m", "1M", "--net", "none")
    assert r.status == 125 and r.err.count(b"\n") == 1 and b"--mem" in r.err, r.err


def test_row87_initrd_larger_than_memory_is_refused(vmm, tmp_path):
    big = tmp_path / "big"
    with open(big, "wb") as f:
        f.truncate(32 << 20)
    r = vmm("-k", guest("pvh.elf"), "-i", big, "-m", "16M", "-a", "test=1", "--net", "none")
    assert r.status == 125 and r.err.count(b"\n") == 1 and b"initrd" in r.err, r.err
