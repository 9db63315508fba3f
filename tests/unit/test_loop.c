/* The loop's contract, every case on both engines. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/loop.h"

static struct loop *L;
static struct error err;

/* Run a case once per engine, on a fresh loop, from the main thread. */
static void each(void (*fn)(void), unsigned poll_us)
{
	static const enum loop_engine engines[] = { LOOP_URING, LOOP_EPOLL };

	for (unsigned i = 0; i < ARRAY_LEN(engines); i++) {
		L = loop_new("test", engines[i], poll_us, &err);
		ck_assert_msg(L != NULL, "%s", err.msg);
		ck_assert_str_eq(loop_engine_name(L), i ? "epoll" : "io_uring");
		fn();
		loop_free(L);
	}
}

static void nothing(void *arg)
{
	(void)arg;
}

/* Two calls: whatever was ready before them has been told. */
static void settle(void)
{
	loop_call(L, nothing, NULL);
	loop_call(L, nothing, NULL);
}

/* A counter that the main thread can wait for. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static unsigned hits;

static void hit(void)
{
	pthread_mutex_lock(&lock);
	hits++;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static void wait_hits(unsigned n)
{
	struct timespec end;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += 60;
	pthread_mutex_lock(&lock);
	while (hits < n)
		ck_assert_msg(!pthread_cond_timedwait(&changed, &lock, &end), "%u of %u", hits, n);
	pthread_mutex_unlock(&lock);
}

static unsigned take_hits(void)
{
	unsigned n;

	pthread_mutex_lock(&lock);
	n = hits;
	hits = 0;
	pthread_mutex_unlock(&lock);
	return n;
}

/* --- descriptors --- */

static int pfd[2];
static struct loop_fd watched;

static void read_one(struct loop_fd *f, uint32_t ready)
{
	char c;

	ck_assert(loop_here(L) && (ready & EPOLLIN));
	ck_assert_int_eq(read(f->fd, &c, 1), 1);
	hit();
}

static void add_fd(void *arg)
{
	ck_assert_int_eq(loop_add_fd(L, arg), 0);
}

static void del_fd(void *arg)
{
	loop_del_fd(L, arg);
}

static void case_fd_level(void)
{
	ck_assert(!pipe(pfd));
	watched = (struct loop_fd){ .fd = pfd[0], .events = EPOLLIN, .fn = read_one };
	take_hits();
	ck_assert_int_eq(write(pfd[1], "abc", 3), 3);
	loop_call(L, add_fd, &watched);
	wait_hits(3);
	ck_assert_int_eq(write(pfd[1], "d", 1), 1);
	wait_hits(4);
	loop_call(L, del_fd, &watched);
	ck_assert_int_eq(write(pfd[1], "e", 1), 1);
	settle();
	ck_assert_uint_eq(take_hits(), 4);
	close(pfd[0]);
	close(pfd[1]);
}

START_TEST(test_fd_is_level_triggered_until_removed)
{
	each(case_fd_level, 0);
}
END_TEST

static void bad_fd(void *arg)
{
	struct loop_fd f = { .fd = 999999, .events = EPOLLIN };

	(void)arg;
	ck_assert_int_eq(loop_add_fd(L, &f), -EBADF);
}

static void case_bad_fd(void)
{
	loop_call(L, bad_fd, NULL);
}

START_TEST(test_closed_fd_is_refused)
{
	each(case_bad_fd, 0);
}
END_TEST

static struct loop_fd pair[2];
static int pair_pipe[2][2];

/* Whichever runs first removes the other and frees its descriptor: the other must not run. */
static void remove_other(struct loop_fd *f, uint32_t ready)
{
	struct loop_fd *other = f == &pair[0] ? &pair[1] : &pair[0];

	(void)ready;
	loop_del_fd(L, other);
	loop_del_fd(L, f);
	memset(other, 0, sizeof(*other));
	hit();
}

static void add_pair(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < 2; i++) {
		pair[i] = (struct loop_fd){ .fd = pair_pipe[i][0], .events = EPOLLIN, .fn = remove_other };
		ck_assert_int_eq(loop_add_fd(L, &pair[i]), 0);
	}
	for (unsigned i = 0; i < 2; i++)
		ck_assert_int_eq(write(pair_pipe[i][1], "x", 1), 1);
}

