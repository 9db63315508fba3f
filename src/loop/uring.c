/*
 * The loop on io_uring.
 *
 * How this works: operations, cancellations and polls wait on three lists until prepare() turns them into
 * SQEs; wait() hands those over and sleeps in one io_uring_enter. A full SQ is submitted early; at most
 * MAX_INFLIGHT operations are with the kernel, so the CQ cannot overflow for more than a moment, and then
 * the kernel keeps what did not fit (NODROP). What a CQE is about is in the low bits of its user_data.
 *
 * Descriptors are watched by one-shot polls, armed again at the end of the turn in which fn ran: this is
 * level-triggered and costs no call of its own. Events are watched by one multishot poll that stays armed;
 * an eventfd wakes its pollers at every write, so nobody needs to read the counter.
 *
 * An operation that fails with EAGAIN is tried again when the descriptor is ready (O_NONBLOCK streams:
 * the kernel does not wait for those), or by a worker (files); EINTR is simply tried again.
 */
#include <errno.h>
#include <limits.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "loop_priv.h"
#include "vmm/cleanup.h"

#define SQ_ENTRIES   256
#define CQ_ENTRIES   1024
#define MAX_INFLIGHT 768        /* the rest of the CQ is for polls and cancellations */

enum tag { TAG_OP, TAG_WATCH, TAG_IGNORE, TAG_MASK };

struct uring {
	struct io_uring ring;
	unsigned inflight;
	struct op_list todo, cancels;
	struct watch *arm, **arm_tail;
};

/* Directly: the shared liburing 2.3 does not export its functions for these two. */
static int ring_register(struct io_uring *ring, unsigned op, const void *arg, unsigned n)
{
	return syscall(SYS_io_uring_register, ring->ring_fd, op, arg, n) < 0 ? -errno : 0;
}

/*
 * What this ring may ever be asked for: the operations below, with no flags on them, and to forget its
 * registered descriptor when it ends. A system-call filter does not see into a ring. It starts disabled, for
 * only then can it be restricted.
 */
