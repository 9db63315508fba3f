"""What the beds and make check are made of: archives, module order, the fetched kernel, the counting."""
import pathlib
import subprocess
import sys

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / 'scripts'))
import check  # noqa: E402
import initramfs  # noqa: E402
import kernel  # noqa: E402


@pytest.fixture(autouse=True)
def counts(monkeypatch):
	"""Empty lists for the counting, given back after the test."""
	for name in ('passed', 'failed', 'skipped'):
		monkeypatch.setattr(check, name, [])


def archive():
	ramfs = initramfs.Initramfs()
	ramfs.data('a/b/file', b'12345', 0o600)
	ramfs.symlink('a/link', 'b/file')
	return ramfs


def test_archive_unpacks_to_what_was_put_in(tmp_path):
	subprocess.run([initramfs.BUSYBOX, 'cpio', '-i', '-d'], cwd=tmp_path, input=archive().pack(), check=True,
		stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
	assert (tmp_path / 'a/link').read_bytes() == b'12345'
	assert (tmp_path / 'a/b/file').stat().st_mode & 0o777 == 0o600


def test_archive_is_reproducible():
	assert archive().pack() == archive().pack()


def test_archive_has_directories_before_what_is_in_them():
	data = archive().pack()
	assert data.index(b'a\0') < data.index(b'a/b\0') < data.index(b'a/b/file\0')


def test_modules_load_after_what_they_need():
	kernel.fetch()
	names = [ko.stem for ko in kernel.module_order(['virtio_net', 'kvm-amd'])]
	assert names.index('net_failover') < names.index('virtio_net')
	assert names.index('failover') < names.index('net_failover')
	assert names.index('kvm') < names.index('kvm-amd')
	assert len(names) == len(set(names))


def test_vmlinux_is_the_elf_inside_vmlinuz():
	assert (kernel.fetch() / 'vmlinux').read_bytes()[:5] == b'\x7fELF\x02'


def test_unpack_refuses_what_is_not_a_bzimage(tmp_path):
	(tmp_path / 'x').write_bytes(b'\0' * 4096)
	with pytest.raises(SystemExit, match='not a bzImage'):
		kernel.unpack_vmlinux(tmp_path / 'x')


def test_check_counts_each_test_of_a_check_executable():
	check.meson_row('build', {'name': 'vmm / a', 'result': 'OK',
		'stdout': 'Running suite(s): a\n100%: Checks: 5, Failures: 0, Errors: 0\n'})
	assert (len(check.passed), len(check.failed)) == (5, 0)


def test_check_names_the_test_that_failed_and_counts_the_others():
	check.meson_row('build', {'name': 'vmm / a', 'result': 'FAIL', 'stdout':
		'66%: Checks: 3, Failures: 1, Errors: 0\n../t.c:9:F:core:test_two:0: Assertion failed\n'})
	assert len(check.passed) == 2
	assert len(check.failed) == 1 and 'test_two' in check.failed[0]


@pytest.mark.parametrize('result', ['FAIL', 'TIMEOUT', 'ERROR', 'INTERRUPT', 'UNEXPECTEDPASS'])
def test_check_counts_an_executable_that_died_as_failed(result):
	check.meson_row('build', {'name': 'vmm / a', 'result': result, 'stdout': ''})
	assert (len(check.passed), len(check.failed)) == (0, 1)


def test_check_gives_a_skipped_tests_reason():
	check.meson_row('build', {'name': 'vmm / a', 'result': 'SKIP', 'stdout': 'needs /dev/kvm\n'})
	assert check.skipped == ['build: vmm / a: needs /dev/kvm']


def test_check_counts_a_check_executable_that_died_after_its_last_test_as_failed():
	check.meson_row('build', {'name': 'vmm / a', 'result': 'FAIL',
		'stdout': '100%: Checks: 4, Failures: 0, Errors: 0\n', 'stderr': 'LeakSanitizer'})
	assert (len(check.passed), len(check.failed)) == (4, 1)