static void case_del_in_batch(void)
{
	ck_assert(!pipe(pair_pipe[0]) && !pipe(pair_pipe[1]));
	take_hits();
	loop_call(L, add_pair, NULL);
	wait_hits(1);
	settle();
	ck_assert_uint_eq(take_hits(), 1);
	for (unsigned i = 0; i < 4; i++)
		close(pair_pipe[i / 2][i % 2]);
}

START_TEST(test_removed_fd_drops_out_of_its_batch)
{
	each(case_del_in_batch, 0);
}
END_TEST

static void file_ready(struct loop_fd *f, uint32_t ready)
{
	ck_assert(ready & EPOLLIN);
	loop_del_fd(L, f);
	hit();
}

static void case_file_fd(void)
{
	static const char *const paths[] = { "/proc/self/exe", "/dev/null" };

	for (unsigned i = 0; i < ARRAY_LEN(paths); i++) {
		watched = (struct loop_fd){ .fd = open(paths[i], O_RDONLY), .events = EPOLLIN,
			.fn = file_ready };
		take_hits();
		loop_call(L, add_fd, &watched);
		wait_hits(1);
		settle();
		ck_assert_uint_eq(take_hits(), 1);
		close(watched.fd);
	}
}

START_TEST(test_file_and_dev_null_are_always_readable)
{
	each(case_file_fd, 0);
}
END_TEST

/* --- events --- */

static struct loop_event event;

static void event_hit(struct loop_event *e)
{
	(void)e;
	hit();
}

static void add_event(void *arg)
{
	(void)arg;
	ck_assert_int_eq(loop_add_event(L, &event), 0);
}

static void del_event(void *arg)
{
	(void)arg;
	loop_del_event(L, &event);
}

static void kick(int fd)
{
	uint64_t one = 1;

	ck_assert_int_eq(write(fd, &one, sizeof(one)), sizeof(one));
}

static void case_event(void)
{
	for (int flags = 0; flags <= EFD_NONBLOCK; flags += EFD_NONBLOCK) {
		event = (struct loop_event){ .fd = eventfd(0, flags), .fn = event_hit };
		take_hits();
		kick(event.fd);
		loop_call(L, add_event, NULL);
		wait_hits(1);
		for (unsigned i = 2; i < 100; i++) {
			kick(event.fd);
			wait_hits(i);
		}
		settle();
		ck_assert_uint_eq(take_hits(), 99);     /* told once each, then silence */
		loop_call(L, del_event, NULL);
		kick(event.fd);
		settle();
		ck_assert_uint_eq(take_hits(), 0);
		close(event.fd);
	}
}

START_TEST(test_event_runs_once_per_kick_seen)
{
	each(case_event, 0);
}
END_TEST

static void case_kick_storm(void)
{
	event = (struct loop_event){ .fd = eventfd(0, EFD_NONBLOCK), .fn = event_hit };
	loop_call(L, add_event, NULL);
	take_hits();
	for (unsigned i = 0; i < 200000; i++)
		kick(event.fd);
	settle();
	wait_hits(1);
	ck_assert_uint_le(take_hits(), 200000);
	loop_call(L, del_event, NULL);
	close(event.fd);
}

START_TEST(test_row20_kick_storm_is_coalesced_and_survived)
{
	each(case_kick_storm, 0);
}
END_TEST

/* --- timers --- */

#define TIMERS 200
static struct loop_timer timers[TIMERS];
static unsigned fired[TIMERS], nr_fired;

static void on_timer(struct loop_timer *t)
{
	ck_assert_uint_ge(loop_now(), t->at_ns);
	fired[nr_fired++] = (unsigned)(t - timers);
	hit();
}

static void set_timers(void *arg)
{
	uint64_t now = loop_now();

	(void)arg;
	nr_fired = 0;
	/* Scrambled due times; then every third is removed, and every fifth moved to the end and back. */
	for (unsigned i = 0; i < TIMERS; i++) {
		timers[i] = (struct loop_timer){ .fn = on_timer };
		loop_set_timer(L, &timers[i], now + 1000000 + (i * 71 % TIMERS) * 50000);
	}
	for (unsigned i = 0; i < TIMERS; i += 5) {
		loop_set_timer(L, &timers[i], now + 1000000000ull);
		loop_set_timer(L, &timers[i], now + 1000000 + (i * 71 % TIMERS) * 50000);
	}
	for (unsigned i = 0; i < TIMERS; i += 3) {
		loop_del_timer(L, &timers[i]);
		loop_del_timer(L, &timers[i]);
	}
}

