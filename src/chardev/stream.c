/*
 * The host end of a byte stream, run by its home loop.
 *
 * How this works: chardev_write() puts bytes in a ring under a leaf lock and posts pump(). pump() moves
 * a piece of the ring to tx and writes tx with one operation at a time, so the ring can drop its oldest
 * bytes whenever it likes. Input is read one piece at a time into rx, only when its user has room for
 * it (flow control reaches the host), or, from a terminal, always: the escape key must work with a guest
 * that does not listen.
 *
 * A listening stream: no client (listener watched) -> accept -> client (reads, writes) -> end or error
 * -> closing (both operations called back) -> no client.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "chardev_priv.h"
#include "vmm/cleanup.h"
#include "vmm/log.h"

/* --- the output ring; under s->lock --- */

static void ring_grow(struct stream *s, size_t want)
{
	size_t size = s->ring_size ? s->ring_size : RING_FIRST, head;
	uint8_t *r;

	while (size < want && size < RING_MAX)
		size *= 2;
	if (size == s->ring_size)
		return;
	r = malloc(size);
	if (!r)
		return;         /* the oldest bytes make room instead */
	head = MIN(s->ring_len, s->ring_size - s->ring_start);
	if (s->ring_len) {
		memcpy(r, s->ring + s->ring_start, head);
		memcpy(r + head, s->ring, s->ring_len - head);
	}
	free(s->ring);
	s->ring = r;
	s->ring_size = size;
	s->ring_start = 0;
}

static void ring_drop(struct stream *s, size_t n)
{
	s->dropped += n;
	s->settled += n;
}

static size_t ring_take(struct stream *s, uint8_t *dst, size_t max)
{
	size_t n = MIN(s->ring_len, max), head = MIN(n, s->ring_size - s->ring_start);

	if (!n)
		return 0;
	if (dst) {
		memcpy(dst, s->ring + s->ring_start, head);
		memcpy(dst + head, s->ring, n - head);
	}
	s->ring_start = (s->ring_start + n) % s->ring_size;
	s->ring_len -= n;
	return n;
}

static void ring_put(struct stream *s, const uint8_t *buf, size_t len)
{
	size_t at, head;

	if (s->ring_len + len > s->ring_size)
		ring_grow(s, s->ring_len + len);
	if (len > s->ring_size) {
		ring_drop(s, len - s->ring_size);
		buf += len - s->ring_size;
		len = s->ring_size;
	}
	if (s->ring_len + len > s->ring_size)
		ring_drop(s, ring_take(s, NULL, s->ring_len + len - s->ring_size));
	if (!len)
		return;
	at = (s->ring_start + s->ring_len) % s->ring_size;
	head = MIN(len, s->ring_size - at);
	memcpy(s->ring + at, buf, head);
	memcpy(s->ring, buf + head, len - head);
	s->ring_len += len;
}

void stream_write(struct stream *s, const void *buf, size_t len)
{
	bool dead;

	if (s->discard || !len)
		return;
	pthread_mutex_lock(&s->lock);
	s->accepted += len;
	dead = s->dead;
	if (dead)
		ring_drop(s, len);
	else
		ring_put(s, buf, len);
	pthread_mutex_unlock(&s->lock);
	if (!dead)
		loop_post(s->home, &s->pump);
}

/* --- output; home loop --- */

/* Count n bytes as gone: to the host, or lost with it. */
static void settle(struct stream *s, size_t n, bool lost)
{
	pthread_mutex_lock(&s->lock);
	s->settled += n;
	if (lost)
		s->dropped += n;
	pthread_cond_broadcast(&s->moved);
	pthread_mutex_unlock(&s->lock);
}

static void set_ready(struct stream *s, bool ready)
{
	pthread_mutex_lock(&s->lock);
	s->ready = ready;
	pthread_cond_broadcast(&s->moved);
	pthread_mutex_unlock(&s->lock);
}

static void output_died(struct stream *s)
{
	pthread_mutex_lock(&s->lock);
	s->dead = true;
	ring_drop(s, ring_take(s, NULL, s->ring_len) + s->tx_len - s->tx_pos);
	pthread_cond_broadcast(&s->moved);
	pthread_mutex_unlock(&s->lock);
	s->tx_pos = s->tx_len = 0;
}

