/* The spawner: what it starts, what it hands over, and that it never outlives the VM process. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/error.h"
#include "vmm/spawner.h"

static struct error err;

static struct spawner *sealed(const char *script)
{
	const char *const argv[] = { "/bin/sh", "-c", script, NULL };
	struct spawner *s;

	ck_assert_int_eq(spawner_new(&s, &err), 0);
	ck_assert_int_eq(spawner_add(s, argv, &err), 0);
	ck_assert_int_eq(spawner_seal(s, &err), 0);
	return s;
}

static bool readable(int fd, int timeout_ms)
{
	struct pollfd p = { fd, POLLIN };

	return poll(&p, 1, timeout_ms) == 1;
}

/* Everything fd has to say until its end, as a string. */
static void read_all(int fd, char *buf, size_t len)
{
	size_t n = 0;
	ssize_t got;

	while (readable(fd, 10000) && (got = read(fd, buf + n, len - 1 - n)) > 0)
		n += (size_t)got;
	buf[n] = '\0';
}

START_TEST(test_program_gets_descriptors_from_three_and_nothing_else)
{
	struct spawner *s = sealed("ls /proc/self/fd | tr '\\n' ' ' >&4; cat <&3 >&4; echo $$ >&4");
	int in[2], out[2], pidfd;
	char buf[200];

	ck_assert(!pipe2(in, O_CLOEXEC) && !pipe2(out, O_CLOEXEC));
	pidfd = spawner_run(s, 0, (int[]){ in[0], out[1] }, 2);
	ck_assert_int_ge(pidfd, 0);
	ck_assert_int_eq(write(in[1], "word ", 5), 5);
	close(in[0]);
	close(in[1]);
	close(out[1]);
	read_all(out[0], buf, sizeof(buf));
	/* ls has its own descriptor of the directory, 5, and its stdout is 1 */
	ck_assert_msg(!strncmp(buf, "0 1 2 3 4 5 word ", 17), "%s", buf);
	ck_assert(readable(pidfd, 10000));
	close(pidfd);
	close(out[0]);
	spawner_free(s);
}
END_TEST

START_TEST(test_children_leave_no_zombie_and_are_gone_after_free)
{
	struct spawner *s = sealed("echo $PPID $$ >&3; exec sleep 1000");
	int out[2], pidfd[3], ppid, pid[3];
	char buf[64], path[64];
	FILE *f;

	for (int i = 0; i < 3; i++) {
		ck_assert(!pipe2(out, O_CLOEXEC));
		ck_assert_int_ge(pidfd[i] = spawner_run(s, 0, &out[1], 1), 0);
		close(out[1]);
		ck_assert(readable(out[0], 10000));
		ck_assert_int_gt(read(out[0], buf, sizeof(buf)), 0);
		ck_assert_int_eq(sscanf(buf, "%d %d", &ppid, &pid[i]), 2);
		close(out[0]);
	}
	/* One that ended is reaped before the next request has been answered. */
	kill(pid[0], SIGKILL);
	ck_assert(readable(pidfd[0], 10000));
	for (int i = 0; i < 100 && !kill(pid[0], 0); i++)
		ck_assert_int_eq(spawner_run(s, 7, NULL, 0), -EINVAL);
	ck_assert(kill(pid[0], 0) < 0 && errno == ESRCH);
	snprintf(path, sizeof(path), "/proc/%d/comm", ppid);
	ck_assert((f = fopen(path, "re")) && fgets(buf, sizeof(buf), f));
	fclose(f);
	ck_assert_str_eq(buf, "vmm-spawner\n");
	spawner_free(s);
	for (int i = 0; i < 3; i++) {
		ck_assert(readable(pidfd[i], 0));
		ck_assert(kill(pid[i], 0) < 0 && errno == ESRCH);
		close(pidfd[i]);
	}
	ck_assert(kill(ppid, 0) < 0 && errno == ESRCH);
}
END_TEST

