#!/usr/bin/python3
"""Fetch the stock Debian cloud kernel into cache/kernel without installing it.

cache/kernel/ then holds vmlinuz, vmlinux (the ELF inside vmlinuz), modules/*.ko (flat) and `version`.
"""
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

TOP = pathlib.Path(__file__).resolve().parent.parent
KERNEL = TOP / 'cache' / 'kernel'
META_PACKAGE = 'linux-image-cloud-amd64'

# How a kernel's payload may be packed (Documentation/arch/x86/boot.rst, payload_offset), and what unpacks it.
PACKERS = [
	(b'\x02\x21\x4c\x18', ['lz4', '-dc']),
	(b'\x28\xb5\x2f\xfd', ['zstd', '-dc']),
	(b'\x1f\x8b', ['gzip', '-dc']),
	(b'\xfd7zXZ\x00', ['xz', '-dc', '--single-stream']),
	(b'BZh', ['bzip2', '-dc']),
]


def run(*argv, **kw):
	"""Run a tool; its output is shown only when it fails."""
	p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
		text=True, env=dict(os.environ, LC_ALL='C'), **kw)
	if p.returncode:
		sys.exit(f'{p.stdout}\n{" ".join(argv)}: failed')
	return p.stdout


def newest_package():
	"""The package that linux-image-cloud-amd64 stands for today."""
	def look():
		out = subprocess.run(['apt-cache', 'depends', META_PACKAGE], stdout=subprocess.PIPE,
			stderr=subprocess.DEVNULL, text=True, env=dict(os.environ, LC_ALL='C')).stdout
		return re.search(r'Depends: (linux-image-\S+)', out)

	found = look()
	if not found and os.geteuid() == 0:
		run('apt-get', 'update', '-qq', timeout=300)
		found = look()
	if not found:
		sys.exit(f'apt-cache knows no {META_PACKAGE}: run apt-get update')
	return found[1]


def unpack_vmlinux(vmlinuz):
	"""The ELF inside a bzImage."""
	image = vmlinuz.read_bytes()
	if image[0x202:0x206] != b'HdrS':
		sys.exit(f'{vmlinuz}: not a bzImage')
	setup_sects = image[0x1f1] or 4
	offset, length = struct.unpack_from('<II', image, 0x248)
	start = (setup_sects + 1) * 512 + offset
	payload = image[start:start + length]
	for magic, argv in PACKERS:
		if payload.startswith(magic):
			break
	else:
		sys.exit(f'{vmlinuz}: payload packed by something unknown ({payload[:4].hex()})')
	if argv[0] == 'lz4':
		payload = payload[:-4]          # the legacy format has no end mark; the unpacked size follows
	out = subprocess.run(argv, input=payload, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
	if not out.startswith(b'\x7fELF'):
		sys.exit(f'{vmlinuz}: {argv[0]} could not unpack the payload')
	return out


def fetch():
	"""Fill cache/kernel once; returns it."""
	if (KERNEL / 'version').exists():
		return KERNEL
	package = newest_package()
	print(f'fetching {package} (unpacked into cache/kernel, not installed)', flush=True)
	KERNEL.parent.mkdir(exist_ok=True)
	with tempfile.TemporaryDirectory(dir=KERNEL.parent, prefix='fetch-') as tmp:
		tmp = pathlib.Path(tmp)
		run('apt-get', '-o', 'APT::Sandbox::User=', 'download', package, cwd=tmp, timeout=600)
		run('dpkg', '-x', str(next(tmp.glob('*.deb'))), str(tmp / 'tree'))
		version = next((tmp / 'tree/lib/modules').iterdir()).name
		new = tmp / 'new'
		(new / 'modules').mkdir(parents=True)
		shutil.copy(tmp / f'tree/boot/vmlinuz-{version}', new / 'vmlinuz')
		(new / 'vmlinux').write_bytes(unpack_vmlinux(new / 'vmlinuz'))
		for ko in (tmp / 'tree/lib/modules').rglob('*.ko'):
			shutil.copy(ko, new / 'modules' / ko.name)
		(new / 'version').write_text(version + '\n')
		shutil.rmtree(KERNEL, ignore_errors=True)
		new.rename(KERNEL)
	return KERNEL


def module_file(name):
	for spelling in (name, name.replace('_', '-'), name.replace('-', '_')):
		ko = KERNEL / 'modules' / f'{spelling}.ko'
		if ko.exists():
			return ko
	return None


def module_order(names):
	"""The files of these modules and of all they depend on, in loading order. Built-in ones are left out."""
	order = []

	def add(name):
		ko = module_file(name)
		if ko is None or ko in order:
			return
		depends = re.search(rb'\0depends=([^\0]*)\0', ko.read_bytes())
		for d in (depends[1].decode().split(',') if depends else []):
			if d:
				add(d)
		order.append(ko)

	for name in names:
		add(name)
	return order


if __name__ == '__main__':
	print(fetch())
