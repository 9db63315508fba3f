#!/usr/bin/python3
"""Disks beside QEMU and fio: a polling ring-3 guest works on an image, and the host's clock is read between its marks.

The programs of a row take turns; figures are medians. QEMU runs with whatever engine a first short turn found best.
Every row has targets: at least (or at most) so many times what another program did in the same turns.
"""
import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
PAYLOAD = TOP / 'build/bench/ring3-blk.elf'
VMM = TOP / 'build/vmm'
TMPFS = pathlib.Path('/dev/shm')
MIB = 1024
LIMIT = 60
KIB4, KIB64, KIB128, MIB1 = 4096, 65536, 131072, 1 << 20

# Where the image lies and what it is. direct: O_DIRECT. fresh: made anew for every run, with nothing in it.
Medium = collections.namedtuple('Medium', 'directory format direct fresh', defaults=('raw', False, False))
EXT4, RAM, DIRECT = Medium('disk'), Medium('tmpfs'), Medium('disk', direct=True)
QCOW2, FRESH = Medium('disk', 'qcow2'), Medium('disk', 'qcow2', fresh=True)

# first: requests of the first turn, after which a turn is as long as it should be. beside: the programs compared.
Load = collections.namedtuple('Load', 'name medium size depth sequential write first beside targets')
ALL = ('vmm', 'QEMU', 'fio')


def load(name, medium, size, depth, first, beside, *targets, sequential=False, write=False):
	return Load(name, medium, size, depth, sequential, write, first, beside, targets)


def hot(depth, first, write, *targets):
	return load(f'ext4 hot, 4 KiB random {"write" if write else "read"}, depth {depth}', EXT4, KIB4, depth, first, ALL,
		*targets, write=write)


LOADS = [
	hot(1, 30_000, False, ('QEMU', 4)),
	hot(32, 60_000, False, ('QEMU', 1.4), ('fio', 0.85)),
	hot(64, 60_000, False, ('QEMU', 1.4), ('fio', 0.85)),
	hot(1, 2000, True, ('QEMU', 4)),
	hot(32, 5000, True, ('QEMU', 1.4), ('fio', 0.85)),
	hot(64, 5000, True, ('QEMU', 1.4), ('fio', 0.85)),
	load('tmpfs, 4 KiB random read, depth 1', RAM, KIB4, 1, 30_000, ALL, ('QEMU', 2.5)),
	load('tmpfs, 4 KiB random read, depth 32', RAM, KIB4, 32, 60_000, ALL, ('QEMU', 2.5)),
	load('ext4 O_DIRECT, 4 KiB random read, depth 1', DIRECT, KIB4, 1, 500, ALL, ('fio', 0.9)),
	load('ext4 O_DIRECT, 4 KiB random read, depth 32', DIRECT, KIB4, 32, 5000, ALL, ('fio', 0.9)),
	load('ext4 hot, 128 KiB sequential read, depth 8', EXT4, KIB128, 8, 3000, ALL, ('fio', 0.95), sequential=True),
	load('ext4 hot, 1 MiB sequential read, depth 8', EXT4, MIB1, 8, 400, ALL, ('fio', 0.95), sequential=True),
	load('qcow2, 4 KiB random read, depth 1', QCOW2, KIB4, 1, 30_000, ('vmm', 'QEMU', 'vmm raw'), ('vmm raw', 0.9),
		('QEMU', 2)),
	load('qcow2, 4 KiB random read, depth 32', QCOW2, KIB4, 32, 60_000, ('vmm', 'QEMU', 'vmm raw'), ('vmm raw', 0.9),
		('QEMU', 2)),
	load('qcow2 fresh, 64 KiB sequential write, depth 32', FRESH, KIB64, 32, 4000, ('vmm', 'QEMU'), ('QEMU', 1.5),
		sequential=True, write=True),
	load('qcow2 fresh, 4 KiB random write, depth 32', FRESH, KIB4, 32, 6000, ('vmm', 'QEMU'), ('QEMU', 1.5), write=True),
]
FRESH_GIB = 2

# values: {program: median}. targets: (other program, times, True for "at least").
Result = collections.namedtuple('Result', 'name unit values targets note', defaults=('',))


