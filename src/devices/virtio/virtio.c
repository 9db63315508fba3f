#include "vmm/virtio.h"
#include <assert.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <sched.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "virtq.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. A device has two halves. The transport half (status, features, what the driver said about
 * its queues) belongs to whoever holds v->lock: the vCPU that accesses a register, or the main thread. The
 * device half (live rings, the device's own state) belongs to the home loop. They meet in four places:
 *
 *      vCPU    DRIVER_OK  --loop_call-->  start_here: rings made live, ops->start
 *      vCPU    status = 0 --loop_call-->  stop_here:  ops->stop returns when all is quiet, rings dropped
 *      vCPU    config wr. --loop_call-->  ops->config_write
 *      loop    v->broken, v->isr, v->config[]: atomics, read by the vCPU
 *
 * so the lock is held while waiting for the loop, and the loop never takes it.
 *
 *                 FEATURES_OK            DRIVER_OK, rings proven
 *      (0) --------------------> set up -------------------------> running
 *       ^                          |  rings refused                   | bad ring, virtio_break()
 *       |                          v                                  v
 *       +---------- status = 0 --- NEEDS_RESET <----------------------+
 *
 * Kicks come as an eventfd (KVM's ioeventfd or virtio_kick()), or the loop sees a ring's index move while it
 * polls. Pushes of a turn are published at its end by flush_here, with at most one interrupt a queue.
 */

/* ---- while the VM is built: main thread ---- */

static void flush_here(struct loop_task *t);
static bool look_here(struct loop_poll *p);
static bool arm_here(struct loop_poll *p, bool on);
static void kicked_here(struct loop_event *e);

void virtio_init(struct virtio *v, const struct virtio_ops *ops, uint64_t features,
	unsigned config_len)
{
	assert(config_len <= VIRTIO_CONFIG_SIZE);
	memset(v, 0, sizeof(*v));
	v->ops = ops;
	v->features = features | 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
		1ull << VIRTIO_RING_F_EVENT_IDX;
	v->config_len = config_len;
	snprintf(v->name, sizeof(v->name), "%s", ops->name);
	pthread_mutex_init(&v->lock, NULL);
	v->flush.fn = flush_here;
	v->poll.look = look_here;
	v->poll.arm = arm_here;
}

unsigned virtio_add_queue(struct virtio *v, uint16_t max_size)
{
	unsigned qi = v->nr_queues++;

	assert(qi < VIRTIO_QUEUES);
	assert(max_size && max_size <= VIRTQ_MAX && !(max_size & (max_size - 1)));
	v->queue_size[qi] = max_size;
	v->cfg[qi] = (struct virtq_cfg){ .max = max_size, .size = max_size };
	v->bell[qi] = (struct virtio_bell){ .event = { .fd = -1, .fn = kicked_here }, .v = v };
	return qi;
}

void virtio_detach(struct virtio *v)
{
	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (v->bell[i].event.fd >= 0)
			close(v->bell[i].event.fd);
		v->bell[i].event.fd = -1;
	}
	free(v->rings);
	v->rings = NULL;
	v->home = NULL;
}

int virtio_attach(struct virtio *v, const struct gmem *mem, struct loop *home,
	const struct virtio_transport_ops *port, void *port_priv, struct error *err)
{
	v->mem = mem;
	v->home = home;
	v->port = port;
	v->port_priv = port_priv;
	v->rings = calloc(v->nr_queues ? v->nr_queues : 1, sizeof(*v->rings));
	if (!v->rings) {
		virtio_detach(v);
		return error_errno(err, ENOMEM, "%s: no memory for its queues", v->name);
	}
	for (unsigned i = 0; i < v->nr_queues; i++) {
		int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

		if (fd < 0) {
			int e = errno;

			virtio_detach(v);
			return error_errno(err, e, "%s: cannot create an eventfd", v->name);
		}
		v->bell[i].event.fd = fd;
	}
	return 0;
}

/* ---- device half: home loop ---- */

bool virtio_has(const struct virtio *v, unsigned feature_bit)
{
	return v->acked >> feature_bit & 1;
}

void virtio_config_set(struct virtio *v, unsigned off, const void *src, unsigned len)
{
	const uint8_t *s = src;

	assert(off <= v->config_len && len <= v->config_len - off);
	v->config_gen++;
	for (unsigned i = 0; i < len; i++)
		v->config[off + i] = s[i];
	v->config_gen++;
}

void virtio_config_changed(struct virtio *v)
{
	if (!v->running || v->broken)
		return;
	v->irqs++;
	v->port->config_irq(v);
}

void virtio_break(struct virtio *v, const char *fmt, ...)
{
	char why[200];
	va_list ap;

	ON_LOOP(v->home);
	if (atomic_exchange(&v->broken, true))
		return;
	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	log_guest(&v->limit, "%s: stopped until the guest resets it: %s", v->name, why);
	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (v->vq[i])
			virtq_break(v->vq[i], "device is broken");
	}
	v->irqs++;
	v->port->config_irq(v);
}

