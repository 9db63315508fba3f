"""Initramfs archives: a small, reproducible writer of the cpio "newc" format, and what goes in."""
import pathlib
import re
import stat
import subprocess
import tempfile

import kernel

TOP = kernel.TOP
BUSYBOX = pathlib.Path('/bin/busybox')

# What a guest loads at start, whichever machine it runs on.
GUEST_MODULES = ['virtio_pci', 'virtio_mmio', 'virtio_blk', 'virtio_net', 'virtio_console', 'virtio-rng',
	'virtio_balloon', 'evdev', 'button', 'pvpanic-mmio', 'crc32c-intel']
# More for some guests, in an archive of its own that is put behind.
XFS_MODULES = ['xfs']
# What the emulated Linux around the guests loads.
BED_MODULES = ['kvm-amd', 'virtio_pci', 'virtio_blk', 'virtio_net', 'crc32c-intel']


class Initramfs:
	"""Entries are kept sorted by path and carry no times or owners: equal input, equal bytes."""

	def __init__(self):
		self.entries = {}
		for d in ('dev', 'proc', 'sys', 'tmp', 'run', 'etc', 'mnt', 'root'):
			self.directory(d)
		self.node('dev/console', 5, 1)
		self.node('dev/null', 1, 3)

	def _add(self, path, mode, data=b'', rdev=(0, 0)):
		path = str(path).strip('/')
		for parent in pathlib.PurePath(path).parents:
			if str(parent) != '.' and str(parent) not in self.entries:
				self.directory(parent)
		self.entries[path] = (mode, data, rdev)

	def directory(self, path):
		self._add(path, stat.S_IFDIR | 0o755)

	def node(self, path, major, minor):
		self._add(path, stat.S_IFCHR | 0o600, rdev=(major, minor))

	def symlink(self, path, target):
		self._add(path, stat.S_IFLNK | 0o777, target.encode())

	def data(self, path, data, mode=0o644):
		self._add(path, stat.S_IFREG | mode, data if isinstance(data, bytes) else data.encode())

	def file(self, source, path=None, mode=None):
		source = pathlib.Path(source)
		self.data(path or source, source.read_bytes(), mode or (source.stat().st_mode & 0o777))

	def program(self, source, path=None):
		"""An executable without its debug information, and the libraries it links."""
		source = pathlib.Path(source)
		with tempfile.NamedTemporaryFile() as out:
			subprocess.run(['strip', '-o', out.name, str(source)], check=True)
			self.data(path or source, pathlib.Path(out.name).read_bytes(), 0o755)
		ldd = subprocess.run(['ldd', str(source)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
			text=True).stdout
		for lib in re.findall(r'(/\S+) \(0x', ldd):
			self.data(lib, pathlib.Path(lib).read_bytes(), 0o755)

	def busybox(self):
		"""Busybox under all its names."""
		self.file(BUSYBOX, 'bin/busybox', 0o755)
		names = subprocess.run([str(BUSYBOX), '--list'], stdout=subprocess.PIPE, text=True, check=True)
		for name in names.stdout.split():
			if name != 'busybox':
				self.symlink(f'bin/{name}', 'busybox')
		self.symlink('sbin', 'bin')

	def modules(self, names):
		"""Modules in /lib/modules, their loading order in /lib/modules/order."""
		order = kernel.module_order(names)
		for ko in order:
			self.file(ko, f'lib/modules/{ko.name}', 0o644)
		self.data('lib/modules/order', ''.join(f'/lib/modules/{ko.name}\n' for ko in order))

	def extra_modules(self, names):
		"""Modules that init loads where the command line asks for them (vmm.with=)."""
		for ko in kernel.module_order(names):
			self.file(ko, f'lib/modules/{ko.name}', 0o644)

	def pack(self):
		out = bytearray()
		for ino, (path, (mode, data, rdev)) in enumerate(
				[*sorted(self.entries.items()), ('TRAILER!!!', (0, b'', (0, 0)))], start=1):
			name = path.encode() + b'\0'
			fields = (ino, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name), 0)
			out += b'070701' + b''.join(b'%08X' % f for f in fields) + name
			out += b'\0' * (-len(out) % 4) + data
			out += b'\0' * (-len(out) % 4)
		return bytes(out)

	def write(self, path):
		path = pathlib.Path(path)
		path.parent.mkdir(parents=True, exist_ok=True)
		path.write_bytes(self.pack())
		return path


def guest(report, **files):
	"""The guest's archive: busybox, virtio modules, init and the program `report`; files by their path, for what is
	particular to it.
	"""
	ramfs = Initramfs()
	ramfs.busybox()
	ramfs.modules(GUEST_MODULES)
	ramfs.file(TOP / 'tests/nested/guest-init', 'init', 0o755)
	ramfs.file(TOP / 'tests/nested/udhcpc.sh', 'etc/udhcpc.sh', 0o755)
	ramfs.program(report, 'bin/report')
	for path, contents in files.items():
		ramfs.data(path, contents)
	return ramfs
