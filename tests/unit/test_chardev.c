/* Character devices: output that never blocks, input with flow control, the terminal; on both engines. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <pty.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/loop.h"

static struct loop *L;
static struct error err;
static char dir[] = "/tmp/test_chardev.XXXXXX", path[100], spec[160];

static void each(void (*fn)(void))
{
	static const enum loop_engine engines[] = { LOOP_URING, LOOP_EPOLL };

	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	ck_assert(mkdtemp(dir) != NULL);
	for (unsigned i = 0; i < ARRAY_LEN(engines); i++) {
		L = loop_new("test", engines[i], 0, &err);
		ck_assert_msg(L != NULL, "%s", err.msg);
		fn();
		loop_free(L);
	}
	rmdir(dir);
}

static struct chardev *open_it(const char *what)
{
	struct chardev *c;

	ck_assert_msg(!chardev_open(&c, what, "serial0", L, &err), "%s", err.msg);
	return c;
}

static const char *named(const char *kind, const char *file)
{
	snprintf(path, sizeof(path), "%s/%s", dir, file);
	snprintf(spec, sizeof(spec), "%s:%s", kind, path);
	return spec;
}

static void nothing(void *arg)
{
	(void)arg;
}

/* A user that takes limit bytes at most, in all; what it got can be waited for. */
struct user {
	struct chardev_user u;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	size_t limit, got;
	int events, resizes;
	bool connected;
	char buf[1 << 17];
};

static size_t user_room(struct chardev_user *u)
{
	struct user *me = container_of(u, struct user, u);
	size_t n;

	pthread_mutex_lock(&me->lock);
	n = me->limit - me->got;
	pthread_mutex_unlock(&me->lock);
	return n;
}

static void user_input(struct chardev_user *u, const uint8_t *buf, size_t len)
{
	struct user *me = container_of(u, struct user, u);

	pthread_mutex_lock(&me->lock);
	ck_assert_uint_le(len, me->limit - me->got);
	memcpy(me->buf + me->got, buf, len);
	me->got += len;
	pthread_cond_broadcast(&me->changed);
	pthread_mutex_unlock(&me->lock);
}

static void user_event(struct chardev_user *u, bool connected)
{
	struct user *me = container_of(u, struct user, u);

	pthread_mutex_lock(&me->lock);
	me->events++;
	me->connected = connected;
	pthread_cond_broadcast(&me->changed);
	pthread_mutex_unlock(&me->lock);
}

static void user_resized(struct chardev_user *u)
{
	container_of(u, struct user, u)->resizes++;
}

static struct user *user_new(size_t limit)
{
	struct user *me = calloc(1, sizeof(*me));

	me->u = (struct chardev_user){ user_room, user_input, user_event, user_resized };
	pthread_mutex_init(&me->lock, NULL);
	pthread_cond_init(&me->changed, NULL);
	me->limit = limit;
	return me;
}

static void user_wait(struct user *me, size_t got, int events)
{
	struct timespec end;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += 60;
	pthread_mutex_lock(&me->lock);
	while (me->got < got || me->events < events)
		ck_assert_msg(!pthread_cond_timedwait(&me->changed, &me->lock, &end),
			"%zu of %zu bytes, %d of %d events", me->got, got, me->events, events);
	pthread_mutex_unlock(&me->lock);
}

static void user_allow(struct user *me, struct chardev *c, size_t limit)
{
	pthread_mutex_lock(&me->lock);
	me->limit = limit;
	pthread_mutex_unlock(&me->lock);
	chardev_more(c);
}

static void read_exactly(int fd, char *buf, size_t n)
{
	while (n) {
		ssize_t r = read(fd, buf, n);

		ck_assert_int_gt(r, 0);
		buf += r;
		n -= (size_t)r;
	}
}

static uint64_t fact(struct chardev *c, const char *key)
{
	struct facts *f = facts_new();
	char *text, *at, want[40];
	uint64_t v;

	chardev_describe(c, f);
	text = facts_text(f);
	snprintf(want, sizeof(want), "\"%s\":", key);
	at = strstr(text, want);
	ck_assert_msg(at != NULL, "no %s in %s", key, text);
	v = strtoull(at + strlen(want), NULL, 10);
	free(text);
	facts_free(f);
	return v;
}

/* --- files --- */

