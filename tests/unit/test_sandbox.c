/*
 * The confinement of the VM process. Each test runs in a child that shuts itself in as vmm does; what the
 * filter refuses ends the child with SIGSYS, and with SANDBOX_LOG shows what the rest of the confinement does.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/capability.h>
#include <linux/kvm.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "loop/loop_priv.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/sandbox.h"
#include "vmm/vm.h"

#define NOBODY 65534

/* The child's: a VM that has a loop and no more; what it opened before it was shut in. */
static struct vm vm;
static int ends[2];
static void *page;

static void shut_in(enum sandbox_mode mode, enum loop_engine engine)
{
	struct error err = { 0 };

	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pipe(ends) || sandbox_prepare(mode, &err) || !(vm.io = loop_new("io/0", engine, 0, &err)) ||
		sandbox_enter(&vm, &err)) {
		fprintf(stderr, "%s\n", err.msg);
		_exit(99);
	}
}

/* Wait status of a child that shuts itself in and runs fn(arg): its value is the exit status. */
static int shut_in_on(enum loop_engine engine, enum sandbox_mode mode, int (*fn)(const void *arg),
	const void *arg)
{
	int status;
	pid_t pid = fork();

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		shut_in(mode, engine);
		_exit(fn(arg));
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	return status;
}

static int shut_in_run(enum sandbox_mode mode, int (*fn)(const void *arg), const void *arg)
{
	return shut_in_on(LOOP_AUTO, mode, fn, arg);
}

/* In the child, where ck_assert has no say. */
#define CHECK(what)                                                                                \
	do {                                                                                       \
		if (!(what)) {                                                                     \
			fprintf(stderr, "line %d: %s (errno %d)\n", __LINE__, #what, errno);       \
			return 1;                                                                  \
		}                                                                                  \
	} while (0)

/* --- what kills --- */

struct call {
	const char *name;
	long nr, arg[6];
};
#define C(nr, ...) { #nr " " #__VA_ARGS__, SYS_##nr, { __VA_ARGS__ } }

static int make_call(const void *arg)
{
	const struct call *c = arg;

	syscall(c->nr, c->arg[0], c->arg[1], c->arg[2], c->arg[3], c->arg[4], c->arg[5]);
	return 0;
}

static void all_kill(const struct call *calls, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		int status = shut_in_run(SANDBOX_ON, make_call, &calls[i]);

		ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS,
			"%s: wait status 0x%x, not killed by SIGSYS", calls[i].name, (unsigned)status);
	}
}

START_TEST(test_files_and_sockets_cannot_be_opened)
{
	const struct call calls[] = {
		C(open, (long)"/dev/null", O_RDONLY),
		C(openat, AT_FDCWD, (long)"/dev/null", O_RDONLY),
		C(openat2, AT_FDCWD, (long)"/dev/null", 0, 0),
		C(creat, (long)"/dev/null", 0),
		C(memfd_create, (long)"x", 0),
		C(newfstatat, AT_FDCWD, (long)"/dev/null", 0, 0),
		C(unlink, (long)"/nonexistent/x"),
		C(mount, 0, 0, 0, 0, 0),
		C(chroot, (long)"/"),
		C(socket, AF_INET, SOCK_STREAM, 0),
		C(socketpair, AF_UNIX, SOCK_STREAM, 0, 0),
		C(connect, 0, 0, 0),
		C(bind, 0, 0, 0),
		C(sendto, 0, 0, 0, 0, 1, 0),
		C(sendto, 0, 0, 0, 0, 1l << 32, 0),
		C(fcntl, 0, F_DUPFD, 10),
		C(fcntl, 0, F_SETFL, O_APPEND),
		C(dup, 0),
		C(io_uring_setup, 8, 0),
		C(io_uring_register, 0, IORING_REGISTER_BUFFERS, 0, 0),
	};

	all_kill(calls, ARRAY_LEN(calls));
}
END_TEST

