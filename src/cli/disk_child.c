/*
 * vmm disk: the files are opened here, and a child that is shut in reads what is in them. disk.h has the picture.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "disk.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"

#define MEMORY_DEFAULT (1ull << 30)

enum request_kind { REQUEST_OPEN, REQUEST_WRITABLE };
struct request {
	uint32_t kind, first;   /* first: the file the chain begins with */
	char name[PATH_MAX], from[PATH_MAX];
};
struct reply {
	int32_t result;         /* 0, and a descriptor with it, or -errno */
	char words[400];
};

/* ---- opening; parent ---- */

static int check_kind(const struct stat *st, const char *path, struct error *err)
{
	if (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode))
		return 0;
	return error_set(err, EINVAL, "'%s' is no regular file and no block device: a disk image is one of them", path);
}

int disk_open_file(struct disk_args *a, unsigned k, bool write, struct error *err)
{
	struct disk_file *f = &a->file[k];
	struct stat st;
	int r;

	if (stat(f->path, &st))         /* first: merely opening some devices does something */
		return error_errno(err, errno, "cannot open '%s'", f->path);
	r = check_kind(&st, f->path, err);
	if (r)
		return r;
	f->fd = open(f->path, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (f->fd < 0)
		return error_errno(err, errno, "cannot open '%s'%s", f->path, write ? " for writing" : "");
	if (fstat(f->fd, &st))
		return error_errno(err, errno, "cannot look at '%s'", f->path);
	return check_kind(&st, f->path, err);
}

int disk_open_new(struct disk_args *a, unsigned k, struct error *err)
{
	struct disk_file *f = &a->file[k];

	f->fd = open(f->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, 0644);
	f->made = f->fd >= 0;
	if (f->fd < 0 && errno == EEXIST)
		return disk_open_file(a, k, true, err);
	return f->fd < 0 ? error_errno(err, errno, "cannot make '%s'", f->path) : 0;
}

char *disk_beside(const char *from, const char *name)
{
	const char *slash = strrchr(from, '/');
	int n = *name == '/' || !slash ? 0 : (int)(slash - from + 1);
	char *path;

	return asprintf(&path, "%.*s%s", n, from, name) < 0 ? NULL : path;
}

/* ---- messages ---- */

static int send_message(int sock, void *data, size_t len, int fd)
{
	union {
		struct cmsghdr align;
		char buf[CMSG_SPACE(sizeof(int))];
	} control = { .buf = { 0 } };
	struct iovec iov = { data, len };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control.buf);
		control.align = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
			.cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.align), &fd, sizeof(fd));
	}
	while (sendmsg(sock, &m, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/* Bytes, 0 at the end, or -errno; *fd: -1 where none came. */
static ssize_t get_message(int sock, void *data, size_t len, int *fd)
{
	union {
		struct cmsghdr align;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = { data, len };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf,
		.msg_controllen = sizeof(control.buf) };
	ssize_t n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&m);

	*fd = -1;
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(fd, CMSG_DATA(c), sizeof(int));
	return n < 0 ? -errno : n;
}

/* ---- the child's side ---- */

static int ask(struct disk_args *a, enum request_kind kind, unsigned first, const char *name, const char *from,
	struct error *err)
{
	static struct request q;
	struct reply p;
	ssize_t n;
	int fd;

	q = (struct request){ .kind = kind, .first = first };
	if (strlen(name) >= sizeof(q.name) || strlen(from) >= sizeof(q.from))
		return error_set(err, ENAMETOOLONG, "the name of its backing file is too long");
	strcpy(q.name, name);
	strcpy(q.from, from);
	if (send_message(a->sock, &q, sizeof(q), -1))
		return error_set(err, EPIPE, "nobody is there to open its backing file '%s'", name);
	do
		n = get_message(a->sock, &p, sizeof(p), &fd);
	while (n == -EINTR);
	if (n != sizeof(p) || (!p.result && fd < 0))
		return error_set(err, EPIPE, "nobody is there to open its backing file '%s'", name);
	p.words[sizeof(p.words) - 1] = '\0';
	return p.result ? error_set(err, -p.result, "%s", p.words) : fd;
}

static int ask_opener(const struct image_opener *ops, const char *name, const char *from, struct error *err)
{
	const struct disk_opener *o = container_of(ops, struct disk_opener, ops);

	return ask(o->args, REQUEST_OPEN, o->first, name, from, err);
}

int disk_backing_for_writing(struct disk_args *a, const struct image *i, struct error *err)
{
	return ask(a, REQUEST_WRITABLE, 0, image_backing_name(i), image_path(i), err);
}

const char *disk_guess(const struct disk_args *a, unsigned k)
{
	static uint8_t head[4096];
	ssize_t n = pread(a->file[k].fd, head, sizeof(head), 0);

	return image_guess(head, n < 0 ? 0 : (size_t)n);
}

int disk_image(struct disk_args *a, struct image **ret, unsigned k, const char *format, struct image_how how,
	struct error *err)
{
	const char *path = a->file[k].path, *looks = format ? format : disk_guess(a, k);
	struct stat st;
	int r;

	if (!format && strcmp(looks, "raw"))
		return error_set(err, EINVAL, "'%s' looks like %s, and a format is never guessed: -f %s says that it is, -f raw that "
			"its bytes are the disk", path, looks, looks);
	a->opener[k] = (struct disk_opener){ .ops = { ask_opener }, .args = a, .first = k };
	how.format = format;
	how.share = how.share || (how.readonly && a->share);
	how.opener = a->backing_rule ? &a->opener[k].ops : NULL;
	how.fd = dup(a->file[k].fd);
	if (how.fd < 0)
		return error_errno(err, errno, "'%s'", path);
	r = image_open(ret, path, &how, err);
	if (!r && how.readonly && !strcmp(looks, "raw") && !fstat(a->file[k].fd, &st) && st.st_size % 512)
		log_warn("'%s': its last %u bytes, less than a sector, are no part of the disk ('truncate -s %%512' adds the rest)",
			path, (unsigned)(st.st_size % 512));
	return r;
}

int disk_failed(const struct disk_command *c)
{
	return c->failed ? c->failed : DISK_FAILED;
}

static int shut_in(struct disk_args *a, struct error *err)
{
	uint64_t memory = a->command->memory ? a->command->memory : MEMORY_DEFAULT;
	const struct rlimit space = { memory, memory }, cpu = { a->command->cpu_seconds, a->command->cpu_seconds };

	if (SANITIZED)
		return 0;       /* as vmm run: they need calls and memory that end here */
	if (setrlimit(RLIMIT_AS, &space) || (a->command->cpu_seconds && setrlimit(RLIMIT_CPU, &cpu)))
		return error_errno(err, errno, "cannot limit memory and time");
	return sandbox_tool(a->mode, err);
}

static void child(struct disk_args *a, pid_t parent)
{
	struct error err = { 0 };
	int r;

	signal(SIGINT, SIG_DFL);
	signal(SIGTERM, SIG_DFL);
	signal(SIGHUP, SIG_DFL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		exit(disk_failed(a->command));
	r = shut_in(a, &err);
	if (!r)
		r = a->command->work(a, &err);
	if (r < 0)
		log_error("disk %s: %s", a->command->name, err.msg);
	if (fflush(stdout) && r >= 0) {
		if (errno != EPIPE)     /* who reads has had enough */
			log_error("disk %s: cannot write to standard output: %s", a->command->name,
				strerrordesc_np(errno));
		r = -EIO;
	}
	exit(r < 0 ? disk_failed(a->command) : r);
}

/* ---- the parent's side ---- */

static volatile sig_atomic_t ended_by;
static volatile pid_t child_pid;

static void on_signal(int sig)
{
	ended_by = sig;
	if (child_pid > 0)
		kill(child_pid, sig);
}

/* Is name, as the image at path from has it, the file that the user named with -b (or that was opened before)? */
static int same_file(const struct disk_args *a, const struct request *q, struct error *err)
{
	const struct disk_file *b = &a->file[1];
	auto_free char *path = disk_beside(q->from, q->name);
	struct stat st, own;

	if (!path || stat(path, &st) || fstat(b->fd, &own) || st.st_dev != own.st_dev || st.st_ino != own.st_ino)
		return error_set(err, EINVAL, "'%s' has the backing file '%s', which is not what -b names: '%s'", q->from, q->name,
			b->path);
	return dup(b->fd);
}

static int open_for(struct disk_args *a, const struct request *q, struct error *err)
{
	bool writable = q->kind == REQUEST_WRITABLE && a->command->work == commit_work;
	auto_close int fd = -1;
	char self[40];
	int r;

	if (writable && a->file[1].fd >= 0)
		return same_file(a, q, err);
	if (!a->backing_rule || q->first >= DISK_FILES || a->file[q->first].fd < 0 || (q->kind != REQUEST_OPEN && !writable))
		return error_set(err, EACCES, "its backing file '%s' is not opened: --backing=allow opens it if it lies beside the "
			"image, --backing=DIR if it lies under DIR", q->name);
	fd = image_open_backing_file(a->backing_rule, q->name, q->from, a->file[q->first].path, a->file[q->first].fd, err);
	if (fd < 0 || !writable)
		return TAKE_FD(fd);
	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	r = open(self, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (r < 0)
		return error_errno(err, errno, "cannot open its backing file '%s' for writing", q->name);
	a->file[1] = (struct disk_file){ .path = disk_beside(q->from, q->name), .fd = dup(r) }; /* its chain begins there */
	if (a->file[1].path && a->file[1].fd >= 0)
		return r;
	close(r);
	return error_set(err, ENOMEM, "cannot keep its backing file '%s' open", q->name);
}

/* Until the child has gone. */
static void serve(struct disk_args *a, int sock)
{
	static struct request q;

	for (;;) {
		struct error err = { 0 };
		struct reply p = { 0 };
		auto_close int fd = -1;
		auto_close int stray = -1;
		ssize_t n = get_message(sock, &q, sizeof(q), &stray);

		if (n == -EINTR)
			continue;
		if (n != sizeof(q))
			return;
		q.name[sizeof(q.name) - 1] = q.from[sizeof(q.from) - 1] = '\0';
		fd = open_for(a, &q, &err);
		p.result = fd < 0 ? fd : 0;
		snprintf(p.words, sizeof(p.words), "%s", err.msg);
		if (send_message(sock, &p, sizeof(p), fd))
			return;
	}
}

static int status_of(const struct disk_args *a, int wait)
{
	int sig;

	if (WIFEXITED(wait))
		return WEXITSTATUS(wait);
	sig = WTERMSIG(wait);
	if (!ended_by && sig == SIGXCPU)
		log_error("disk %s: given up: '%s' takes more than %u s of processor time", a->command->name, a->file[0].path,
			a->command->cpu_seconds);
	else if (!ended_by)
		log_error("disk %s: the process that works on '%s' was ended by signal %d (%s)", a->command->name,
			a->file[0].path, sig, sigdescr_np(sig));
	return disk_failed(a->command);
}

static void remove_unfinished(struct disk_args *a)
{
	for (unsigned k = 0; k < DISK_FILES; k++)
		if (a->file[k].made)
			unlink(a->file[k].path);
	if (a->fresh)
		unlink(a->fresh);
	free(TAKE_PTR(a->fresh));
}

static int wait_for(pid_t pid)
{
	int wait = 0;

	while (waitpid(pid, &wait, 0) < 0 && errno == EINTR)
		;
	return wait;
}

/* Fork, serve, wait: the child's status, or -errno with words. */
static int confined(struct disk_args *a, struct error *err)
{
	struct sigaction act = { .sa_handler = on_signal };
	pid_t parent = getpid();
	sigset_t set, old;
	int ends[2], status;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return error_errno(err, errno, "cannot make a socket pair");
	tzset();        /* reads a file that the child cannot */
	fflush(stdout);
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, &old);     /* none is lost before the child has a number */
	child_pid = fork();
	if (child_pid == 0) {
		sigprocmask(SIG_SETMASK, &old, NULL);
		close(ends[0]);
		a->sock = ends[1];
		child(a, parent);
	}
	close(ends[1]);
	if (child_pid < 0) {
		close(ends[0]);
		return error_errno(err, errno, "cannot make a process");
	}
	sigaction(SIGINT, &act, NULL);
	sigaction(SIGTERM, &act, NULL);
	sigaction(SIGHUP, &act, NULL);
	sigprocmask(SIG_SETMASK, &old, NULL);
	serve(a, ends[0]);
	close(ends[0]);
	status = wait_for(child_pid);
	child_pid = 0;
	return status_of(a, status);
}

int disk_run(struct disk_args *a)
{
	struct error err = { 0 };
	cpu_set_t cpus;
	int r;

	a->fresh_fd = -1;
	a->tty = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
	a->cpus = sched_getaffinity(0, sizeof(cpus), &cpus) ? 1 : (unsigned)CPU_COUNT(&cpus);
	r = a->command->prepare(a, &err);
	if (!r)
		r = confined(a, &err);
	if (!r && a->command->finish)
		r = a->command->finish(a, &err);
	if (r)
		remove_unfinished(a);
	if (ended_by) {
		signal(ended_by, SIG_DFL);
		raise(ended_by);
	}
	if (r < 0)
		log_error("disk %s: %s", a->command->name, err.msg);
	return r < 0 ? disk_failed(a->command) : r;
}
