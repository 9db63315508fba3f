#!/usr/bin/env python3
"""Writes the corpus of fuzz_blk: which image, which keys, then commands (see step() in fuzz_blk.c)."""
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "blk"
READ, WRITE, FLUSH, ZERO, DISCARD = 0, 1, 3, 4, 5
NEAR, LONG, WHOLE, BEYOND = 0x80, 0x40, 0x20, 0x10
FULL, SHORT, NOTHING, EAGAIN, EINTR, EIO, ENOSPC, TORN, OTHER = 0, 8, 9, 10, 11, 12, 13, 14, 15
RAW, Q512, Q4K, Q64K, Q512_BACKED, Q4K_BACKED, SNAPSHOT, PACKED, EXT, EXT_BACKED, V2, VDI4K, VDI64K, VDI1M, FIXED, ZIPPED = range(16)
PLAIN, _, THROUGH, UNSAFE, NO_DISCARD, STOP, STOP_FULL, LIMITS, DELAYS, TORN_STOP, FAULTS, THROUGH_STOP = range(12)
SMALL, DIRECT, DRAIN = 1, 2, 4


def submit(op, off, n, how=0):
    return bytes([0, op, how, off & 255, off >> 8, n])


def end(which=0, how=FULL):
    return bytes([5 | which << 4, how])


def perform(which=0, how=FULL):
    return bytes([10 | which << 4, how])


TIMER, KILL, STOP_ALL = b"\x0b", b"\x0c", b"\x0d"
NO_ROOM, NO_MEMORY = b"\x1f", b"\x0f"


def at_once(pattern):
    return bytes([14, pattern])


def seed(shape, keys=PLAIN, flags=0, pattern=0xFF, *steps):
    return bytes([shape, keys, flags, pattern]) + b"".join(steps)


def main():
    many = [submit(WRITE | NEAR, 7 * k, 9, k) for k in range(8)] + [submit(READ | NEAR, 5, 60)]
    ends = [end(k % 3) for k in range(30)]
    frees = [submit(WRITE, 0, 200), *ends, submit(FLUSH, 0, 0), *ends, submit(DISCARD | WHOLE, 32, 64), submit(WRITE, 30, 80), *ends, TIMER, *ends]
    errors = [end(k % 2, (EIO, EAGAIN, SHORT, ENOSPC, TORN, EINTR, NOTHING, OTHER)[k % 8] | k % 5 << 4) for k in range(16)]
    # A read that is still under way when its cluster has been freed and is written anew.
    late = [submit(READ, 40, 8), submit(DISCARD, 88, 8), submit(FLUSH, 0, 0), end(), TIMER, end(), at_once(0xFF), submit(READ, 24, 8)]
    late += [submit(DISCARD, 24, 8), submit(FLUSH, 0, 0), end(1), TIMER, end(1)]
    late += [step for k in range(4) for step in (submit(WRITE, 480 + 16 * k, 8), end(1))]
    # A table that cannot be read, and nobody waits for it any more: what comes later reads it again.
    stale = [submit(WRITE, 20, 1), submit(FLUSH, 0, 0), at_once(0xFF), submit(WRITE, 90, 1), end(0, SHORT), end(0, EIO)]
    seeds = {
        "no-memory": seed(VDI4K, 1, SMALL, 0xFF, bytes.fromhex("0f00153300006105 0000af9d0a19dd55 0000 6172 6d61")),
        "vdi-count": seed(VDI1M, THROUGH_STOP, 0, 0xFF, bytes.fromhex("004100002013000100f82222222222222222222222222222050015002500050015002500ba05001500250015054e150b05193b")),
        "stale-error": seed(Q512, PLAIN, 0, 0, *stale),
        "late-read": seed(Q4K, PLAIN, 0, 0, *late, *ends),
        "late-read-backed": seed(Q4K_BACKED, PLAIN, 0, 0, *late, *ends),
        "raw-all": seed(RAW, PLAIN, 0, 0xFF, *many, submit(ZERO, 8, 24, 64), submit(DISCARD, 40, 16), submit(FLUSH, 0, 0), *errors, *ends),
        "raw-direct": seed(RAW, STOP, DIRECT, 0xFF, *many, *errors, TIMER, TIMER, *ends),
        "small-clusters": seed(Q512, PLAIN, SMALL, 0xAA, *many, submit(WRITE | LONG, 0, 40), submit(FLUSH, 0, 0), *ends, KILL, *frees),
        "freed": seed(Q4K, PLAIN, 0, 0xF0, *frees, submit(FLUSH, 0, 0), end(0, OTHER), KILL, *ends),
        "copied": seed(Q512_BACKED, PLAIN, SMALL, 0xFF, submit(WRITE, 201, 3), submit(WRITE, 202, 1), submit(READ, 198, 9), end(0, EIO), *ends),
        "backed": seed(Q4K_BACKED, THROUGH, 0, 0x55, *many, submit(ZERO, 0, 60, 64), perform(0), perform(2, EIO), *ends, KILL),
        "snapshot": seed(SNAPSHOT, PLAIN, SMALL, 0xFF, *many, NO_ROOM, *errors, *frees, KILL),
        "packed": seed(PACKED, PLAIN, 0, 0, submit(READ, 30, 40), submit(WRITE, 33, 2), end(0, EIO), *ends, submit(DISCARD, 40, 16), *ends, *many),
        "subclusters": seed(EXT, PLAIN, 0, 0xFF, *many, submit(ZERO, 2, 30), submit(DISCARD, 0, 40), *ends, KILL),
        "subclusters-backed": seed(EXT_BACKED, UNSAFE, 0, 0x0F, *frees, submit(WRITE, 210, 1), *ends, KILL),
        "old-version": seed(V2, STOP_FULL, 0, 0xFF, *many, submit(ZERO, 195, 30), end(0, ENOSPC), *ends, TIMER, *ends),
        "vdi": seed(VDI4K, PLAIN, SMALL, 0xFF, *frees, *many, submit(FLUSH, 0, 0), end(0, 12 | 2 << 4), *ends),
        "vdi-large": seed(VDI1M, THROUGH_STOP, 0, 0xFF, submit(WRITE | LONG, 0, 19), submit(WRITE, 2040, 20), *errors, TIMER, *ends, KILL),
        "vdi-fixed": seed(FIXED, DELAYS, DRAIN, 0xFF, *many, submit(ZERO, 0, 200, 64), TIMER, TIMER, *ends, STOP_ALL, *frees),
        "limits": seed(Q64K, LIMITS, DRAIN, 0xFF, *many, TIMER, TIMER, *ends, STOP_ALL, *many),
        "faults": seed(VDI64K, FAULTS, 0, 0xFF, *many, submit(FLUSH, 0, 0), *ends, NO_MEMORY, submit(FLUSH, 0, 0), *ends),
        "torn": seed(ZIPPED, TORN_STOP, 0, 0xFF, *many, *ends, TIMER, *ends, submit(READ | BEYOND, 2040, 9)),
    }
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