static void pump_out(struct stream *s)
{
	if (!s->wr_idle || s->out_fd < 0 || s->closing)
		return;
	if (s->tx_pos == s->tx_len) {
		pthread_mutex_lock(&s->lock);
		s->tx_len = ring_take(s, s->tx, sizeof(s->tx));
		pthread_mutex_unlock(&s->lock);
		s->tx_pos = 0;
		if (!s->tx_len)
			return;
	}
	s->wr_iov = (struct iovec){ s->tx + s->tx_pos, s->tx_len - s->tx_pos };
	s->wr_idle = false;
	loop_submit(s->home, &s->wr);
}

static void disconnect(struct stream *s);
static void finish_closing(struct stream *s);

static void wr_done(struct loop_op *op, int res)
{
	struct stream *s = container_of(op, struct stream, wr);
	size_t left;

	s->wr_idle = true;
	if (res > 0) {
		s->tx_pos += (size_t)res;
		settle(s, (size_t)res, false);
	}
	if (s->closing) {
		finish_closing(s);
		return;
	}
	if (res == -ENOSPC || res == -EDQUOT || res == -EFBIG) {
		left = s->tx_len - s->tx_pos;   /* there may be room again later */
		s->tx_pos = s->tx_len;
		settle(s, left, true);
		if (!s->full_told)
			log_warn("%s: output is lost: %s", s->name, strerrordesc_np(-res));
		s->full_told = true;
	} else if (res < 0 && res != -EAGAIN) {
		if (s->listen_fd >= 0)
			disconnect(s);
		else
			output_died(s); /* EPIPE, EIO: nobody listens any more; that is no news to anybody */
		return;
	}
	pump_out(s);
}

/* --- input; home loop --- */

static void deliver(struct chardev *c)
{
	struct chardev_user *u = atomic_load(&c->user);

	while (c->fifo_len) {
		size_t n = u ? u->room(u) : c->fifo_len;

		n = MIN(n, c->fifo_len);
		if (!n)
			return;
		if (u) {
			atomic_fetch_add_explicit(&c->bytes_in, n, memory_order_relaxed);
			u->input(u, c->fifo + c->fifo_pos, n);
		}
		c->fifo_pos += n;
		c->fifo_len -= n;
	}
	c->fifo_pos = 0;
}

/* What does not fit is lost; only a terminal is read without asking for room first. */
void stream_input(struct chardev *c, const uint8_t *buf, size_t len)
{
	memmove(c->fifo, c->fifo + c->fifo_pos, c->fifo_len);
	c->fifo_pos = 0;
	len = MIN(len, sizeof(c->fifo) - c->fifo_len);
	memcpy(c->fifo + c->fifo_len, buf, len);
	c->fifo_len += len;
	deliver(c);
}

/* How much may be read now. */
static size_t wanted(struct stream *s)
{
	struct chardev *c = atomic_load(&s->focus);
	struct chardev_user *u = c ? atomic_load(&c->user) : NULL;

	if (!c || atomic_load(&s->hold_input))
		return 0;
	if (atomic_load(&s->terminal))
		return sizeof(s->rx);
	if (c->fifo_len)
		return 0;
	if (!u)         /* nobody listens: a socket is read to see its end */
		return s->listen_fd >= 0 ? sizeof(s->rx) : 0;
	return MIN(u->room(u), sizeof(s->rx));
}

static void pump_in(struct stream *s)
{
	size_t n;

	if (!s->rd_idle || s->in_fd < 0 || s->rd_dead || s->closing)
		return;
	n = wanted(s);
	if (!n)
		return;
	s->rd_iov = (struct iovec){ s->rx, n };
	s->rd_idle = false;
	loop_submit(s->home, &s->rd);
}

static void rd_done(struct loop_op *op, int res)
{
	struct stream *s = container_of(op, struct stream, rd);
	struct chardev *c = atomic_load(&s->focus);

	s->rd_idle = true;
	if (res > 0 && atomic_load(&s->terminal))
		terminal_keys(s, s->rx, (size_t)res);
	else if (res > 0 && c)
		stream_input(c, s->rx, (size_t)res);
	if (s->closing) {
		finish_closing(s);
		return;
	}
	if (res <= 0 && res != -EAGAIN) {
		if (s->listen_fd >= 0)
			disconnect(s);
		else
			s->rd_dead = true;      /* end of input; output goes on */
		return;
	}
	pump_in(s);
}

