/* From "file:PATH" and its like to open descriptors. Whatever is opened here is ours and O_NONBLOCK where it may wait. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include "chardev_priv.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"

#define OURS (O_CLOEXEC | O_NOCTTY | O_NONBLOCK)

static int open_file(struct stream *s, const char *path, int how, struct error *err)
{
	s->out_fd = open(path, O_WRONLY | O_CREAT | how | OURS, 0666);
	if (s->out_fd < 0)
		return error_errno(err, errno, "cannot open '%s'", path);
	s->own_fds = true;
	s->wr.quick = loop_file_quick(s->out_fd);
	return 0;
}

/* Opened for both directions, so that a FIFO needs no peer to open and has no end when a peer leaves. */
static int open_fifo(const char *path, struct error *err)
{
	auto_close int fd = open(path, O_RDWR | OURS);
	struct stat st;

	if (fd < 0)
		return error_errno(err, errno, "cannot open '%s'", path);
	if (fstat(fd, &st) || !S_ISFIFO(st.st_mode))
		return error_set(err, EINVAL, "'%s' is not a FIFO", path);
	return TAKE_FD(fd);
}

static int open_pipe(struct stream *s, const char *path, struct error *err)
{
	auto_free char *in = NULL, *out = NULL;

	if (asprintf(&in, "%s.in", path) < 0 || asprintf(&out, "%s.out", path) < 0)
		return error_errno(err, ENOMEM, "cannot open '%s'", path);
	s->own_fds = true;
	if (access(path, F_OK) == 0) {
		s->out_fd = open_fifo(path, err);
		return MIN(s->out_fd, 0);
	}
	if (access(in, F_OK) || access(out, F_OK))
		return error_set(err, ENOENT, "there is neither a FIFO '%s' nor a pair '%s' and '%s' (make them with mkfifo)",
			path, in, out);
	s->in_fd = open_fifo(in, err);
	if (s->in_fd < 0)
		return s->in_fd;
	s->out_fd = open_fifo(out, err);
	return MIN(s->out_fd, 0);
}

/* Remove what a dead process left at the address: a socket that refuses connections, nothing else. */
static int remove_stale(const struct sockaddr_un *a, struct error *err)
{
	auto_close int fd = -1;
	struct stat st;

	if (lstat(a->sun_path, &st))
		return errno == ENOENT ? 0 : error_errno(err, errno, "cannot look at '%s'", a->sun_path);
	if (!S_ISSOCK(st.st_mode))
		return error_set(err, EEXIST, "'%s' exists and is not a socket", a->sun_path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return error_errno(err, errno, "cannot make a socket");
	if (!connect(fd, (const struct sockaddr *)a, sizeof(*a)) || errno != ECONNREFUSED)
		return error_set(err, EADDRINUSE, "somebody is listening on '%s'", a->sun_path);
	if (unlink(a->sun_path))
		return error_errno(err, errno, "cannot remove the stale socket '%s'", a->sun_path);
	return 0;
}

static int open_unix(struct stream *s, const char *path, struct error *err)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	auto_close int fd = -1;
	int r;

	if (strlen(path) >= sizeof(a.sun_path))
		return error_set(err, ENAMETOOLONG, "the socket path '%s' is longer than %zu bytes", path,
			sizeof(a.sun_path) - 1);
	strcpy(a.sun_path, path);
	r = remove_stale(&a, err);
	if (r)
		return r;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	/* unix(7), Linux: the new file takes its mode from the socket's; there is no moment in which it is open to others. */
	if (fd < 0 || fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&a, sizeof(a)) || listen(fd, 4))
		return error_errno(err, errno, "cannot listen on '%s'", path);
	s->listen_fd = TAKE_FD(fd);
	return 0;
}

/* Use fd in the directions it is open for. */
static void use_fd(struct stream *s, int fd, bool in, bool out)
{
	int mode = fcntl(fd, F_GETFL);

	if (mode < 0)
		return;
	mode &= O_ACCMODE;
	if (in && mode != O_WRONLY)
		s->in_fd = fd;
	if (out && mode != O_RDONLY)
		s->out_fd = fd;
}

static int open_fd(struct stream *s, const char *number, struct error *err)
{
	uint64_t n;
	int fd;

	if (parse_u64(number, &n) || n > 1u << 20)
		return error_set(err, EINVAL, "'%s' is not a descriptor number", number);
	fd = fcntl((int)n, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		return error_errno(err, errno, "cannot use descriptor %s", number);
	s->own_fds = true;
	use_fd(s, fd, true, true);
	return 0;
}

/* Inherited: their flags are shared with whoever started us, and stay as they are. Closed ones are no error. */
static int open_stdio(struct stream *s)
{
	use_fd(s, STDIN_FILENO, true, false);
	use_fd(s, STDOUT_FILENO, false, true);
	atomic_store(&s->hold_input, s->in_fd >= 0 && isatty(s->in_fd));
	/* In the background a read would stop us or fail: such a keyboard is not ours. */
	s->foreground = tcgetpgrp(STDIN_FILENO) == getpgrp();
	return 0;
}

static int open_spec(struct stream *s, const char *spec, struct error *err)
{
	const char *arg = strchr(spec, ':');
	size_t n = arg ? (size_t)(arg++ - spec) : 0;

	if (!strcmp(spec, "stdio"))
		return open_stdio(s);
	s->discard = !strcmp(spec, "null");
	if (s->discard)
		return 0;
	if (n == 4 && !strncmp(spec, "file", n) && *arg)
		return open_file(s, arg, O_TRUNC, err);
	if (n == 6 && !strncmp(spec, "append", n) && *arg)
		return open_file(s, arg, O_APPEND, err);
	if (n == 4 && !strncmp(spec, "pipe", n) && *arg)
		return open_pipe(s, arg, err);
	if (n == 4 && !strncmp(spec, "unix", n) && *arg)
		return open_unix(s, arg, err);
	if (n == 2 && !strncmp(spec, "fd", n))
		return open_fd(s, arg, err);
	return error_set(err, EINVAL, "'%s' is not one of stdio, null, file:PATH, append:PATH, pipe:PATH, unix:PATH, fd:N",
		spec);
}

int stream_open(struct stream *s, const char *spec, const char *name, struct error *err)
{
	int r = open_spec(s, spec, err);

	if (r) {
		error_prefix(err, "%s: ", name);
		return r;
	}
	s->rd.fd = s->in_fd;
	s->wr.fd = s->out_fd;
	s->ready = s->out_fd >= 0;
	s->dead = s->out_fd < 0 && s->listen_fd < 0;
	return 0;
}