START_TEST(test_nothing_can_be_executed)
{
	const struct call calls[] = {
		C(execve, (long)"/bin/true", 0, 0),
		C(execveat, AT_FDCWD, (long)"/bin/true", 0, 0, 0),
		C(fork, 0),
		C(clone, SIGCHLD),
		C(clone, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD),
		C(clone, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_NEWNET),
		C(mmap, 0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
		C(mprotect, 0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC),
		C(pkey_mprotect, 0, 4096, PROT_EXEC, -1),
		C(personality, 0x0400000),
		C(prctl, PR_SET_DUMPABLE, 1),
		C(seccomp, 0, 0, 0),
		C(bpf, 0, 0, 0),
		C(userfaultfd, 0),
		C(unshare, 0),
		C(setns, 0, 0),
		C(setresuid, 0, 0, 0),
	};

	all_kill(calls, ARRAY_LEN(calls));
}
END_TEST

START_TEST(test_other_processes_cannot_be_reached)
{
	const long other = getpid();            /* the child's parent */
	const struct call calls[] = {
		C(ptrace, 16, other),
		C(process_vm_readv, other, 0, 0, 0, 0, 0),
		C(process_vm_writev, other, 0, 0, 0, 0, 0),
		C(kill, other, 0),
		C(tkill, other, 0),
		C(tgkill, other, other, 0),
		C(pidfd_open, other, 0),
		C(pidfd_send_signal, 0, 0, 0, 0),
		C(rt_sigqueueinfo, other, 0, 0),
		C(prlimit64, other, 0, 0, 0),
	};

	all_kill(calls, ARRAY_LEN(calls));
}
END_TEST

START_TEST(test_ioctl_makes_no_vm_and_types_no_keys)
{
	const struct call calls[] = {
		C(ioctl, 0, KVM_CREATE_VM, 0),
		C(ioctl, 0, KVM_CREATE_VCPU, 0),
		C(ioctl, 0, KVM_CREATE_DEVICE, 0),
		C(ioctl, 0, KVM_SET_USER_MEMORY_REGION, 0),
		C(ioctl, 0, KVM_ENABLE_CAP, 0),
		C(ioctl, 0, TIOCSTI, 0),
		C(ioctl, 0, 0, 0),
	};

	all_kill(calls, ARRAY_LEN(calls));
}
END_TEST

static int call_i386(const void *arg)
{
	long r = 20;    /* getpid */

	(void)arg;
	__asm__ volatile("int $0x80" : "+a"(r) : : "memory", "r8", "r9", "r10", "r11");
	return 0;
}

START_TEST(test_calls_of_another_architecture_kill)
{
	static const struct call x32 = { "x32 getpid", SYS_getpid | 0x40000000, { 0 } };
	int status = shut_in_run(SANDBOX_ON, call_i386, NULL);

	ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
	all_kill(&x32, 1);
}
END_TEST

/* --- what works --- */

static void *run_thread(void *arg)
{
	prctl(PR_SET_NAME, "late");
	return arg;
}

struct job {
	struct loop_op op;
	void (*look)(struct job *j);    /* on the loop, then on a worker */
	sem_t done;
};

static int job_work(struct loop_op *op)
{
	struct job *j = container_of(op, struct job, op);

	j->look(j);
	return 0;
}

static void job_done(struct loop_op *op, int res)
{
	(void)res;
	sem_post(&container_of(op, struct job, op)->done);
}

static void job_start(void *arg)
{
	struct job *j = arg;

	j->look(j);
	loop_submit(vm.io, &j->op);
}

/* Main thread: look from the loop, then from a worker that the loop starts for it. */
static void job_run(struct job *j)
{
	j->op = (struct loop_op){ .kind = OP_WORK, .work = job_work, .done = job_done };
	sem_init(&j->done, 0, 0);
	loop_call(vm.io, job_start, j);
	while (sem_wait(&j->done))
		;
}

struct counted {
	struct job job;
	int looks;
};

static void count_look(struct job *j)
{
	container_of(j, struct counted, job)->looks++;
}

static int run_allowed(const void *arg)
{
	struct counted c = { .job.look = count_look };
	pthread_t thread;
	struct stat st;
	void *ret;
	char x = 'x';

	CHECK(!*(const bool *)arg || !strcmp(loop_engine_name(vm.io), "epoll"));
	CHECK(write(ends[1], &x, 1) == 1 && read(ends[0], &x, 1) == 1);
	CHECK(!fstat(ends[0], &st) && fcntl(ends[0], F_GETFL) == O_RDONLY);
	CHECK(!mprotect(page, 4096, PROT_READ));
	CHECK(mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
	CHECK(ioctl(ends[0], KVM_RUN, 0) < 0 && errno == ENOTTY);
	CHECK(syscall(SYS_clone3, NULL, 0) < 0 && errno == ENOSYS);
	CHECK(!pthread_create(&thread, NULL, run_thread, &c) && !pthread_join(thread, &ret) && ret == &c);
	CHECK(!pthread_kill(pthread_self(), 0) && !sched_yield());
	job_run(&c.job);
	CHECK(c.looks == 2);
	loop_free(vm.io);
	return 0;
}

/* Sanitizers make calls of their own where a thread starts and where a program fails. */
#define ON_IF_PLAIN (SANITIZED ? SANDBOX_LOG : SANDBOX_ON)

START_TEST(test_a_running_vm_can_do_its_work)
{
	const bool epoll = false;

	ck_assert_int_eq(shut_in_run(ON_IF_PLAIN, run_allowed, &epoll), 0);
}
END_TEST

START_TEST(test_a_running_vm_can_do_its_work_on_epoll)
{
	const bool epoll = true;

	ck_assert_int_eq(shut_in_on(LOOP_EPOLL, ON_IF_PLAIN, run_allowed, &epoll), 0);
}
END_TEST

static int run_abort(const void *arg)
{
	assert(arg);
	return 0;
}

START_TEST(test_a_failed_assertion_is_not_mistaken_for_an_escape)
{
	int status = shut_in_run(ON_IF_PLAIN, run_abort, NULL);

	ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}
END_TEST

/* --- what holds without the filter --- */

static long landlock_abi(void)
{
	return syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
}

struct confined {
	struct job job;
	long landlock;
	bool root;
	int bad;
};

static int check_denied(long landlock)
{
	const struct sockaddr_in any = { .sin_family = AF_INET };
	int s;

	CHECK(open("/dev/null", O_RDONLY) < 0 ? landlock > 0 && errno == EACCES : landlock <= 0);
	CHECK(open("/", O_RDONLY | O_DIRECTORY) < 0 ? landlock > 0 && errno == EACCES : landlock <= 0);
	s = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(s >= 0);
	CHECK(landlock < 4 || (bind(s, (const void *)&any, sizeof(any)) < 0 && errno == EACCES));
	close(s);
	return 0;
}

static int check_unprivileged(bool root)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct caps[2] = { { .effective = 1 }, { .effective = 1 } };
	uid_t r, e, s;

	CHECK(!syscall(SYS_capget, &head, caps));
	CHECK(!(caps[0].effective | caps[0].permitted | caps[0].inheritable));
	CHECK(!(caps[1].effective | caps[1].permitted | caps[1].inheritable));
	CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	CHECK(!getresuid(&r, &e, &s) && (!root || (r == NOBODY && e == NOBODY && s == NOBODY)));
	CHECK(!root || (getgid() == NOBODY && getegid() == NOBODY && getgroups(0, NULL) == 0));
	return 0;
}

static void confined_look(struct job *j)
{
	struct confined *c = container_of(j, struct confined, job);

	c->bad += check_denied(c->landlock) + check_unprivileged(c->root);
}

static int run_confined(const void *arg)
{
	struct confined c = *(const struct confined *)arg;

	confined_look(&c.job);
	job_run(&c.job);
	CHECK(!c.bad);
	CHECK(prctl(PR_GET_DUMPABLE) == !c.root);
	return 0;
}

START_TEST(test_row106_every_thread_is_nobody_and_reaches_no_file)
{
	const struct confined c = { .job.look = confined_look, .landlock = landlock_abi(),
		.root = geteuid() == 0 };

	ck_assert_int_eq(shut_in_run(SANDBOX_LOG, run_confined, &c), 0);
}
END_TEST

START_TEST(test_parent_death_signal_outlives_the_change_of_identity)
{
	int status, sig = 0;
	pid_t pid = fork();

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGUSR1);
		shut_in(SANDBOX_LOG, LOOP_AUTO);
		_exit(prctl(PR_GET_PDEATHSIG, &sig) || sig != SIGUSR1);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
}
END_TEST

