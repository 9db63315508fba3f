"""Every error path of the command line: one line on stderr that names the option, status 125, nothing on stdout."""
import os
import subprocess

import pytest

from conftest import VMM, guest, run_vmm


def fails(*args, says, **kw):
    r = run_vmm(*args, **kw)
    err = r.err.decode()
    assert r.status == 125, err
    assert r.out == b""
    assert err.startswith("vmm: ") and err.count("\n") == 1, err
    for word in [says] if isinstance(says, str) else says:
        assert word in err, err


@pytest.fixture
def kernel(tmp_path):
    """A file that is no kernel: errors of the options themselves come before it is looked at."""
    path = tmp_path / "kernel"
    path.write_bytes(b"\0" * 4096)
    return path


@pytest.fixture
def bootable(kvm):
    """Errors of devices come while the machine is built: the kernel and /dev/kvm have been found good by then."""
    return guest("actions.elf")


def test_no_arguments_print_usage_and_125():
    r = run_vmm()
    assert r.status == 125 and b"usage: vmm" in r.out


def test_help_fits_a_screen():
    r = run_vmm("--help")
    assert r.status == 0 and r.err == b""
    lines = r.out.decode().splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 110


def test_version():
    r = run_vmm("--version")
    assert r.status == 0 and r.out.startswith(b"vmm 0.")


def test_device_help_lists_the_classes():
    r = run_vmm("--device", "help")
    assert r.status == 0
    for name in (b"blk", b"net", b"console", b"rng", b"balloon"):
        assert name in r.out


def test_unknown_command():
    fails("boot", says=["'boot'", "expected run, disk, doctor"])


def test_no_kernel():
    fails("--mem", "64M", says="no kernel given")


def test_unknown_option_suggests_the_nearest():
    fails("--kernal", "x", says=["--kernal", "did you mean --kernel?"])


@pytest.mark.parametrize("option", ["--", "--=", "-x", "--x", "--zzzzzzzzz"])
def test_unknown_option_is_named_without_a_wild_guess(option):
    fails(option, "1", says=[f"'{option}'", "vmm --help"])


@pytest.mark.parametrize("option", ["kernel", "smp", "append", "initrd"])
def test_long_names_with_one_dash_are_not_taken_for_letters(option):
    fails(f"-{option}", "1", says=[f"'-{option}'", f"did you mean --{option}?"])


@pytest.mark.parametrize("command", ["version", "--version", "help"])
def test_nothing_may_follow_a_word_that_takes_nothing(command):
    fails(command, "more", says="'more'")


def test_stray_argument():
    fails("--mem", "64M", "bzImage", says=["'bzImage'", "--kernel"])


def test_flag_refuses_a_value():
    fails("--rng=1", says=["--rng", "takes no value"])


def test_option_without_its_value():
    fails("--kernel", says="--kernel needs a value")


@pytest.mark.parametrize("option, value, says", [
    ("--mem", "0", "must be 1M"),                   # row 89
    ("--mem", "1000000T", "--mem"),
    ("--mem", "lots", "expected a size"),
    ("--mem", "1048577B", "multiple of 4K"),
    ("--cpus", "0", "--cpus"),
    ("--cpus", "1000000", "--cpus"),
    ("--cpus", "two", "--cpus"),
    ("--cpu", "host,-nosuchflag", "nosuchflag"),
    ("--machine", "q35", "pc or microvm"),
    ("--timeout", "0", "--timeout"),
    ("--timeout", "soon", "expected a time"),
    ("--grace", "-1", "--grace"),
    ("--on-reboot", "later", "exit or restart"),
    ("--on-panic", "cry", "exit or ignore"),
    ("--engine", "aio", "auto, io_uring or epoll"),
    ("--poll-us", "x", "--poll-us"),
    ("--sandbox", "maybe", "on, off or log"),
    ("--kernel-entry", "uefi", "one of auto, "),
    ("--load-address", "here", "an address"),
    ("--debug-exit", "0x10000", "PORT"),
    ("--debug-exit", "0xf4,loud", "raw or qemu"),
    ("--device", "gpu", "no class 'gpu'"),
    ("--cmdline", "a\nb", "line break"),            # row 88
    ("--cmdline", "x" * 5000, "--cmdline"),
])
def test_row88_row89_bad_values_name_option_and_what_is_accepted(kernel, option, value, says):
    fails("--kernel", kernel, "--net", "none", option, value, says=[option, says])


def test_same_option_twice(kernel):
    fails("--kernel", kernel, "--kernel", kernel, says="given twice")


def test_too_many_serial_ports(kernel):
    fails("--kernel", kernel, *["--serial", "null"] * 5, says="COM1 to COM4")


