/*
 * The loop where io_uring is refused: epoll for readiness, the worker pool for what may block.
 *
 * How this works: epoll knows a descriptor once, but a stream may carry a watch, a read and a write at a
 * time, so there is a slot for each descriptor number in use; the mask that epoll is given is the sum of
 * what the slot's users want. Descriptors that epoll refuses (files, /dev/null) are always ready.
 *
 * Operations on streams are tried without waiting and else wait in their slot for readiness. Most streams
 * can be asked not to wait (RWF_NOWAIT, MSG_DONTWAIT, O_NONBLOCK). The rest, such as an inherited terminal,
 * is read once when readable, and written in pieces small enough not to wait when writable. File
 * reads and writes are first tried with RWF_NOWAIT (in the page cache: done) and else go to a worker.
 *
 * Events are edge-triggered: an eventfd wakes its pollers at every write, so nobody needs to read it.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "loop_priv.h"
#include "vmm/cleanup.h"

#define BATCH      64           /* readiness reports a call */
#define TTY_PIECE  64           /* bytes that fit wherever POLLOUT was reported */
#define LOOK_EVERY 16           /* pending() asks the kernel at every n-th call */

struct slot {
	struct watch *watches;          /* by next */
	struct op_list in, out;
	uint32_t mask;                  /* what epoll was told, 0: not registered */
	bool always;                    /* epoll refuses it */
};

struct epoller {
	int fd;
	struct slot *slot;              /* by descriptor number */
	unsigned nr_slots;
	unsigned nr_always;             /* watches on slots that are always ready */
	unsigned looks;
	struct op_list todo;
	bool no_pwait2;
};

static int epoller_open(struct loop *l)
{
	struct epoller *e = calloc(1, sizeof(*e));

	if (!e)
		return -ENOMEM;
	e->fd = epoll_create1(EPOLL_CLOEXEC);
	if (e->fd < 0) {
		int r = -errno;

		free(e);
		return r;
	}
	l->engine = e;
	return 0;
}

static void epoller_close(void *engine)
{
	struct epoller *e = engine;

	close(e->fd);
	free(e->slot);
	free(e);
}

/* --- slots --- */

/* NULL: no memory. Pointers to slots do not outlive the next call. */
static struct slot *slot_of(struct epoller *e, int fd)
{
	unsigned n = e->nr_slots ? e->nr_slots : 64;
	struct slot *s;

	if (fd < 0)
		return NULL;
	if ((unsigned)fd < e->nr_slots)
		return &e->slot[fd];
	while (n <= (unsigned)fd)
		n *= 2;
	s = realloc(e->slot, n * sizeof(*s));
	if (!s)
		return NULL;
	memset(s + e->nr_slots, 0, (n - e->nr_slots) * sizeof(*s));
	e->slot = s;
	e->nr_slots = n;
	return &s[fd];
}

static uint32_t wanted(const struct slot *s)
{
	uint32_t m = (s->in.head ? EPOLLIN : 0) | (s->out.head ? EPOLLOUT : 0);

	for (const struct watch *w = s->watches; w; w = w->next)
		if (!w->parked)
			m |= w->e ? EPOLLIN | EPOLLET : w->events;
	return m;
}

/* Tell epoll what the slot's users want now. False: it refuses the descriptor. */
static bool slot_update(struct epoller *e, int fd)
{
	struct slot *s = &e->slot[fd];
	struct epoll_event ev = { .events = wanted(s), .data.fd = fd };
	int r = 0;

	if (s->always || ev.events == s->mask)
		return !s->always;
	if (!ev.events) {
		epoll_ctl(e->fd, EPOLL_CTL_DEL, fd, NULL);
	} else {
		r = epoll_ctl(e->fd, s->mask ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &ev);
		/* The number may have been closed, or used for another file, since. */
		if (r && errno == ENOENT)
			r = epoll_ctl(e->fd, EPOLL_CTL_ADD, fd, &ev);
	}
	s->mask = r ? 0 : ev.events;
	return !r;
}

static void slot_set_always(struct epoller *e, struct slot *s)
{
	if (s->always)
		return;
	s->always = true;
	for (struct watch *w = s->watches; w; w = w->next)
		e->nr_always++;
}

/* --- watches --- */

static void epoller_watch(struct loop *l, struct watch *w)
{
	struct epoller *e = l->engine;
	struct slot *s = slot_of(e, w->fd);

	if (!s) {
		watch_ready(l, w, EPOLLERR);    /* no memory for it: its owner is told */
		return;
	}
	w->next = s->watches;
	s->watches = w;
	if (s->always)
		e->nr_always++;
	else if (!slot_update(e, w->fd))
		slot_set_always(e, s);
}