START_TEST(test_errors_of_exec_and_of_the_request_come_back)
{
	static const char *const missing[] = { "/nonexistent/program", NULL };
	struct spawner *s;

	ck_assert_int_eq(spawner_new(&s, &err), 0);
	ck_assert_int_eq(spawner_run(s, 0, NULL, 0), -EINVAL);
	ck_assert_int_eq(spawner_add(s, missing, &err), 0);
	ck_assert_int_eq(spawner_find(s, "program"), 0);
	ck_assert_int_eq(spawner_find(s, "other"), -ENOENT);
	ck_assert_int_eq(spawner_seal(s, &err), 0);
	ck_assert_int_lt(spawner_add(s, missing, &err), 0);
	ck_assert_int_eq(spawner_run(s, 0, NULL, 0), -ENOENT);
	ck_assert_int_eq(spawner_run(s, 1, NULL, 0), -EINVAL);
	spawner_free(s);
}
END_TEST

START_TEST(test_nothing_registered_forks_nothing)
{
	struct spawner *s;

	ck_assert_int_eq(spawner_new(&s, &err), 0);
	ck_assert_int_eq(spawner_seal(s, &err), 0);
	ck_assert(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD);
	spawner_free(s);
	spawner_free(NULL);
}
END_TEST

START_TEST(test_spawner_and_children_end_when_the_vm_process_is_killed)
{
	int out[2];
	char buf[64];
	pid_t vm;

	ck_assert(!pipe2(out, O_CLOEXEC));
	vm = fork();
	if (vm == 0) {
		struct spawner *s = sealed("echo up >&3; exec sleep 1000");

		if (spawner_run(s, 0, &out[1], 1) < 0)
			_exit(1);
		raise(SIGKILL);
	}
	ck_assert_int_eq(waitpid(vm, NULL, 0), vm);
	close(out[1]);
	read_all(out[0], buf, sizeof(buf));     /* its end: the sleeper, the last writer, is gone */
	ck_assert(readable(out[0], 10000) && read(out[0], buf + 60, 1) == 0);
	ck_assert_msg(!*buf || !strcmp(buf, "up\n"), "%s", buf);
	close(out[0]);
}
END_TEST

START_TEST(test_signals_to_the_process_group_leave_it_alone)
{
	int out[2], status;
	char buf[64] = "";
	pid_t vm;

	ck_assert(!pipe2(out, O_CLOEXEC));
	vm = fork();
	if (vm == 0) {
		struct spawner *s;
		int pidfd;

		setpgid(0, 0);
		signal(SIGTERM, SIG_IGN);
		signal(SIGINT, SIG_IGN);
		s = sealed("kill -TERM $PPID; kill -INT $PPID; echo alive >&3");
		kill(0, SIGTERM);
		kill(0, SIGINT);
		for (int i = 0; i < 2; i++)
			if ((pidfd = spawner_run(s, 0, &out[1], 1)) < 0 || !readable(pidfd, 10000))
				_exit(1);
		spawner_free(s);
		_exit(0);
	}
	close(out[1]);
	ck_assert_int_eq(waitpid(vm, &status, 0), vm);
	ck_assert_int_eq(status, 0);
	read_all(out[0], buf, sizeof(buf));
	ck_assert_str_eq(buf, "alive\nalive\n");
	close(out[0]);
}
END_TEST

START_TEST(test_helper_path_finds_only_what_is_there)
{
	char buf[4096], tiny[4];

	ck_assert_int_eq(helper_path("no-such-helper", buf, sizeof(buf)), -ENOENT);
	ck_assert_int_eq(helper_path("test_spawner", buf, sizeof(buf)), 0);     /* beside this binary */
	ck_assert_int_eq(access(buf, X_OK), 0);
	ck_assert_int_eq(helper_path("test_spawner", tiny, sizeof(tiny)), -ENOENT);
}
END_TEST

UNIT_MAIN("spawner", test_program_gets_descriptors_from_three_and_nothing_else,
	test_children_leave_no_zombie_and_are_gone_after_free,
	test_errors_of_exec_and_of_the_request_come_back, test_nothing_registered_forks_nothing,
	test_spawner_and_children_end_when_the_vm_process_is_killed,
	test_signals_to_the_process_group_leave_it_alone, test_helper_path_finds_only_what_is_there)