static void case_timers(void)
{
	unsigned kept = TIMERS - (TIMERS + 2) / 3;

	take_hits();
	loop_call(L, set_timers, NULL);
	wait_hits(kept);
	settle();
	ck_assert_uint_eq(take_hits(), kept);
	for (unsigned i = 0; i < kept; i++) {
		ck_assert_uint_ne(fired[i] % 3, 0);
		ck_assert(!i || timers[fired[i - 1]].at_ns < timers[fired[i]].at_ns);
	}
}

START_TEST(test_timers_fire_in_order_and_not_before_their_time)
{
	each(case_timers, 0);
}
END_TEST

/* --- posts, calls, turn end --- */

#define POSTERS 4
#define POSTS   20000
static struct loop_task post_task[POSTERS];
static _Atomic unsigned ran[POSTERS], posted[POSTERS], seen[POSTERS];

static void run_post(struct loop_task *t)
{
	unsigned i = (unsigned)(t - post_task);

	atomic_store(&seen[i], atomic_load(&posted[i]));
	atomic_fetch_add(&ran[i], 1);
}

static void *poster(void *arg)
{
	unsigned i = (unsigned)(uintptr_t)arg;

	for (unsigned n = 0; n < POSTS; n++) {
		atomic_fetch_add(&posted[i], 1);
		loop_post(L, &post_task[i]);
	}
	return NULL;
}

static void case_posts(void)
{
	pthread_t t[POSTERS];

	take_hits();
	for (unsigned i = 0; i < POSTERS; i++) {
		post_task[i] = (struct loop_task){ .fn = run_post };
		ran[i] = posted[i] = seen[i] = 0;
	}
	for (unsigned i = 0; i < POSTERS; i++)
		ck_assert(!pthread_create(&t[i], NULL, poster, (void *)(uintptr_t)i));
	for (unsigned i = 0; i < POSTERS; i++)
		pthread_join(t[i], NULL);
	settle();
	for (unsigned i = 0; i < POSTERS; i++) {
		ck_assert_uint_eq(seen[i], POSTS);      /* the last post was not lost */
		ck_assert_uint_le(ran[i], POSTS);
	}
}

START_TEST(test_no_post_of_four_threads_is_lost)
{
	each(case_posts, 0);
	each(case_posts, 50);
}
END_TEST

static void count_up(void *arg)
{
	++*(unsigned *)arg;
}

static void *caller(void *arg)
{
	unsigned *n = arg;

	for (unsigned i = 0; i < 5000; i++) {
		unsigned was = *n;

		loop_call(L, count_up, n);
		ck_assert_uint_eq(*n, was + 1);
	}
	return NULL;
}

static void case_calls(void)
{
	unsigned n[2] = { 0 };
	pthread_t t[2];

	for (unsigned i = 0; i < 2; i++)
		ck_assert(!pthread_create(&t[i], NULL, caller, &n[i]));
	for (unsigned i = 0; i < 2; i++) {
		pthread_join(t[i], NULL);
		ck_assert_uint_eq(n[i], 5000);
	}
}

START_TEST(test_calls_of_two_threads_all_return)
{
	each(case_calls, 0);
}
END_TEST

static struct loop_task end_task;
static unsigned order;

static void at_end(struct loop_task *t)
{
	ck_assert_uint_eq(order++, 1);
	if (t == &end_task)
		hit();
}

static void ask_thrice(void *arg)
{
	(void)arg;
	order = 0;
	for (unsigned i = 0; i < 3; i++)
		loop_at_turn_end(L, &end_task);
	order++;
}

static void case_turn_end(void)
{
	end_task = (struct loop_task){ .fn = at_end };
	take_hits();
	loop_call(L, ask_thrice, NULL);
	settle();
	ck_assert_uint_eq(take_hits(), 1);
	loop_call(L, ask_thrice, NULL);
	settle();
	ck_assert_uint_eq(take_hits(), 1);
}

START_TEST(test_turn_end_task_runs_once_after_the_rest)
{
	each(case_turn_end, 0);
}
END_TEST

/* --- operations --- */

struct req {
	struct loop_op op;
	struct iovec iov;
	char buf[64];
	int res;
	bool done;
};

static void req_done(struct loop_op *op, int res)
{
	struct req *r = container_of(op, struct req, op);

	ck_assert(loop_here(L) && !r->done);
	r->res = res;
	r->done = true;
	hit();
}