static void case_file(void)
{
	struct chardev *c;
	char buf[64];
	FILE *f;

	for (unsigned i = 0; i < 3; i++) {
		c = open_it(named(i < 2 ? "file" : "append", "out"));
		chardev_write(c, "hello ", 6);
		chardev_write(c, "world\n", 6);
		ck_assert(chardev_flush(c, 10000));
		ck_assert_uint_eq(fact(c, "bytes_out"), 12);
		ck_assert_uint_eq(fact(c, "bytes_dropped"), 0);
		chardev_free(c);
		f = fopen(path, "r");
		ck_assert_uint_eq(fread(buf, 1, sizeof(buf), f), i < 2 ? 12 : 24);
		ck_assert_mem_eq(buf + (i < 2 ? 0 : 12), "hello world\n", 12);
		fclose(f);
	}
	unlink(path);
}

START_TEST(test_file_is_truncated_or_appended_to)
{
	each(case_file);
}
END_TEST

static void case_large(void)
{
	struct chardev *c = open_it(named("file", "big"));
	struct stat st;

	for (unsigned i = 0; i < 100; i++) {
		char line[5000];

		memset(line, 'a' + i % 26, sizeof(line));
		chardev_write(c, line, sizeof(line));
		if (i % 50 == 49)
			ck_assert(chardev_flush(c, 10000));
	}
	ck_assert(!stat(path, &st) && st.st_size == 500000);
	ck_assert_uint_eq(fact(c, "bytes_dropped"), 0);
	chardev_free(c);
	unlink(path);
}

START_TEST(test_output_grows_the_ring_and_loses_nothing)
{
	each(case_large);
}
END_TEST

static void case_full_disk(void)
{
	struct chardev *c = open_it("file:/dev/full");

	chardev_write(c, "lost", 4);
	ck_assert(chardev_flush(c, 10000));
	ck_assert_uint_eq(fact(c, "bytes_dropped"), 4);
	chardev_free(c);
}

START_TEST(test_row98_full_disk_drops_and_counts)
{
	each(case_full_disk);
}
END_TEST

static void case_null(void)
{
	struct chardev *c = open_it("null");
	struct user *u = user_new(10);

	chardev_attach(c, &u->u);
	chardev_write(c, "x", 1);
	ck_assert(chardev_flush(c, 0));
	user_wait(u, 0, 1);
	chardev_free(c);
	chardev_free(NULL);
	free(u);
}

START_TEST(test_null_swallows)
{
	each(case_null);
}
END_TEST

static void case_refused(void)
{
	static const struct {
		const char *spec;
		int code;
	} t[] = { { "", EINVAL }, { "stdi", EINVAL }, { "file:", EINVAL }, { "tcp:1", EINVAL },
		{ "fd:x", EINVAL }, { "fd:9999", EBADF }, { "fd:99999999999", EINVAL },
		{ "file:/nonexistent/x", ENOENT }, { "pipe:/nonexistent/x", ENOENT },
		{ "pipe:/dev/null", EINVAL }, { "unix:/dev/null", EEXIST },
		{ "unix:/nonexistent/x", ENOENT } };
	char longer[300] = "unix:/tmp/";
	struct chardev *c;

	for (unsigned i = 0; i < ARRAY_LEN(t); i++) {
		ck_assert_msg(chardev_open(&c, t[i].spec, "serial0", L, &err) == -t[i].code, "%s: %s",
			t[i].spec, err.msg);
		ck_assert_msg(!strncmp(err.msg, "serial0: ", 9), "%s", err.msg);
	}
	memset(longer + 10, 'x', 200);
	ck_assert_int_eq(chardev_open(&c, longer, "serial0", L, &err), -ENAMETOOLONG);
}

START_TEST(test_bad_specs_are_refused_by_name)
{
	each(case_refused);
}
END_TEST

/* --- pipes and descriptors --- */

static void case_fd_input(void)
{
	struct user *u = user_new(3);
	struct chardev *c;
	int fd[2];

	ck_assert(!pipe(fd));
	snprintf(spec, sizeof(spec), "fd:%d", fd[0]);
	c = open_it(spec);
	ck_assert_int_eq(write(fd[1], "abcdefgh", 8), 8);
	chardev_attach(c, &u->u);
	user_wait(u, 3, 1);
	loop_call(L, nothing, NULL);
	ck_assert_uint_eq(u->got, 3);           /* no room: the rest stays with the host */
	user_allow(u, c, 5);
	user_wait(u, 5, 1);
	user_allow(u, c, 100);
	user_wait(u, 8, 1);
	ck_assert_mem_eq(u->buf, "abcdefgh", 8);
	ck_assert_uint_eq(fact(c, "bytes_in"), 8);
	close(fd[1]);                           /* end of input */
	loop_call(L, nothing, NULL);
	chardev_write(c, "x", 1);               /* this end is for input only */
	ck_assert(chardev_flush(c, 10000));
	ck_assert_uint_eq(fact(c, "bytes_dropped"), 1);
	chardev_free(c);
	close(fd[0]);
	free(u);
}

