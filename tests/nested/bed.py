#!/usr/bin/python3
"""Run stock Linux guests under vmm: directly on /dev/kvm where it runs them, else inside the emulated bed.

  bed.py [--build DIR] [--only PATTERN]... [--results FILE]       the cases of cases.sh
  bed.py --script FILE [--add FILE[:PATH]]...                     a script of your own, in the emulated bed

A script finds vmm and what was added in $BED (its directory), kernels and guest archive as in cases.sh, and writes
to $RESULTS; its lines are printed here, its status is this program's.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import emulator  # noqa: E402
import initramfs  # noqa: E402
import kernel  # noqa: E402

TOP = emulator.TOP
HERE = TOP / 'tests/nested'
PROGRAMS = ['mkfs.ext4', 'e2fsck', 'debugfs', 'mkfs.xfs', 'xfs_repair']
BED_TIMEOUT = 780
ISOLATE = ['unshare', '--map-root-user', '--net', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc']
BED_ENVIRONMENT = '''#!/bin/sh
export BED=/bed VMM=/bed/build/{vmm} KERNELS=/bed INITRD=/bed/guest.cpio XFS=/bed/xfs.cpio WORK=/tmp/work ONLY='{only}'
export PATH=$BED:$PATH
mkdir -p $WORK
echo nameserver 127.0.0.1 >/etc/resolv.conf
exec sh {script}
'''


def find_program(name):
	return shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin')


def built(build):
	"""The executables of a build directory: {name: path relative to it}."""
	out = subprocess.run(['/usr/bin/meson', 'introspect', '--targets', str(build)], stdout=subprocess.PIPE,
		check=True, text=True).stdout
	return {t['name']: pathlib.Path(t['filename'][0]).relative_to(build.resolve())
		for t in json.loads(out) if t['type'] == 'executable'}


def runs_linux_directly(vmm):
	"""Does /dev/kvm here run a stock Linux? vmm doctor measures it."""
	try:
		out = subprocess.run([vmm, 'doctor', '--json'], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
			stderr=subprocess.DEVNULL, timeout=60).stdout
		return json.loads(out).get('linux') is True
	except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired):
		return False


def may_isolate():
	"""May we make the namespaces that cases on the host run in? Containers often forbid it."""
	return subprocess.run([*ISOLATE, 'true'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
		stderr=subprocess.DEVNULL).returncode == 0


def add_vmm(ramfs, build, programs):
	"""vmm, its helpers and ours, in the places they have in the build tree."""
	for name in ('vmm', 'vmm-nat'):
		ramfs.program(build / programs[name], f'bed/build/{programs[name]}')
	for name in ('dnsd', 'minimal'):
		ramfs.program(build / programs[name], f'bed/{name}')


def bed_archive(build, programs):
	ramfs = emulator.base()
	add_vmm(ramfs, build, programs)
	for name in PROGRAMS:
		ramfs.program(find_program(name), f'bed/{name}')
	ramfs.data('bed/guest.cpio', initramfs.guest(build / programs['report']).pack())
	ramfs.data('bed/xfs.cpio', xfs_archive().pack())
	return ramfs


def xfs_archive():
	ramfs = initramfs.Initramfs()
	ramfs.extra_modules(initramfs.XFS_MODULES)
	return ramfs


def run_emulated(build, programs, only, on_line):
	ramfs = bed_archive(build, programs)
	ramfs.file(HERE / 'cases.sh', 'bed/cases.sh', 0o755)
	script = BED_ENVIRONMENT.format(vmm=programs['vmm'], only=' '.join(only), script='/bed/cases.sh')
	with open(TOP / 'cache/bed.log', 'wb') as log:
		return emulator.boot(ramfs, script, on_line, BED_TIMEOUT, stdout=log)


def run_directly(build, programs, only, on_line):
	"""The same script on the host, in user, network and mount namespaces that look to it like the bed."""
	with tempfile.TemporaryDirectory(dir=TOP / 'cache', prefix='direct-') as tmp:
		tmp = pathlib.Path(tmp)
		bed = tmp / 'bed'
		bed.mkdir()
		for name in subprocess.run([str(initramfs.BUSYBOX), '--list'], stdout=subprocess.PIPE, text=True,
				check=True).stdout.split():
			if name not in PROGRAMS:
				(bed / name).symlink_to(initramfs.BUSYBOX)
		(bed / 'dnsd').symlink_to((build / programs['dnsd']).resolve())
		for name in PROGRAMS:
			(bed / name).symlink_to(find_program(name))
		(tmp / 'work').mkdir()
		(tmp / 'resolv.conf').write_text('nameserver 127.0.0.1\n')
		initramfs.guest(build / programs['report']).write(tmp / 'guest.cpio')
		xfs_archive().write(tmp / 'xfs.cpio')
		os.mkfifo(tmp / 'results')
		env = dict(os.environ, BED=str(bed), VMM=str((build / programs['vmm']).resolve()),
			KERNELS=str(kernel.fetch()), INITRD=str(tmp / 'guest.cpio'), XFS=str(tmp / 'xfs.cpio'), WORK=str(tmp / 'work'),
			RESULTS=str(tmp / 'results'), ONLY=' '.join(only))
		script = ('mount --bind "$1" /etc/resolv.conf && ip link set lo up && busybox sh "$2"; '
			'echo STATUS $? >"$RESULTS"')
		with open(TOP / 'cache/bed.log', 'wb') as log:
			child = subprocess.Popen([*ISOLATE, 'sh', '-c', script, 'sh', str(tmp / 'resolv.conf'),
				str(HERE / 'cases.sh')], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
			# Open for both directions: the end of one writer is not the end.
			fifo = os.fdopen(os.open(tmp / 'results', os.O_RDWR), 'r', errors='replace')
			return emulator.follow(child, fifo, tmp / 'results', on_line, BED_TIMEOUT)


class Results:
	"""What the bed reported: (name, outcome, seconds, words)."""

	def __init__(self):
		self.rows = []
		self.began = time.monotonic()

	def line(self, text):
		kind, _, rest = text.partition(' ')
		if kind == 'RESULT':
			name, outcome, seconds, *words = rest.split(' ', 3)
			self.rows.append({'name': name, 'outcome': outcome, 'seconds': float(seconds),
				'words': words[0] if words else ''})
			if '/' in name and outcome == 'pass':
				return
			rest = f'{outcome:5} {seconds:>6} s  {name}  {" ".join(words)}'
		elif kind == 'NOTE':
			rest = f'             {rest}'
		print(f'bed {time.monotonic() - self.began:6.1f}  {rest}', flush=True)


def run_cases(args, programs):
	results = Results()
	if runs_linux_directly(args.build / programs['vmm']) and may_isolate():
		print('bed: stock Linux guests directly on /dev/kvm', flush=True)
		status = run_directly(args.build, programs, args.only, results.line)
	else:
		print('bed: stock Linux guests do not run directly on this host (see vmm doctor), so they run inside '
			'the emulated bed', flush=True)
		status = run_emulated(args.build, programs, args.only, results.line)
	if status != 0:
		results.rows.append({'name': 'bed-ends', 'outcome': 'fail', 'seconds': 0,
			'words': f'the bed ended with status {status}; its console is in cache/bed.log'})
		print(results.rows[-1]['words'], flush=True)
	if args.results:
		args.results.write_text(json.dumps(results.rows))
	return int(any(r['outcome'] == 'fail' for r in results.rows) or not results.rows)


def run_script(args, programs):
	ramfs = bed_archive(args.build, programs)
	ramfs.file(args.script, 'bed/script', 0o755)
	for add in args.add:
		source, _, path = add.partition(':')
		path = path or f'bed/{pathlib.Path(source).name}'
		with open(source, 'rb') as f:
			add_one = ramfs.program if f.read(4) == b'\x7fELF' else ramfs.file
		add_one(source, path)
	script = BED_ENVIRONMENT.format(vmm=programs['vmm'], only='', script='/bed/script')
	with open(TOP / 'cache/bed.log', 'wb') as log:
		status = emulator.boot(ramfs, script, lambda line: print(line, flush=True), BED_TIMEOUT, stdout=log)
	return 1 if status is None else status


def main():
	parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
	parser.add_argument('--build', type=pathlib.Path, default=TOP / 'build')
	parser.add_argument('--only', action='append', default=[], help='cases to run, a shell pattern')
	parser.add_argument('--results', type=pathlib.Path, help='write a JSON list here')
	parser.add_argument('--script', type=pathlib.Path)
	parser.add_argument('--add', action='append', default=[])
	args = parser.parse_args()
	programs = built(args.build)
	missing = [p for p in ('vmm', 'vmm-nat', 'dnsd', 'report', 'minimal') if p not in programs]
	if missing:
		sys.exit(f'bed: {args.build} has no {", ".join(missing)}: build first (make)')
	kernel.fetch()
	return run_script(args, programs) if args.script else run_cases(args, programs)


if __name__ == '__main__':
	sys.exit(main())