static struct req *req(enum loop_op_kind kind, int fd, uint64_t off, const char *data, size_t len)
{
	struct req *r = calloc(1, sizeof(*r));

	if (data)
		memcpy(r->buf, data, len);
	r->iov = (struct iovec){ r->buf, len };
	r->op = (struct loop_op){ .kind = kind, .fd = fd, .off = off, .iov = &r->iov, .cnt = 1,
		.done = req_done };
	return r;
}

static void submit(void *arg)
{
	struct req *r = arg;

	loop_submit(L, &r->op);
	ck_assert(!r->done);            /* never inside loop_submit() */
}

static void cancel(void *arg)
{
	struct req *r = arg;

	loop_cancel(L, &r->op);
	loop_cancel(L, &r->op);
}

static int run(struct req *r)
{
	unsigned before;

	pthread_mutex_lock(&lock);
	before = hits;
	pthread_mutex_unlock(&lock);
	loop_call(L, submit, r);
	wait_hits(before + 1);
	return r->res;
}

static int run_free(struct req *r)
{
	int res = run(r);

	free(r);
	return res;
}

/* A file of the given kind: on the build directory's file system, or in memory. */
static int temp_file(bool memory)
{
	char path[] = "./test_loop.XXXXXX";
	int fd;

	if (memory)
		return memfd_create("t", MFD_CLOEXEC);
	fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	unlink(path);
	return fd;
}

static void case_files(void)
{
	for (unsigned i = 0; i < 3; i++) {
		int fd = temp_file(i > 0);
		struct iovec two[2];
		struct req *r;

		ck_assert(i == 0 || loop_file_quick(fd));
		ck_assert_int_eq(run_free(req(OP_WRITEV, fd, 4096, "hello", 5)), 5);
		ck_assert_int_eq(run_free(req(OP_FSYNC, fd, 0, NULL, 0)), 0);
		r = req(OP_READV, fd, 4096, NULL, 64);
		r->op.quick = i == 2;
		ck_assert_int_eq(run(r), 5);
		ck_assert_mem_eq(r->buf, "hello", 5);
		free(r);
		r = req(OP_READV, fd, 4096, NULL, 64);
		two[0] = (struct iovec){ r->buf, 2 };
		two[1] = (struct iovec){ r->buf + 10, 3 };
		r->op.iov = two;
		r->op.cnt = 2;
		ck_assert_int_eq(run(r), 5);
		ck_assert_mem_eq(r->buf + 10, "llo", 3);
		free(r);
		r = req(OP_FALLOCATE, fd, 4096, NULL, 0);
		r->op.len = 4096;
		r->op.mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
		ck_assert_int_eq(run_free(r), 0);
		ck_assert_int_eq(run_free(req(OP_READV, fd, 1 << 20, NULL, 64)), 0);
		ck_assert_int_eq(run_free(req(OP_READV, -1, 0, NULL, 64)), -EBADF);
		close(fd);
	}
	ck_assert(!loop_file_quick(-1));
}

START_TEST(test_file_operations)
{
	each(case_files, 0);
}
END_TEST

static void case_streams(void)
{
	/* 0, 1: a pipe, blocking and not; 2, 3: a socket pair, likewise */
	for (unsigned i = 0; i < 4; i++) {
		int fd[2], flags = i & 1 ? O_NONBLOCK : 0;
		struct req *r;

		ck_assert(i < 2 ? !pipe2(fd, flags) :
				  !socketpair(AF_UNIX, SOCK_STREAM | (flags ? SOCK_NONBLOCK : 0), 0, fd));
		take_hits();
		r = req(OP_READV, fd[0], (uint64_t)-1, NULL, 64);
		loop_call(L, submit, r);
		settle();
		ck_assert_uint_eq(take_hits(), 0);      /* nothing to read: it waits */
		ck_assert_int_eq(write(fd[1], "data", 4), 4);
		wait_hits(1);
		ck_assert_int_eq(r->res, 4);
		ck_assert_mem_eq(r->buf, "data", 4);
		free(r);
		ck_assert_int_eq(run_free(req(OP_WRITEV, fd[1], (uint64_t)-1, "xy", 2)), 2);
		ck_assert_int_eq(run_free(req(OP_READV, fd[0], (uint64_t)-1, NULL, 64)), 2);
		close(fd[1]);
		ck_assert_int_eq(run_free(req(OP_READV, fd[0], (uint64_t)-1, NULL, 64)), 0);
		close(fd[0]);
		ck_assert(!pipe(fd));
		close(fd[0]);
		ck_assert_int_eq(run_free(req(OP_WRITEV, fd[1], (uint64_t)-1, "x", 1)), -EPIPE);
		close(fd[1]);
	}
}

