#ifndef LOOP_PRIV_H
#define LOOP_PRIV_H
/* What loop.c, timer.c, worker.c and the two engines share. */
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include "vmm/loop.h"

#define LOOP_TIMERS  1024               /* set at one time; devices make them, guests do not */
#define POOL_THREADS 4
#define FOREVER      UINT64_MAX
#define STREAM       UINT64_MAX         /* loop_op.off of a pipe, tty or socket */

/* loop_op.state */
enum op_state {
	OP_IDLE,
	OP_QUEUED,              /* on a list of the engine's, the kernel does not know it */
	OP_RUNNING,             /* with the kernel */
	OP_POLLING,             /* uring: with the kernel, waiting to be ready before it is tried again */
	OP_POOLED,              /* with a worker, or waiting for one */
	OP_FINISHED,            /* done() is about to run */
};
#define OP_STATE     0xffu
#define OP_CANCELLED 0x100u             /* flag: loop_cancel() was asked for */

/* The loop's half of a loop_fd or loop_event; outlives it until the kernel has let go. */
struct watch {
	struct loop_fd *f;      /* one of the two; both NULL: removed */
	struct loop_event *e;
	int fd;
	uint32_t events;
	uint32_t ready;         /* seen, not yet told */
	bool listed;            /* on loop.ready */
	bool armed;             /* uring: a poll is with the kernel */
	bool queued;            /* uring: on the list of polls to arm or remove */
	bool parked;            /* epoll: seen again before it was told; not asked for meanwhile */
	struct watch *next_ready;
	struct watch *next;     /* engine: uring's arm list, or the others of the same epoll slot */
	struct watch *next_all, **prev_all;
};

struct op_list {
	struct loop_op *head, *tail;
};

/* The pool for what may block. lock guards all but finished. */
struct pool {
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct op_list queue;
	unsigned queued, idle, threads;
	bool quit;
	pthread_t thread[POOL_THREADS];
	_Atomic(struct loop_op *) finished;     /* stack: pushed by workers, taken by the loop */
};

/*
 * An engine waits and submits; everything else is common. Home loop only, but for open and close. Engines
 * report with op_complete() and watch_ready(); they never call done() or fn themselves.
 */
struct engine_ops {
	const char *name;
	int  (*open)(struct loop *l);           /* sets l->engine; 0, or -errno: not on this host */
	void (*close)(void *engine);
	void (*watch)(struct loop *l, struct watch *w);
	void (*told)(struct loop *l, struct watch *w);          /* fn has run: look out for it again */
	void (*unwatch)(struct loop *l, struct watch *w);       /* frees w now or when the kernel lets go */
	void (*submit)(struct loop *l, struct loop_op *op);
	void (*cancel)(struct loop *l, struct loop_op *op);
	void (*prepare)(struct loop *l);        /* get what is queued ready for the kernel; may complete ops */
	bool (*pending)(struct loop *l);        /* is there something to reap? As good as free */
	void (*wait)(struct loop *l, uint64_t timeout_ns);      /* submit, then sleep; 0: do not sleep */
	void (*reap)(struct loop *l);           /* complete ops, mark watches */
};
extern const struct engine_ops uring_engine, epoll_engine;

struct loop {
	/* const once up */
	char name[16];
	enum loop_engine asked;
	const struct engine_ops *ops;
	void *engine;
	uint64_t poll_max;              /* ns */
	pthread_t thread;
	int wake_fd;
	int up_error;

	/* any thread */
	pthread_mutex_t up_lock;        /* guards up */
	pthread_cond_t up_cond;
	bool up;
	_Atomic(struct loop_task *) posted;     /* stack, newest first */
	_Atomic bool sleeping;          /* whoever clears it writes wake_fd */
	_Atomic uint64_t turns, enters, sleeps, polled;
	struct pool pool;

	/* home loop only */
	bool quit;
	struct loop_event wake;
	struct watch *watches, *ready, **ready_tail;
	struct op_list done, quick;
	struct loop_task *turn_end, **turn_end_tail;
	struct loop_poll *polls, *poll_next;
	uint64_t budget;                /* ns to look before the next sleep */
	unsigned long_sleeps;
	struct loop_timer *timer[LOOP_TIMERS];
	unsigned nr_timers;
};

void op_list_add(struct op_list *list, struct loop_op *op);
struct loop_op *op_list_take(struct op_list *list);
bool op_list_remove(struct op_list *list, struct loop_op *op);  /* true: it was there */

/* Home loop: done(op, res) is to run in the next reaping. */
void op_complete(struct loop *l, struct loop_op *op, int res);
static inline enum op_state op_state(const struct loop_op *op)
{
	return (enum op_state)(op->state & OP_STATE);
}
static inline void op_set_state(struct loop_op *op, enum op_state s)
{
	op->state = (op->state & ~OP_STATE) | s;
}
static inline bool op_is_stream(const struct loop_op *op)
{
	return op->kind == OP_SENDMSG || op->kind == OP_RECVMSG ||
		((op->kind == OP_READV || op->kind == OP_WRITEV) && op->off == STREAM);
}
static inline bool op_is_input(const struct loop_op *op)
{
	return op->kind == OP_READV || op->kind == OP_RECVMSG;
}

/* Home loop: fn of w is to run with these bits. */
void watch_ready(struct loop *l, struct watch *w, uint32_t bits);
void watch_free(struct watch *w);

/* Any thread: the loop has something to see. */
void loop_wake(struct loop *l);

static inline void stat_add(_Atomic uint64_t *n)
{
	atomic_store_explicit(n, atomic_load_explicit(n, memory_order_relaxed) + 1,
		memory_order_relaxed);
}

/* timer.c; home loop only. */
uint64_t timers_next(const struct loop *l);     /* when the first is due, FOREVER if none is set */
void timers_run(struct loop *l);

/* worker.c */
void pool_init(struct pool *p);
void pool_stop(struct pool *p);         /* joins */
void pool_submit(struct loop *l, struct loop_op *op);           /* home loop */
bool pool_cancel(struct loop *l, struct loop_op *op);           /* home loop; true: no worker had it yet */
int  op_run(struct loop_op *op);        /* the blocking system call; a result as done() gets it */
#endif