START_TEST(test_input_waits_for_room)
{
	each(case_fd_input);
}
END_TEST

#define FLOOD (8u << 20)

/* A megabyte-ring behind a blocking pipe that nobody reads: the newest bytes survive. */
static void case_stalled(void)
{
	static char chunk[1 << 16], back[1 << 16];
	struct chardev *c;
	size_t total = 0;
	int fd[2];

	ck_assert(!pipe(fd));
	snprintf(spec, sizeof(spec), "fd:%d", fd[1]);
	c = open_it(spec);
	for (unsigned i = 0; i < FLOOD / sizeof(chunk); i++) {
		memset(chunk, (int)i, sizeof(chunk));
		chardev_write(c, chunk, sizeof(chunk));
	}
	ck_assert(!chardev_flush(c, 20));
	ck_assert_uint_ge(fact(c, "bytes_dropped"), FLOOD - (1 << 20) - (1 << 17));
	ck_assert_int_eq(fcntl(fd[1], F_GETFL) & O_NONBLOCK, 0);        /* inherited flags are not ours */
	total = FLOOD - fact(c, "bytes_dropped");
	while (total) {
		size_t n = MIN(total, sizeof(back));

		read_exactly(fd[0], back, n);
		total -= n;
		if (!total)
			ck_assert_uint_eq((uint8_t)back[n - 1], FLOOD / sizeof(chunk) - 1);
	}
	ck_assert(chardev_flush(c, 10000));
	chardev_free(c);
	close(fd[0]);
	close(fd[1]);
}

START_TEST(test_row56_stalled_reader_loses_the_oldest_bytes_only)
{
	each(case_stalled);
}
END_TEST

static void case_free_while_stalled(void)
{
	static char chunk[1 << 18];
	struct chardev *c;
	int fd[2];

	ck_assert(!pipe(fd));
	snprintf(spec, sizeof(spec), "fd:%d", fd[1]);
	c = open_it(spec);
	chardev_write(c, chunk, sizeof(chunk));
	ck_assert(!chardev_flush(c, 10));
	chardev_free(c);                        /* does not wait for a reader */
	close(fd[0]);
	close(fd[1]);
}

START_TEST(test_row56_free_does_not_wait_for_a_stalled_reader)
{
	each(case_free_while_stalled);
}
END_TEST

static void case_epipe(void)
{
	struct chardev *c;
	int fd[2];

	ck_assert(!pipe(fd));
	snprintf(spec, sizeof(spec), "fd:%d", fd[1]);
	c = open_it(spec);
	close(fd[0]);
	for (unsigned i = 0; i < 100; i++)
		chardev_write(c, "gone", 4);
	ck_assert(chardev_flush(c, 10000));
	ck_assert_uint_eq(fact(c, "bytes_dropped"), 400);
	chardev_free(c);
	close(fd[1]);
}

START_TEST(test_row56_closed_reader_is_silent)
{
	each(case_epipe);
}
END_TEST

static void case_fifos(void)
{
	struct user *u = user_new(100);
	struct chardev *c;
	char in[160], out[160], buf[8];
	int fd;

	snprintf(in, sizeof(in), "%s/p.in", dir);
	snprintf(out, sizeof(out), "%s/p.out", dir);
	ck_assert(!mkfifo(in, 0600) && !mkfifo(out, 0600));
	c = open_it(named("pipe", "p"));
	chardev_attach(c, &u->u);
	chardev_write(c, "to host", 7);         /* nobody has opened it yet */
	fd = open(out, O_RDONLY);
	read_exactly(fd, buf, 7);
	ck_assert_mem_eq(buf, "to host", 7);
	close(fd);
	for (unsigned i = 1; i <= 2; i++) {     /* writers may come and go */
		fd = open(in, O_WRONLY);
		ck_assert_int_eq(write(fd, "guest", 5), 5);
		close(fd);
		user_wait(u, 5 * i, 1);
	}
	chardev_free(c);
	unlink(in);
	c = open_it(strcat(strcpy(spec, "pipe:"), out));
	chardev_write(c, "one", 3);
	fd = open(out, O_RDONLY);
	read_exactly(fd, buf, 3);
	close(fd);
	chardev_free(c);
	unlink(out);
	free(u);
}

