"""A guest on images of every format: what it reads, what it leaves behind, and which images are refused."""
import shutil
import subprocess

import pytest
from conftest import PATIENCE, guest, read_until, started_vmm

QEMU_IMG = shutil.which("qemu-img")
needs_qemu_img = pytest.mark.skipif(not QEMU_IMG, reason="needs qemu-img (Debian package qemu-utils)")
SIZE = 1 << 20


def qemu_img(*args):
    return subprocess.run([QEMU_IMG, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "raw.img"
    path.write_bytes(b"vmm disk".ljust(512, b".") + bytes(range(256)) * ((SIZE - 512) // 256))
    return path


def contents(path, fmt, tmp_path):
    qemu_img("convert", "-f", fmt, "-O", "raw", path, tmp_path / "flat")
    return (tmp_path / "flat").read_bytes()


def expected(raw):
    data = bytearray(raw.read_bytes())
    data[512:1024] = bytes(i * 7 & 0xff for i in range(512))
    return bytes(data)


def run(vmm, disk, *args):
    return vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", disk, "-M", "microvm", "--net", "none", *args)


WRITABLE = [("qcow2", "compat=1.1"), ("qcow2", "compat=0.10"), ("qcow2", "cluster_size=512"),
            ("qcow2", "cluster_size=2M,extended_l2=on"), ("qcow2", "refcount_bits=1"),
            ("qcow2", "compression_type=zstd"), ("vdi", "static=off"), ("vdi", "static=on")]


@needs_qemu_img
@pytest.mark.parametrize("engine", ["io_uring", "epoll"])
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
@pytest.mark.parametrize("fmt, options", WRITABLE)
def test_guest_reads_and_writes(vmm, raw, tmp_path, fmt, options, cache, engine):
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", fmt, "-o", options, raw, image)
    r = run(vmm, f"{image},format={fmt},cache={cache}", "--engine", engine)
    if cache == "none" and r.status == 125 and b"O_DIRECT" in r.err:
        pytest.skip("no O_DIRECT on this file system")
    assert r.status == 0 and b"ok" in r.out, (r.out, r.err)
    qemu_img("check", "-q", "-f", fmt, image)
    assert contents(image, fmt, tmp_path) == expected(raw)
    d = r.result["devices"]["blk0"]
    assert d["format"] == fmt and d["size"] == SIZE and d["writes"] == 1


@needs_qemu_img
@pytest.mark.parametrize("how", ["poweroff", "triple", "timeout", "signal", "iothread"])
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=2M,extended_l2=on"])
def test_what_was_not_flushed_is_there_when_the_machine_ends(vmm, raw, tmp_path, options, how):
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", "-o", options, image)  # all of it to be copied
    disk = f"{image},format=qcow2,backing=allow" + (",iothread=0" if how == "iothread" else "")
    if how == "signal":
        with started_vmm("-k", guest("virtio-blk.elf"), "-m", "16M", "-d", disk, "-M", "microvm", "--net", "none",
                         "-a", "noflush hang") as p:
            read_until(p.stdout, b"ok")
            p.terminate()
            p.communicate(timeout=PATIENCE)
    else:
        args = {"triple": ["-a", "noflush triple"], "timeout": ["-a", "noflush hang", "--timeout", "1"]}
        r = run(vmm, disk, *args.get(how, ["-a", "noflush"]))
        assert b"ok" in r.out, (r.out, r.err)
    qemu_img("check", "-q", "-f", "qcow2", image)
    assert contents(image, "qcow2", tmp_path) == expected(raw)


@needs_qemu_img
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_guest_writes_into_a_compressed_image(vmm, raw, tmp_path, compression):
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"compression_type={compression}", raw, image)
    r = run(vmm, f"{image},format=qcow2")
    assert r.status == 0, (r.out, r.err)
    qemu_img("check", "-q", "-f", "qcow2", image)
    assert contents(image, "qcow2", tmp_path) == expected(raw)


@needs_qemu_img
@pytest.mark.parametrize("fmt, name, options", [
    ("vmdk", "vmdk", "subformat=monolithicSparse"), ("vmdk", "vmdk", "subformat=streamOptimized"),
    ("vmdk", "vmdk", "subformat=monolithicFlat"), ("vpc", "vhd", "subformat=dynamic"), ("vpc", "vpc", "subformat=fixed"),
    ("vhdx", "vhdx", "subformat=dynamic"), ("vhdx", "vhdx", "subformat=fixed"), ("qcow2", "qcow2", "compat=1.1"),
    ("vdi", "vdi", "static=off"), ("raw", "raw", "")])
def test_thrown_away_writes_on_any_format(vmm, raw, tmp_path, fmt, name, options):
    image = tmp_path / "image.vmdk"
    qemu_img("convert", "-f", "raw", "-O", fmt, *(["-o", options] if options else []), raw, image)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    r = run(vmm, f"{image},format={name},snapshot")
    assert r.status == 0 and b"ok" in r.out, (r.out, r.err)
    assert r.result["devices"]["blk0"]["snapshot"] is True
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before


@needs_qemu_img
@pytest.mark.parametrize("fmt", ["vmdk", "vhd", "vhdx"])
def test_formats_that_are_only_read_say_so(vmm, raw, tmp_path, fmt):
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", {"vhd": "vpc"}.get(fmt, fmt), raw, image)
    r = run(vmm, f"{image},format={fmt}")
    assert r.status == 125 and b"can only be read" in r.err and b"convert" in r.err, r.err


@pytest.fixture
def overlay(raw, tmp_path):
    if not QEMU_IMG:
        pytest.skip("needs qemu-img (Debian package qemu-utils)")
    path = tmp_path / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", path)
    return path


@pytest.mark.parametrize("key", ["allow", "DIR"])
def test_backing_file_is_read_when_allowed(vmm, raw, overlay, tmp_path, key):
    before = raw.read_bytes()
    r = run(vmm, f"{overlay},format=qcow2,backing={'allow' if key == 'allow' else tmp_path}")
    assert r.status == 0, (r.out, r.err)
    assert raw.read_bytes() == before
    assert contents(overlay, "qcow2", tmp_path) == expected(raw)


def refused(vmm, disk, *words):
    r = run(vmm, disk)
    assert r.status == 125 and r.err.count(b"\n") == 1, r.err
    for w in words:
        assert w in r.err, r.err


def test_row61_backing_file_is_refused_by_default(vmm, overlay):
    refused(vmm, f"{overlay},format=qcow2", b"backing=allow")


@needs_qemu_img
def test_row61_backing_file_elsewhere_is_refused(vmm, raw, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    image = inside / "over.qcow2"
    for name in ("/etc/shadow", "../raw.img", raw):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image, "1M")
        refused(vmm, f"{image},format=qcow2,backing=allow", b"backing file")
    (inside / "link").symlink_to(raw)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "link", "-F", "raw", image, "1M")
    refused(vmm, f"{image},format=qcow2,backing=allow", b"no symbolic links")


@needs_qemu_img
@pytest.mark.parametrize("name", ["json:{}", "nbd:localhost:1", "http://127.0.0.1/x", "fat:/etc"])
def test_row62_backing_file_names_with_a_scheme(vmm, tmp_path, name):
    image = tmp_path / "over.qcow2"
    plain = "x" * len(name)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", plain, "-F", "raw", image, "1M")
    image.write_bytes(image.read_bytes().replace(plain.encode(), name.encode()))
    refused(vmm, f"{image},format=qcow2,backing=allow", b"not a plain file name")


@needs_qemu_img
def test_row63_backing_loops_and_long_chains(vmm, tmp_path):
    for a, b in (("a", "b"), ("b", "a")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", b, "-F", "qcow2", tmp_path / a, "1M")
    refused(vmm, f"{tmp_path}/a,format=qcow2,backing=allow", b"leads back")
    for n in range(20):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", f"c{n + 1}", "-F", "qcow2", tmp_path / f"c{n}", "1M")
    refused(vmm, f"{tmp_path}/c0,format=qcow2,backing=allow", b"more than 8")


@needs_qemu_img
def test_row64_backing_file_without_a_format(vmm, raw, tmp_path):
    image = tmp_path / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=1.1", "-b", raw, "-F", "raw", image)
    image.write_bytes(image.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))
    refused(vmm, f"{image},format=qcow2,backing=allow", b"which format")


def test_row60_raw_stays_raw(vmm, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(b"vmm disk".ljust(65536, b"\0"))
    assert run(vmm, image).status == 0
    image.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(65528))
    r = run(vmm, image)
    assert b"looks like a qcow2 image but is used as raw" in r.err and b"format=raw" in r.err


@needs_qemu_img
def test_image_in_use_by_qemu_is_refused(vmm, tmp_path):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        p.stdin.write(b"read 0 512\n")
        p.stdin.flush()
        p.stdout.readline()
        refused(vmm, f"{image},format=qcow2", b"in use")
        p.stdin.close()


def test_unknown_format_names_those_there_are(vmm, raw):
    refused(vmm, f"{raw},format=qed", b"format", b"qcow2", b"raw")
