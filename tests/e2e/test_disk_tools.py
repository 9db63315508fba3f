"""vmm disk as a user runs it, beside qemu-img where that is installed. Which formats there are, the binary says."""
import contextlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import PATIENCE, VMM, started_vmm, until

MIB = 1 << 20
QEMU_IMG = shutil.which("qemu-img")
QEMU_NAME = {"vhd": "vpc"}
needs_qemu = pytest.mark.skipif(not QEMU_IMG, reason="no qemu-img on this host")


def formats(*needs):
    """Formats of this binary that can do all of this."""
    if not VMM.exists():
        return []
    lines = subprocess.run([VMM, "disk", "formats"], stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    return [name for name, *can in map(str.split, lines) if set(needs) <= set(can)]


READ, MADE = formats("read"), formats("read", "write", "create")
MAPPED = [f for f in MADE if f != "raw"]
QCOW2 = pytest.mark.skipif("qcow2" not in MADE, reason="this binary does not write qcow2")


def disk(*args, status=0, **kw):
    """Run vmm disk; its output. An error is one line that names the subcommand."""
    proc = subprocess.run([VMM, "disk", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=PATIENCE, text=True, **kw)
    assert proc.returncode == status, (args, proc.returncode, proc.stdout, proc.stderr)
    if status == 0:
        assert not proc.stderr, proc.stderr
    return proc.stdout


def refused(*args, status=1, words="", **kw):
    """It fails with this status and one line that has these words."""
    proc = subprocess.run([VMM, "disk", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=PATIENCE, text=True, **kw)
    lines = proc.stderr.splitlines()
    assert proc.returncode == status, (args, proc.returncode, proc.stderr)
    assert lines and lines[-1].startswith("vmm: ") and len(lines) <= 2, proc.stderr
    assert words in lines[-1], proc.stderr
    return lines[-1]


def qemu(*args, status=0):
    proc = subprocess.run([QEMU_IMG, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert proc.returncode == status, (args, proc.stderr)
    return proc.stdout


def qname(fmt):
    return QEMU_NAME.get(fmt, fmt)


def write(path, seed=1, size=16 * MIB, pieces=24):
    """A raw disk with data here and there."""
    r = random.Random(seed)
    with open(path, "wb") as f:
        f.truncate(size)
        for _ in range(pieces):
            n = r.choice([512, 4096, 5120, 70000, 200000]) // 512 * 512
            f.seek(r.randrange(0, size - n) // 512 * 512)
            f.write(r.randbytes(n))
    return path


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "src.raw")


def same(a, fmt, b):
    disk("compare", "-q", "-f", fmt, a, b)


# ---- the command line ----

def test_help_fits_a_screen():
    out = disk("--help")
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 110
    for line in out.splitlines():
        if line.startswith("  "):
            name = line.split()[0]
            text = disk(name, "--help")
            assert text.startswith(f"usage: vmm disk {name}") and len(text.splitlines()) <= 24


@pytest.mark.parametrize("args, words", [
    (["mend", "x"], "expected create"),
    (["create", "x"], "say also its size"),
    (["create", "x", "12Q"], "is no size"),
    (["create", "-f", "bochs", "x", "1M"], "one of"),
    (["create", "-o", "cluster=4k", "x", "1M"], "cluster_size"),
    (["create", "-o", "preallocation=some", "x", "1M"], "falloc"),
    (["create", "-b", "y", "x"], "-F"),
    (["create", "--preallocate"], "needs a value"),
    (["info"], "usage"),
    (["info", "--output=xml", "x"], "human or json"),
    (["info", "-z", "x"], "accepted are"),
    (["info", "x", "y"], "unexpected argument"),
    (["info", "x"], "cannot open"),
    (["info", "/dev/zero"], "regular file"),
    (["info", "."], "regular file"),
    (["convert", "-m", "many", "x", "y"], "no number"),
    (["convert", "-S", "3", "x", "y"], "multiple of 512"),
    (["resize", "x", "big"], "is no size"),
    (["snapshot", "-c", "a", "-d", "b", "x"], "at a time"),
    (["rebase", "x"], "-b"),
    (["commit", "x"], "-b FILE"),
    (["check", "-r", "some", "x"], "leaks or all"),
    (["bench", "-w", "-d", "4", "x"], "one at a time"),
    (["map", "--sandbox", "maybe", "x"], "on, off or log"),
])
def test_usage_errors_name_what_is_wrong(args, words, tmp_path):
    refused(*args, words=words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_compare_that_fails_is_no_difference(tmp_path):
    refused("compare", "a", "b", status=2, words="cannot open", cwd=tmp_path)


def test_works_without_home_terminal_and_writable_directory(raw):
    out = disk("info", raw, cwd="/proc", env={}, start_new_session=True)
    assert "virtual size: 16 MiB" in out


# ---- create, info ----

@pytest.mark.parametrize("fmt", MADE)
def test_create(fmt, tmp_path):
    path = tmp_path / "disk"
    disk("create", "-f", fmt, path, "3M")
    info = json.loads(disk("info", "-f", fmt, "--json", path))
    assert info["format"] == fmt and info["virtual-size"] == 3 * MIB and info["format-guessed"] is False
    assert fmt in disk("info", path)
    if QEMU_IMG:
        assert json.loads(qemu("info", "--output=json", "-f", qname(fmt), path))["virtual-size"] == 3 * MIB
    same(path, fmt, write(tmp_path / "zero", pieces=0, size=3 * MIB))


def test_create_preallocates(tmp_path):
    for how, least in (("off", 0), ("falloc", MIB), ("full", MIB)):
        disk("create", "-q", "--preallocate", how, tmp_path / how, "1M")
        disk("create", "-q", "-o", f"preallocation={how}", tmp_path / how, "1M")
        assert (tmp_path / how).stat().st_blocks * 512 >= least
    assert (tmp_path / "off").stat().st_blocks == 0


def test_create_overwrites_but_not_what_is_in_use(tmp_path):
    path = write(tmp_path / "disk")
    data = path.read_bytes()
    with started_vmm("disk", "bench", "-w", "-c", "100000000", path) as proc:
        until(lambda: path.read_bytes() != data, "its writes")
        refused("create", path, "1M", words="in use")
        assert path.stat().st_size == 16 * MIB
        proc.terminate()
        proc.wait()
    disk("create", path, "1M")
    assert path.stat().st_size == MIB


def test_create_failed_leaves_no_file(tmp_path):
    refused("create", "-f", "raw", "-o", "cluster_size=64k", tmp_path / "x", "1M", words="raw")
    assert not list(tmp_path.iterdir())


# ---- convert ----

@needs_qemu
@pytest.mark.parametrize("fmt", READ)
def test_convert_from_what_qemu_made(fmt, raw, tmp_path):
    img, out = tmp_path / "img", tmp_path / "out"
    made = subprocess.run([QEMU_IMG, "convert", "-O", qname(fmt), raw, img], stderr=subprocess.PIPE)
    if made.returncode:
        pytest.skip(f"this qemu-img cannot make {fmt}")
    disk("convert", "-f", fmt, img, out)
    data = raw.read_bytes()
    got = out.read_bytes()
    assert got[:len(data)] == data and not any(got[len(data):])    # VHD rounds up to its geometry
    same(img, fmt, raw)


@pytest.mark.parametrize("fmt", MADE)
@pytest.mark.parametrize("options", [[], ["-m", "1"], ["-m", "8", "-W"], ["-S", "0"], ["-S", "64k"]], ids=" ".join)
def test_convert_to(fmt, options, raw, tmp_path):
    out = tmp_path / "out"
    disk("convert", "-O", fmt, *options, raw, out)
    same(out, fmt, raw)
    if QEMU_IMG:
        qemu("compare", "-f", qname(fmt), "-F", "raw", out, raw)
    back = tmp_path / "back"
    disk("convert", "-f", fmt, out, back)
    assert back.read_bytes() == raw.read_bytes()


def test_convert_keeps_holes(tmp_path):
    src = write(tmp_path / "src", pieces=0, size=64 * MIB)
    with open(src, "r+b") as f:
        f.seek(5 * MIB)
        f.write(bytes(MIB) + b"x" * 4096 + bytes(MIB))
    disk("convert", src, tmp_path / "out")
    assert (tmp_path / "out").stat().st_blocks * 512 <= 16384
    assert (tmp_path / "out").stat().st_size == 64 * MIB
    disk("convert", "-S", "0", src, tmp_path / "full")
    assert (tmp_path / "full").stat().st_blocks * 512 >= 64 * MIB
    assert (tmp_path / "out").read_bytes() == (tmp_path / "full").read_bytes() == src.read_bytes()


@pytest.mark.parametrize("fmt", MADE)
def test_convert_joins(fmt, tmp_path):
    parts = [write(tmp_path / f"p{k}", seed=k, size=size) for k, size in enumerate((MIB + 512, 3 * MIB - 1024, 2 * MIB))]
    disk("convert", "-O", fmt, *parts, tmp_path / "out")
    disk("convert", "-f", fmt, tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"".join(p.read_bytes() for p in parts)


def test_convert_into_what_is_there(raw, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(b"\xff" * (17 * MIB))
    disk("convert", "-n", raw, out)
    assert out.read_bytes() == raw.read_bytes() + bytes(MIB)
    out.write_bytes(b"\xff" * MIB)
    refused("convert", "-n", raw, out, words="are needed")


@pytest.mark.parametrize("fmt", [f for f in MAPPED if f == "qcow2"])
@pytest.mark.parametrize("options", [[], ["-o", "compression_type=zstd"], ["-m", "1", "-S", "0"], ["-o", "cluster_size=4k"],
                                     ["-W"]], ids=" ".join)
def test_convert_compressed(fmt, options, tmp_path):
    src = tmp_path / "src"
    src.write_bytes(b"all work and no play " * 100000 + bytes(MIB) + random.Random(5).randbytes(200000) + bytes(10 * MIB - 300128))
    disk("convert", "-c", "-O", fmt, *options, src, tmp_path / "out")
    same(tmp_path / "out", fmt, src)
    disk("check", "-f", fmt, tmp_path / "out")
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB
    disk("convert", "-f", fmt, tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back").read_bytes().ljust(src.stat().st_size, b"\0") == src.read_bytes()
    if QEMU_IMG:
        qemu("compare", "-f", fmt, tmp_path / "out", src)


def test_convert_refuses_compression_where_there_is_none(raw, tmp_path):
    refused("convert", "-c", raw, tmp_path / "out", words="no compression")
    assert not (tmp_path / "out").exists()


def test_convert_says_how_far_it_is(raw, tmp_path):
    out = disk("convert", "-p", raw, tmp_path / "out")
    assert "(0.00/100%)" in out and "(100.00/100%)" in out
    assert not disk("convert", raw, tmp_path / "out")


def test_convert_bar_on_a_terminal(raw, tmp_path):
    ours, theirs = pty.openpty()
    with subprocess.Popen([VMM, "disk", "convert", "-p", raw, tmp_path / "out"], stdin=subprocess.DEVNULL, stdout=theirs,
                          stderr=theirs) as proc:
        os.close(theirs)
        got = b""
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                got += part
    os.close(ours)
    assert proc.returncode == 0 and b"100.0%" in got and b"[####" in got


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_convert_interrupted_removes_what_it_made(number, tmp_path):
    src = write(tmp_path / "src", pieces=0, size=1 << 40)     # with -S 0: for hours
    out = tmp_path / "out"
    with started_vmm("disk", "convert", "-S", "0", src, out) as proc:
        until(lambda: out.exists() and out.stat().st_blocks, "some output")
        child = _children(proc.pid)[0]
        proc.send_signal(number)
        assert proc.wait(PATIENCE) == -number
    assert not out.exists() and not Path(f"/proc/{child}").exists()


def test_convert_full_disk_removes_what_it_made(tmp_path):
    out = tmp_path / "out"
    refused("convert", write(tmp_path / "src"), out, words="cannot",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))
    assert not out.exists()


def test_a_dead_child_is_told(tmp_path):
    src = write(tmp_path / "src", pieces=0, size=1 << 40)
    out = tmp_path / "out"
    with started_vmm("disk", "convert", "-S", "0", src, out) as proc:
        until(lambda: out.exists() and out.stat().st_blocks, "some output")
        os.kill(int(_children(proc.pid)[0]), signal.SIGKILL)
        assert proc.wait(PATIENCE) == 1
        assert b"ended by signal 9" in proc.stderr.read()
    assert not out.exists()


def test_the_child_dies_with_its_parent(tmp_path):
    src = write(tmp_path / "src", pieces=0, size=1 << 40)
    out = tmp_path / "out"
    with started_vmm("disk", "convert", "-S", "0", src, out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as proc:
        until(lambda: out.exists() and out.stat().st_blocks, "some output")
        child = _children(proc.pid)[0]
        proc.kill()
        until(lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text(),
              "the end of the child")


# ---- formats are never guessed ----

@needs_qemu
@pytest.mark.parametrize("fmt", [f for f in READ if f not in ("raw", "vmdk")])
def test_a_format_is_said_not_guessed(fmt, raw, tmp_path):
    img = tmp_path / "img"
    if subprocess.run([QEMU_IMG, "convert", "-O", qname(fmt), raw, img], stderr=subprocess.PIPE).returncode:
        pytest.skip(f"this qemu-img cannot make {fmt}")
    refused("convert", img, tmp_path / "out", words=f"-f {fmt}")
    assert not (tmp_path / "out").exists()
    disk("convert", "-f", "raw", img, tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[:img.stat().st_size // 512 * 512] == img.read_bytes()[:img.stat().st_size // 512 * 512]
    info = json.loads(disk("info", "--json", img))
    assert info["format"] == fmt and info["format-guessed"] is True
    assert "looks like" in disk("info", img)


# ---- resize ----

@pytest.mark.parametrize("fmt", MADE)
def test_resize(fmt, raw, tmp_path):
    img = tmp_path / "img"
    disk("convert", "-O", fmt, raw, img)
    size = lambda: json.loads(disk("info", "--json", "-f", fmt, img))["virtual-size"]
    disk("resize", "-f", fmt, img, "+1M")
    assert size() == 17 * MIB
    disk("resize", "-f", fmt, img, "20M")
    assert size() == 20 * MIB
    same(img, fmt, raw)
    refused("resize", "-f", fmt, img, "-1M", words="--shrink")
    refused("resize", "-f", fmt, img, "-20M")
    proc = subprocess.run([VMM, "disk", "resize", "--shrink", "-f", fmt, img, "-4M"], stderr=subprocess.PIPE)
    if not proc.returncode:
        assert size() == 16 * MIB
    same(img, fmt, raw)


# ---- map, compare, check, bench ----

@pytest.mark.parametrize("fmt", MADE)
def test_map_covers_the_disk_and_says_where_data_is(fmt, raw, tmp_path):
    img = tmp_path / "img"
    disk("convert", "-O", fmt, raw, img)
    at, data, file = 0, raw.read_bytes(), img.read_bytes()
    for e in json.loads(disk("map", "--json", "-f", fmt, img)):
        assert e["start"] == at and e["length"] > 0
        at += e["length"]
        there = data[e["start"]:at]
        if e["data"]:
            assert file[e["offset"]:e["offset"] + e["length"]].ljust(e["length"], b"\0") == there
        else:
            assert not any(there)
    assert at == len(data)
    assert disk("map", "-f", fmt, img).splitlines()[0].split() == ["Offset", "Length", "Mapped", "to", "File"]


@needs_qemu
def test_map_of_raw_is_that_of_qemu(raw):
    ours, theirs = json.loads(disk("map", "--json", raw)), json.loads(qemu("map", "--output=json", "-f", "raw", raw))
    keys = ("start", "length", "depth", "present", "zero", "data")
    assert [[e[k] for k in keys] for e in ours] == [[e[k] for k in keys] for e in theirs]
    assert [line.split()[:3] for line in disk("map", raw).splitlines()[1:]] == \
        [line.split()[:3] for line in qemu("map", "-f", "raw", raw).splitlines()[1:]]


def test_compare(raw, tmp_path):
    other = tmp_path / "other"
    shutil.copy(raw, other)
    assert "identical" in disk("compare", raw, other)
    with open(other, "r+b") as f:
        f.truncate(17 * MIB)
    assert "sizes differ" in disk("compare", raw, other)
    disk("compare", "-s", raw, other, status=1)
    with open(other, "r+b") as f:
        f.seek(16 * MIB + 123456)
        f.write(b"x")
    assert f"offset {16 * MIB + 123456}!" in disk("compare", raw, other, status=1)
    with open(other, "r+b") as f:
        f.seek(7654321)
        f.write(bytes([raw.read_bytes()[7654321] ^ 1]))
    assert "offset 7654321!" in disk("compare", raw, other, status=1)


def test_check_of_raw_is_not_supported(raw):
    refused("check", raw, status=63, words="no metadata")


@pytest.mark.parametrize("fmt", MAPPED)
def test_check(fmt, raw, tmp_path):
    img = tmp_path / "img"
    disk("convert", "-O", fmt, raw, img)
    assert "No errors" in disk("check", "-f", fmt, img)
    found = json.loads(disk("check", "-f", fmt, "--json", img))
    assert found["corruptions"] == found["leaks"] == found["check-errors"] == 0
    disk("check", "-f", fmt, "-r", "all", img)
    disk("check", "-f", fmt, "--repair=leaks", img)
    same(img, fmt, raw)


def test_bench(raw):
    before = raw.read_bytes()
    for args in ([], ["-d", "4"], ["-s", "64k"]):
        assert "IOPS" in disk("bench", "-c", 500, *args, raw)
    assert raw.read_bytes() == before
    for mode in ("writeback", "writethrough", "unsafe"):
        assert json.loads(disk("bench", "--json", "-c", 64, "-s", "512", "-w", "-t", mode, raw))["requests"] == 64
    assert not any(raw.read_bytes()[:64 * 512])


# ---- snapshots ----

@QCOW2
def test_snapshots(raw, tmp_path):
    img = tmp_path / "img"
    disk("convert", "-O", "qcow2", raw, img)
    disk("snapshot", "-c", "first", "-f", "qcow2", img)
    disk("bench", "-f", "qcow2", "-w", "-c", 2000, img)
    disk("snapshot", "create", "second", "-f", "qcow2", img)
    assert [s["name"] for s in json.loads(disk("snapshot", "--json", "-f", "qcow2", img))["snapshots"]] == ["first", "second"]
    disk("compare", "-f", "qcow2", img, raw, status=1)
    now, then = tmp_path / "now", tmp_path / "then"
    disk("convert", "-f", "qcow2", img, now)
    disk("convert", "-f", "qcow2", "-l", "first", img, then)
    assert then.read_bytes() == raw.read_bytes() != now.read_bytes()
    refused("convert", "-f", "qcow2", "--snapshot", "gone", img, tmp_path / "out", words="'gone'")
    disk("snapshot", "apply", "first", "-f", "qcow2", img)
    same(img, "qcow2", raw)
    disk("snapshot", "-d", "second", "-f", "qcow2", img)
    listed = disk("snapshot", "-l", "-f", "qcow2", img)
    assert "first" in listed and "second" not in listed
    refused("snapshot", "-d", "second", "-f", "qcow2", img)
    disk("check", "-f", "qcow2", img)


def test_raw_has_no_snapshots(raw):
    for args in (["list"], ["create", "x"]):
        refused("snapshot", *args, raw, words="no internal snapshots")
    refused("convert", "-l", "x", raw, raw.parent / "out", words="no internal snapshots")
    assert not (raw.parent / "out").exists()


# ---- chains ----

@pytest.fixture
def chain(raw, tmp_path):
    """base.raw <- over.qcow2, whose disk is that of want.raw."""
    img, want = tmp_path / "over.qcow2", write(tmp_path / "want.raw", seed=2)
    (tmp_path / "base.raw").write_bytes(raw.read_bytes())
    disk("convert", "-O", "qcow2", "-B", "base.raw", "-F", "raw", want, img)
    return img, tmp_path / "base.raw", want


@QCOW2
def test_overlay(raw, tmp_path):
    img = tmp_path / "over"
    disk("create", "-f", "qcow2", "-b", "src.raw", "-F", "raw", img)
    info = json.loads(disk("info", "--json", "-f", "qcow2", img))
    assert info["virtual-size"] == 16 * MIB and info["backing-filename"] == "src.raw"
    assert info["backing-filename-format"] == "raw"
    refused("compare", "-f", "qcow2", img, raw, status=2, words="backing=allow")
    disk("compare", "-f", "qcow2", "--backing=allow", img, raw)
    disk("compare", "-f", "qcow2", "--backing", tmp_path, img, raw)
    refused("info", "-f", "qcow2", "--backing-chain", img, words="backing")
    assert len(json.loads(disk("info", "-f", "qcow2", "--backing-chain", "--json", "--backing=allow", img))) == 2
    refused("create", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", tmp_path / "other", words="gone.raw")
    refused("create", "-f", "raw", "-b", "src.raw", "-F", "raw", tmp_path / "other", words="no backing")
    assert not (tmp_path / "other").exists()


@QCOW2
def test_growing_an_overlay_does_not_show_the_backing_file(raw, tmp_path):
    img = tmp_path / "over"
    for compat in ("0.10", "1.1"):
        disk("create", "-f", "qcow2", "-o", f"compat={compat}", "-b", "src.raw", "-F", "raw", img, "1M")
        disk("resize", "-f", "qcow2", img, "16M")
        disk("convert", "-f", "qcow2", "--backing=allow", img, tmp_path / "flat")
        assert (tmp_path / "flat").read_bytes() == raw.read_bytes()[:MIB] + bytes(15 * MIB)


@QCOW2
def test_convert_to_an_overlay(chain):
    img, _, want = chain
    disk("compare", "--backing=allow", "-f", "qcow2", img, want)
    if QEMU_IMG:
        qemu("compare", "-f", "qcow2", img, want)


@QCOW2
@pytest.mark.parametrize("how", [["-b", "base.raw"], ["--backing=allow"], ["-d", "-b", "base.raw"]], ids=" ".join)
def test_commit(how, chain):
    img, base, want = chain
    os.chmod(img, 0o640)
    before = img.stat().st_blocks
    disk("commit", "-f", "qcow2", *how, img, cwd=img.parent)
    assert base.read_bytes() == want.read_bytes()
    disk("compare", "--backing=allow", "-f", "qcow2", img, want)
    disk("check", "-f", "qcow2", img)
    assert img.stat().st_mode & 0o777 == 0o640
    assert img.stat().st_blocks == before if "-d" in how else img.stat().st_blocks < before
    assert sorted(p.name for p in img.parent.iterdir()) == ["base.raw", "over.qcow2", "src.raw", "want.raw"]


@QCOW2
def test_commit_writes_only_into_the_file_that_is_named(chain, raw):
    img, base, _ = chain
    before = base.read_bytes()
    refused("commit", "-f", "qcow2", "-b", raw, img, words="which is not what -b names")
    assert base.read_bytes() == before == raw.read_bytes()
    assert sorted(p.name for p in img.parent.iterdir()) == ["base.raw", "over.qcow2", "src.raw", "want.raw"]


@QCOW2
def test_rebase(chain, tmp_path):
    img, base, want = chain
    write(tmp_path / "new.raw", seed=3, size=8 * MIB)
    refused("rebase", "-f", "qcow2", "-b", "new.raw", "-F", "raw", img, words="backing=allow")
    disk("rebase", "-f", "qcow2", "--backing=allow", "-b", "new.raw", "-F", "raw", img)
    info = json.loads(disk("info", "--json", "-f", "qcow2", img))
    assert info["backing-filename"] == "new.raw"
    disk("compare", "--backing=allow", "-f", "qcow2", img, want)
    disk("rebase", "-f", "qcow2", "--backing=allow", "-b", "", img)
    assert "backing-filename" not in json.loads(disk("info", "--json", "-f", "qcow2", img))
    base.unlink()
    same(img, "qcow2", want)
    disk("check", "-f", "qcow2", img)


@QCOW2
def test_rebase_of_the_name_alone(chain):
    img, base, want = chain
    base.rename(base.parent / "moved.raw")
    disk("rebase", "-u", "-f", "qcow2", "-b", "moved.raw", "-F", "raw", img)
    disk("compare", "--backing=allow", "-f", "qcow2", img, want)


# ---- images that mean harm ----

@needs_qemu
@pytest.mark.skipif("qcow2" not in READ, reason="this binary does not read qcow2")
@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "link", "json:{}", "/proc/self/mem", "x" * 1000])
def test_a_backing_name_opens_nothing_elsewhere(name, tmp_path):
    below = tmp_path / "below"
    below.mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * 512)
    (below / "link").symlink_to("../secret")
    img, out = below / "img", tmp_path / "out"
    qemu("create", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", img, "1M")
    data = bytearray(img.read_bytes())
    at, n = int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:20], "big")
    end = int.from_bytes(data[100:104], "big")
    assert data[at:at + n] == b"base" and end < at
    data[16:20] = len(name).to_bytes(4, "big")
    if len(data) < at + len(name):
        data.extend(bytes(at + len(name) - len(data)))
    data[at:at + len(name)] = name.encode()
    img.write_bytes(data)
    for rule in ([], ["--backing=allow"], ["--backing", below]):
        refused("convert", "-f", "qcow2", *rule, img, out)
        assert not out.exists()
    refused("commit", "-f", "qcow2", "--backing=allow", img)
    assert (tmp_path / "secret").read_bytes() == b"secret" * 512


@pytest.mark.parametrize("fmt", [f for f in READ if f != "raw"])
def test_damaged_images_are_an_error_not_a_crash(fmt, raw, tmp_path):
    src, img = tmp_path / "whole", tmp_path / "img"
    small = write(tmp_path / "small", size=2 * MIB, pieces=3)
    if fmt in MADE:
        disk("convert", "-O", fmt, small, src)
    elif not QEMU_IMG or subprocess.run([QEMU_IMG, "convert", "-O", qname(fmt), small, src], stderr=subprocess.PIPE).returncode:
        pytest.skip(f"nothing here makes {fmt}")
    whole, r = src.read_bytes(), random.Random(4)
    for n in range(40):
        data = bytearray(whole)
        for _ in range(r.choice([1, 3, 30])):
            data[r.randrange(min(len(data), r.choice([64, 512, 200000])))] = r.randrange(256)
        img.write_bytes(data[:r.choice([len(data), len(data), r.randrange(len(data))])])
        for args in (["info"], ["check"], ["map"], ["convert", "-q"]):
            proc = subprocess.run([VMM, "disk", args[0], "-f", fmt, *args[1:], img, *([tmp_path / "out"] if args[0] == "convert" else [])],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
            assert proc.returncode in ((0, 1, 2, 3, 63) if args[0] == "check" else (0, 1)), (n, args, proc.stderr)
            assert b"ended by signal" not in proc.stderr and b"Sanitizer" not in proc.stderr, (n, args, proc.stderr)
            if args[0] != "check":
                assert len(proc.stderr.splitlines()) <= 3, proc.stderr
            (tmp_path / "out").unlink(missing_ok=True)


def test_words_of_an_image_do_not_reach_the_terminal_raw(tmp_path):
    path = tmp_path / "a\x1b[31mb"
    write(path)
    assert "\x1b" not in disk("info", path) + disk("map", path)
    assert json.loads(disk("info", "--json", path))["filename"] == str(path)


# ---- the sandbox ----

@pytest.mark.release
def test_the_child_is_shut_in(raw):
    with started_vmm("disk", "bench", "-d", "2", "-c", "100000000", raw) as proc:
        child = until(lambda: _children(proc.pid), "a child")[0]
        until(lambda: "Seccomp:\t2" in Path(f"/proc/{child}/status").read_text(), "the filter")
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines() if ":\t" in line)
        limits = Path(f"/proc/{child}/limits").read_text()
        proc.terminate()
        proc.wait(PATIENCE)
    assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == 0
    if os.geteuid() == 0:
        assert status["Uid"].split() == ["65534"] * 4
    assert str(1 << 30) in [line for line in limits.splitlines() if line.startswith("Max address space")][0]


def test_sandbox_can_be_left_off(raw):
    assert "16 MiB" in disk("info", "--sandbox", "off", raw)