START_TEST(test_fifo_pair_and_single_fifo)
{
	each(case_fifos);
}
END_TEST

/* --- sockets --- */

static int dial(void)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	ck_assert_int_eq(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	return fd;
}

static void case_socket(void)
{
	struct user *u = user_new(1000);
	struct chardev *c, *again;
	struct stat st;
	char buf[16];
	int fd, second;

	c = open_it(named("unix", "sock"));
	ck_assert(!stat(path, &st) && (st.st_mode & 0777) == 0600);
	ck_assert_int_eq(chardev_open(&again, spec, "serial1", L, &err), -EADDRINUSE);
	chardev_attach(c, &u->u);
	chardev_write(c, "early ", 6);
	ck_assert(!chardev_flush(c, 60000));    /* nobody there: it says so at once */
	fd = dial();
	user_wait(u, 0, 1);
	ck_assert(u->connected);
	chardev_write(c, "late", 4);
	read_exactly(fd, buf, 10);
	ck_assert_mem_eq(buf, "early late", 10);
	ck_assert_int_eq(write(fd, "ping", 4), 4);
	user_wait(u, 4, 1);
	second = dial();                        /* waits for its turn */
	ck_assert_int_eq(write(second, "pong", 4), 4);
	close(fd);
	user_wait(u, 8, 3);
	ck_assert(u->connected);
	chardev_write(c, "bye", 3);
	read_exactly(second, buf, 3);
	close(second);
	user_wait(u, 8, 4);
	ck_assert(!u->connected);
	chardev_free(c);
	chardev_free(open_it(spec));            /* the file it left is stale now */
	unlink(path);
	free(u);
}

START_TEST(test_row92_socket_is_private_and_serves_one_client_at_a_time)
{
	each(case_socket);
}
END_TEST

static void case_stale(void)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	struct chardev *c;

	named("unix", "stale");
	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	ck_assert(!bind(fd, (struct sockaddr *)&a, sizeof(a)));
	close(fd);                              /* the file stays behind */
	c = open_it(spec);
	close(dial());
	chardev_free(c);
	unlink(path);
	fd = open(path, O_CREAT | O_WRONLY, 0600);
	close(fd);
	ck_assert_int_eq(chardev_open(&c, spec, "serial0", L, &err), -EEXIST);
	ck_assert(!unlink(path));               /* and it was left alone */
	ck_assert(!symlink("/dev/null", path));
	ck_assert_int_eq(chardev_open(&c, spec, "serial0", L, &err), -EEXIST);
	ck_assert(!unlink(path));
}

START_TEST(test_row92_only_a_dead_socket_is_replaced)
{
	each(case_stale);
}
END_TEST

/* --- stdio --- */

static int real[2];

/* Put other descriptors in the place of stdin and stdout; -1: closed. */
static void swap_stdio(int in, int out)
{
	int with[2] = { in, out };

	fflush(stdout);
	for (int i = 0; i < 2; i++) {
		real[i] = fcntl(i, F_DUPFD_CLOEXEC, 100);
		if (with[i] < 0)
			close(i);
		else
			dup2(with[i], i);
	}
}

static void restore_stdio(void)
{
	for (int i = 0; i < 2; i++) {
		dup2(real[i], i);
		close(real[i]);
	}
}

static void case_stdio_pipes(void)
{
	struct user *u = user_new(1000);
	struct chardev *c;
	int in[2], out[2];
	char buf[8];

	ck_assert(!pipe(in) && !pipe(out));
	swap_stdio(in[0], out[1]);
	c = open_it("stdio");
	chardev_attach(c, &u->u);
	chardev_stdio_start(&(struct chardev_keys){ 0 });
	ck_assert_int_eq(write(in[1], "\x01x\x01\x01", 4), 4);
	user_wait(u, 4, 1);
	ck_assert_mem_eq(u->buf, "\x01x\x01\x01", 4);   /* no terminal, no escape key */
	chardev_write(c, "out", 3);
	read_exactly(out[0], buf, 3);
	close(in[1]);
	loop_call(L, nothing, NULL);
	chardev_write(c, "more", 4);            /* the end of stdin is not the end of stdout */
	read_exactly(out[0], buf, 4);
	ck_assert_int_eq(fcntl(0, F_GETFL) & O_NONBLOCK, 0);
	ck_assert_int_eq(fcntl(1, F_GETFL) & O_NONBLOCK, 0);
	chardev_free(c);
	ck_assert_int_ge(fcntl(1, F_GETFD), 0);         /* and not ours to close */
	restore_stdio();
	close(in[0]);
	close(out[0]);
	close(out[1]);
	free(u);
}

