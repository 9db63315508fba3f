/*
 * How this works
 *
 * spawner_seal() forks. The child keeps stderr and one end of a SOCK_SEQPACKET pair, and serves one kind
 * of request: { command number, number of descriptors } with the descriptors attached. It answers
 * { result } with a pidfd attached. The other end lives in the VM process only (it is close-on-exec and the
 * child closes everything else), so end of file on the pair means that the VM process is gone: the child
 * then kills and reaps what it started, and ends. PR_SET_PDEATHSIG would not do: it fires when the *thread*
 * that forked ends.
 *
 * The child leads a session of its own and ignores the signals that ask to end: Ctrl-C in a terminal, or a
 * service manager's SIGTERM to everybody, reaches the VM first, which may want its network while the
 * guest shuts down.
 */
#include "vmm/spawner.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "helper_dir.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define MAX_ARGS     32
#define MAX_CHILDREN 64
#define FIRST_FD     3

struct command {
	char *argv[MAX_ARGS + 1];
};

struct spawner {
	/* const after seal */
	struct command cmd[SPAWNER_COMMANDS];
	unsigned nr;
	pid_t pid;              /* 0: not sealed, or nothing to run */
	int sock;               /* -1 until sealed */

	pthread_mutex_t lock;   /* one request and its answer at a time on sock */
};

/* On the pair; fixed size, both ends are the same binary. */
struct request {
	uint32_t command, nr_fds;
};
struct answer {
	int32_t result;         /* 0: a pidfd is attached; else -errno */
};

/* Room for the descriptors of one message. */
union fd_room {
	struct cmsghdr align;
	char buf[CMSG_SPACE(SPAWNER_FDS * sizeof(int))];
};