START_TEST(test_stream_operations_wait_for_readiness)
{
	each(case_streams, 0);
}
END_TEST

static void case_null_stream(void)
{
	int fd = open("/dev/null", O_RDWR);

	take_hits();
	ck_assert_int_eq(run_free(req(OP_READV, fd, (uint64_t)-1, NULL, 64)), 0);
	ck_assert_int_eq(run_free(req(OP_WRITEV, fd, (uint64_t)-1, "abc", 3)), 3);
	close(fd);
}

START_TEST(test_dev_null_as_a_stream)
{
	each(case_null_stream, 0);
}
END_TEST

static void case_messages(void)
{
	int fd[2];
	struct req *in, *out;
	struct msghdr m[2];

	ck_assert(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fd));
	in = req(OP_RECVMSG, fd[0], 0, NULL, 64);
	out = req(OP_SENDMSG, fd[1], 0, "frame", 5);
	m[0] = (struct msghdr){ .msg_iov = &in->iov, .msg_iovlen = 1 };
	m[1] = (struct msghdr){ .msg_iov = &out->iov, .msg_iovlen = 1 };
	in->op.msg = &m[0];
	out->op.msg = &m[1];
	take_hits();
	loop_call(L, submit, in);
	settle();
	loop_call(L, submit, out);
	wait_hits(2);
	ck_assert_int_eq(out->res, 5);
	ck_assert_int_eq(in->res, 5);
	ck_assert_mem_eq(in->buf, "frame", 5);
	close(fd[0]);
	out->done = false;
	ck_assert_int_eq(run(out), -EPIPE);     /* no SIGPIPE: we are alive */
	close(fd[1]);
	free(in);
	free(out);
}

START_TEST(test_messages_on_a_seqpacket_pair)
{
	each(case_messages, 0);
}
END_TEST

static void fill(int fd)
{
	char page[4096] = { 0 };
	int fl = fcntl(fd, F_GETFL);

	fcntl(fd, F_SETFL, fl | O_NONBLOCK);
	while (write(fd, page, sizeof(page)) > 0)
		;
	fcntl(fd, F_SETFL, fl);
}

/* A blocking pipe that nobody reads must not stop the loop. */
static void case_full_pipe(void)
{
	char *big = calloc(1, 1 << 20);
	struct req *r;
	int fd[2];

	ck_assert(!pipe(fd));
	fill(fd[1]);
	take_hits();
	r = req(OP_WRITEV, fd[1], (uint64_t)-1, NULL, 0);
	r->iov = (struct iovec){ big, 1 << 20 };
	loop_call(L, submit, r);
	settle();
	ck_assert_uint_eq(take_hits(), 0);
	loop_call(L, cancel, r);
	wait_hits(1);
	ck_assert_int_eq(r->res, -ECANCELED);
	free(r);
	free(big);
	close(fd[0]);
	close(fd[1]);
}

START_TEST(test_stalled_reader_does_not_stop_the_loop)
{
	each(case_full_pipe, 0);
}
END_TEST

static void submit_and_cancel(void *arg)
{
	submit(arg);
	cancel(arg);
}

static void case_cancel(void)
{
	for (unsigned i = 0; i < 4; i++) {
		struct req *r;
		int fd[2];

		ck_assert(!pipe2(fd, i & 1 ? O_NONBLOCK : 0));
		r = req(OP_READV, fd[0], (uint64_t)-1, NULL, 64);
		take_hits();
		if (i & 2) {
			loop_call(L, submit_and_cancel, r);     /* before the kernel knows it */
		} else {
			loop_call(L, submit, r);
			settle();
			loop_call(L, cancel, r);
		}
		wait_hits(1);
		ck_assert_int_eq(r->res, -ECANCELED);
		loop_call(L, cancel, r);                        /* idle: nothing */
		r->done = false;
		ck_assert_int_eq(write(fd[1], "ab", 2), 2);
		ck_assert_int_eq(run(r), 2);                    /* and it can be used again */
		settle();
		ck_assert_uint_eq(take_hits(), 2);
		free(r);
		close(fd[0]);
		close(fd[1]);
	}
}

START_TEST(test_cancelled_operation_is_done_once)
{
	each(case_cancel, 0);
}
END_TEST