@pytest.mark.parametrize("disk, says", [
    ("{tmp}/missing.img", "missing.img"),
    ("{tmp}", "directory"),                         # row 81
    ("/dev/null", "/dev/null"),
    ("{img},colour=red", "colour"),
    ("{img},format=qcow2", "qcow2"),
    ("{img},cache=maybe", "cache=maybe"),
    ("{img},queues=0", "queues=0"),
    ("file=", "--disk"),
])
def test_row81_bad_disks_are_refused_by_name(tmp_path, bootable, disk, says):
    img = tmp_path / "a.img"
    img.write_bytes(b"\0" * 65536)
    fails("--kernel", bootable, "--net", "none", "--disk", disk.format(tmp=tmp_path, img=img), says=["--disk", says])
    assert img.read_bytes() == b"\0" * 65536


@pytest.mark.parametrize("net, says", [
    ("bridge", "bridge"),
    ("user,colour=red", "colour"),
    ("user,fwd=tcp", "fwd"),
    ("user,fwd=icmp:1:2", "fwd"),
    ("user,fwd=tcp:0:70000", "fwd"),
    ("user,mac=zz", "mac"),
    ("user,mac=01:00:00:00:00:00", "mac"),
    ("user,mtu=10", "mtu"),
])
def test_bad_nets_are_refused_by_name(bootable, net, says):
    fails("--kernel", bootable, "--net", net, says=["--net", says])


@pytest.mark.parametrize("option", ["--serial", "--console", "--debugcon"])
@pytest.mark.parametrize("spec", ["file:/nonexistent/x", "telepathy", "unix:/nonexistent/x", "fd:99", "pipe:/nonexistent"])
def test_bad_chardevs_are_refused_by_name(bootable, option, spec):
    fails("--kernel", bootable, "--net", "none", option, spec, says=[option, spec.split(":")[-1]])


@pytest.mark.parametrize("args, says", [
    (["--serial", "null", "--serial", "null"], "second --serial"),
    (["--debugcon", "null"], "--debugcon"),
    (["--testdev"], "--testdev"),
])
def test_what_microvm_has_not_is_refused(kernel, args, says):
    fails("--kernel", kernel, "--net", "none", "--machine", "microvm", *args, says=[says, "microvm", "pc"])


def test_result_file_that_cannot_be_written(kernel):
    fails("--kernel", kernel, "--net", "none", "--result", "/nonexistent/r.json", says=["--result", "/nonexistent"])


def test_host_error_is_in_the_result_file(tmp_path):
    r = run_vmm("--kernel", tmp_path / "none", "--net", "none", result=tmp_path / "r.json")
    assert r.status == 125
    assert r.result["status"] == 125 and r.result["cause"] == "host-error"
    assert "none" in r.result["reason"]


@pytest.mark.parametrize("content, says", [
    (b"", "empty"),
    (b"\0" * 4096, "accepted"),
    (b"#!/bin/sh\necho hello\n" * 50, "script"),
    (b"QFI\xfb" + b"\0" * 4092, "qcow2"),
    (b"\x7fELF\x02\x01\x01" + b"\0" * 500, "ELF"),
    (b"MZ" + b"\0" * 4094, "PE"),
])
def test_kernels_that_are_none_say_what_was_found(tmp_path, content, says):
    path = tmp_path / "k"
    path.write_bytes(content)
    fails("--kernel", path, "--net", "none", says=["k", says])


def test_missing_initrd_is_named(tmp_path):
    fails("--kernel", guest("pvh.elf"), "--initrd", tmp_path / "no.cpio", "--net", "none", says="no.cpio")


def test_row103_no_kvm_says_the_remedy(tmp_path):
    """/dev/kvm hidden by an empty /dev in a mount namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a mount namespace")
    kernel = tmp_path / "k"
    kernel.write_bytes((VMM.parent / "tests/guest/pvh.elf").read_bytes())
    script = "mount -t tmpfs none /dev && exec \"$@\""
    p = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", VMM, "--kernel", kernel, "--net", "none"],
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.returncode == 125
    assert b"/dev/kvm is missing" in p.stderr and b"modprobe" in p.stderr


def test_doctor_speaks_words_and_json(tmp_path):
    import json

    r = run_vmm("doctor")
    assert b"kvm" in r.out and b"io_uring" in r.out and b"landlock" in r.out
    j = run_vmm("doctor", "--json")
    facts = json.loads(j.out)
    assert isinstance(facts["linux"], bool) and isinstance(facts["usable"], bool)
    assert j.status == (0 if facts["usable"] else 125)
    assert {"kvm", "io_uring", "hugepages", "landlock", "nat", "tap"} <= set(facts["checks"])


def test_doctor_refuses_unknown_arguments():
    fails("doctor", "--jsn", says=["--jsn", "--json"])


def test_bash_completion_knows_every_option():
    import re
    from conftest import ROOT

    text = (ROOT / "completions/vmm.bash").read_text()
    options = re.findall(r'^\t\{ "([a-z-]+)",', (ROOT / "src/cli/config.c").read_text(), re.M)
    assert len(options) > 25
    missing = [o for o in options if f"--{o}" not in text]
    assert not missing
    page = (ROOT / "docs/vmm.1").read_text().replace("\\-", "-")
    assert not [o for o in options if f"--{o}" not in page and o != "help"]
