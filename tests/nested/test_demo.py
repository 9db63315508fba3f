"""make demo, end to end: a stock kernel, a shell, the NAT, a disk that keeps what was written."""
import os
import pathlib
import pty
import re
import select
import subprocess
import time

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
DEMO = ['/usr/bin/python3', str(TOP / 'scripts/demo.py')]
SECONDS = 120


@pytest.fixture(scope='module')
def image(tmp_path_factory):
	return tmp_path_factory.mktemp('demo') / 'disk.img'


def demo(image, commands):
	return subprocess.run([*DEMO, str(image)], env=dict(os.environ, DEMO_CMD=commands), stdin=subprocess.DEVNULL,
		stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', timeout=SECONDS)


class Terminal:
	"""The demo on a pseudo-terminal."""

	def __init__(self, image):
		self.pid, self.fd = pty.fork()
		if self.pid == 0:
			os.execv(DEMO[0], [*DEMO, str(image)])
		self.seen = ''

	def until(self, pattern):
		"""Read until the pattern shows after what was matched before."""
		end = time.monotonic() + SECONDS
		while not (found := re.search(pattern, self.seen)):
			ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
			assert ready, f'no {pattern!r} in time after:\n{self.seen}'
			try:
				data = os.read(self.fd, 4096)
			except OSError:         # EIO: the other side is closed
				data = b''
			assert data, f'ended without {pattern!r} after:\n{self.seen}'
			self.seen += data.decode(errors='replace')
		self.seen = self.seen[found.end():]
		return found

	def type(self, text):
		os.write(self.fd, text.encode())

	def status(self):
		"""Read to the end; the demo's exit status."""
		while True:
			try:
				if not os.read(self.fd, 4096):
					break
			except OSError:
				break
		return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_demo_fetches_through_the_nat_and_returns_the_commands_status(image):
	run = demo(image, 'wget -qO- http://10.0.2.2:8000/ && echo kept-word >/mnt/kept && exit 7')
	assert 'hello from the host side of the NAT' in run.stdout
	assert run.returncode == 7, run.stdout


def test_demo_says_in_one_line_where_the_guest_runs_and_its_disk_persists(image):
	run = demo(image, 'cat /mnt/kept')
	assert run.returncode == 0, run.stdout
	assert 'kept-word' in run.stdout
	assert sum(line.startswith('demo: ') for line in run.stdout.splitlines()) == 1


def test_demo_on_a_terminal_is_a_shell_that_poweroff_ends(image):
	terminal = Terminal(image)
	terminal.until('# ')
	terminal.type('echo sum $((40 + 2)); wget -qO- http://10.0.2.2:8000/\n')
	terminal.until('sum 42')
	terminal.until('hello from the host side')
	terminal.type('poweroff\n')
	assert terminal.status() == 0


def test_demo_on_a_terminal_ends_with_ctrl_a_x(image):
	terminal = Terminal(image)
	terminal.until('# ')
	terminal.type('\x01x')
	terminal.status()
	assert demo(image, 'cat /mnt/kept').returncode == 0