static int run_off(const void *arg)
{
	const uid_t *uid = arg;

	CHECK(open("/dev/null", O_RDONLY) >= 0);
	CHECK(prctl(PR_GET_SECCOMP) == 0 && geteuid() == *uid);
	return 0;
}

START_TEST(test_off_changes_nothing)
{
	const uid_t uid = geteuid();

	ck_assert_int_eq(shut_in_run(SANDBOX_OFF, run_off, &uid), 0);
}
END_TEST

/* --- the ring, which no filter sees into --- */

#define MARK 0xfff2     /* an address nothing has; the low bits tell the loop to let it pass */

static int ask_ring(struct io_uring *ring, const struct io_uring_sqe *what)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct io_uring_cqe *cqe;
	unsigned head;

	*sqe = *what;
	io_uring_sqe_set_data64(sqe, MARK);
	io_uring_submit_and_wait(ring, 1);
	io_uring_for_each_cqe(ring, head, cqe)
		if (cqe->user_data == MARK)
			return cqe->res;
	return 1;
}

struct question {
	struct io_uring_sqe sqe;
	int answer;
};

static void ask(void *arg)
{
	struct question *q = arg;

	q->answer = ask_ring(vm.io->engine, &q->sqe);
}

static void ask_to_register(void *arg)
{
	struct question *q = arg;

	q->answer = io_uring_register_files(vm.io->engine, ends, 2);
}