static int restrict_ring(struct io_uring *ring)
{
	static const uint8_t ops[] = { IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV,
		IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_SENDMSG, IORING_OP_RECVMSG,
		IORING_OP_POLL_ADD, IORING_OP_POLL_REMOVE, IORING_OP_ASYNC_CANCEL };
	struct io_uring_restriction res[ARRAY_LEN(ops) + 1] = {
		{ .opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_UNREGISTER_RING_FDS } };
	int r;

	for (unsigned i = 0; i < ARRAY_LEN(ops); i++)
		res[i + 1] = (struct io_uring_restriction){ .opcode = IORING_RESTRICTION_SQE_OP,
			.sqe_op = ops[i] };
	io_uring_register_ring_fd(ring);        /* saves a lookup a call; older kernels do without */
	r = ring_register(ring, IORING_REGISTER_RESTRICTIONS, res, ARRAY_LEN(res));
	return r ? r : ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

static int open_ring(struct io_uring *ring)
{
	static const unsigned flags[] = {       /* 6.1, 5.19, older */
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
			IORING_SETUP_SUBMIT_ALL,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL, 0 };
	int r = -EINVAL;

	for (unsigned i = 0; r == -EINVAL && i < ARRAY_LEN(flags); i++) {
		struct io_uring_params p = { .flags = flags[i] | IORING_SETUP_CQSIZE | IORING_SETUP_R_DISABLED,
			.cq_entries = CQ_ENTRIES };

		r = io_uring_queue_init_params(SQ_ENTRIES, ring, &p);
	}
	if (r)
		return r;
	r = restrict_ring(ring);
	if (r)
		io_uring_queue_exit(ring);
	return r;
}

static int uring_open(struct loop *l)
{
	/* RSRC_TAGS came with multishot polls (5.13). */
	const unsigned need = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG | IORING_FEAT_RSRC_TAGS;
	struct uring *u = calloc(1, sizeof(*u));
	int r;

	if (!u)
		return -ENOMEM;
	r = open_ring(&u->ring);
	if (!r && (u->ring.features & need) != need) {
		io_uring_queue_exit(&u->ring);
		r = -ENOSYS;
	}
	if (r) {
		free(u);
		return r;
	}
	u->arm_tail = &u->arm;
	l->engine = u;
	return 0;
}

static void uring_close(void *engine)
{
	struct uring *u = engine;

	io_uring_queue_exit(&u->ring);
	free(u);
}

/* --- to the kernel --- */

static void back_off(int r)
{
	static const struct timespec ms = { .tv_nsec = 1000000 };

	/* The host is out of memory for requests: they stay in the SQ. EBUSY: reap first; no need to wait. */
	if (r == -EAGAIN || r == -ENOMEM)
		nanosleep(&ms, NULL);
}

static struct io_uring_sqe *next_sqe(struct loop *l)
{
	struct uring *u = l->engine;
	struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

	if (sqe)
		return sqe;
	stat_add(&l->enters);
	io_uring_submit(&u->ring);
	return io_uring_get_sqe(&u->ring);
}

static void set_tag(struct io_uring_sqe *sqe, void *p, enum tag tag)
{
	io_uring_sqe_set_data64(sqe, (uintptr_t)p | tag);
}

static void fill_op(struct io_uring_sqe *sqe, struct loop_op *op)
{
	switch (op->kind) {
	case OP_READV:
		if (op->cnt == 1 && op->iov->iov_len <= INT_MAX)
			io_uring_prep_read(sqe, op->fd, op->iov->iov_base, (unsigned)op->iov->iov_len, op->off);
		else
			io_uring_prep_readv(sqe, op->fd, op->iov, op->cnt, op->off);
		break;
	case OP_WRITEV:
		if (op->cnt == 1 && op->iov->iov_len <= INT_MAX)
			io_uring_prep_write(sqe, op->fd, op->iov->iov_base, (unsigned)op->iov->iov_len, op->off);
		else
			io_uring_prep_writev(sqe, op->fd, op->iov, op->cnt, op->off);
		break;
	case OP_FSYNC:
		io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
		break;
	case OP_FALLOCATE:
		io_uring_prep_fallocate(sqe, op->fd, op->mode, (off_t)op->off, (off_t)op->len);
		break;
	case OP_SENDMSG:
		io_uring_prep_sendmsg(sqe, op->fd, op->msg, MSG_NOSIGNAL);
		break;
	case OP_RECVMSG:
		io_uring_prep_recvmsg(sqe, op->fd, op->msg, 0);
		break;
	case OP_WORK:
		assert(!"work goes to the pool");
	}
}

static bool send_op(struct loop *l, struct loop_op *op)
{
	struct uring *u = l->engine;
	struct io_uring_sqe *sqe = next_sqe(l);

	if (!sqe)
		return false;
	if (op_state(op) == OP_POLLING) {
		io_uring_prep_poll_add(sqe, op->fd, op_is_input(op) ? POLLIN : POLLOUT);
	} else {
		fill_op(sqe, op);
		op_set_state(op, OP_RUNNING);
	}
	set_tag(sqe, op, TAG_OP);
	u->inflight++;
	return true;
}

static bool send_watch(struct loop *l, struct watch *w)
{
	struct io_uring_sqe *sqe = next_sqe(l);

	if (!sqe)
		return false;
	if (!w->f && !w->e) {
		io_uring_prep_poll_remove(sqe, (uintptr_t)w | TAG_WATCH);
		set_tag(sqe, NULL, TAG_IGNORE);
		return true;
	}
	if (w->e)
		io_uring_prep_poll_multishot(sqe, w->fd, POLLIN);
	else
		io_uring_prep_poll_add(sqe, w->fd, w->events);
	set_tag(sqe, w, TAG_WATCH);
	w->armed = true;
	return true;
}

static bool send_cancel(struct loop *l, struct loop_op *op)
{
	struct io_uring_sqe *sqe = next_sqe(l);

	if (!sqe)
		return false;
	io_uring_prep_cancel64(sqe, (uintptr_t)op | TAG_OP, 0);
	set_tag(sqe, NULL, TAG_IGNORE);
	return true;
}

/* Operations before their cancellations. What gets no SQE now is tried again next turn. */
static void uring_prepare(struct loop *l)
{
	struct uring *u = l->engine;

	while (u->todo.head && u->inflight < MAX_INFLIGHT) {
		struct loop_op *next = u->todo.head->next;

		if (!send_op(l, u->todo.head))
			return;
		u->todo.head = next;
	}
	while (u->cancels.head) {
		struct loop_op *next = u->cancels.head->next;

		if (!send_cancel(l, u->cancels.head))
			return;
		u->cancels.head = next;
	}
	while (u->arm) {
		struct watch *w = u->arm, *next = w->next;

		if (!send_watch(l, w))
			return;
		w->queued = false;
		u->arm = next;
		if (!next)
			u->arm_tail = &u->arm;
	}
}

static bool uring_pending(struct loop *l)
{
	struct uring *u = l->engine;

	return io_uring_cq_ready(&u->ring) ||
		(IO_URING_READ_ONCE(*u->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

static void uring_wait(struct loop *l, uint64_t timeout)
{
	struct uring *u = l->engine;
	struct __kernel_timespec ts = { .tv_sec = (long long)(timeout / 1000000000u),
		.tv_nsec = (long long)(timeout % 1000000000u) };
	struct io_uring_cqe *cqe;
	int r;

	/* Never sleep on a completion that is here, nor with work left that got no SQE. */
	if (io_uring_cq_ready(&u->ring) || u->cancels.head || u->arm ||
		(u->todo.head && u->inflight < MAX_INFLIGHT))
		timeout = 0;
	if (!timeout) {
		if (!io_uring_sq_ready(&u->ring) && !(IO_URING_READ_ONCE(*u->ring.sq.kflags) &
						       (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)))
			return;
		r = io_uring_submit_and_get_events(&u->ring);
	} else {
		r = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, timeout == FOREVER ? NULL : &ts,
			NULL);
	}
	stat_add(&l->enters);
	if (r < 0)
		back_off(r);    /* ETIME, EINTR: awake is awake */
}

/* --- from the kernel --- */

static void op_came_back(struct loop *l, struct loop_op *op, int res)
{
	struct uring *u = l->engine;
	bool cancelled = op->state & OP_CANCELLED, polled = op_state(op) == OP_POLLING;

	u->inflight--;
	if (cancelled)
		op_list_remove(&u->cancels, op);
	if (cancelled && (polled || res == -EINTR || res == -EAGAIN))
		res = -ECANCELED;
	else if (polled ? res >= 0 : res == -EINTR) {
		op_set_state(op, OP_QUEUED);
		op_list_add(&u->todo, op);
		return;
	} else if (!polled && res == -EAGAIN && op_is_stream(op)) {
		op_set_state(op, OP_POLLING);
		op_list_add(&u->todo, op);
		return;
	} else if (!polled && res == -EAGAIN) {
		pool_submit(l, op);
		return;
	}
	op_complete(l, op, res);
}

static void queue_watch(struct uring *u, struct watch *w)
{
	if (w->queued)
		return;
	w->queued = true;
	w->next = NULL;
	*u->arm_tail = w;
	u->arm_tail = &w->next;
}

static void unqueue_watch(struct uring *u, struct watch *w)
{
	struct watch **p;

	if (!w->queued)
		return;
	for (p = &u->arm; *p != w; p = &(*p)->next)
		;
	*p = w->next;
	if (!*p)
		u->arm_tail = p;
	w->queued = false;
}

static void watch_came_back(struct loop *l, struct watch *w, int res, bool more)
{
	struct uring *u = l->engine;

	w->armed = more;
	if (!w->f && !w->e) {
		if (!more) {
			unqueue_watch(u, w);
			watch_free(w);
		}
		return;
	}
	if (w->e && !more)
		queue_watch(u, w);
	watch_ready(l, w, res < 0 ? POLLERR : (uint32_t)res);
}

static void uring_reap(struct loop *l)
{
	struct uring *u = l->engine;
	unsigned n = io_uring_cq_ready(&u->ring);

	while (n--) {
		struct io_uring_cqe *cqe;
		uint64_t data;
		bool more;
		int res;

		io_uring_peek_cqe(&u->ring, &cqe);
		data = cqe->user_data;
		res = cqe->res;
		more = cqe->flags & IORING_CQE_F_MORE;
		io_uring_cqe_seen(&u->ring, cqe);
		switch ((enum tag)(data & TAG_MASK)) {
		case TAG_OP:
			op_came_back(l, (void *)(uintptr_t)data, res);
			break;
		case TAG_WATCH:
			watch_came_back(l, (void *)(uintptr_t)(data & ~(uint64_t)TAG_MASK), res, more);
			break;
		case TAG_IGNORE:
		case TAG_MASK:
			break;
		}
	}
}

/* --- from the loop --- */

static void uring_watch(struct loop *l, struct watch *w)
{
	queue_watch(l->engine, w);
}

static void uring_told(struct loop *l, struct watch *w)
{
	if (w->f)
		queue_watch(l->engine, w);
}

static void uring_unwatch(struct loop *l, struct watch *w)
{
	unqueue_watch(l->engine, w);
	if (w->armed)
		queue_watch(l->engine, w);
	else
		watch_free(w);
}

static void uring_submit(struct loop *l, struct loop_op *op)
{
	struct uring *u = l->engine;

	op_list_add(&u->todo, op);
}

static void uring_cancel(struct loop *l, struct loop_op *op)
{
	struct uring *u = l->engine;

	if (op_list_remove(&u->todo, op))
		op_complete(l, op, -ECANCELED);
	else
		op_list_add(&u->cancels, op);
}

const struct engine_ops uring_engine = {
	.name = "io_uring",
	.open = uring_open,
	.close = uring_close,
	.watch = uring_watch,
	.told = uring_told,
	.unwatch = uring_unwatch,
	.submit = uring_submit,
	.cancel = uring_cancel,
	.prepare = uring_prepare,
	.pending = uring_pending,
	.wait = uring_wait,
	.reap = uring_reap,
};
