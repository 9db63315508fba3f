/* Image locks: among ourselves, and with QEMU's tools in both directions. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "block/format.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

static struct error err;
static char path[64];

static void make_image(void)
{
	int fd;

	snprintf(path, sizeof(path), "/tmp/vmm-lock-XXXXXX");
	fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, 1 << 20), 0);
	close(fd);
}

static int open_locked(bool readonly, int *fd)
{
	int r;

	*fd = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	ck_assert_int_ge(*fd, 0);
	r = lock_image(*fd, path, readonly, &err);
	if (r) {
		close(*fd);
		*fd = -1;
	}
	return r;
}

START_TEST(test_row83_second_writer_is_refused_naming_the_file)
{
	int a, b;

	make_image();
	ck_assert_int_eq(open_locked(false, &a), 0);
	ck_assert_int_eq(open_locked(false, &b), -EBUSY);
	ck_assert_ptr_nonnull(strstr(err.msg, path));
	ck_assert_ptr_nonnull(strstr(err.msg, "in use"));
	close(a);
	ck_assert_int_eq(open_locked(false, &b), 0);
	close(b);
	unlink(path);
}
END_TEST

START_TEST(test_row83_reader_and_writer_exclude_each_other)
{
	int a, b;

	make_image();
	ck_assert_int_eq(open_locked(true, &a), 0);
	ck_assert_int_eq(open_locked(false, &b), -EBUSY);
	close(a);
	ck_assert_int_eq(open_locked(false, &a), 0);
	ck_assert_int_eq(open_locked(true, &b), -EBUSY);
	close(a);
	unlink(path);
}
END_TEST

START_TEST(test_row83_many_readers_share)
{
	int fd[8];

	make_image();
	for (unsigned i = 0; i < ARRAY_LEN(fd); i++)
		ck_assert_int_eq(open_locked(true, &fd[i]), 0);
	for (unsigned i = 0; i < ARRAY_LEN(fd); i++)
		close(fd[i]);
	unlink(path);
}
END_TEST

START_TEST(test_row83_other_process_is_refused_and_death_unlocks)
{
	int a, status, ready[2];
	char c;
	pid_t pid;

	make_image();
	ck_assert_int_eq(pipe(ready), 0);
	pid = fork();
	if (!pid) {
		int fd = open(path, O_RDWR);

		c = lock_image(fd, path, false, NULL) ? 'x' : 'y';
		if (write(ready[1], &c, 1) == 1)
			pause();
		_exit(0);
	}
	ck_assert_int_eq(read(ready[0], &c, 1), 1);
	ck_assert_int_eq(c, 'y');
	ck_assert_int_eq(open_locked(true, &a), -EBUSY);
	kill(pid, SIGKILL);
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(open_locked(false, &a), 0);
	close(a);
	close(ready[0]);
	close(ready[1]);
	unlink(path);
}
END_TEST

/* ---- QEMU ---- */

static bool have(const char *tool, const char *test)
{
	char cmd[128];

	snprintf(cmd, sizeof(cmd), "command -v %s >/dev/null 2>&1", tool);
	if (!system(cmd))
		return true;
	printf("SKIP %s: no %s on this host\n", test, tool);
	return false;
}

static int shell(const char *fmt)
{
	char cmd[256];

	snprintf(cmd, sizeof(cmd), fmt, path);
	return system(cmd);
}

START_TEST(test_row83_qemu_tools_refuse_our_image)
{
	int a;

	if (!have("qemu-img", __func__) || !have("qemu-io", __func__))
		return;
	make_image();
	ck_assert_int_eq(open_locked(false, &a), 0);
	ck_assert_int_ne(shell("qemu-io -f raw -c 'read 0 512' %s >/dev/null 2>&1"), 0);
	ck_assert_int_ne(shell("qemu-img resize -f raw %s 2M >/dev/null 2>&1"), 0);
	/* What it grants for its own writers it grants for us: looking at a raw image. */
	ck_assert_int_eq(shell("qemu-img info -f raw %s >/dev/null 2>&1"), 0);
	close(a);
	ck_assert_int_eq(shell("qemu-io -f raw -c 'read 0 512' %s >/dev/null 2>&1"), 0);
	/* Ours read-only: QEMU may read with us and may not write. */
	ck_assert_int_eq(open_locked(true, &a), 0);
	ck_assert_int_eq(shell("qemu-io -r -f raw -c 'read 0 512' %s >/dev/null 2>&1"), 0);
	ck_assert_int_ne(shell("qemu-io -f raw -c 'write 0 512' %s >/dev/null 2>&1"), 0);
	close(a);
	unlink(path);
}
END_TEST