static int ring_says(void (*fn)(void *arg), struct question q)
{
	loop_call(vm.io, fn, &q);
	return q.answer;
}

START_TEST(test_a_ring_opens_nothing_and_registers_nothing)
{
	struct question open = { 0 }, poll = { 0 }, async = { 0 };
	struct error err;

	ck_assert_int_eq(pipe(ends), 0);
	vm.io = loop_new("io/0", LOOP_AUTO, 0, &err);
	if (!strcmp(loop_engine_name(vm.io), "io_uring")) {
		io_uring_prep_openat(&open.sqe, AT_FDCWD, "/dev/null", O_RDONLY, 0);
		io_uring_prep_poll_add(&poll.sqe, ends[1], POLLOUT);
		async = poll;
		async.sqe.flags |= IOSQE_ASYNC;
		ck_assert_int_eq(ring_says(ask, poll), POLLOUT);
		ck_assert_int_eq(ring_says(ask, open), -EACCES);
		ck_assert_int_eq(ring_says(ask, async), -EACCES);
		ck_assert_int_eq(ring_says(ask_to_register, open), -EACCES);
	}
	loop_free(vm.io);
	close(ends[0]);
	close(ends[1]);
}
END_TEST

/* --- a tool that reads images --- */

static int shut_in_tool(enum sandbox_mode mode, int (*fn)(const void *arg), const void *arg)
{
	struct error err = { 0 };
	int status;
	pid_t pid = fork();

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (sandbox_tool(mode, &err)) {
			fprintf(stderr, "%s\n", err.msg);
			_exit(99);
		}
		_exit(fn(arg));
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	return status;
}

