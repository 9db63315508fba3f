#!/usr/bin/env python3
"""Writes the corpora of fuzz_vmdk and fuzz_vhdx: small images of every kind that is read."""
import struct
import uuid
import zlib
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MIB = 1 << 20


def pad(data, n=512):
    return data.ljust((len(data) + n - 1) // n * n, b"\0")


def desc(kind, *extents):
    return "\n".join(
        ["# Disk DescriptorFile", "version=1", "parentCID=ffffffff", f'createType="{kind}"', *extents, 'ddb.adapterType = "ide"\n']
    ).encode()


def header(sectors, gd, flags=3, grain=8, rgd=0, overhead=6, desc_at=1, gtes=4, version=1):
    h = struct.pack("<4sIIQQQQIQQQ", b"KDMV", version, flags, sectors, grain, desc_at, 1, gtes, rgd, gd, overhead)
    return pad(h + b"\0\n \r\n" + struct.pack("<H", flags >> 16 & 1))


def sparse(flags=7):
    """Two grain tables of four grains: data, zero, hole, data; then one short grain."""
    tables = pad(struct.pack("<2I", 3, 4)) + pad(struct.pack("<4I", 8, 1, 0, 16)) + pad(struct.pack("<4I", 24, 0, 0, 0))
    text = pad(desc("monolithicSparse", 'RW 36 SPARSE "disk.vmdk"'))
    return pad(header(36, 2, flags, rgd=2, overhead=8) + text + tables, 4096) + b"a" * 4096 + b"b" * 4096 + b"c" * 4096


def stream():
    out = header(20, 0xFFFFFFFFFFFFFFFF, 0x30001, version=3) + pad(desc("streamOptimized", 'RDONLY 20 SPARSE "disk.vmdk"'))
    table = []
    for n, size in enumerate((4096, 0, 2048)):
        table.append(len(out) // 512 if size else 0)
        z = zlib.compress(bytes([n + 65]) * size)
        out += pad(struct.pack("<QI", n * 8, len(z)) + z) if size else b""
    out += pad(struct.pack("<QII", 1, 0, 1))
    at = len(out) // 512
    out += pad(struct.pack("<4I", *table, 0)) + pad(struct.pack("<QII", 1, 0, 2))
    gd = len(out) // 512
    out += pad(struct.pack("<I", at)) + pad(struct.pack("<QII", 1, 0, 3))
    return out + header(20, gd, 0x30001, version=3) + bytes(512)


def split(text, rest):
    return text + b"\0--\n" + rest


def guid(text):
    return uuid.UUID(text).bytes_le


def vhdx(entries, size=20 * MIB, block=MIB, logical=512):
    head = struct.pack("<4sIQ48xHHIQ", b"head", 0, 7, 0, 1, MIB, MIB)
    regions = struct.pack("<4sIII", b"regi", 0, 2, 0)
    for name, at in (("2dc27766-f623-4200-9d64-115e9bfd4a08", 3 * MIB), ("8b7ca206-4790-4b9a-b8fe-575f050f886e", 2 * MIB)):
        regions += guid(name) + struct.pack("<QII", at, MIB, 1)
    items = (
        ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", struct.pack("<II", block, 0)),
        ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", struct.pack("<Q", size)),
        ("8141bf1d-a96f-4709-ba47-f233a8faab5f", struct.pack("<I", logical)),
        ("cda348c7-445d-4471-9cc9-e9885251c556", struct.pack("<I", 4096)),
        ("beca12ab-b2e6-4523-93ef-c309e000c746", bytes(range(16))),
    )
    table, values = struct.pack("<8sHH20x", b"metadata", 0, len(items)), b""
    for name, value in items:
        table += guid(name) + struct.pack("<IIII", 65536 + len(values), len(value), 6, 0)
        values += value
    bat = b"".join(struct.pack("<Q", e) for e in entries)
    return head.ljust(80, b"\0") + regions.ljust(128, b"\0") + table.ljust(256, b"\0") + values.ljust(64, b"\0") + bat


def main():
    part = header(36, 2, 1, desc_at=0, overhead=8) + bytes(512) + pad(struct.pack("<2I", 3, 0)) + pad(struct.pack("<4I", 8, 0, 0, 16))
    part = pad(part, 4096) + b"d" * 8192
    flat = desc("monolithicFlat", 'RW 8 FLAT "disk-flat.vmdk" 0', "RW 5 ZERO", 'RDONLY 3 FLAT "disk-flat.vmdk" 9', 'NOACCESS 2 FLAT "x"')
    two = desc("twoGbMaxExtentSparse", 'RW 32 SPARSE "disk-s001.vmdk"', 'RW 36 SPARSE "disk-s002.vmdk"')
    corpora = {
        "vmdk": {
            "sparse": sparse(),
            "sparse-plain": sparse(1),
            "stream": stream(),
            "flat": split(flat, b"e" * 8192),
            "split": split(two, part),
            "part": part,
            "cowd": b"COWD" + bytes(508),
        },
        "vhdx": {
            "dynamic": vhdx([4 * MIB | 6, 0, 1, 2, 3, 5 * MIB | 6, 6 * MIB | 6, 7 * MIB | 6] + [0] * 12),
            "big-blocks": vhdx([0, 2], 300 * MIB, 256 * MIB, 4096),
            "states": vhdx([4, 5, 7, 2 * MIB | 6, 100 * MIB | 6]),
        },
    }
    for name, files in corpora.items():
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (directory / file).write_bytes(data)


if __name__ == "__main__":
    main()