START_TEST(test_stdio_on_pipes_is_transparent)
{
	each(case_stdio_pipes);
}
END_TEST

static void case_stdio_odd(void)
{
	/* closed; /dev/null; a file for stdin and for stdout */
	for (unsigned i = 0; i < 3; i++) {
		struct user *u = user_new(1 << 16);
		int fd = -1;
		struct chardev *c;
		char buf[8];

		named("file", "f");
		if (i)
			fd = i == 1 ? open("/dev/null", O_RDWR) : open(path, O_RDWR | O_CREAT, 0600);
		if (i == 2)
			ck_assert_int_eq(pwrite(fd, "input", 5, 0), 5);
		swap_stdio(fd, fd);
		c = open_it("stdio");
		chardev_attach(c, &u->u);
		chardev_stdio_start(&(struct chardev_keys){ 0 });
		user_wait(u, i == 2 ? 5 : 0, 1);
		loop_call(L, nothing, NULL);
		chardev_write(c, "x", 1);
		ck_assert(chardev_flush(c, 10000));
		chardev_stdio_restore();
		chardev_free(c);
		restore_stdio();
		ck_assert(i < 2 || (pread(fd, buf, 8, 0) >= 5 && !memcmp(buf, "input", 5)));
		if (fd >= 0)
			close(fd);
		if (i == 2)
			unlink(path);
		free(u);
	}
}

START_TEST(test_stdio_closed_null_and_file)
{
	each(case_stdio_odd);
}
END_TEST

/* --- the terminal: in a child whose controlling terminal is a pty --- */

static _Atomic int quits, breaks;

static void on_quit(void *arg)
{
	(void)arg;
	atomic_fetch_add(&quits, 1);
}

static void on_break(void *arg)
{
	(void)arg;
	atomic_fetch_add(&breaks, 1);
}

static const struct chardev_keys test_keys = { .quit = on_quit, .send_break = on_break };

/* Read from the terminal's other end until words were seen. */
static void expect(int pty, const char *words)
{
	static char seen[1 << 16];
	size_t n = 0;

	while (!memmem(seen, n, words, strlen(words))) {
		struct pollfd p = { pty, POLLIN, 0 };
		ssize_t r;

		ck_assert_msg(poll(&p, 1, 30000) == 1, "no '%s' in '%.*s'", words, (int)n, seen);
		r = read(pty, seen + n, sizeof(seen) - n);
		ck_assert_int_gt(r, 0);
		n += (size_t)r;
	}
}

static void type(int pty, const char *keys)
{
	ck_assert_int_eq(write(pty, keys, strlen(keys)), (ssize_t)strlen(keys));
}

static bool is_raw(void)
{
	struct termios t;

	tcgetattr(0, &t);
	return !(t.c_lflag & (ICANON | ECHO | ISIG));
}

/* In the child; the parent plays the person at the keyboard. Words on stderr end the test there. */
static void terminal_child(void)
{
	struct user *a = user_new(4), *b = user_new(100);
	struct chardev *ca = open_it("stdio"), *cb;
	uint16_t cols, rows;

	ck_assert(chardev_size(ca, &cols, &rows) && cols == 80 && rows == 24);
	ck_assert(!chardev_open(&cb, "stdio", "hvc0", L, &err));
	chardev_stdio_start(&test_keys);
	ck_assert(!is_raw());                   /* nobody listens yet */
	chardev_attach(ca, &a->u);
	chardev_attach(cb, &b->u);
	chardev_stdio_start(&test_keys);
	ck_assert(is_raw());
	chardev_stdio_resized();
	ck_assert_int_eq(a->resizes + b->resizes, 2);
	chardev_write(ca, "READY\n", 6);
	user_wait(a, 4, 1);                     /* "\x03ab" and Ctrl-A itself; then it is full */
	ck_assert_mem_eq(a->buf, "\x03" "ab\x01", 4);
	user_wait(b, 3, 1);
	ck_assert_mem_eq(b->buf, "xyz", 3);
	chardev_write(cb, "GOT\n", 4);
	ck_assert(chardev_flush(cb, 10000));
	while (!atomic_load(&quits))
		loop_call(L, nothing, NULL);
	ck_assert_int_eq(atomic_load(&breaks), 1);
	user_allow(a, ca, 100);
	user_wait(a, 5, 1);
	ck_assert_int_eq(a->buf[4], 'q');       /* typed while it was full, before the focus moved */
	chardev_stdio_restore();
	ck_assert(!is_raw());
	chardev_stdio_restore();
	chardev_write(ca, "DONE\n", 5);
	ck_assert(chardev_flush(ca, 10000));
	chardev_free(ca);
	chardev_free(cb);
	free(a);
	free(b);
	loop_free(L);
}

