#ifndef VMM_LOOP_H
#define VMM_LOOP_H
/*
 * One loop per I/O thread. A turn: look at the polled rings and at completions; run what is ready; run
 * the turn-end tasks (publish used rings, interrupts); hand everything queued to the kernel and wait,
 * in one io_uring_enter. Where io_uring is refused, the same contract runs on epoll and a worker pool.
 *
 * A loop never waits for a vCPU or the main thread, and never takes a lock under which somebody may wait
 * for a loop. Its threads, workers too, open no files: they are shut off from them from the start (sandbox.h).
 */
#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>
struct loop;
struct error;
struct msghdr;

enum loop_engine { LOOP_AUTO, LOOP_URING, LOOP_EPOLL };

/*
 * A descriptor to watch: fn runs each time it is readable (EPOLLIN) or writable (EPOLLOUT), or has failed
 * (EPOLLERR, EPOLLHUP: always reported). Level-triggered. Files are always ready. fn may remove anything.
 */
struct loop_fd {
	int fd;
	uint32_t events;                /* EPOLLIN and/or EPOLLOUT */
	void (*fn)(struct loop_fd *f, uint32_t ready);
	void *engine;                   /* loop.c */
};

/*
 * An eventfd: fn runs after it was written, once for any number of writes. Its counter is the loop's
 * business: nobody else reads it, and whether the loop does is open. A write made before loop_add_event()
 * counts.
 */
struct loop_event {
	int fd;
	void (*fn)(struct loop_event *e);
	void *engine;                   /* loop.c */
};

/* One shot. at_ns is CLOCK_MONOTONIC. Zero-initialise. */
struct loop_timer {
	uint64_t at_ns;
	void (*fn)(struct loop_timer *t);
	unsigned slot;                  /* loop.c: place in the heap + 1, 0 = not set */
};

/* For loop_post() or for loop_at_turn_end(), one task not for both. Zero-initialise. */
struct loop_task {
	void (*fn)(struct loop_task *t);
	struct loop_task *next;
	_Atomic bool queued;
};

/*
 * Something in memory to look at before sleeping, e.g. a virtqueue. look() does the work that is there
 * and says whether there was any. Before the loop sleeps it calls arm(true): ask to be told, then look
 * once more; true means work arrived meanwhile and the loop does not sleep. arm(false): no telling needed.
 */
struct loop_poll {
	bool (*look)(struct loop_poll *p);
	bool (*arm)(struct loop_poll *p, bool on);
	struct loop_poll *next;         /* loop.c */
	bool armed;                     /* loop.c */
};

/*
 * One asynchronous operation: embed it, container_of() it in done(). res: bytes (perhaps fewer than asked
 * for), or -errno from the kernel; never -EINTR, and -EAGAIN only where a worker got it. done() runs in a
 * later turn, never inside loop_submit(), and may submit again. The loop waits for streams by itself: whether they
 * are O_NONBLOCK makes no difference to the result, blocking ones take one step less. Zero-initialise.
 */
enum loop_op_kind {
	OP_READV,               /* off = -1: a stream (pipe, tty, socket) */
	OP_WRITEV,
	OP_FSYNC,               /* fdatasync */
	OP_FALLOCATE,           /* mode, off, len */
	OP_SENDMSG,
	OP_RECVMSG,
	OP_WORK,                /* run work(op) on a worker thread; its return value is res */
};
struct loop_op {
	enum loop_op_kind kind;
	int fd;
	uint64_t off, len;
	const struct iovec *iov;        /* must stay until done() */
	unsigned cnt;
	struct msghdr *msg;             /* must stay until done() */
	int mode;
	bool quick;             /* never waits for a device (loop_file_quick()): the loop does it in place */
	int (*work)(struct loop_op *op);
	void (*done)(struct loop_op *op, int res);
	/* loop.c */
	struct loop_op *next;
	unsigned state;
	int res;
};

/*
 * Start a loop and its thread. poll_max_us bounds the adaptive looking before a sleep (0: never look).
 * LOOP_AUTO probes io_uring and falls back; it does not wait for that, so ask loop_engine_name() before a
 * filter is loaded that forbids io_uring_setup(). Worker threads are started when first needed; where the
 * host refuses them the loop does their work itself. Main thread.
 */
struct loop *loop_new(const char *name, enum loop_engine engine, unsigned poll_max_us,
	struct error *err);
void loop_free(struct loop *l);         /* main thread; everything removed and drained before; NULL is fine */
const char *loop_engine_name(const struct loop *l);     /* "io_uring" or "epoll"; any thread; waits until it is up */
bool loop_here(const struct loop *l);                   /* any thread */
#define ON_LOOP(l) assert(loop_here(l)) /* first line of every home-loop function; kept in release builds */

/* Home loop only. */
int  loop_add_fd(struct loop *l, struct loop_fd *f);            /* 0 or -errno */
void loop_del_fd(struct loop *l, struct loop_fd *f);            /* also drops it from this turn's batch */
int  loop_add_event(struct loop *l, struct loop_event *e);      /* 0 or -errno */
void loop_del_event(struct loop *l, struct loop_event *e);
void loop_submit(struct loop *l, struct loop_op *op);           /* reaches the kernel at turn end */
void loop_cancel(struct loop *l, struct loop_op *op);           /* done() still runs, once, perhaps -ECANCELED; idle: nothing */
void loop_drain(struct loop *l, const bool *done);              /* run completions only, until *done; for stop() */
void loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns);      /* moves it if set */
void loop_del_timer(struct loop *l, struct loop_timer *t);
void loop_add_poll(struct loop *l, struct loop_poll *p);
void loop_del_poll(struct loop *l, struct loop_poll *p);
void loop_at_turn_end(struct loop *l, struct loop_task *t);     /* once, however often asked */
uint64_t loop_now(void);                                        /* CLOCK_MONOTONIC in ns; any thread */

/*
 * True for files in memory (tmpfs, memfd). io_uring hands each of their reads to a kernel thread (73 us
 * where the plain call takes 1.3): set op.quick for them. Any thread.
 */
bool loop_file_quick(int fd);

/* Any thread but a loop's for loop_call(). */
void loop_post(struct loop *l, struct loop_task *t);            /* run there, do not wait; once until it ran */
void loop_call(struct loop *l, void (*fn)(void *arg), void *arg);       /* run there and wait */

/* For the result file: turns, system calls, sleeps so far. Any thread. */
struct loop_stats {
	uint64_t turns, enters, sleeps, polled;
};
void loop_get_stats(const struct loop *l, struct loop_stats *st);
#endif