START_TEST(test_a_tool_reaches_nothing_it_was_not_given)
{
	const struct call calls[] = {
		C(open, (long)"/dev/null", O_RDONLY),
		C(openat, AT_FDCWD, (long)"/dev/null", O_RDONLY),
		C(readlink, (long)"/proc/self/exe", 0, 0),
		C(unlink, (long)"/nonexistent/x"),
		C(rename, (long)"/nonexistent/x", (long)"/nonexistent/y"),
		C(newfstatat, AT_FDCWD, (long)"/dev/null", 0, 0),
		C(statx, AT_FDCWD, (long)"/dev/null", 0, 0, 0),
		C(fchmod, 0, 0777),
		C(socket, AF_INET, SOCK_STREAM, 0),
		C(accept4, 0, 0, 0, 0),
		C(execve, (long)"/bin/true", 0, 0),
		C(fork, 0),
		C(clone, SIGCHLD),
		C(kill, 1, 0),
		C(ptrace, 0, 0, 0, 0),
		C(io_uring_setup, 8, 0),
		C(mmap, 0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
		C(ioctl, 0, TIOCSTI, 0),
		C(ioctl, 0, KVM_RUN, 0),
		C(fcntl, 0, F_SETFL, O_APPEND),
	};

	for (size_t i = 0; i < ARRAY_LEN(calls); i++) {
		int status = shut_in_tool(SANDBOX_ON, make_call, &calls[i]);

		ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS,
			"%s: wait status 0x%x, not killed by SIGSYS", calls[i].name, (unsigned)status);
	}
}
END_TEST

static void *write_there(void *fd)
{
	return (void *)(intptr_t)pwrite(*(int *)fd, "x", 1, 0);
}

static int work_on_a_file(const void *arg)
{
	struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 100, .l_len = 1 };
	int fd = *(const int *)arg, copy;
	struct stat st;
	pthread_t t;
	void *n;

	CHECK(!pthread_create(&t, NULL, write_there, &fd) && !pthread_join(t, &n) && n == (void *)1);
	CHECK(!ftruncate(fd, 65536) && !fstat(fd, &st) && st.st_size == 65536);
	CHECK(!fcntl(fd, F_OFD_SETLK, &l) && !fcntl(fd, F_OFD_GETLK, &l));
	CHECK((copy = dup(fd)) >= 0 && lseek(copy, 0, SEEK_HOLE) > 0 && !fdatasync(copy) && !close(copy));
	return 0;
}

START_TEST(test_a_tool_works_on_the_files_it_was_given)
{
	int fd = memfd_create("image", MFD_CLOEXEC), status;

	ck_assert_int_ge(fd, 0);
	status = shut_in_tool(ON_IF_PLAIN, work_on_a_file, &fd);
	ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "wait status 0x%x", (unsigned)status);
	close(fd);
}
END_TEST

static int open_by_name(const void *arg)
{
	(void)arg;
	CHECK(open("/dev/null", O_RDONLY) < 0 && errno == EACCES);
	CHECK(geteuid() != 0);
	return 0;
}

START_TEST(test_a_tool_finds_no_file_even_without_the_filter)
{
	int status;

	if (syscall(SYS_landlock_create_ruleset, NULL, 0, 1) < 1)
		return;
	status = shut_in_tool(SANDBOX_LOG, open_by_name, NULL);
	ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "wait status 0x%x", (unsigned)status);
}
END_TEST

UNIT_MAIN("sandbox", test_files_and_sockets_cannot_be_opened, test_nothing_can_be_executed,
	test_other_processes_cannot_be_reached, test_ioctl_makes_no_vm_and_types_no_keys,
	test_calls_of_another_architecture_kill, test_a_running_vm_can_do_its_work,
	test_a_running_vm_can_do_its_work_on_epoll, test_a_failed_assertion_is_not_mistaken_for_an_escape,
	test_row106_every_thread_is_nobody_and_reaches_no_file,
	test_parent_death_signal_outlives_the_change_of_identity, test_off_changes_nothing,
	test_a_ring_opens_nothing_and_registers_nothing, test_a_tool_reaches_nothing_it_was_not_given,
	test_a_tool_works_on_the_files_it_was_given, test_a_tool_finds_no_file_even_without_the_filter)
