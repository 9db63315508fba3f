"""Faults, delays, limits, error policy and write log of --disk, with a guest that reads, writes and flushes a sector."""
import signal
import struct
import time

import pytest

from conftest import guest, read_until, started_vmm

MACHINES = [("pc", "pci"), ("microvm", "line")]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"vmm disk" + b"\0" * (65536 - 8))
    return path


@pytest.fixture
def run(kvm, vmm, disk):
    def go(keys, *args):
        return vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-M", "microvm", "--net", "none",
                   "-d", f"{disk},{keys}", *args)

    return go


def blk(r):
    return r.result["devices"]["blk0"]


@pytest.mark.parametrize("fault, line", [("read:eio:at=1", "BLK_IN, 0"), ("read:eio:at=2", "BLK_IN, 1"),
                                         ("write:enospc:at=1", "BLK_OUT, 1"), ("write:torn:at=1", "BLK_OUT, 1"),
                                         ("flush:eio", "BLK_FLUSH"), ("read:eio:sector=1", "BLK_IN, 1")])
def test_an_injected_error_reaches_the_driver(run, fault, line):
    r = run(f"fault={fault}")
    assert r.status == 1 and b"failed: request(&d, " + line.encode() in r.out, r.out
    assert blk(r)["faults"] == 1 and blk(r)["errors"] == 1


def test_a_fault_elsewhere_changes_nothing(run):
    r = run("fault=write:eio:sector=2-100,fault=read:eio:at=4,fault=discard:eio")
    assert r.status == 0 and blk(r)["faults"] == 0


def test_a_timeout_is_answered_in_the_end(run):
    start = time.monotonic()
    r = run("fault=read:timeout:at=1,timeout=500ms")
    assert r.status == 1 and b"BLK_IN, 0" in r.out and time.monotonic() - start > 0.5


def test_a_run_ends_although_a_request_is_held(run):
    r = run("fault=flush:timeout", "-t", "1")
    assert r.status == 124 and r.result["wall_seconds"] < 20


def test_a_delay_takes_its_time(run):
    start = time.monotonic()
    r = run("delay=100ms,delay=flush:300ms")
    assert r.status == 0 and time.monotonic() - start > 0.6 and blk(r)["delayed"] == 4


def test_ignored_errors_do_not_reach_the_driver(run):
    r = run("fault=flush:eio,werror=ignore")
    assert r.status == 0 and blk(r)["errors_ignored"] == 1 and blk(r)["errors"] == 2


@pytest.mark.parametrize("machine, words", MACHINES)
def test_stop_pauses_the_machine_until_the_write_works(kvm, vmm, disk, machine, words):
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-M", machine, "-a", words, "--net", "none",
            "-d", f"{disk},fault=write:enospc:at=1,werror=stop")
    assert r.status == 0, (r.out, r.err)
    assert b"a write failed: No space left on device: the machine is stopped" in r.err
    assert b"the machine goes on" in r.err
    assert blk(r)["stops"] == 1 and blk(r)["retries"] == 1 and not blk(r)["stopped"]
    assert disk.read_bytes()[512:1024] == bytes(i * 7 & 0xff for i in range(512))


def test_a_stopped_machine_can_be_ended(kvm, disk, tmp_path):
    with started_vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-M", "microvm", "--net", "none",
                     "-d", f"{disk},fault=read:eio:sector=1,rerror=stop") as p:
        read_until(p.stderr, b"the machine is stopped")
        p.send_signal(signal.SIGTERM)
        assert p.wait(30) == 128 + signal.SIGTERM


def test_a_timeout_of_a_stopped_machine_says_why(run):
    r = run("fault=write:eio:sector=1,werror=stop", "-t", "2")
    assert r.status == 124 and blk(r)["stopped"] is True and blk(r)["faults"] >= 2


@pytest.mark.parametrize("cache, flags", [("writeback", 0), ("writethrough", 2)])
def test_the_log_has_what_the_guest_wrote(run, tmp_path, cache, flags):
    log = tmp_path / "log"
    r = run(f"log={log},cache={cache}")
    assert r.status == 0 and blk(r)["log_entries"] == 2 and blk(r)["log_error"] is None
    data = log.read_bytes()
    assert struct.unpack_from("<QQQI", data) == (0x6a736677736872, 1, 2, 512)
    # write-through: every write goes to the medium (FUA)
    assert struct.unpack_from("<QQQQ", data, 512) == (1, 1, flags, 0)
    assert data[1024:1536] == bytes(i * 7 & 0xff for i in range(512))
    assert struct.unpack_from("<QQQQ", data, 1536) == (0, 0, 1, 0) and len(data) == 2048


def test_a_log_is_never_written_over_something_else(run, tmp_path, disk):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    r = run(f"log={other}")
    assert r.status == 125 and b"is not a write log" in r.err and other.read_bytes() == b"precious"
    before = disk.read_bytes()
    assert run(f"log={disk}").status == 125 and disk.read_bytes() == before


@pytest.mark.parametrize("keys", ["fault=write:eoi", "delay=x", "iops=0", "werror=often", "iops_max=3"])
def test_mistakes_are_refused_before_the_machine_starts(run, keys):
    r = run(keys)
    assert r.status == 125 and b"--disk" in r.err and keys.split("=")[0].encode() in r.err
