#!/usr/bin/python3
"""A stock Debian kernel with a disk and NAT, to a shell in this terminal: what `make demo` runs.

Directly on /dev/kvm where a stock Linux runs on it, else inside the emulated bed. Without a terminal, or with
DEMO_CMD in the environment, the guest runs those commands (or those on stdin) and ends; their status is ours.

  demo.py [IMAGE]       the disk, cache/demo.img by default; made if it is not there
"""
import os
import pathlib
import subprocess
import sys
import tempfile

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / 'tests/nested'))
import bed  # noqa: E402
import emulator  # noqa: E402
import initramfs  # noqa: E402
import kernel  # noqa: E402

IMAGE = TOP / 'cache/demo.img'
BED_SECONDS = 12 * 3600
MOTD = '''
Debian's kernel in vmm. /mnt is the disk and keeps what you write; the network is NAT: try
  wget -qO- http://10.0.2.2:8000/
Ctrl-A x or poweroff ends it.
'''
PAGE = 'hello from the host side of the NAT\n'
# The guest; both paths run exactly this.
OPTIONS = ['--mem', '512M', '--cpus', '2', '--net', 'user,host=allow', '--cmdline', 'console=ttyS0 quiet vmm.steps=demo']
BED_SCRIPT = '''#!/bin/sh
dmesg -n 1
stty -F /dev/ttyS0 -onlcr
udhcpc -i eth0 -s /etc/udhcpc.sh -n -q -t 2 -T 1 >/dev/null 2>&1
cd /bed
httpd -p 127.0.0.1:8000 -h /bed/www
exec {command}
'''


def make_image(image):
	"""The demo's disk: made once, kept between runs."""
	if image.exists():
		return
	with open(image, 'wb') as f:
		f.truncate(64 << 20)
	kernel.run(bed.find_program('mke2fs'), '-q', '-F', '-t', 'ext4', '-L', 'demo', str(image))


def quoted(argv):
	return ' '.join("'" + a.replace("'", "'\\''") + "'" for a in argv)


def run_emulated(build, programs, archive, image, terminal):
	ramfs = emulator.base()
	bed.add_vmm(ramfs, build, programs)
	ramfs.file(TOP / 'tests/nested/udhcpc.sh', 'etc/udhcpc.sh', 0o755)
	ramfs.data('bed/guest.cpio', archive)
	ramfs.data('bed/www/index.html', PAGE)
	command = quoted([f'/bed/build/{programs["vmm"]}', '--kernel', '/bed/vmlinuz', '--initrd', '/bed/guest.cpio',
		'--disk', '/dev/vda', *OPTIONS])
	status = emulator.boot(ramfs, BED_SCRIPT.format(command=command), lambda line: None, BED_SECONDS, disk=image,
		network=True, stdin=None if terminal else subprocess.DEVNULL)
	if status is None:
		print('demo: the emulated bed ended early', file=sys.stderr)
		return 1
	return status


def run_directly(build, programs, archive, image, terminal):
	with tempfile.TemporaryDirectory(dir=TOP / 'cache', prefix='demo-') as tmp:
		tmp = pathlib.Path(tmp)
		(tmp / 'guest.cpio').write_bytes(archive)
		(tmp / 'www').mkdir()
		(tmp / 'www/index.html').write_text(PAGE)
		server = subprocess.Popen([initramfs.BUSYBOX, 'httpd', '-f', '-p', '127.0.0.1:8000', '-h', tmp / 'www'],
			stdin=subprocess.DEVNULL)
		try:
			return subprocess.run([build / programs['vmm'], '--kernel', kernel.KERNEL / 'vmlinuz', '--initrd',
				tmp / 'guest.cpio', '--disk', image, *OPTIONS],
				stdin=None if terminal else subprocess.DEVNULL).returncode
		finally:
			server.kill()
			server.wait()


def main():
	image = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGE
	build = TOP / 'build'
	programs = bed.built(build)
	commands = os.environ.get('DEMO_CMD')
	terminal = commands is None and sys.stdin.isatty()
	if not terminal and commands is None:
		commands = sys.stdin.read()
	kernel.fetch()
	make_image(image)
	files = {'etc/motd': MOTD} if terminal else {'demo.cmd': commands + '\n'}
	archive = initramfs.guest(build / programs['report'], **files).pack()
	if bed.runs_linux_directly(build / programs['vmm']):
		print('demo: directly on /dev/kvm', flush=True)
		return run_directly(build, programs, archive, image, terminal)
	print('demo: /dev/kvm does not run a stock Linux here, so the guest runs inside the emulated bed (slower; '
		'about 20 s to the shell)', flush=True)
	return run_emulated(build, programs, archive, image, terminal)


if __name__ == '__main__':
	try:
		sys.exit(main())
	except KeyboardInterrupt:
		sys.exit(130)