static sem_t gate;
static pthread_t worked_on;

static int wait_gate(struct loop_op *op)
{
	worked_on = pthread_self();
	while (sem_wait(&gate))
		;
	return (int)op->len;
}

static void case_work(void)
{
	struct req *r[6];

	sem_init(&gate, 0, 0);
	take_hits();
	for (unsigned i = 0; i < ARRAY_LEN(r); i++) {
		r[i] = req(OP_WORK, -1, 0, NULL, 0);
		r[i]->op.work = wait_gate;
		r[i]->op.len = 100 + i;
		loop_call(L, submit, r[i]);
	}
	settle();
	ck_assert_uint_eq(take_hits(), 0);              /* the loop runs on while they work */
	loop_call(L, cancel, r[5]);                     /* four workers: the sixth has none yet */
	wait_hits(1);
	ck_assert_int_eq(r[5]->res, -ECANCELED);
	for (unsigned i = 0; i < 5; i++)
		sem_post(&gate);
	wait_hits(6);
	for (unsigned i = 0; i < ARRAY_LEN(r); i++) {
		ck_assert(i == 5 || r[i]->res == (int)(100 + i));
		free(r[i]);
	}
	sem_destroy(&gate);
}

START_TEST(test_work_runs_beside_the_loop)
{
	each(case_work, 0);
}
END_TEST

#define MANY 10000

static void submit_many(void *arg)
{
	struct req **r = arg;

	for (unsigned i = 0; i < MANY; i++)
		loop_submit(L, &r[i]->op);
}

static void case_many(void)
{
	struct req **r = calloc(MANY, sizeof(*r));
	int fd = temp_file(false);

	for (unsigned i = 0; i < MANY; i++) {
		uint32_t v = i;

		r[i] = req(OP_WRITEV, fd, (uint64_t)i * 4, (char *)&v, 4);
	}
	take_hits();
	loop_call(L, submit_many, r);
	wait_hits(MANY);
	for (unsigned i = 0; i < MANY; i++) {
		ck_assert_int_eq(r[i]->res, 4);
		r[i]->op.kind = OP_READV;
		r[i]->done = false;
		memset(r[i]->buf, 0xff, 4);
	}
	take_hits();
	loop_call(L, submit_many, r);
	wait_hits(MANY);
	settle();
	ck_assert_uint_eq(take_hits(), MANY);
	for (unsigned i = 0; i < MANY; i++) {
		uint32_t v;

		memcpy(&v, r[i]->buf, 4);
		ck_assert_uint_eq(v, i);
		free(r[i]);
	}
	free(r);
	close(fd);
}

START_TEST(test_row43_ten_thousand_operations_beyond_the_ring)
{
	each(case_many, 0);
}
END_TEST

/* Interrupting signals on the loop's thread would be our bug; a storm at the process must not reach it. */
static volatile sig_atomic_t on_main, on_loop;

static void on_signal(int sig)
{
	(void)sig;
	if (loop_here(L))
		on_loop = 1;
	else
		on_main = 1;
}

static void case_signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal };

	sigaction(SIGUSR1, &sa, NULL);
	for (unsigned i = 0; i < 1000; i++) {
		kill(getpid(), SIGUSR1);
		loop_call(L, nothing, NULL);
	}
	ck_assert(on_main && !on_loop);
}

START_TEST(test_row43_signals_stay_with_the_main_thread)
{
	each(case_signals, 0);
}
END_TEST

/* --- drain --- */

static int drain_pipe[2];

static void drain(void *arg)
{
	struct req *r = arg;
	struct loop_task *t = &post_task[0];

	loop_submit(L, &r->op);
	loop_post(L, t);                        /* neither this nor the event may run inside */
	kick(event.fd);
	loop_set_timer(L, &timers[0], loop_now());
	ck_assert_int_eq(write(drain_pipe[1], "z", 1), 1);
	loop_drain(L, &r->done);
	ck_assert(r->done && !atomic_load(&ran[0]));
	pthread_mutex_lock(&lock);
	ck_assert_uint_eq(hits, 1);             /* the request alone */
	pthread_mutex_unlock(&lock);
}

static int nap(struct loop_op *op)
{
	struct timespec ts = { .tv_nsec = 20000000 };

	(void)op;
	return nanosleep(&ts, NULL);            /* work that takes its time */
}

