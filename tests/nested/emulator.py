"""The emulated bed: a stock Linux with a working /dev/kvm, on any host, under QEMU's TCG.

TCG emulates AMD's SVM, so that Linux (called L1 here) runs guests of its own through kvm-amd. It costs an order of
magnitude in speed and needs no privilege. One boot runs one script, which may run as many guests as it likes.
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / 'scripts'))
import initramfs  # noqa: E402
import kernel  # noqa: E402

CACHE = TOP / 'cache'


def base():
	"""L1's archive without the script: busybox, KVM modules, init, the kernels to boot in it."""
	fetched = kernel.fetch()
	ramfs = initramfs.Initramfs()
	ramfs.busybox()
	ramfs.modules(initramfs.BED_MODULES)
	ramfs.file(TOP / 'tests/nested/l1-init', 'init', 0o755)
	for image in ('vmlinuz', 'vmlinux'):
		ramfs.file(fetched / image, f'bed/{image}', 0o644)
	return ramfs


def argv(initrd, results, disk, network):
	# One CPU: with two, the emulated SVM loses a guest in some starts (a triple fault, or a lock that
	# is never let go), whichever program runs it: 38 of about 580 under vmm, 5 of about 134 under QEMU. With one: none of 143.
	cmd = ['qemu-system-x86_64', '-M', 'q35', '-accel', 'tcg', '-cpu', 'max', '-smp', '1',
		'-m', '2G', '-nodefaults', '-display', 'none', '-no-reboot',
		'-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console',
		'-chardev', f'pipe,id=results,path={results}', '-serial', 'chardev:results',
		'-kernel', str(kernel.KERNEL / 'vmlinuz'), '-initrd', str(initrd),
		'-append', 'console=ttyS0 panic=-1 quiet mitigations=off random.trust_cpu=on']
	if disk:
		cmd += ['-drive', f'file={disk},format=raw,if=none,id=disk', '-device', 'virtio-blk-pci,drive=disk']
	if network:
		cmd += ['-nic', 'user,model=virtio-net-pci,net=10.0.3.0/24']
	return cmd


def follow(child, results, path, on_line, timeout):
	"""Give each line that arrives in the FIFO to on_line until the child ends. Returns the number of its line
	"STATUS n", None where there was none. results: the FIFO at path, opened for both directions.
	"""
	status = None

	def end():
		try:
			child.wait(timeout)
		except subprocess.TimeoutExpired:
			child.kill()
			child.wait()
		with open(path, 'w') as out:
			out.write('\nGONE\n')

	watcher = threading.Thread(target=end)
	watcher.start()
	try:
		for line in results:
			line = line.strip()
			if line == 'GONE':
				break
			if line.startswith('STATUS '):
				status = int(line.split()[1])
			elif line:
				on_line(line)
	finally:
		if child.poll() is None:
			child.kill()
		watcher.join()
	return status


def boot(ramfs, script, on_line, timeout, *, disk=None, network=False, stdin=subprocess.DEVNULL, stdout=None):
	"""Boot L1, run the shell script there, give each line it writes to $RESULTS to on_line.

	Returns the script's status, None where the bed ended without telling one or the time was up. stdin and stdout
	are L1's console (None: this process's). disk: an image for L1's /dev/vda. network: L1 reaches what the host
	reaches, through QEMU's own NAT.
	"""
	ramfs.data('bed/main', script, 0o755)
	CACHE.mkdir(exist_ok=True)
	with tempfile.TemporaryDirectory(dir=CACHE, prefix='bed-') as tmp:
		tmp = pathlib.Path(tmp)
		initrd = ramfs.write(tmp / 'initrd')
		for end in ('in', 'out'):
			os.mkfifo(tmp / f'results.{end}')
		# Opened for both directions, so that opening never waits for QEMU.
		with os.fdopen(os.open(tmp / 'results.out', os.O_RDWR), 'r', errors='replace') as results, \
				os.fdopen(os.open(tmp / 'results.in', os.O_RDWR), 'w'):
			qemu = subprocess.Popen(argv(initrd, tmp / 'results', disk, network), stdin=stdin, stdout=stdout,
				stderr=stdout)
			return follow(qemu, results, tmp / 'results.out', on_line, timeout)
