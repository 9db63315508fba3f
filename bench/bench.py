#!/usr/bin/python3
"""vmm beside the smallest KVM program and QEMU, in one run on this host: what `make bench` prints.

All figures are medians. The runs of the programs compared alternate, so that a noisy moment hits them all alike.
"""
import argparse
import collections
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / 'tests/nested'))
import bed  # noqa: E402
import blk  # noqa: E402

RUNS = 15
EXITS = 100_000
MEM_MIB = 1024
LIMIT = 30

# Real mode: '!' to the serial port, then 0 to the debug-exit port.
HELLO = bytes.fromhex('ba f803 b021 ee b000 e6f4 f4')
# '!', then halt for good with interrupts on.
IDLE = bytes.fromhex('ba f803 b021 ee fb f4 ebfc')


def exits(n):
	"""n writes to port 0xe0, then HELLO."""
	return b'\x66\xb9' + n.to_bytes(4, 'little') + bytes.fromhex('e6e0 6649 75fa') + HELLO


def rom(payload):
	"""A 64 KiB ROM whose reset vector is the payload (at most 16 bytes)."""
	return bytes(0xfff0) + payload.ljust(16, b'\xf4')


class Rows:
	def __init__(self):
		self.rows = []

	def add(self, what, value, unit, most=None, least=None, beside=''):
		bound = f'<= {most:.2f}' if most is not None else f'>= {least:.2f}' if least is not None else ''
		missed = (most is not None and value > most) or (least is not None and value < least)
		print(f'… {what}: {value:.2f} {unit}', file=sys.stderr, flush=True)
		self.rows.append((what, f'{value:.2f} {unit}', bound, ('MISSED' if missed else 'ok') if bound else '', beside))

	def print(self):
		head = ('what', 'vmm', 'must be', '', 'beside')
		widths = [max(len(r[i]) for r in [head, *self.rows]) for i in range(len(head))]
		for row in [head, *self.rows]:
			print('  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip())


def start(argv):
	"""(seconds from exec to the first byte on stdout, CPU seconds of the whole process)."""
	began = time.perf_counter()
	child = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
		stderr=subprocess.PIPE)
	first = os.read(child.stdout.fileno(), 1)
	took = time.perf_counter() - began
	if first != b'!':
		sys.exit(f'{argv[0]} said {first!r}: {child.stderr.read().decode(errors="replace")}')
	child.stdout.read()
	_, _, usage = os.wait4(child.pid, 0)
	child.returncode = 0
	child.stdout.close()
	child.stderr.close()
	return took, usage.ru_utime + usage.ru_stime


def compare(programs):
	"""{name: (median start, median CPU)} of {name: argv}, alternating."""
	samples = {name: [] for name in programs}
	for _ in range(RUNS):
		for name, argv in programs.items():
			samples[name].append(start(argv))
	return {name: tuple(statistics.median(s) for s in zip(*rows)) for name, rows in samples.items()}


def starts(rows, tools, tmp):
	(tmp / 'hello').write_bytes(HELLO)
	(tmp / 'rom').write_bytes(rom(HELLO))
	(tmp / 'disk').write_bytes(bytes(1 << 20))
	got = compare({
		'minimal': [tools['minimal'], str(MEM_MIB), tmp / 'hello'],
		'vmm': [*tools['vmm'], '--mem', f'{MEM_MIB}M', '--kernel', tmp / 'hello', '--net', 'none', '--disk',
			tmp / 'disk'],
		'QEMU microvm': ['qemu-system-x86_64', '-M', 'microvm', '-accel', 'kvm', '-nodefaults', '-display', 'none',
			'-m', str(MEM_MIB), '-bios', tmp / 'rom', '-serial', 'stdio', '-device',
			'isa-debug-exit,iobase=0xf4,iosize=4', '-drive',
			f'file={tmp}/disk,format=raw,if=none,id=d', '-device', 'virtio-blk-device,drive=d'],
	})
	beside = [', '.join(f'{n} {got[n][i] * 1e3:.2f} ms' for n in got if n != 'vmm') for i in range(2)]
	rows.add('exec to the first guest byte', got['vmm'][0] * 1e3, 'ms', 1.25e3 * got['minimal'][0], beside=beside[0])
	rows.add('CPU time of that start', got['vmm'][1] * 1e3, 'ms', 2e3 * got['minimal'][1], beside=beside[1])