static void case_drain(void)
{
	struct req *r = req(OP_WORK, -1, 0, NULL, 0);

	r->op.work = nap;
	ck_assert(!pipe(drain_pipe));
	ran[0] = 0;
	nr_fired = 0;
	post_task[0] = (struct loop_task){ .fn = run_post };
	timers[0] = (struct loop_timer){ .fn = on_timer };
	watched = (struct loop_fd){ .fd = drain_pipe[0], .events = EPOLLIN, .fn = read_one };
	event = (struct loop_event){ .fd = eventfd(0, 0), .fn = event_hit };
	loop_call(L, add_event, NULL);
	loop_call(L, add_fd, &watched);
	take_hits();
	loop_call(L, drain, r);
	wait_hits(4);                           /* event, timer, descriptor, later */
	settle();
	ck_assert_uint_eq(ran[0], 1);
	ck_assert_uint_eq(take_hits(), 4);
	loop_call(L, del_event, NULL);
	loop_call(L, del_fd, &watched);
	close(drain_pipe[0]);
	close(drain_pipe[1]);
	close(event.fd);
	free(r);
}

START_TEST(test_drain_runs_completions_only)
{
	each(case_drain, 0);
}
END_TEST

/* --- polled rings --- */

/* A ring in memory: the producer bumps made; the doorbell is rung only if the consumer asked for it. */
static struct ring {
	struct loop_poll poll;
	struct loop_event bell;
	_Atomic unsigned made, taken;
	_Atomic bool want_bell;
	unsigned bells, arms;
} ring;

static bool ring_take(void)
{
	unsigned made = atomic_load(&ring.made);
	bool any = made != atomic_load(&ring.taken);

	atomic_store(&ring.taken, made);
	return any;
}

static bool ring_look(struct loop_poll *p)
{
	(void)p;
	return ring_take();
}

static bool ring_arm(struct loop_poll *p, bool on)
{
	(void)p;
	ring.arms += on;
	atomic_store(&ring.want_bell, on);
	return on && ring_take();
}

static void ring_bell(struct loop_event *e)
{
	(void)e;
	ring.bells++;
	ring_take();
}

static void ring_start(void *arg)
{
	(void)arg;
	ring = (struct ring){ .poll = { .look = ring_look, .arm = ring_arm },
		.bell = { .fd = eventfd(0, EFD_NONBLOCK), .fn = ring_bell } };
	ck_assert_int_eq(loop_add_event(L, &ring.bell), 0);
	loop_add_poll(L, &ring.poll);
}

static void ring_stop(void *arg)
{
	(void)arg;
	loop_del_poll(L, &ring.poll);
	loop_del_event(L, &ring.bell);
	close(ring.bell.fd);
}

/* Produces in bursts with pauses around the length of the budget, and waits until each was taken. */
static void *producer(void *arg)
{
	unsigned seed = 1;

	(void)arg;
	for (unsigned i = 1; i <= 20000; i++) {
		uint64_t until = loop_now() + (seed = seed * 1103515245 + 12345) % 40000;
		uint64_t limit;

		while (i % 8 == 0 && loop_now() < until)
			;
		atomic_fetch_add(&ring.made, 1);
		if (atomic_load(&ring.want_bell))
			kick(ring.bell.fd);
		for (limit = loop_now() + 30000000000ull; atomic_load(&ring.taken) != i;)
			ck_assert_msg(loop_now() < limit, "wakeup %u lost", i);
	}
	return NULL;
}

static void case_ring(void)
{
	pthread_t t;

	loop_call(L, ring_start, NULL);
	ck_assert(!pthread_create(&t, NULL, producer, NULL));
	pthread_join(t, NULL);
	loop_call(L, ring_stop, NULL);
	ck_assert_uint_gt(ring.arms, 0);
}

START_TEST(test_polled_ring_loses_no_wakeup)
{
	each(case_ring, 30);
	each(case_ring, 0);
}
END_TEST

/* CPU time of the whole process and turns over a stretch of real time in which nothing happens. */
static void case_idle(void)
{
	struct timespec ts = { .tv_nsec = 100000000 };
	struct loop_stats a, b;

	loop_call(L, ring_start, NULL);
	for (unsigned i = 0; i < 12; i++)       /* long sleeps: the budget comes down */
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL), loop_call(L, nothing, NULL);
	settle();
	nanosleep(&ts, NULL);
	loop_get_stats(L, &a);
	nanosleep(&ts, NULL);
	loop_get_stats(L, &b);
	ck_assert_uint_eq(a.turns, b.turns);
	ck_assert_uint_eq(a.sleeps, b.sleeps);
	loop_call(L, ring_stop, NULL);
}