static void epoller_told(struct loop *l, struct watch *w)
{
	struct epoller *e = l->engine;

	if (!w->parked)
		return;
	w->parked = false;
	slot_update(e, w->fd);
}

static void epoller_unwatch(struct loop *l, struct watch *w)
{
	struct epoller *e = l->engine;
	struct slot *s = (unsigned)w->fd < e->nr_slots ? &e->slot[w->fd] : NULL;

	for (struct watch **p = s ? &s->watches : &(struct watch *){ NULL }; *p; p = &(*p)->next) {
		if (*p != w)
			continue;
		*p = w->next;
		if (s->always)
			e->nr_always--;
		break;
	}
	if (s)
		slot_update(e, w->fd);
	if (s && s->always && !s->watches)
		s->always = false;      /* the number may become another file */
	watch_free(w);
}

static void mark_watches(struct loop *l, struct slot *s, uint32_t ready)
{
	for (struct watch *w = s->watches; w; w = w->next) {
		uint32_t bits = ready & (w->events | EPOLLERR | EPOLLHUP);

		if (!bits)
			continue;
		if (w->listed && w->f)
			w->parked = true;       /* loop_drain() tells nobody: do not hear it again and again */
		watch_ready(l, w, bits);
	}
}

/* --- operations --- */

/* A stream known to be ready that can only wait: read what is there, write a little. */
static int run_blocking(struct loop_op *op)
{
	struct iovec piece;
	struct loop_op part = *op;
	struct stat st;

	if (op->kind != OP_WRITEV || (fcntl(op->fd, F_GETFL) & O_NONBLOCK))
		return op_run(op);
	for (unsigned i = 0; i < op->cnt; i++) {
		if (!op->iov[i].iov_len)
			continue;
		piece = op->iov[i];
		/* pipe(7): a writable pipe has room for PIPE_BUF bytes. */
		piece.iov_len = MIN(piece.iov_len,
			!fstat(op->fd, &st) && S_ISFIFO(st.st_mode) ? (size_t)PIPE_BUF : TTY_PIECE);
		part.iov = &piece;
		part.cnt = 1;
		return op_run(&part);
	}
	return 0;
}