static void run_terminal(enum loop_engine engine)
{
	int pty, status;
	struct winsize size = { .ws_col = 80, .ws_row = 24 };
	pid_t pid = forkpty(&pty, NULL, NULL, &size);

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		L = loop_new("test", engine, 0, &err);
		terminal_child();
		_exit(0);
	}
	expect(pty, "READY");
	type(pty, "\x03" "ab\x01\x01q");
	type(pty, "\x01" "h");
	expect(pty, "this help");
	type(pty, "\x01" "b\x01" "c");
	expect(pty, "[hvc0]");
	type(pty, "xyz");
	expect(pty, "GOT");
	type(pty, "\x01" "x");
	expect(pty, "DONE");
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
	close(pty);
}

START_TEST(test_terminal_is_raw_has_an_escape_key_and_is_restored)
{
	run_terminal(LOOP_URING);
	run_terminal(LOOP_EPOLL);
}
END_TEST

/* Somebody else's job has the terminal: no raw mode, and reading it would only fail. */
static void background_child(void)
{
	pid_t other = fork();
	struct user *u;
	struct chardev *c;

	if (!other) {
		setpgid(0, 0);
		pause();
	}
	setpgid(other, other);
	signal(SIGTTOU, SIG_IGN);
	ck_assert(!tcsetpgrp(0, other));
	L = loop_new("test", LOOP_AUTO, 0, &err);
	u = user_new(10);
	c = open_it("stdio");
	chardev_attach(c, &u->u);
	chardev_stdio_start(&test_keys);
	ck_assert(!is_raw());
	chardev_write(c, "STILL\n", 6);
	ck_assert(chardev_flush(c, 10000));
	chardev_free(c);
	loop_free(L);
	free(u);
	kill(other, SIGKILL);
	waitpid(other, NULL, 0);
}

START_TEST(test_row104_background_job_leaves_the_terminal_alone)
{
	int pty, status;
	pid_t pid = forkpty(&pty, NULL, NULL, NULL);

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		background_child();
		_exit(0);
	}
	expect(pty, "STILL");
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
	close(pty);
}
END_TEST

/* --- taps --- */

static char tapped[64];
static size_t tapped_len;

static void tap(void *arg, const uint8_t *buf, size_t len)
{
	ck_assert_ptr_eq(arg, tapped);
	memcpy(tapped + tapped_len, buf, len);
	tapped_len += len;
}

static void case_tap(void)
{
	struct chardev *c = open_it("null");

	tapped_len = 0;
	chardev_tap(c, tap, tapped);
	chardev_write(c, "Kernel ", 7);
	chardev_write(c, "panic", 5);
	ck_assert_uint_eq(tapped_len, 12);
	ck_assert_mem_eq(tapped, "Kernel panic", 12);
	chardev_free(c);
}

START_TEST(test_tap_sees_every_byte)
{
	each(case_tap);
}
END_TEST

UNIT_MAIN("chardev", test_file_is_truncated_or_appended_to,
	test_output_grows_the_ring_and_loses_nothing, test_row98_full_disk_drops_and_counts,
	test_null_swallows, test_bad_specs_are_refused_by_name, test_input_waits_for_room,
	test_row56_stalled_reader_loses_the_oldest_bytes_only,
	test_row56_free_does_not_wait_for_a_stalled_reader, test_row56_closed_reader_is_silent,
	test_fifo_pair_and_single_fifo, test_row92_socket_is_private_and_serves_one_client_at_a_time,
	test_row92_only_a_dead_socket_is_replaced, test_stdio_on_pipes_is_transparent,
	test_stdio_closed_null_and_file, test_terminal_is_raw_has_an_escape_key_and_is_restored,
	test_row104_background_job_leaves_the_terminal_alone, test_tap_sees_every_byte)