START_TEST(test_row105_idle_loop_never_wakes)
{
	each(case_idle, 50);
}
END_TEST

/* --- cost --- */

static unsigned rounds;

static void again(struct loop_op *op, int res)
{
	ck_assert_int_eq(res, 5);
	if (--rounds)
		loop_submit(L, op);
	else
		hit();
}

static void case_enters(void)
{
	struct loop_stats a, b;
	struct req *r;
	int fd = temp_file(false);

	ck_assert_int_eq(run_free(req(OP_WRITEV, fd, 0, "hello", 5)), 5);
	r = req(OP_READV, fd, 0, NULL, 64);
	r->op.done = again;
	rounds = 1000;
	take_hits();
	loop_get_stats(L, &a);
	loop_call(L, submit, r);
	wait_hits(1);
	settle();
	loop_get_stats(L, &b);
	if (!strcmp(loop_engine_name(L), "io_uring"))
		ck_assert_uint_le(b.enters - a.enters, 1000 + 20);
	free(r);
	close(fd);
}

START_TEST(test_cached_read_costs_one_enter)
{
	each(case_enters, 0);
}
END_TEST

/* --- where io_uring is refused --- */

static void refuse_io_uring(void)
{
	scmp_filter_ctx f = seccomp_init(SCMP_ACT_ALLOW);

	if (!f || seccomp_rule_add(f, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(io_uring_setup), 0) ||
		seccomp_load(f))
		_exit(3);
	seccomp_release(f);
}

START_TEST(test_row103_refused_io_uring_falls_back_to_epoll)
{
	int status;
	pid_t pid = fork();

	ck_assert_int_ge(pid, 0);
	if (!pid) {
		refuse_io_uring();
		if (loop_new("x", LOOP_URING, 0, &err) || err.code != EPERM)
			_exit(1);
		L = loop_new("x", LOOP_AUTO, 0, &err);
		if (!L || strcmp(loop_engine_name(L), "epoll"))
			_exit(2);
		loop_call(L, nothing, NULL);
		loop_free(L);
		_exit(0);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
}
END_TEST

START_TEST(test_auto_prefers_io_uring_where_it_works)
{
	L = loop_new("x", LOOP_AUTO, 0, &err);
	ck_assert_str_eq(loop_engine_name(L), "io_uring");
	loop_call(L, nothing, NULL);
	loop_free(L);
	loop_free(NULL);
}
END_TEST

START_TEST(test_row102_no_descriptors_left_is_an_error)
{
	struct rlimit was, none = { 3, 3 };
	struct loop *l;

	ck_assert(!getrlimit(RLIMIT_NOFILE, &was));
	none.rlim_max = was.rlim_max;
	ck_assert(!setrlimit(RLIMIT_NOFILE, &none));
	l = loop_new("x", LOOP_AUTO, 0, &err);
	ck_assert(!setrlimit(RLIMIT_NOFILE, &was));
	ck_assert(!l && err.code == EMFILE);
}
END_TEST

UNIT_MAIN("loop", test_fd_is_level_triggered_until_removed, test_closed_fd_is_refused,
	test_removed_fd_drops_out_of_its_batch, test_file_and_dev_null_are_always_readable,
	test_event_runs_once_per_kick_seen, test_row20_kick_storm_is_coalesced_and_survived,
	test_timers_fire_in_order_and_not_before_their_time, test_no_post_of_four_threads_is_lost,
	test_calls_of_two_threads_all_return, test_turn_end_task_runs_once_after_the_rest,
	test_file_operations, test_stream_operations_wait_for_readiness, test_dev_null_as_a_stream,
	test_messages_on_a_seqpacket_pair, test_stalled_reader_does_not_stop_the_loop,
	test_cancelled_operation_is_done_once, test_work_runs_beside_the_loop,
	test_row43_ten_thousand_operations_beyond_the_ring,
	test_row43_signals_stay_with_the_main_thread, test_drain_runs_completions_only,
	test_polled_ring_loses_no_wakeup, test_row105_idle_loop_never_wakes,
	test_cached_read_costs_one_enter, test_row103_refused_io_uring_falls_back_to_epoll,
	test_auto_prefers_io_uring_where_it_works, test_row102_no_descriptors_left_is_an_error)