static int send_with_fds(int sock, const void *msg, size_t len, const int *fds, unsigned nr)
{
	struct iovec iov = { (void *)msg, len };
	union fd_room room = { 0 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (nr) {
		struct cmsghdr *c;

		m.msg_control = room.buf;
		m.msg_controllen = CMSG_SPACE(nr * sizeof(int));
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(nr * sizeof(int));
		memcpy(CMSG_DATA(c), fds, nr * sizeof(int));
	}
	do
		n = sendmsg(sock, &m, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

/* Bytes received, 0 at end of file, or -errno. fds has room for SPAWNER_FDS; *nr are valid even if the rest is bad. */
static ssize_t recv_with_fds(int sock, void *msg, size_t len, int *fds, unsigned *nr)
{
	struct iovec iov = { msg, len };
	union fd_room room = { 0 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room.buf,
		.msg_controllen = sizeof(room.buf) };
	ssize_t n;

	*nr = 0;
	do
		n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		size_t bytes = c->cmsg_len - CMSG_LEN(0);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(fds, CMSG_DATA(c), bytes);
		*nr = (unsigned)(bytes / sizeof(int));
	}
	return n;
}

static void close_all(const int *fds, unsigned nr)
{
	for (unsigned i = 0; i < nr; i++)
		close(fds[i]);
}

/* ---- the spawner process ------------------------------------------------------------------------ */

struct served {
	const struct spawner *s;
	int sock;
	pid_t child[MAX_CHILDREN];      /* 0: free; a pid stays ours until we reap it */
};

/* In the new process: descriptors in place, everything else shut, exec. Says why on report if it fails. */
static void become(const struct command *cmd, const int *fds, unsigned nr, int report)
{
	char *env[] = { (char *)"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", NULL };
	int high[SPAWNER_FDS], why, up;
	sigset_t none;

	up = fcntl(report, F_DUPFD_CLOEXEC, FIRST_FD + SPAWNER_FDS);
	for (unsigned i = 0; i < nr && up >= 0; i++)
		if ((high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, FIRST_FD + SPAWNER_FDS)) < 0)
			goto fail;
	for (unsigned i = 0; i < nr && up >= 0; i++)
		if (dup2(high[i], FIRST_FD + (int)i) < 0)
			goto fail;
	for (int sig = 1; sig < NSIG; sig++)
		signal(sig, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (up >= 0)            /* every other descriptor of this process is close-on-exec */
		execve(cmd->argv[0], cmd->argv, env);
fail:
	why = errno;
	if (write(up >= 0 ? up : report, &why, sizeof(why)) < 0)
		_exit(126);
	_exit(127);
}

/* A pidfd or -errno; *pid is the new child. */
static int start(const struct command *cmd, const int *fds, unsigned nr, pid_t *pid)
{
	int report[2], why = 0, pidfd;
	ssize_t n;

	if (pipe2(report, O_CLOEXEC) < 0)
		return -errno;
	*pid = fork();
	if (*pid == 0)
		become(cmd, fds, nr, report[1]);
	why = *pid < 0 ? errno : 0;
	close(report[1]);
	if (*pid > 0) {
		do      /* end of file: exec took the other end away */
			n = read(report[0], &why, sizeof(why));
		while (n < 0 && errno == EINTR);
	}
	close(report[0]);
	if (*pid < 0)
		return -why;
	pidfd = why ? -1 : (int)syscall(SYS_pidfd_open, *pid, 0);
	if (pidfd >= 0)
		return pidfd;
	if (!why)
		why = errno;
	kill(*pid, SIGKILL);
	waitpid(*pid, NULL, 0);
	return -why;
}

static void serve_one(struct served *v, const struct request *r, const int *fds, unsigned nr)
{
	struct answer a = { -EINVAL };
	int pidfd = -1;
	unsigned slot;

	for (slot = 0; slot < MAX_CHILDREN && v->child[slot]; slot++)
		;
	if (slot == MAX_CHILDREN)
		a.result = -EAGAIN;
	else if (r->command < v->s->nr && r->nr_fds == nr)
		a.result = pidfd = start(&v->s->cmd[r->command], fds, nr, &v->child[slot]);
	if (pidfd < 0 && slot < MAX_CHILDREN)
		v->child[slot] = 0;
	if (pidfd >= 0)
		a.result = 0;
	send_with_fds(v->sock, &a, sizeof(a), &pidfd, pidfd >= 0 ? 1 : 0);
	close_all(&pidfd, pidfd >= 0 ? 1 : 0);
}

static void reap(struct served *v)
{
	for (unsigned i = 0; i < MAX_CHILDREN; i++)
		if (v->child[i] && waitpid(v->child[i], NULL, WNOHANG) == v->child[i])
			v->child[i] = 0;
}

static void serve(struct served *v, int sigchld)
{
	struct pollfd p[] = { { v->sock, POLLIN }, { sigchld, POLLIN } };

	for (;;) {
		int fds[SPAWNER_FDS];
		struct request r;
		unsigned nr;
		ssize_t n;

		if (poll(p, ARRAY_LEN(p), -1) < 0 && errno != EINTR)
			return;
		if (p[1].revents) {
			struct signalfd_siginfo si;

			if (read(sigchld, &si, sizeof(si)) > 0)
				reap(v);
		}
		if (!p[0].revents)
			continue;
		n = recv_with_fds(v->sock, &r, sizeof(r), fds, &nr);
		if (n == (ssize_t)sizeof(r))
			serve_one(v, &r, fds, nr);
		close_all(fds, nr);
		if (n <= 0)
			return;
	}
}

/* Only stderr stays of what vmm was given: a reader of its stdout must see the end when vmm ends. */
static void quieten(void)
{
	static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGTSTP, SIGUSR1,
		SIGUSR2 };
	int null = open("/dev/null", O_RDWR);

	if (null >= 0) {
		dup2(null, STDIN_FILENO);
		dup2(null, STDOUT_FILENO);
	} else {
		close(STDIN_FILENO);
		close(STDOUT_FILENO);
	}
	setsid();
	for (unsigned i = 0; i < ARRAY_LEN(ignored); i++)
		signal(ignored[i], SIG_IGN);
	signal(SIGCHLD, SIG_DFL);
}

static void spawner_main(const struct spawner *s, int sock)
{
	struct served v = { .s = s };
	sigset_t chld, all;
	int sigchld;

	prctl(PR_SET_NAME, "vmm-spawner");
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	quieten();
	/* The socket to 3, all others shut: no image, no terminal and no end of anybody's pipe lives on here. */
	if (sock != FIRST_FD && dup3(sock, FIRST_FD, O_CLOEXEC) < 0)
		return;
	v.sock = FIRST_FD;
	if (syscall(SYS_close_range, FIRST_FD + 1, ~0u, 0) < 0)
		return;
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	sigprocmask(SIG_SETMASK, &chld, NULL);
	sigchld = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
	if (sigchld < 0)
		return;
	serve(&v, sigchld);
	for (unsigned i = 0; i < MAX_CHILDREN; i++)
		if (v.child[i])
			kill(v.child[i], SIGKILL);
	for (unsigned i = 0; i < MAX_CHILDREN; i++)
		if (v.child[i])
			waitpid(v.child[i], NULL, 0);
}

/* ---- the VM process ----------------------------------------------------------------------------- */

int spawner_new(struct spawner **ret, struct error *err)
{
	struct spawner *s = calloc(1, sizeof(*s));

	if (!s)
		return error_set(err, ENOMEM, "out of memory");
	s->sock = -1;
	pthread_mutex_init(&s->lock, NULL);
	*ret = s;
	return 0;
}

int spawner_add(struct spawner *s, const char *const *argv, struct error *err)
{
	struct command *cmd = &s->cmd[s->nr];

	if (s->sock >= 0 || s->nr == SPAWNER_COMMANDS)
		return error_set(err, EINVAL, "'%s' cannot be registered: %s", argv[0],
			s->sock >= 0 ? "too late" : "too many commands");
	for (unsigned i = 0; argv[i]; i++) {
		if (i == MAX_ARGS || !(cmd->argv[i] = strdup(argv[i]))) {
			while (i--)
				free(TAKE_PTR(cmd->argv[i]));
			return error_set(err, ENOMEM, "'%s': too many arguments", argv[0]);
		}
	}
	return (int)s->nr++;
}

int spawner_find(const struct spawner *s, const char *name)
{
	for (unsigned i = 0; i < s->nr; i++) {
		const char *path = s->cmd[i].argv[0], *slash = strrchr(path, '/');

		if (!strcmp(slash ? slash + 1 : path, name))
			return (int)i;
	}
	return -ENOENT;
}

int spawner_seal(struct spawner *s, struct error *err)
{
	int pair[2];

	if (!s->nr || s->sock >= 0)
		return 0;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return error_errno(err, errno, "cannot make a socket pair");
	s->pid = fork();
	if (s->pid == 0) {
		spawner_main(s, pair[1]);
		_exit(0);
	}
	close(pair[1]);
	if (s->pid < 0) {
		int e = errno;

		s->pid = 0;
		close(pair[0]);
		return error_errno(err, e, "cannot start the spawner process");
	}
	s->sock = pair[0];
	return 0;
}

int spawner_run(struct spawner *s, unsigned n, const int *fds, unsigned nr_fds)
{
	struct request r = { n, nr_fds };
	struct answer a = { -EPROTO };
	int got[SPAWNER_FDS];
	unsigned nr = 0;
	ssize_t len;
	int e;

	if (s->sock < 0 || nr_fds > SPAWNER_FDS)
		return -EINVAL;
	pthread_mutex_lock(&s->lock);
	e = send_with_fds(s->sock, &r, sizeof(r), fds, nr_fds);
	len = e ? 0 : recv_with_fds(s->sock, &a, sizeof(a), got, &nr);
	pthread_mutex_unlock(&s->lock);
	if (!e && len == (ssize_t)sizeof(a) && !a.result && nr == 1)
		return got[0];
	close_all(got, nr);
	if (e || len < 0)
		return e ? e : (int)len;
	return len == 0 ? -EPIPE : a.result < 0 ? a.result : -EPROTO;
}

void spawner_free(struct spawner *s)
{
	if (!s)
		return;
	if (s->sock >= 0)
		close(s->sock);
	if (s->pid > 0)
		while (waitpid(s->pid, NULL, 0) < 0 && errno == EINTR)
			;
	for (unsigned i = 0; i < s->nr; i++)
		for (unsigned k = 0; s->cmd[i].argv[k]; k++)
			free(s->cmd[i].argv[k]);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

int helper_path(const char *name, char *buf, size_t len)
{
	static const char *const from_vmm[] = { "", "../libexec/vmm/" };        /* build tree, moved installation */
	char exe[4096], *slash;
	ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);

	exe[n > 0 ? n : 0] = '\0';
	slash = strrchr(exe, '/');
	for (unsigned i = 0; slash && i < ARRAY_LEN(from_vmm); i++) {
		slash[1] = '\0';
		if ((size_t)snprintf(buf, len, "%s%s%s", exe, from_vmm[i], name) < len && !access(buf, X_OK))
			return 0;
	}
	if ((size_t)snprintf(buf, len, "%s/%s", HELPER_DIR, name) < len && !access(buf, X_OK))
		return 0;
	return -ENOENT;
}
