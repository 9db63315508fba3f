/*
 * Threads for what may block: OP_WORK on both engines, and file I/O where there is no io_uring. Started
 * when there is work and nobody idle, at most POOL_THREADS; they end with the loop.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
#include "loop_priv.h"

static int run_once(struct loop_op *op)
{
	ssize_t n = -1;

	switch (op->kind) {
	case OP_READV:
		n = op->off == STREAM ? readv(op->fd, op->iov, (int)op->cnt) :
					preadv(op->fd, op->iov, (int)op->cnt, (off_t)op->off);
		break;
	case OP_WRITEV:
		n = op->off == STREAM ? writev(op->fd, op->iov, (int)op->cnt) :
					pwritev(op->fd, op->iov, (int)op->cnt, (off_t)op->off);
		break;
	case OP_FSYNC:
		n = fdatasync(op->fd);
		break;
	case OP_FALLOCATE:
		n = fallocate(op->fd, op->mode, (off_t)op->off, (off_t)op->len);
		break;
	case OP_SENDMSG:
		n = sendmsg(op->fd, op->msg, MSG_NOSIGNAL);
		break;
	case OP_RECVMSG:
		n = recvmsg(op->fd, op->msg, 0);
		break;
	case OP_WORK:
		return op->work(op);
	}
	return n < 0 ? -errno : (int)n;
}

int op_run(struct loop_op *op)
{
	int r;

	do {
		r = run_once(op);
	} while (r == -EINTR && op->kind != OP_WORK);
	return r;
}

/* Any thread: to the loop with it. op is the loop's again once it is on the stack. */
static void finish(struct loop *l, struct loop_op *op, int res)
{
	op->res = res;
	op->next = atomic_load(&l->pool.finished);
	while (!atomic_compare_exchange_weak(&l->pool.finished, &op->next, op))
		;
	loop_wake(l);
}

static void *worker(void *arg)
{
	struct loop *l = arg;
	struct pool *p = &l->pool;
	struct loop_op *op;

	pthread_setname_np(pthread_self(), "worker");
	pthread_mutex_lock(&p->lock);
	for (;;) {
		p->idle++;
		while (!p->queue.head && !p->quit)
			pthread_cond_wait(&p->more, &p->lock);
		p->idle--;
		op = op_list_take(&p->queue);
		if (!op)
			break;
		p->queued--;
		pthread_mutex_unlock(&p->lock);
		finish(l, op, op_run(op));
		pthread_mutex_lock(&p->lock);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

void pool_init(struct pool *p)
{
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->more, NULL);
}

void pool_stop(struct pool *p)
{
	pthread_mutex_lock(&p->lock);
	p->quit = true;
	pthread_cond_broadcast(&p->more);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->threads; i++)
		pthread_join(p->thread[i], NULL);
	pthread_cond_destroy(&p->more);
	pthread_mutex_destroy(&p->lock);
}

/* One more worker if nobody is free; under the lock. The new thread inherits the loop's signal mask: none. */
static void grow(struct loop *l)
{
	struct pool *p = &l->pool;

	if (p->queued > p->idle && p->threads < POOL_THREADS &&
		!pthread_create(&p->thread[p->threads], NULL, worker, l))
		p->threads++;
}

void pool_submit(struct loop *l, struct loop_op *op)
{
	struct pool *p = &l->pool;
	bool alone;

	op_set_state(op, OP_POOLED);
	pthread_mutex_lock(&p->lock);
	op_list_add(&p->queue, op);
	p->queued++;
	grow(l);
	alone = !p->threads;
	if (alone) {
		op_list_remove(&p->queue, op);
		p->queued--;
	} else {
		pthread_cond_signal(&p->more);
	}
	pthread_mutex_unlock(&p->lock);
	if (alone)      /* the host refuses a thread: late is better than never */
		op_complete(l, op, op_run(op));
}

bool pool_cancel(struct loop *l, struct loop_op *op)
{
	struct pool *p = &l->pool;
	bool was;

	pthread_mutex_lock(&p->lock);
	was = op_list_remove(&p->queue, op);
	if (was)
		p->queued--;
	pthread_mutex_unlock(&p->lock);
	return was;
}
