"""vmm disk replay: the images that a power cut could have left."""
import json
import os
import shutil
import struct
import subprocess

import pytest

from conftest import VMM, guest

MAGIC = 0x6a736677736872
FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16
PATH = os.environ["PATH"] + ":/sbin:/usr/sbin"


class Log:
    """A write log as dm-log-writes makes it."""

    def __init__(self, block=512):
        self.block, self.body, self.n = block, b"", 0

    def entry(self, sector, nr, flags, data=b"", text=b""):
        head = struct.pack("<QQQQ", sector, nr, flags, len(text)) + text
        self.body += head.ljust(self.block, b"\0") + data
        self.n += 1

    def write(self, sector, data, flags=0):
        self.entry(sector, len(data) // self.block, flags, data)

    def flush(self):
        self.entry(0, 0, FLUSH)

    def bytes(self, n=None, magic=MAGIC, version=1):
        head = struct.pack("<QQQI", magic, version, self.n if n is None else n, self.block)
        return head.ljust(self.block, b"\0") + self.body

    def save(self, path):
        path.write_bytes(self.bytes())
        return path


def sectors(*fills):
    return b"".join(bytes([f]) * 512 for f in fills)


class Done:
    def __init__(self, proc):
        self.status, self.out, self.err = proc.returncode, proc.stdout.decode(), proc.stderr.decode()


def replay(*args):
    return Done(subprocess.run([VMM, "disk", "replay", *map(str, args)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=60, env={**os.environ, "PATH": PATH}))


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture
def simple(tmp_path):
    log = Log()
    log.write(0, sectors(1, 2))
    log.write(4, sectors(3))
    log.flush()
    log.entry(1, 1, DISCARD)
    log.write(4, sectors(4, 5), FUA)
    log.entry(0, 0, MARK, text=b"here \x1b[1m")
    log.flush()
    log.write(0, sectors(6))
    return log.save(tmp_path / "wlog")


STATES = {0: sectors(0, 0, 0, 0, 0, 0), 1: sectors(1, 2, 0, 0, 0, 0), 3: sectors(1, 2, 0, 0, 3, 0),
          4: sectors(1, 0, 0, 0, 3, 0), 5: sectors(1, 0, 0, 0, 4, 5), 8: sectors(6, 0, 0, 0, 4, 5)}


@pytest.mark.parametrize("n", STATES)
def test_at_is_the_disk_after_that_many_entries(simple, tmp_path, n):
    image = tmp_path / "image"
    r = replay("--log", simple, "--out", image, "--at", n)
    assert r.status == 0 and r.out == f"{image}\n", r.err
    assert image.read_bytes() == STATES[n]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image", "wlog"]


def test_a_base_is_what_was_there_before(simple, tmp_path):
    base, image = tmp_path / "base", tmp_path / "image"
    base.write_bytes(sectors(*[9] * 8))
    assert replay("--log", simple, "--base", base, "--out", image, "--at=3").status == 0
    assert image.read_bytes() == sectors(1, 2, 9, 9, 3, 9, 9, 9)
    assert base.read_bytes() == sectors(*[9] * 8)
    assert replay("--log", simple, "--base", base, "--out", image, "--at=3").status == 1, "it exists"
    image.unlink()
    assert replay("--log", simple, "--size", "1M", "--out", image, "--at", 3).status == 0
    assert image.stat().st_size == 1 << 20 and image.stat().st_blocks * 512 < 65536


def test_a_large_base_is_copied_with_its_holes(simple, tmp_path):
    base, image = tmp_path / "base", tmp_path / "image"
    with open(base, "wb") as f:
        f.truncate(3 << 30)
        f.seek(2 << 30)
        f.write(b"x" * 100000)
    assert replay("--log", simple, "--base", base, "--out", image, "--at", 8).status == 0
    assert image.stat().st_size == 3 << 30 and image.stat().st_blocks * 512 < 1 << 20
    with open(image, "rb") as f:
        assert f.read(512) == sectors(6)
        f.seek(2 << 30)
        assert f.read(100001) == b"x" * 100000 + b"\0"


def test_every_flush_makes_an_image_each(simple, out):
    r = replay("--log", simple, "--out", out, "--every-flush")
    assert r.status == 0 and r.out.split() == [f"{out}/wlog.000003.img", f"{out}/wlog.000007.img"]
    assert (out / "wlog.000003.img").read_bytes() == STATES[3]
    assert (out / "wlog.000007.img").read_bytes() == STATES[5]
    for p in out.iterdir():
        p.unlink()
    r = replay("--log", simple, "--out", out, "--every-fua")
    assert [p[-8:-4] for p in r.out.split()] == ["0003", "0005", "0007"]


def test_list_shows_each_entry_and_no_control_characters(simple):
    r = replay("--log", simple, "--list")
    lines = [line.split() for line in r.out.splitlines()]
    assert lines[0] == ["1", "write", "0", "+2"] and lines[2] == ["3", "flush"] and lines[3][1:] == ["discard", "1", "+1"]
    assert lines[4][1:] == ["write", "4", "+2", "fua"] and lines[5][1:] == ["mark", "here", "?[1m"]
    entries = [json.loads(line) for line in replay("--log", simple, "--list", "--json").out.splitlines()]
    assert len(entries) == 8 and entries[4] == {"entry": 5, "kind": "write", "sector": 4, "sectors": 2, "flush": False,
                                                "fua": True, "metadata": False}
    assert entries[5]["mark"].startswith("here")


def test_logs_with_large_sectors_are_read(tmp_path):
    log, image = Log(4096), tmp_path / "image"
    log.write(3, b"y" * 8192)
    log.entry(3, 1, DISCARD)
    assert replay("--log", log.save(tmp_path / "log"), "--out", image, "--at", 2).status == 0
    assert image.read_bytes() == b"\0" * 16384 + b"y" * 4096


# ---- torn ----

def torn_log(tmp_path):
    """Sector i of 64 is written with round r, all in each round; sectors 60 and up with FUA."""
    log = Log()
    for r in range(1, 5):
        for i in range(0, 60, 4):
            log.write(i, sectors(*[r] * 4))
        for i in range(60, 64):
            log.write(i, sectors(r), FUA)
        if r < 4:
            log.flush()
    return log.save(tmp_path / "log")


def test_torn_images_keep_what_was_flushed_and_lose_some_of_the_rest(tmp_path, out):
    log = torn_log(tmp_path)
    r = replay("--log", log, "--out", out, "--torn", "--seed", 5, "--count", 200)
    images = r.out.split()
    assert r.status == 0 and len(images) == 200
    mixed = split = 0
    for name in images:
        data = open(name, "rb").read()
        got = [data[i * 512] for i in range(64)]
        assert all(data[i * 512:i * 512 + 512] == bytes([got[i]]) * 512 for i in range(64)), "sectors are never torn"
        low, high = min(got), max(got)
        assert high - low <= 1, "only the last stretch may be missing"
        mixed += low != high
        split += any(len(set(got[i:i + 4])) > 1 for i in range(0, 60, 4))
        # FUA writes: in order, and none is there before what is before it... is decided; the last may be on its way
        fua = got[60:]
        assert fua == sorted(fua, reverse=True)
    assert mixed > 50 and split > 20
    assert len({open(n, "rb").read() for n in images}) > 100


def test_the_same_seed_makes_the_same_images(tmp_path):
    log, made = torn_log(tmp_path), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        d = tmp_path / name
        d.mkdir()
        assert replay("--log", log, "--out", d, "--torn", "--seed", seed).status == 0
        made.append([p.read_bytes() for p in sorted(d.iterdir())])
    assert len(made[0]) == 4 and made[0] == made[1] and made[0] != made[2]


# ---- with a command ----

def test_exec_runs_for_each_image_and_removes_it(simple, tmp_path):
    odd = tmp_path / "it's {odd}; $HOME"
    odd.mkdir()
    seen = tmp_path / "seen"
    r = replay("--log", simple, "--out", odd, "--every-flush", "--exec", f"test -s {{}} && stat -c %s {{}} >> {seen}; echo noise")
    assert r.status == 0 and r.out == "2 images, 0 failed\n", (r.out, r.err)
    assert seen.read_text() == "3072\n3072\n" and list(odd.iterdir()) == []


def test_a_command_that_fails_is_reported_with_what_it_said(simple, out):
    r = replay("--log", simple, "--out", out, "--every-flush", "--exec", "cmp -n 3072 {} {} && echo broken: {} && case {} in *3.img) exit 4; esac",
               "--json")
    j = json.loads(r.out)
    assert r.status == 2 and (j["images"], j["failures"], j["entries"], j["flushes"]) == (2, 1, 8, 2)
    assert j["failed"] == [{"image": f"{out}/wlog.000003.img", "entry": 3, "how": "status 4"}]
    assert "broken: " in r.err and "after entry 3" in r.err and "000007" not in r.err
    assert list(out.iterdir()) == []
    r = replay("--log", simple, "--out", out, "--every-flush", "--exec", "kill -9 $$; {}", "--keep-failed")
    assert r.status == 2 and "signal 9" in r.err and len(list(out.iterdir())) == 2


# ---- refused ----

def hostile():
    def log(*entry, **kw):
        made = Log()
        made.flush()
        made.entry(*entry, **kw)
        return made
    good = log(0, 1, 0, sectors(1))
    yield "is not a write log", b""
    yield "is not a write log", good.bytes(magic=MAGIC + 1)
    yield "version 2", good.bytes(version=2)
    yield "sectors of", good.bytes()[:24] + struct.pack("<I", 3) + good.bytes()[28:]
    yield "sectors of", good.bytes()[:24] + struct.pack("<I", 1 << 31) + good.bytes()[28:]
    yield "claims", good.bytes(n=2 ** 64 - 1)
    yield "entry 3 is not there", good.bytes(n=3)
    yield "is cut off", good.bytes()[:-1]
    yield "flags that no log has", log(0, 1, 32, sectors(1)).bytes()
    yield "says nothing", log(0, 0, 0).bytes()
    yield "past the end", log(2 ** 64 - 1, 2, 0, sectors(1, 2)).bytes()
    yield "past the end", log(0, 2 ** 63, DISCARD).bytes()
    yield "past the end", log(0, 2 ** 55, DISCARD).bytes()
    yield "past the end", log(2 ** 40, 1, 0, sectors(1)).bytes()
    yield "is cut off", log(0, 2 ** 30, 0, sectors(1)).bytes()
    yield "a text where none fits", log(0, 0, FLUSH, text=b"x").bytes()
    yield "a text where none fits", log(0, 1, MARK, sectors(1)).bytes()
    bad = bytearray(log(0, 0, MARK).bytes())
    bad[1024 + 24:1024 + 32] = struct.pack("<Q", 481)
    yield "a text where none fits", bytes(bad)


@pytest.mark.parametrize("words, data", hostile())
def test_a_log_that_makes_no_sense_is_refused_before_anything_is_made(tmp_path, out, words, data):
    path = tmp_path / "log"
    path.write_bytes(data)
    r = replay("--log", path, "--out", out, "--torn")
    assert r.status == 1 and words in r.err, r.err
    assert list(out.iterdir()) == []
    assert replay("--log", path, "--list").status == 1


def test_a_log_for_a_larger_disk_is_refused(simple, tmp_path, out):
    base = tmp_path / "base"
    base.write_bytes(sectors(0, 0, 0))
    r = replay("--log", simple, "--base", base, "--out", out, "--every-flush")
    assert r.status == 1 and "entry 2 is past the end of the disk" in r.err


@pytest.mark.parametrize("args, words", [
    ((), "no log"), (("--log", "x"), "which images"), (("--log", "x", "--torn"), "--out"), (("--log",), "missing"),
    (("--log", "x", "--at", "1", "--torn"), "at a time"), (("--log", "x", "--at", "z"), "not a number"),
    (("--log", "/nonexistent", "--list"), "cannot open"), (("--log", "/dev/null", "--list"), "neither"),
    (("--what",), "unknown option"), (("x",), "unexpected"),
    (("--log", "x", "--torn", "--out", "y", "--exec", "fsck"), "{}"),
    (("--log", "x", "--torn", "--out", "y", "--count", "0"), "--count"),
    (("--log", "x", "--at", "1", "--out", "y", "--count", "5"), "--count"),
    (("--log", "x", "--torn", "--out", "y", "--size", "513"), "--size"),
])
def test_mistakes_are_refused_with_words(args, words):
    r = replay(*args)
    assert r.status == 1 and words in r.err, r.err


def test_at_past_the_end_is_refused(simple, tmp_path):
    r = replay("--log", simple, "--out", tmp_path / "image", "--at", 9)
    assert r.status == 1 and "has 8 entries" in r.err and not (tmp_path / "image").exists()


# ---- file systems ----

def have(tool):
    return shutil.which(tool, path=PATH)


def changed(log, before, after, order):
    """Log the difference of two images, 4 KiB at a time."""
    blocks = [i for i in range(0, len(after), 4096) if before[i:i + 4096] != after[i:i + 4096]]
    for i in blocks if order else reversed(blocks):
        log.write(i // 512, after[i:i + 4096])


@pytest.fixture
def ext4(tmp_path):
    """The log of an ext4 file system that files are made in and removed from, a flush after each."""
    if not (have("mkfs.ext4") and have("debugfs") and have("e2fsck")):
        pytest.skip("no e2fsprogs")
    image, base, log = tmp_path / "image", tmp_path / "base", Log()
    env = {**os.environ, "PATH": PATH}
    image.write_bytes(b"\0" * (8 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", image], check=True, env=env)
    shutil.copy(image, base)
    (tmp_path / "content").write_bytes(os.urandom(300000))
    commands = ["mkdir a"] + [f"write {tmp_path}/content a/f{i}" for i in range(5)] + ["rm a/f2", "mkdir a/b", "rm a/f4"]
    for i, command in enumerate(commands):
        before = image.read_bytes()
        subprocess.run(["debugfs", "-w", "-R", command, image], check=True, env=env, stderr=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)
        changed(log, before, image.read_bytes(), i % 2)
        log.flush()
    return base, log.save(tmp_path / "log"), image, len(commands)


def test_an_ext4_is_whole_at_every_flush(ext4, out):
    base, log, _, n = ext4
    r = replay("--log", log, "--base", base, "--out", out, "--every-flush", "--exec", "e2fsck -fn {}")
    assert r.status == 0 and r.out == f"{n} images, 0 failed\n", r.err
    assert list(out.iterdir()) == []


def test_the_end_of_the_log_is_the_disk(ext4, tmp_path):
    base, log, image, _ = ext4
    total = len(replay("--log", log, "--list").out.splitlines())
    assert replay("--log", log, "--base", base, "--out", tmp_path / "last", "--at", total).status == 0
    assert (tmp_path / "last").read_bytes() == image.read_bytes()


def test_torn_images_of_writes_without_a_journal_are_found_broken(ext4, out):
    base, log, _, _ = ext4
    r = replay("--log", log, "--base", base, "--out", out, "--torn", "--count", 30, "--seed", 3, "--exec", "e2fsck -fn {}", "--json")
    j = json.loads(r.out)
    assert r.status == 2 and j["images"] == 30 and 0 < j["failures"] < 30


# ---- beside QEMU, which writes such logs, too ----

def qemu_io(disk, log, *commands, **options):
    keys = "".join(f",{k.replace('_', '-')}={v}" for k, v in options.items())
    args = [a for c in (*commands, "flush") for a in ("-c", c)]
    subprocess.run(["qemu-io", "--image-opts", f"driver=blklogwrites,file.driver=file,file.filename={disk},"
                    f"log.driver=file,log.filename={log}{keys}", *args], check=True, stdout=subprocess.DEVNULL)


def replay_all(log, image, *args):
    n = len(replay("--log", log, "--list").out.splitlines())
    assert replay("--log", log, "--out", image, "--at", n, *args).status == 0
    return n


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="no qemu-io")
def test_a_log_of_qemu_is_read(tmp_path):
    disk, log, image = (tmp_path / n for n in ("disk", "log", "image"))
    for path, size in ((disk, 8 << 20), (log, 64 << 20)):
        path.touch()
        os.truncate(path, size)
    qemu_io(disk, log, "write -P 1 0 64k", "write -f -P 2 1M 8k", "flush", "write -z 4k 4k", "discard 1M 4k",
            "write -P 7 3M 4k", log_sector_size=4096)
    assert replay_all(log, image, "--size", "8M") >= 7
    assert image.read_bytes() == disk.read_bytes()


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="no qemu-io")
def test_our_log_is_read_by_qemu_which_goes_on_with_it(kvm, vmm, tmp_path):
    disk, base, log, image = (tmp_path / n for n in ("disk", "base", "log", "image"))
    disk.write_bytes(b"vmm disk".ljust(1 << 20, b"\0"))
    shutil.copy(disk, base)
    assert vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-M", "microvm", "--net", "none", "-d",
               f"{disk},log={log}").status == 0
    os.truncate(log, 1 << 20)       # room for more
    qemu_io(disk, log, "write -P 9 8k 4k", log_append="on")
    assert replay_all(log, image, "--base", base) >= 4
    assert image.read_bytes() == disk.read_bytes()


# ---- from a machine ----

@pytest.mark.parametrize("keys", ["", ",cache=unsafe", ",fault=write:torn:at=1,werror=ignore"])
def test_the_log_of_a_machine_replays_to_its_disk(kvm, vmm, tmp_path, keys):
    disk, base, log, image = (tmp_path / n for n in ("disk", "base", "log", "image"))
    disk.write_bytes(b"vmm disk" + bytes(range(256)) * 255 + b"\0" * 248)
    shutil.copy(disk, base)
    r = vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-M", "microvm", "--net", "none", "-d", f"{disk},log={log}{keys}")
    n = r.result["devices"]["blk0"]["log_entries"]
    r = replay("--log", log, "--base", base, "--out", image, "--at", n)
    assert r.status == 0 and image.read_bytes() == disk.read_bytes(), r.err