def port_exits(rows, tools, tmp):
	(tmp / 'none').write_bytes(exits(1))
	(tmp / 'many').write_bytes(exits(1 + EXITS))
	got = compare({(name, n): argv(tmp / n) for n in ('none', 'many') for name, argv in {
		'minimal': lambda f: [tools['minimal'], str(MEM_MIB), f],
		'vmm': lambda f: [*tools['vmm'], '--mem', f'{MEM_MIB}M', '--net', 'none', '--kernel', f],
	}.items()})
	each = {name: (got[name, 'many'][0] - got[name, 'none'][0]) / EXITS * 1e6 for name in ('minimal', 'vmm')}
	rows.add(f'port write, round trip ({EXITS:,})', each['vmm'], 'us', 1.15 * each['minimal'],
		beside=f'minimal {each["minimal"]:.2f} us')


def memory(rows, tools, tmp):
	(tmp / 'idle').write_bytes(IDLE)
	child = subprocess.Popen([str(a) for a in [*tools['vmm'], '--mem', f'{MEM_MIB}M', '--kernel', tmp / 'idle',
		'--disk', tmp / 'disk', '--net', 'user', '--timeout', str(LIMIT)]], stdin=subprocess.DEVNULL,
		stdout=subprocess.PIPE)
	try:
		os.read(child.stdout.fileno(), 1)
		below = {child.pid: 'vmm'}
		for status in pathlib.Path('/proc').glob('[0-9]*/status'):
			try:
				text = status.read_text()
			except OSError:
				continue
			if int(re.search(r'PPid:\t(\d+)', text)[1]) in below:
				below[int(status.parent.name)] = re.search(r'Name:\t(.*)', text)[1]
		sizes = collections.Counter()   # vmm's own helpers go by its name and count as vmm
		for pid, name in below.items():
			sizes[name] += blk.private_mib(pid)
	finally:
		child.send_signal(signal.SIGKILL)
		child.wait()
	rows.add('private memory, disk and NAT, idle', sizes['vmm'], 'MiB', 4)
	if 'vmm-nat' in sizes:
		rows.add('private memory of the NAT helper', sizes['vmm-nat'], 'MiB', 4)


def bed_boot(rows):
	"""exec to init of the stock kernel, in the emulated bed."""
	qemu = shutil.which('qemu-system-x86_64')
	argv = ['/usr/bin/python3', TOP / 'tests/nested/bed.py', '--script', TOP / 'bench/bed.sh', '--add',
		f'{qemu}:bed/qemu']
	for name in ('/usr/share/seabios/bios-256k.bin', '/usr/share/seabios/bios-microvm.bin',
			'/usr/share/qemu/linuxboot_dma.bin', '/usr/share/qemu/kvmvapic.bin'):
		argv += ['--add', f'{name}:bed/firmware/{pathlib.Path(name).name}']
	out = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
	samples = {}
	for name, ticks in re.findall(r'^BOOT (\S+) (\d+)$', out, re.M):
		samples.setdefault(name, []).append(int(ticks) / 100)
	if 'vmm' not in samples or len(samples) < 4:
		sys.exit(f'the bed told no times:\n{out}')
	got = {name: statistics.median(s) for name, s in samples.items()}
	best = min(s for name, s in got.items() if name != 'vmm')
	rows.add('bed: exec to init of a stock kernel', got['vmm'], 's', 0.75 * best,
		beside=', '.join(f'{n} {s:.2f} s' for n, s in got.items() if n != 'vmm'))


def main():
	parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
	blk.arguments(parser)
	args = parser.parse_args()
	kvm = os.access('/dev/kvm', os.R_OK | os.W_OK)
	build = TOP / 'build'
	programs = bed.built(build)
	tools = {'minimal': build / programs['minimal'],
		'vmm': [build / programs['vmm'], '--load-address', '0x7c00', '--kernel-entry', 'flat16']}
	rows = Rows()
	(TOP / 'cache').mkdir(exist_ok=True)
	with tempfile.TemporaryDirectory(dir=TOP / 'cache', prefix='bench-') as tmp:
		tmp = pathlib.Path(tmp)
		if kvm:
			starts(rows, tools, tmp)
			port_exits(rows, tools, tmp)
			memory(rows, tools, tmp)
		else:
			print('no usable /dev/kvm here: only what the emulated bed can measure')
	bed_boot(rows)
	rows.print()
	if kvm:
		print()
		blk.run(TOP / 'cache', only=args.only, quick=args.quick)


if __name__ == '__main__':
	main()