/* --- clients of a listening stream; home loop --- */

static void tell_connected(struct stream *s)
{
	bool connected = s->listen_fd < 0 || (s->out_fd >= 0 && !s->closing);

	for (struct chardev *c = atomic_load(&s->users); c; c = c->next) {
		struct chardev_user *u = atomic_load(&c->user);

		if (!u || c->told_connected == connected)
			continue;
		c->told_connected = connected;
		if (u->event)
			u->event(u, connected);
	}
}

static void accepted(struct loop_fd *f, uint32_t ready)
{
	struct stream *s = container_of(f, struct stream, listener);
	int fd = accept4(s->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	(void)ready;
	if (fd < 0)
		return;         /* it went away again, or we are out of descriptors: level-triggered */
	loop_del_fd(s->home, f);
	s->listening = false;
	s->in_fd = s->out_fd = s->rd.fd = s->wr.fd = fd;
	set_ready(s, true);
	loop_post(s->home, &s->pump);
}

static void listen_again(struct stream *s)
{
	if (s->listen_fd < 0 || s->listening || s->out_fd >= 0)
		return;
	s->listener = (struct loop_fd){ .fd = s->listen_fd, .events = EPOLLIN, .fn = accepted };
	s->listening = !loop_add_fd(s->home, &s->listener);
	if (!s->listening)
		log_warn("%s: no more clients can connect", s->name);
}

static void disconnect(struct stream *s)
{
	s->closing = true;
	set_ready(s, false);
	loop_cancel(s->home, &s->rd);
	loop_cancel(s->home, &s->wr);
	finish_closing(s);
}

static void finish_closing(struct stream *s)
{
	if (!s->rd_idle || !s->wr_idle)
		return;
	if (s->gone)
		return;         /* stream_free() closes */
	s->closing = false;
	close(s->out_fd);
	s->in_fd = s->out_fd = -1;
	loop_post(s->home, &s->pump);
}

static void pump(struct loop_task *t)
{
	struct stream *s = container_of(t, struct stream, pump);

	if (s->gone)
		return;
	listen_again(s);
	tell_connected(s);
	pump_out(s);
	for (struct chardev *c = atomic_load(&s->users); c; c = c->next)
		deliver(c);
	pump_in(s);
}

/* --- birth and death; main thread --- */

struct stream *stream_new(struct loop *home)
{
	struct stream *s = calloc(1, sizeof(*s));
	pthread_condattr_t attr;

	if (!s)
		return NULL;
	s->home = home;
	s->in_fd = s->out_fd = s->listen_fd = -1;
	s->rd_idle = s->wr_idle = true;
	s->pump.fn = pump;
	s->rd = (struct loop_op){ .kind = OP_READV, .off = UINT64_MAX, .iov = &s->rd_iov, .cnt = 1,
		.done = rd_done };
	s->wr = (struct loop_op){ .kind = OP_WRITEV, .off = UINT64_MAX, .iov = &s->wr_iov, .cnt = 1,
		.done = wr_done };
	pthread_mutex_init(&s->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->moved, &attr);
	pthread_condattr_destroy(&attr);
	return s;
}

static void shut(void *arg)
{
	struct stream *s = arg;

	s->gone = s->closing = true;
	if (s->listening)
		loop_del_fd(s->home, &s->listener);
	loop_cancel(s->home, &s->rd);
	loop_cancel(s->home, &s->wr);
	loop_drain(s->home, &s->rd_idle);
	loop_drain(s->home, &s->wr_idle);
}

static void nothing(void *arg)
{
	(void)arg;
}

void stream_free(struct stream *s)
{
	loop_call(s->home, shut, s);
	loop_call(s->home, nothing, NULL);      /* a pump() that was posted meanwhile has run */
	if (s->own_fds || s->listen_fd >= 0) {
		if (s->in_fd >= 0)
			close(s->in_fd);
		if (s->out_fd >= 0 && s->out_fd != s->in_fd)
			close(s->out_fd);
	}
	if (s->listen_fd >= 0)
		close(s->listen_fd);
	free(s->ring);
	pthread_cond_destroy(&s->moved);
	pthread_mutex_destroy(&s->lock);
	free(s);
}