static void ring_broke(struct virtq *q)
{
	virtio_break(q->owner, "queue %u: %s", virtq_index(q), q->why);
}

static void ring_dirty(struct virtq *q)
{
	struct virtio *v = q->owner;

	v->flushing = true;
	loop_at_turn_end(v->home, &v->flush);
}

static void flush_here(struct loop_task *t)
{
	struct virtio *v = container_of(t, struct virtio, flush);

	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (v->vq[i] && virtq_flush(v->vq[i])) {
			v->irqs++;
			v->port->queue_irq(v, i);
		}
	}
	v->flushing = false;    /* last: virtio_free() may be waiting for it */
}

/* Tell the device, unless its rings are not to be touched. */
static void notify(struct virtio *v, unsigned qi)
{
	if (v->running && !v->broken && v->vq[qi] && v->ops->notify)
		v->ops->notify(v, v->vq[qi]);
}

static void kicked_here(struct loop_event *e)
{
	struct virtio_bell *b = container_of(e, struct virtio_bell, event);
	struct virtio *v = b->v;
	unsigned qi = (unsigned)(b - v->bell);

	v->kicks++;
	if (v->vq[qi])
		virtq_moved(v->vq[qi]);         /* noted: the next look need not find it again */
	notify(v, qi);
}

static bool look_here(struct loop_poll *p)
{
	struct virtio *v = container_of(p, struct virtio, poll);
	bool any = false;

	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (!v->vq[i] || !virtq_moved(v->vq[i]))
			continue;
		any = true;
		notify(v, i);
	}
	return any;
}

static bool arm_here(struct loop_poll *p, bool on)
{
	struct virtio *v = container_of(p, struct virtio, poll);
	bool any = false;

	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (v->vq[i])
			(on ? virtq_arm : virtq_quiet)(v->vq[i]);
	}
	if (!on)
		return false;
	atomic_thread_fence(memory_order_seq_cst);
	for (unsigned i = 0; i < v->nr_queues; i++)
		any |= v->vq[i] && virtq_peek(v->vq[i]);
	return any;
}

/* The bells go on the loop at the first start, not at build: a VM's start does not wait for its loop. */
static int listen_here(struct virtio *v)
{
	if (v->listening)
		return 0;
	for (unsigned i = 0; i < v->nr_queues; i++) {
		int r = loop_add_event(v->home, &v->bell[i].event);

		if (r) {
			while (i--)
				loop_del_event(v->home, &v->bell[i].event);
			return r;
		}
	}
	v->listening = true;
	return 0;
}

static void drop_rings(struct virtio *v)
{
	for (unsigned i = 0; i < v->nr_queues; i++)
		v->vq[i] = NULL;
}

static int make_rings(struct virtio *v)
{
	for (unsigned i = 0; i < v->nr_queues; i++) {
		struct virtq *q = &v->rings[i];
		int r;

		if (!v->cfg[i].ready)
			continue;
		*q = (struct virtq){ .index = i, .on_dirty = ring_dirty, .on_broken = ring_broke,
			.owner = v };
		r = virtq_start(q, &v->cfg[i], v->mem, v->acked);
		if (r) {
			drop_rings(v);
			virtio_break(v, "queue %u: %s", i, q->why);
			return r;
		}
		v->vq[i] = q;
	}
	return 0;
}

static void start_here(void *arg)
{
	struct virtio *v = arg;
	int r;

	ON_LOOP(v->home);
	r = listen_here(v);
	if (r) {
		virtio_break(v, "cannot watch its doorbells: %s", strerror(-r));
		return;
	}
	if (make_rings(v))
		return;
	r = v->ops->start ? v->ops->start(v) : 0;
	if (r || v->broken) {
		virtio_break(v, "cannot start: %s", strerror(-r));
		if (!r && v->ops->stop)
			v->ops->stop(v);
		drop_rings(v);
		return;
	}
	v->running = true;
	loop_add_poll(v->home, &v->poll);
	for (unsigned i = 0; i < v->nr_queues; i++) {
		if (v->vq[i] && virtq_moved(v->vq[i]))
			notify(v, i);
	}
}

static void stop_here(void *arg)
{
	struct virtio *v = arg;

	ON_LOOP(v->home);
	loop_del_poll(v->home, &v->poll);
	if (v->ops->stop)
		v->ops->stop(v);
	v->running = false;
	drop_rings(v);
}

/* ---- transport half: under v->lock ---- */

const struct virtq_cfg *virtio_queue(struct virtio *v, uint32_t sel)
{
	if (sel < v->nr_queues)
		return &v->cfg[sel];
	v->ignored++;
	return NULL;
}

struct virtq_cfg *virtio_queue_edit(struct virtio *v, uint32_t sel)
{
	if (sel < v->nr_queues && !(v->status & VIRTIO_CONFIG_S_DRIVER_OK))
		return &v->cfg[sel];
	v->ignored++;
	return NULL;
}

uint32_t virtio_features(struct virtio *v, uint32_t sel)
{
	return sel < 2 ? (uint32_t)(v->features >> 32 * sel) : 0;
}

