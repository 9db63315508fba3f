#!/usr/bin/env python3
"""Writes the corpora of fuzz_bzimage, fuzz_elf and fuzz_multiboot: small images of every kind the loader takes."""
import gzip
import lzma
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
BASE = 0x200000


def elf64(segments, entry, data, notes=()):
    phdrs = [(1, *s) for s in segments] + [(4, *n) for n in notes]
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0, 0, 64, 56, len(phdrs), 0, 0, 0)
    for kind, off, gpa, filesz, memsz in phdrs:
        head += struct.pack("<IIQQQQQQ", kind, 5, off, gpa + 0xFFFFFFFF80000000, gpa, filesz, memsz, 4096)
    return head.ljust(0x200, b"\0") + data


def elf32(segments, entry, data):
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, entry, 52, 0, 0, 52, 32, len(segments), 0, 0, 0)
    for off, gpa, filesz, memsz in segments:
        head += struct.pack("<IIIIIIII", 1, off, gpa, gpa, filesz, memsz, 5, 4096)
    return head.ljust(0x200, b"\0") + data


def note(entry):
    return struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)


def lz4_stored(data):
    """A legacy frame of one block that is one run of literals (lz4 block format: token, length bytes, literals)."""
    n = len(data) - 15
    block = b"\xf0" + b"\xff" * (n // 255) + bytes([n % 255]) + data
    return struct.pack("<II", 0x184C2102, len(block)) + block


def bzimage(payload, plain_size, version=0x20F, xloadflags=0x7F):
    h = bytearray(0x800)
    struct.pack_into("<B", h, 0x1F1, 3)
    struct.pack_into("<HH", h, 0x1FE, 0xAA55, 0x6AEB)
    struct.pack_into("<4sH", h, 0x202, b"HdrS", version)
    struct.pack_into("<H", h, 0x20E, 0x500)
    h[0x700:0x70A] = b"6.1-test x"
    struct.pack_into("<B", h, 0x211, 1)
    struct.pack_into("<I", h, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBHI", h, 0x230, 0x200000, 1, 21, xloadflags, 2047)
    struct.pack_into("<II", h, 0x248, 0x240, len(payload) + 4)
    struct.pack_into("<QI", h, 0x258, BASE, 0x100000)
    code = bytes(0x240) + payload + struct.pack("<I", plain_size)
    code = code.ljust((len(code) + 15) & ~15, b"\0")
    struct.pack_into("<I", h, 0x1F4, len(code) // 16)
    return bytes(h) + code


def mb1(flags, *addresses):
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def mb2(*tags):
    body = b""
    for kind, flags, *words in (*tags, (0, 0)):
        tag = struct.pack(f"<HHI{len(words)}I", kind, flags, 8 + 4 * len(words), *words)
        body += tag.ljust((len(tag) + 7) & ~7, b"\0")
    size = 16 + len(body)
    return struct.pack("<IIII", 0xE85250D6, 0, size, -(0xE85250D6 + size) & 0xFFFFFFFF) + body


def main():
    text = note(BASE + 8) + bytes(range(64)) * 4
    segment = [(0x200, BASE, len(text), 0x2000)]
    vmlinux = elf64([*segment, (0x210, BASE + 0x4000, 0x40, 0x40)], BASE + 4, text)
    pvh = elf64(segment, BASE, text, [(0x200, BASE, 20, 20)])
    xz = lzma.compress(vmlinux, preset=0)
    flat1 = mb1(1 << 16, BASE, BASE, BASE + 0x80, BASE + 0x1000, BASE + 0x20).ljust(0x80, b"\x90")
    flat2 = mb2((2, 0, BASE, BASE, 0, BASE + 0x1000), (3, 0, BASE + 0x60)).ljust(0x80, b"\x90")
    tags = mb2((1, 0, 3, 6), (4, 1, 0), (5, 1, 0, 0, 0), (6, 0), (10, 0, 0x400000, 0x2000000, 4096, 1), (3, 0, BASE + 8))
    corpora = {
        "bzimage": {
            "lz4": bzimage(lz4_stored(vmlinux), len(vmlinux)),
            "gzip": bzimage(gzip.compress(vmlinux, mtime=0)[:-4], len(vmlinux)),
            "xz": bzimage(xz, len(vmlinux)),
            "unknown": bzimage(b"BZh9" + bytes(64), 64),
            "old32": bzimage(b"", 0, 0x206, 0),
        },
        "elf": {
            "vmlinux": vmlinux,
            "pvh": pvh,
            "gzip": gzip.compress(pvh, mtime=0),
            "xz": xz,
            "lzma": lzma.compress(vmlinux, format=lzma.FORMAT_ALONE, preset=0),
            "lz4": lz4_stored(pvh),
            "elf32": elf32(segment, BASE, text),
        },
        "multiboot": {
            "elf32": elf32(segment, BASE, mb1(3).ljust(len(text), b"\x90")),
            "elf64": elf64(segment, BASE, mb1(3).ljust(len(text), b"\x90")),
            "flat1": flat1,
            "flat2": flat2,
            "tags": elf64(segment, BASE, tags.ljust(len(text), b"\x90")),
            "gzip": gzip.compress(elf32(segment, BASE, mb2().ljust(len(text), b"\x90")), mtime=0),
        },
    }
    for name, files in corpora.items():
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (directory / file).write_bytes(data)


if __name__ == "__main__":
    main()