/* Run a QEMU program and wait until it says word; it lives until the two descriptors are closed. */
static pid_t start(const char *const *argv, const char *command, const char *word, int fd[2])
{
	int to[2], from[2];
	char buf[4096];
	size_t n = 0;
	pid_t pid;

	ck_assert_int_eq(pipe2(to, O_CLOEXEC), 0);
	ck_assert_int_eq(pipe2(from, O_CLOEXEC), 0);
	pid = fork();
	if (!pid) {
		dup2(to[0], 0);
		dup2(from[1], 1);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	close(to[0]);
	close(from[1]);
	ck_assert_int_eq(write(to[1], command, strlen(command)), strlen(command));
	do {
		ssize_t r = read(from[0], buf + n, sizeof(buf) - 1 - n);

		ck_assert_int_gt(r, 0);
		n += (size_t)r;
		buf[n] = '\0';
	} while (!strstr(buf, word));
	fd[0] = from[0];
	fd[1] = to[1];
	return pid;
}

static void end(pid_t pid, int fd[2])
{
	int status;

	close(fd[0]);
	close(fd[1]);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
}

static pid_t start_vm(const char *more, int fd[2])
{
	static char drive[200];
	const char *const argv[] = { "qemu-system-x86_64", "-M", "microvm,accel=tcg", "-m", "16", "-nodefaults",
		"-display", "none", "-S", "-qmp", "stdio", "-drive", drive, "-device", "virtio-blk-device,drive=d",
		NULL };

	snprintf(drive, sizeof(drive), "file=%s,format=raw,if=none,id=d%s", path, more);
	return start(argv, "{'execute':'qmp_capabilities'}{'execute':'query-block'}", "inserted", fd);
}

START_TEST(test_row83_image_open_in_qemu_io_is_refused)
{
	const char *const argv[] = { "qemu-io", "-f", "raw", path, NULL };
	int a, fd[2];
	pid_t pid;

	if (!have("qemu-io", __func__))
		return;
	make_image();
	pid = start(argv, "length\n", "MiB", fd);
	ck_assert_int_eq(open_locked(false, &a), -EBUSY);
	ck_assert_int_eq(open_locked(true, &a), -EBUSY);
	end(pid, fd);
	ck_assert_int_eq(open_locked(false, &a), 0);
	close(a);
	unlink(path);
}
END_TEST

START_TEST(test_row83_image_of_a_qemu_vm_is_refused_unless_both_only_read)
{
	int a, fd[2];
	pid_t pid;

	if (!have("qemu-system-x86_64", __func__))
		return;
	make_image();
	pid = start_vm("", fd);
	ck_assert_int_eq(open_locked(false, &a), -EBUSY);
	ck_assert_int_eq(open_locked(true, &a), -EBUSY);
	end(pid, fd);
	pid = start_vm(",readonly=on", fd);
	ck_assert_int_eq(open_locked(false, &a), -EBUSY);
	ck_assert_int_eq(open_locked(true, &a), 0);
	close(a);
	end(pid, fd);
	unlink(path);
}
END_TEST

UNIT_MAIN("lock", test_row83_second_writer_is_refused_naming_the_file,
	test_row83_reader_and_writer_exclude_each_other, test_row83_many_readers_share,
	test_row83_other_process_is_refused_and_death_unlocks, test_row83_qemu_tools_refuse_our_image,
	test_row83_image_open_in_qemu_io_is_refused,
	test_row83_image_of_a_qemu_vm_is_refused_unless_both_only_read)