uint32_t virtio_accepted(struct virtio *v, uint32_t sel)
{
	return sel < 2 ? (uint32_t)(v->acked >> 32 * sel) : 0;
}

void virtio_ack_features(struct virtio *v, uint32_t sel, uint32_t bits)
{
	if (sel >= 2 || (v->status & VIRTIO_CONFIG_S_FEATURES_OK)) {
		v->ignored++;
		return;
	}
	v->acked &= ~(0xffffffffull << 32 * sel);
	v->acked |= (uint64_t)bits << 32 * sel;
}

uint8_t virtio_status(struct virtio *v)
{
	return v->status | (v->broken ? VIRTIO_CONFIG_S_NEEDS_RESET : 0);
}

static void reset(struct virtio *v)
{
	if (v->running)
		loop_call(v->home, stop_here, v);
	v->status = 0;
	v->acked = 0;
	v->isr = 0;
	v->broken = false;
	for (unsigned i = 0; i < v->nr_queues; i++)
		v->cfg[i] = (struct virtq_cfg){ .max = v->queue_size[i], .size = v->queue_size[i] };
}

void virtio_set_status(struct virtio *v, uint8_t status)
{
	uint8_t add = status & ~v->status & ~VIRTIO_CONFIG_S_NEEDS_RESET;

	if (!status) {
		reset(v);
		return;
	}
	/* virtio 1.2, 2.1.1: bits are only taken back by a reset; a driver that drops some means no harm */
	if ((add & VIRTIO_CONFIG_S_FEATURES_OK) &&
		((v->acked & ~v->features) || !(v->acked >> VIRTIO_F_VERSION_1 & 1))) {
		add &= ~VIRTIO_CONFIG_S_FEATURES_OK;
		v->ignored++;
	}
	if ((add & VIRTIO_CONFIG_S_DRIVER_OK) &&
		!((v->status | add) & VIRTIO_CONFIG_S_FEATURES_OK)) {
		add &= ~VIRTIO_CONFIG_S_DRIVER_OK;
		v->ignored++;
	}
	v->status |= add;
	if (!(add & VIRTIO_CONFIG_S_DRIVER_OK))
		return;
	if (!v->driver_ok_ns)
		v->driver_ok_ns = loop_now();
	loop_call(v->home, start_here, v);
}

uint32_t virtio_config_generation(struct virtio *v)
{
	uint32_t gen;

	/* Odd: the loop is storing a few bytes this instant. */
	while ((gen = v->config_gen) & 1)
		sched_yield();
	return gen >> 1;
}

uint64_t virtio_config_read(struct virtio *v, uint32_t off, unsigned size)
{
	uint64_t val = 0;

	for (unsigned i = 0; i < size && i < 8; i++) {
		if (off < v->config_len && i < v->config_len - off)
			val |= (uint64_t)v->config[off + i] << 8 * i;
	}
	return val;
}

struct config_write {
	struct virtio *v;
	uint32_t off;
	unsigned size;
	uint64_t val;
};

static void config_write_here(void *arg)
{
	struct config_write *w = arg;

	w->v->ops->config_write(w->v, w->off, w->size, w->val);
}

void virtio_config_write(struct virtio *v, uint32_t off, unsigned size, uint64_t val)
{
	struct config_write w = { v, off, size, val };

	if (!v->ops->config_write || off > v->config_len || size > v->config_len - off) {
		v->ignored++;
		return;
	}
	loop_call(v->home, config_write_here, &w);
}

void virtio_kick(struct virtio *v, uint32_t qi)
{
	uint64_t one = 1;

	/* EAGAIN would mean 2^64 kicks nobody took: the queue is due to be looked at all the same. */
	if (qi >= v->nr_queues || write(v->bell[qi].event.fd, &one, sizeof(one)) < 0)
		v->ignored++;
}

/* ---- the machine's: main thread ---- */

static void settle_here(void *arg)
{
	struct virtio *v = arg;

	if (v->running)
		look_here(&v->poll);
}

void virtio_settle(struct virtio *v)
{
	if (v->driver_ok_ns)    /* else nothing was ever made available */
		loop_call(v->home, settle_here, v);
}

void virtio_reset(struct virtio *v)
{
	pthread_mutex_lock(&v->lock);
	reset(v);
	pthread_mutex_unlock(&v->lock);
	v->port->reset(v);
}

static void unlisten_here(void *arg)
{
	struct virtio *v = arg;

	if (v->running)
		stop_here(v);
	for (unsigned i = 0; i < v->nr_queues && v->listening; i++)
		loop_del_event(v->home, &v->bell[i].event);
	v->listening = false;
}

void virtio_free(struct virtio *v)
{
	if (v->home) {
		/* A push of the last turn may have left a flush behind: it ends with that turn. */
		do
			loop_call(v->home, unlisten_here, v);
		while (v->flushing);
		v->port->free(v);
		virtio_detach(v);
	}
	pthread_mutex_destroy(&v->lock);
	v->ops->free(v);
}
