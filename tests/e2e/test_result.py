"""The result file: what docs/exit-status.md promises, on every way a run can end."""
import json
import os
import re
import subprocess

import pytest

from conftest import ROOT, VMM, guest, read_result, read_until, run_vmm

ALWAYS = {"vmm", "status", "cause", "reason", "guest_value", "wall_seconds", "cpu_seconds", "peak_rss_kib"}
AFTER_START = ALWAYS | {"first_instruction_seconds", "machine", "memory", "cpus", "kernel", "software_kvm", "resets",
                        "exits", "loop", "devices"}


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"vmm disk".ljust(65536, b"\0"))
    return path


def test_document_names_only_keys_that_exist(act):
    text = (ROOT / "docs/exit-status.md").read_text()
    section = text[text.index("**The result file**"):].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", section)) - {"driver_ok_seconds"}
    assert len(named) >= 10
    assert named <= set(act("poweroff").result)


def test_causes_in_the_document_are_those_of_the_program():
    text = (ROOT / "docs/exit-status.md").read_text()
    table = text[:text.index("The status is 0 only")]
    causes = set(re.findall(r"`([a-z-]+)`", "".join(line.split("|")[2] for line in table.splitlines()
                                                    if line.startswith("|") and line.count("|") == 4)))
    source = (ROOT / "src/status.c").read_text()
    assert causes == set(re.findall(r'return "([a-z-]+)"', source)) - {"none", "unknown"}


def test_all_keys_with_sane_values_after_a_run(kvm, vmm, disk):
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-a", "pci msix", "-c", "2", "-d", disk, "--net", "none").result
    assert AFTER_START <= set(r)
    assert (r["status"], r["cause"], r["machine"], r["memory"], r["cpus"], r["resets"]) == \
        (0, "guest-value", "pc", 16 << 20, 2, 0)
    assert "Multiboot" in r["kernel"]
    assert 0 < r["first_instruction_seconds"] <= r["wall_seconds"] < 60
    assert 0 < r["cpu_seconds"] < 60
    assert 500 < r["peak_rss_kib"] < 64 << 10
    assert r["loop"]["engine"] in ("io_uring", "epoll") and r["loop"]["turns"] > 0
    blk = r["devices"]["blk0"]
    assert r["first_instruction_seconds"] < blk["driver_ok_seconds"] <= r["wall_seconds"]
    assert (blk["reads"], blk["writes"], blk["bytes_read"], blk["bytes_written"]) == (2, 1, 1024, 512)
    assert blk["interrupts"] == blk["kicks"] == 6
    assert blk["errors"] == 2               # the two requests past the end
    assert r["exits"]["mmio"] > 0 and r["exits"]["pio"] > 0


def test_peak_memory_is_not_that_of_whoever_started_it(act):
    """A child's getrusage() begins with its parent as it was at the exec: here 200 MiB."""
    ballast = bytearray(os.urandom(1)) * (200 << 20)
    assert act("poweroff").result["peak_rss_kib"] < 32 << 10
    assert len(ballast) == 200 << 20


def test_serial_bytes_are_counted_both_ways(act):
    r = act("echo", stdin=b"hello wq")
    assert r.status == 0 and r.out == b"do=echo\nhello wq"
    assert r.result["devices"]["serial0"]["bytes_out"] == len(r.out)
    assert r.result["devices"]["serial0"]["bytes_in"] == 8


def test_unclaimed_accesses_have_a_kind_of_their_own(act):
    r = act("ports first=8192 last=8199")
    # eight ports nobody has, six accesses each
    assert r.status == 0 and r.result["exits"]["pio_unclaimed"] == 48


@pytest.mark.parametrize("args, says", [
    (["-k", "/nonexistent/kernel"], "/nonexistent/kernel"),
    (["-k", "{k}", "-d", "/nonexistent/disk"], "/nonexistent/disk"),
    (["-k", "{k}", "-n", "user,colour=red"], "colour"),
])
def test_result_is_written_on_125(kvm, vmm, args, says):
    r = vmm(*[a.format(k=guest("actions.elf")) for a in args], *([] if "-n" in args else ["--net", "none"]))
    assert r.status == 125
    assert set(r.result) >= ALWAYS
    assert (r.result["status"], r.result["cause"]) == (125, "host-error") and says in r.result["reason"]
    assert r.err.decode() == f"vmm: {r.result['reason']}\n"


def test_usage_error_reaches_the_result_named_before_it(tmp_path):
    path = tmp_path / "r.json"
    p = subprocess.run([VMM, "--result", path, "--cpus", "0", "-k", "x"], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.returncode == 125
    assert read_result(path)["cause"] == "host-error" and "--cpus" in read_result(path)["reason"]


def test_old_result_does_not_survive_a_killed_run(acting, tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"status": 0}')
    with acting("spin", "-r", path) as p:
        read_until(p.stdout, b"do=spin")
        p.kill()
        p.wait(60)
    assert path.read_bytes() == b""


def test_result_goes_to_a_pipe(act):
    out, back = os.pipe()
    try:
        r = act("poweroff", result=f"/dev/fd/{back}", pass_fds=[back])
        assert r.status == 0
        os.close(back)
        back = -1
        assert json.loads(os.read(out, 1 << 16))["status"] == 0
    finally:
        os.close(out)
        if back >= 0:
            os.close(back)


def test_full_disk_under_the_result_is_an_error_of_ours(act):
    r = act("poweroff", result="/dev/full")
    assert r.status == 125 and b"--result" in r.err and b"No space" in r.err


def test_reason_of_hostile_names_is_still_json(kvm, tmp_path):
    name = os.fsencode(tmp_path) + b"/k\xff\x1b[31m\"\n"
    r = run_vmm("-r", tmp_path / "r", "-k", os.fsdecode(name), "--net", "none")
    assert r.status == 125 and r.err.count(b"\n") == 1 and b"\x1b" not in r.err
    assert read_result(tmp_path / "r")["status"] == 125


def test_forwards_are_in_the_result(kvm, vmm, doctor):
    if not doctor["nat"]["ok"]:
        pytest.skip("no vmm-nat in this build")
    r = vmm("-k", guest("actions.elf"), "-m", "16M", "-a", "do=poweroff", "-n", "user,fwd=tcp:0:22,fwd=udp:127.0.0.1:0:53")
    assert r.status == 0, r.err
    tcp, udp = r.result["devices"]["net0"]["forwards"]
    assert (tcp["protocol"], tcp["guest_port"], udp["protocol"], udp["guest_port"]) == ("tcp", 22, "udp", 53)
    assert 0 < tcp["port"] < 65536 and tcp["host"] == udp["host"] == "127.0.0.1"
    assert f"127.0.0.1:{tcp['port']} -> guest 22".encode() in r.err
    assert f"127.0.0.1:{udp['port']} -> guest 53".encode() in r.err
