#!/usr/bin/python3
"""virtio-blk beside QEMU and fio: a polling ring-3 guest reads one file, hot in the page cache.

The guest says '<' and '>' on its serial port, and the host's clock is read between them. Runs alternate, figures are
medians of thousands of operations a second. Usage: blk.py [DIRECTORY [MIB]]: where the file is made, and how large.
"""
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
PAYLOAD = TOP / 'build/bench/ring3-blk.elf'
VMM = TOP / 'build/vmm'
RUNS = 5
MIB = 1024
LIMIT = 60
# name, block size, depth, sequential, requests a run, at least so many times QEMU's best
LOADS = [
	('4 KiB random read, depth 1', 4096, 1, False, 150_000, 2),
	('4 KiB random read, depth 32', 4096, 32, False, 500_000, 1.2),
	('128 KiB sequential read, depth 8', 131072, 8, True, 20_000, None),
]


def make_file(directory, mib):
	"""A file of random bytes, in the page cache."""
	path = directory / 'disk'
	with path.open('wb') as f:
		for _ in range(mib):
			f.write(os.urandom(1 << 20))
		os.fsync(f.fileno())
	path.read_bytes()
	return path


def vmm(path, cmdline):
	return [VMM, '--machine', 'microvm', '--mem', '256M', '--net', 'none', '--kernel', PAYLOAD, '--cmdline', cmdline,
		'--disk', f'{path},format=raw,ro']


def qemu(path, cmdline, iothread):
	thread = ['-object', 'iothread,id=io'] if iothread else []
	return ['qemu-system-x86_64', '-M', 'microvm', '-accel', 'kvm', '-global', 'virtio-mmio.force-legacy=false',
		'-nodefaults', '-display', 'none', '-serial', 'stdio', '-m', '256', '-kernel', PAYLOAD, '-append', cmdline,
		'-device', 'isa-debug-exit,iobase=0xf4,iosize=4', *thread,
		'-drive', f'file={path},format=raw,if=none,id=d,aio=io_uring,readonly=on',
		'-device', 'virtio-blk-device,drive=d' + (',iothread=io' if iothread else '')]


def wait_for(stream, mark):
	said = b''
	while not said.endswith(mark):
		byte = os.read(stream.fileno(), 1)
		if not byte:
			sys.exit(f'the guest ended before {mark}: {said.decode(errors="replace")}')
		said += byte
	return time.perf_counter()


def guest_rate(argv, requests):
	"""Requests a second between the guest's two marks."""
	with subprocess.Popen([str(a) for a in ['timeout', str(LIMIT), *argv]], stdin=subprocess.DEVNULL,
			stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
		began = wait_for(child.stdout, b'<')
		return requests / (wait_for(child.stdout, b'>') - began)


def fio_rate(path, size, depth, sequential):
	out = subprocess.run(['fio', '--name=x', f'--filename={path}', '--ioengine=io_uring', f'--bs={size}',
		f'--iodepth={depth}', '--rw=' + ('read' if sequential else 'randread'), '--readonly', '--runtime=1',
		'--time_based', '--invalidate=0', '--output-format=json'], stdout=subprocess.PIPE, text=True, check=True).stdout
	return json.loads(out)['jobs'][0]['read']['iops']


def measure(path):
	"""[(load, {program: median rate})]."""
	result = []
	for load in LOADS:
		_, size, depth, sequential, requests, _ = load
		cmdline = f'depth={depth} bs={size} n={requests}' + (' seq' if sequential else '')
		guests = {'vmm': vmm(path, cmdline), 'QEMU': qemu(path, cmdline, False),
			'QEMU iothread': qemu(path, cmdline, True)}
		if not VMM.exists() or not shutil.which('qemu-system-x86_64'):
			sys.exit('needs build/vmm and qemu-system-x86_64')
		samples = {name: [] for name in guests}
		for _ in range(RUNS):
			for name, argv in guests.items():
				samples[name].append(guest_rate(argv, requests))
		rates = {name: statistics.median(s) for name, s in samples.items()}
		if shutil.which('fio'):
			rates['fio'] = fio_rate(path, size, depth, sequential)
		result.append((load, rates))
	return result


def report(result):
	for (name, _, _, _, _, least), rates in result:
		best = max(rates['QEMU'], rates['QEMU iothread'])
		times = rates['vmm'] / best
		verdict = '' if least is None else f' (at least {least}: {"ok" if times >= least else "MISSED"})'
		beside = ', '.join(f'{n} {r / 1e3:.0f} k/s' for n, r in rates.items() if n != 'vmm')
		print(f'{name}: {rates["vmm"] / 1e3:.0f} k/s, {times:.2f} x the best of QEMU{verdict}; {beside}')


def main():
	where = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else TOP / 'cache')
	mib = int(sys.argv[2]) if len(sys.argv) > 2 else MIB
	where.mkdir(parents=True, exist_ok=True)
	with tempfile.TemporaryDirectory(dir=where, prefix='blk-') as tmp:
		report(measure(make_file(pathlib.Path(tmp), mib)))


if __name__ == '__main__':
	main()