class Bench:
	def __init__(self, disk, tmpfs, mib, quick):
		self.directory = {'disk': pathlib.Path(disk), 'tmpfs': pathlib.Path(tmpfs)}
		self.mib = mib
		self.runs, self.seconds = (3, 0.15) if quick else (5, 0.35)
		self.quick = quick
		self.images = {}

	def path(self, medium):
		"""The image of a medium, made when first asked for: random bytes, in the page cache."""
		where = self.directory[medium.directory] / f'image.{medium.format}'
		if medium.fresh:
			where = where.with_name('fresh.qcow2')
			where.unlink(missing_ok=True)
			qemu_img('create', '-q', '-f', 'qcow2', where, f'{FRESH_GIB}G')
		elif where not in self.images:
			if medium.format == 'raw':
				fill(where, self.mib)
			else:
				qemu_img('convert', '-q', '-O', 'qcow2', self.path(medium._replace(format='raw')), where)
			os.sync()
			self.images[where] = where.read_bytes()[:0]
		return where

	# ---- one run ----

	def cmdline(self, l, n):
		return f'depth={l.depth} bs={l.size} n={n}' + (' seq' if l.sequential else '') + (' write' if l.write else '')

	def vmm(self, l, medium, n):
		keys = f'format={medium.format}' + (',cache=none' if medium.direct else '') + ('' if l.write else ',ro')
		return [VMM, '--machine', 'microvm', '--mem', '256M', '--net', 'none', '--kernel', PAYLOAD, '--cmdline',
			self.cmdline(l, n), '--disk', f'{self.path(medium)},{keys}']

	def qemu(self, l, engine, n):
		aio, thread = engine
		return ['qemu-system-x86_64', '-M', 'microvm', '-accel', 'kvm', '-global', 'virtio-mmio.force-legacy=false',
			'-nodefaults', '-display', 'none', '-serial', 'stdio', '-m', '256', '-kernel', PAYLOAD, '-append',
			self.cmdline(l, n), '-device', 'isa-debug-exit,iobase=0xf4,iosize=4',
			*(['-object', 'iothread,id=io'] if thread else []), '-drive',
			f'file={self.path(l.medium)},format={l.medium.format},if=none,id=d,aio={aio}'
			f',cache.direct={"on" if l.medium.direct else "off"}' + ('' if l.write else ',readonly=on'),
			'-device', 'virtio-blk-device,drive=d' + (',iothread=io' if thread else '')]

	def fio(self, l):
		kind = ('' if l.sequential else 'rand') + ('write' if l.write else 'read')
		out = subprocess.run(['fio', '--name=x', f'--filename={self.path(l.medium)}', '--ioengine=io_uring',
			f'--bs={l.size}', f'--iodepth={l.depth}', f'--rw={kind}', *([] if l.write else ['--readonly']),
			f'--direct={int(l.medium.direct)}', f'--runtime={int(self.seconds * 1000)}ms', '--time_based',
			'--norandommap', '--randrepeat=0', '--overwrite=1', '--invalidate=0', '--output-format=json'],
			stdout=subprocess.PIPE, text=True, check=True).stdout
		return json.loads(out)['jobs'][0]['write' if l.write else 'read']['iops']

	def rate(self, l, program, engine, n):
		"""Requests a second; None where the program could not do it."""
		if program == 'fio':
			return self.fio(l)
		if program == 'QEMU':
			return guest(self.qemu(l, engine, n), n)[0]
		medium = l.medium._replace(format='raw') if program == 'vmm raw' else l.medium
		return guest(self.vmm(l, medium, n), n)[0]

	# ---- rows ----

	def engines(self, l):
		aio = ['io_uring', 'threads'] + (['native'] if l.medium.direct else [])
		return [(a, thread) for a in aio for thread in (False, True)]

	def best_engine(self, l):
		"""By the better of two short turns each: one alone may meet a bad moment."""
		return max(self.engines(l), key=lambda e: max(self.rate(l, 'QEMU', e, l.first) for _ in range(2)))

	def turns(self, l, program, rate):
		"""Requests of a run that is as long as it should be; a fresh image has room for only so many."""
		if l.medium.fresh:
			return min(l.first, (FRESH_GIB << 30) // l.size)
		return max(l.depth, int(rate * self.seconds))

	def measure(self, l):
		if l.medium.format != 'raw' and not has_format(l.medium.format):
			return Result(l.name, 'k/s', None, ())
		engine = self.best_engine(l)
		first = {p: self.rate(l, p, engine, l.first) for p in l.beside if p != 'fio'}
		samples = collections.defaultdict(list)
		for _ in range(self.runs):
			for p in l.beside:
				samples[p].append(self.rate(l, p, engine, self.turns(l, p, first.get(p, 0))))
		rates = {p: statistics.median(s) / 1e3 for p, s in samples.items()}
		return Result(l.name, 'k/s', rates, [(p, times, True) for p, times in l.targets], words(engine))

	def cpu(self):
		"""CPU time of the whole process per request, beyond what a short run takes."""
		l = next(l for l in LOADS if l.medium == EXT4 and l.depth == 32 and not l.write)
		engine = self.best_engine(l)
		argv = {'vmm': lambda n: self.vmm(l, l.medium, n), 'QEMU': lambda n: self.qemu(l, engine, n)}
		samples = collections.defaultdict(list)
		for _ in range(self.runs):
			for p, a in argv.items():
				short, n = l.depth, l.first if self.quick else l.first * 4
				samples[p].append((guest(a(n), n)[1] - guest(a(short), short)[1]) / (n - short) * 1e6)
		return Result('CPU time a request, 4 KiB random read, depth 32', 'us', medians(samples), [('QEMU', 0.6, False)],
			words(engine))

	def convert(self, compressed):
		gib = 1 if self.quick else 4
		name = f'convert qcow2 to raw, {gib} GiB half full, {"compressed" if compressed else "plain"}'
		if not has_convert():
			return Result(name, 's', None, ())
		here = self.directory['disk']
		source, target, raw = here / 'source.qcow2', here / 'target.raw', here / 'half.raw'
		fill(raw, gib * 512, compressible=True)
		os.truncate(raw, gib << 30)
		qemu_img('convert', '-q', '-W', '-m', '16', *(['-c'] if compressed else []), '-O', 'qcow2', raw, source)
		raw.unlink()
		argv = {'vmm': [VMM, 'disk', 'convert', '-f', 'qcow2', '-O', 'raw', source, target],
			'QEMU': ['qemu-img', 'convert', '-m', '16', '-f', 'qcow2', '-O', 'raw', source, target]}
		samples = collections.defaultdict(list)
		for _ in range(3):
			for p, a in argv.items():
				target.unlink(missing_ok=True)
				os.sync()
				began = time.perf_counter()
				subprocess.run([str(x) for x in a], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
				samples[p].append(time.perf_counter() - began)
		source.unlink()
		target.unlink()
		return Result(name, 's', medians(samples), [('QEMU', 1 / 1.5, False)], 'qemu-img -m 16')

	def memory(self):
		"""Private memory beyond guest RAM after random reads all over a disk of 10 TiB."""
		name = 'private memory, qcow2 of 10 TiB beside raw'
		if not has_format('qcow2'):
			return Result(name, 'MiB', None, ())
		here = self.directory['disk']
		images = {'vmm': (here / 'huge.qcow2', 'qcow2'), 'vmm raw': (here / 'huge.raw', 'raw')}
		sparse_qcow2(images['vmm'][0], 10 << 40)
		images['vmm raw'][0].touch()
		os.truncate(images['vmm raw'][0], 10 << 40)
		sizes = {}
		for p, (path, form) in images.items():
			argv = [VMM, '--machine', 'microvm', '--mem', '256M', '--net', 'none', '--kernel', PAYLOAD, '--cmdline',
				'depth=32 bs=4096 n=60000 stay', '--disk', f'{path},format={form},ro']
			with started(argv) as child:
				wait_for(child, b'>')
				sizes[p] = private_mib(child.pid)
				child.kill()
			path.unlink()
		return Result(name, 'MiB', sizes, [('vmm raw', 16, None)])

	def rows(self, only):
		todo = [(l.name, lambda l=l: self.measure(l)) for l in LOADS]
		todo += [('CPU time a request', self.cpu), ('convert plain', lambda: self.convert(False)),
			('convert compressed', lambda: self.convert(True)), ('private memory qcow2', self.memory)]
		for name, row in todo:
			if re.search(only, name):
				result = row()
				print('… ' + ' '.join(line(result)), file=sys.stderr, flush=True)
				yield result


# ---- programs ----

def words(engine):
	aio, thread = engine
	return aio + (', iothread' if thread else '')


def medians(samples):
	return {p: statistics.median(s) for p, s in samples.items()}


def qemu_img(*argv):
	subprocess.run(['qemu-img', *[str(a) for a in argv]], check=True, stdout=subprocess.DEVNULL)


def fill(path, mib, compressible=False):
	with path.open('wb') as f:
		for _ in range(mib):
			f.write(os.urandom(1 << 18).hex().encode() * 2 if compressible else os.urandom(1 << 20))


def sparse_qcow2(path, size):
	"""An image whose second-level tables are all there, each in its own place, and all holes: to be read only."""
	qemu_img('create', '-q', '-f', 'qcow2', path, str(size))
	with path.open('r+b') as f:
		f.seek(36)
		entries, table = int.from_bytes(f.read(4), 'big'), int.from_bytes(f.read(8), 'big')
		first = table + (entries * 8 + 0xffff & ~0xffff) + (1 << 20)
		f.seek(table)
		for i in range(entries):
			f.write((first + (i << 16) | 1 << 63).to_bytes(8, 'big'))
		f.truncate(first + (entries << 16))


def complaint(*argv):
	return subprocess.run([str(VMM), *[str(a) for a in argv]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
		stderr=subprocess.PIPE, text=True, errors='replace')


def has_format(name):
	"""Does the binary know this format? It names those it has when it is given another."""
	return name in complaint('--kernel', PAYLOAD, '--net', 'none', '--disk', '/dev/null,format=?').stderr


def has_convert():
	return has_format('qcow2') and complaint('disk', 'convert', '--help').returncode == 0


@contextlib.contextmanager
def started(argv):
	"""The process, killed where it takes too long."""
	with subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
			stderr=subprocess.PIPE) as child:
		limit = threading.Timer(LIMIT, child.kill)
		limit.start()
		try:
			yield child
		finally:
			limit.cancel()


def wait_for(child, mark):
	said = b''
	while not said.endswith(mark):
		byte = os.read(child.stdout.fileno(), 1)
		if not byte:
			sys.exit(f'the guest ended before {mark}: {said.decode(errors="replace")}'
				f'{child.stderr.read().decode(errors="replace")}: {" ".join(child.args)}')
		said += byte
	return time.perf_counter()


def guest(argv, requests):
	"""(requests a second between the guest's two marks, CPU seconds of the process and its children)."""
	with started(argv) as child:
		began = wait_for(child, b'<')
		took = wait_for(child, b'>') - began
		child.stdout.read()
		_, status, usage = os.wait4(child.pid, 0)
		child.returncode = os.waitstatus_to_exitcode(status)
	return requests / took, usage.ru_utime + usage.ru_stime


def private_mib(pid):
	"""Private memory of a process without its memfd mappings (guest RAM), MiB."""
	total, counted = 0, True
	for text in pathlib.Path(f'/proc/{pid}/smaps').read_text().splitlines():
		if re.match(r'[0-9a-f]+-[0-9a-f]+ ', text):
			counted = 'memfd:' not in text
		elif counted and text.startswith('Private_'):
			total += int(text.split()[1])
	return total / 1024


# ---- the table ----

def judge(result, target):
	"""What a target says, and whether it is met."""
	other, times, least = target
	if least is None:
		beyond = result.values['vmm'] - result.values[other]
		return f'{other} + {beyond:.1f} (<= {times})', beyond <= times
	ratio = result.values['vmm'] / result.values[other]
	return f'{ratio:.2f} x {other} ({">=" if least else "<="} {times:.2f})', ratio >= times if least else ratio <= times


def figure(value):
	return f'{value:.0f}' if value >= 100 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


def line(result):
	if result.values is None:
		return [result.name, 'not there', '', '', '']
	told = [judge(result, t) for t in result.targets]
	beside = ', '.join(f'{p} {figure(v)}' + (f' ({result.note})' if p == 'QEMU' and result.note else '')
		for p, v in result.values.items() if p != 'vmm')
	return [result.name, f'{figure(result.values["vmm"])} {result.unit}', ', '.join(t for t, _ in told),
		'ok' if all(ok for _, ok in told) else 'MISSED', beside]


def table(results):
	rows = [['disk', 'vmm', 'is, and must be', '', 'beside'], *[line(r) for r in results]]
	widths = [max(len(r[i]) for r in rows) for i in range(5)]
	for row in rows:
		print('  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip())


def run(directory, mib=MIB, only='', quick=False):
	"""All rows, printed as a table. directory: on ext4, for what must lie there."""
	for program in ('qemu-system-x86_64', 'qemu-img', 'fio'):
		if not shutil.which(program):
			sys.exit(f'the disk benchmark compares with {program}, which is not installed')
	with tempfile.TemporaryDirectory(dir=directory, prefix='blk-') as disk, \
			tempfile.TemporaryDirectory(dir=TMPFS, prefix='blk-') as tmpfs:
		table(list(Bench(disk, tmpfs, mib, quick).rows(only)))


def arguments(parser):
	parser.add_argument('--only', default='', metavar='PATTERN', help='rows of the disk part whose name has this in it')
	parser.add_argument('--quick', action='store_true', help='short turns and few')


def main():
	parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
	arguments(parser)
	parser.add_argument('--directory', default=TOP / 'cache', type=pathlib.Path, help='where the images are made')
	parser.add_argument('--mib', default=MIB, type=int, help='how large they are')
	args = parser.parse_args()
	args.directory.mkdir(parents=True, exist_ok=True)
	run(args.directory, args.mib, args.only, args.quick)


if __name__ == '__main__':
	main()