/* Without waiting; -EAGAIN: not now; -EOPNOTSUPP: it cannot be asked not to wait. */
static int try_op(const struct loop_op *op)
{
	off_t off = op->off == STREAM ? -1 : (off_t)op->off;
	ssize_t n = -1;

	do {
		switch (op->kind) {
		case OP_READV:
			n = preadv2(op->fd, op->iov, (int)op->cnt, off, RWF_NOWAIT);
			break;
		case OP_WRITEV:
			n = pwritev2(op->fd, op->iov, (int)op->cnt, off, RWF_NOWAIT);
			break;
		case OP_SENDMSG:
			n = sendmsg(op->fd, op->msg, MSG_DONTWAIT | MSG_NOSIGNAL);
			break;
		case OP_RECVMSG:
			n = recvmsg(op->fd, op->msg, MSG_DONTWAIT);
			break;
		case OP_FSYNC:
		case OP_FALLOCATE:
		case OP_WORK:
			return -EOPNOTSUPP;
		}
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == ENOSYS || errno == EINVAL ? -EOPNOTSUPP : -errno;
	return (int)n;
}

/* The operations waiting in one direction of a stream that is ready. */
static void run_ready(struct loop *l, struct op_list *list)
{
	while (list->head) {
		struct loop_op *op = list->head;
		int r = try_op(op);
		bool once = r == -EOPNOTSUPP;

		if (once)
			r = run_blocking(op);
		if (r == -EAGAIN)
			return;
		op_list_take(list);
		op_complete(l, op, r);
		if (once)
			return;         /* is it still ready? Only epoll knows */
	}
}

static void start_stream(struct loop *l, struct loop_op *op)
{
	struct epoller *e = l->engine;
	struct slot *s = slot_of(e, op->fd);
	struct op_list *list;
	int r = -EAGAIN;

	if (!s) {
		op_complete(l, op, op->fd < 0 ? -EBADF : -ENOMEM);
		return;
	}
	list = op_is_input(op) ? &s->in : &s->out;
	if (s->always) {
		pool_submit(l, op);
		return;
	}
	if (!list->head)
		r = try_op(op);         /* else those before it come first */
	if (r != -EAGAIN && r != -EOPNOTSUPP) {
		op_complete(l, op, r);
		return;
	}
	op_set_state(op, OP_RUNNING);
	op_list_add(list, op);
	if (!slot_update(e, op->fd)) {
		op_list_remove(list, op);
		if (errno == EPERM)
			pool_submit(l, op);     /* a file or a device without readiness */
		else
			op_complete(l, op, -errno);
	}
}

static void start(struct loop *l, struct loop_op *op)
{
	int r = -EOPNOTSUPP;

	if (op_is_stream(op)) {
		start_stream(l, op);
		return;
	}
	if (op->kind == OP_READV || op->kind == OP_WRITEV)
		r = try_op(op);
	if (r == -EAGAIN || r == -EOPNOTSUPP)
		pool_submit(l, op);
	else
		op_complete(l, op, r);
}

static void epoller_submit(struct loop *l, struct loop_op *op)
{
	struct epoller *e = l->engine;

	op_list_add(&e->todo, op);
}

static void epoller_cancel(struct loop *l, struct loop_op *op)
{
	struct epoller *e = l->engine;
	struct slot *s = slot_of(e, op->fd);

	if (op_list_remove(&e->todo, op) ||
		(s && (op_list_remove(&s->in, op) || op_list_remove(&s->out, op)))) {
		if (s)
			slot_update(e, op->fd);
		op_complete(l, op, -ECANCELED);
	}
}

static void epoller_prepare(struct loop *l)
{
	struct epoller *e = l->engine;
	struct loop_op *op;

	while ((op = op_list_take(&e->todo)))
		start(l, op);
}

/* --- waiting --- */

static int sleep_in_kernel(struct epoller *e, struct epoll_event *ev, uint64_t timeout)
{
	struct timespec ts = { .tv_sec = (time_t)(timeout / 1000000000u),
		.tv_nsec = (long)(timeout % 1000000000u) };
	uint64_t ms = timeout / 1000000u + !!(timeout % 1000000u);
	int n;

	if (timeout && timeout != FOREVER && !e->no_pwait2) {
		n = epoll_pwait2(e->fd, ev, BATCH, &ts, NULL);
		if (n >= 0 || (errno != ENOSYS && errno != EPERM))
			return n;
		e->no_pwait2 = true;    /* before 5.11, or a filter that does not know it */
	}
	return epoll_wait(e->fd, ev, BATCH, timeout == FOREVER ? -1 : (int)MIN(ms, (uint64_t)INT_MAX));
}

/* Watches on descriptors that are always ready: true if one was not marked yet. */
static bool mark_always(struct loop *l)
{
	struct epoller *e = l->engine;
	bool any = false;

	for (struct watch *w = e->nr_always ? l->watches : NULL; w; w = w->next_all) {
		if ((!w->f && !w->e) || (unsigned)w->fd >= e->nr_slots || !e->slot[w->fd].always)
			continue;
		any |= !w->listed;
		watch_ready(l, w, w->events);
	}
	return any;
}

static void epoller_wait(struct loop *l, uint64_t timeout)
{
	struct epoller *e = l->engine;
	struct epoll_event ev[BATCH];
	int n;

	if (mark_always(l))
		timeout = 0;
	n = sleep_in_kernel(e, ev, timeout);
	stat_add(&l->enters);
	for (int i = 0; i < n; i++) {
		int fd = ev[i].data.fd;
		uint32_t ready = ev[i].events, ends = ready & (EPOLLERR | EPOLLHUP);

		mark_watches(l, &e->slot[fd], ready);
		if ((ready & EPOLLIN) || ends)
			run_ready(l, &e->slot[fd].in);
		if ((ready & EPOLLOUT) || ends)
			run_ready(l, &e->slot[fd].out);
		slot_update(e, fd);
	}
}

static bool epoller_pending(struct loop *l)
{
	struct epoller *e = l->engine;

	if (e->looks++ % LOOK_EVERY == LOOK_EVERY - 1)
		epoller_wait(l, 0);
	return l->done.head || l->ready;
}

static void epoller_reap(struct loop *l)
{
	(void)l;        /* wait() has done it */
}

const struct engine_ops epoll_engine = {
	.name = "epoll",
	.open = epoller_open,
	.close = epoller_close,
	.watch = epoller_watch,
	.told = epoller_told,
	.unwatch = epoller_unwatch,
	.submit = epoller_submit,
	.cancel = epoller_cancel,
	.prepare = epoller_prepare,
	.pending = epoller_pending,
	.wait = epoller_wait,
	.reap = epoller_reap,
};
