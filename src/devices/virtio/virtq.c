#include "virtq.h"
#include <assert.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <stdatomic.h>
#include <string.h>

/*
 * How this works. The ring lives in guest RAM and may change under us at any time, so every value is read
 * once, into a copy, checked, and only the copy is used. The driver's index is read when the known entries
 * are used up, not per pop: a batch costs one acquire. Three counters run freely modulo 2^16:
 *
 *      published <= next_used <= next_avail <= seen <= published + size
 *
 * The last inequality is what bounds a turn: a driver can have at most one ring of chains between what we
 * published and what it offers, so one that reuses chains it did not get back yet is caught here, however
 * fast it refills.
 *
 * Doorbells. With EVENT_IDX avail_event is left behind while we work (no doorbell) and is set to the next
 * entry when the ring ran empty (doorbell on the next one). Without it the NO_NOTIFY flag does the same.
 * While the loop polls, an empty ring does not arm: the loop arms all its rings before it sleeps.
 */

#define LOAD(p)         __atomic_load_n((p), __ATOMIC_RELAXED)
#define LOAD_ACQ(p)     __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define STORE(p, v)     __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define STORE_REL(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define FULL_FENCE()    atomic_thread_fence(memory_order_seq_cst)

static uint16_t *used_event(struct virtq *q)
{
	return &q->avail->ring[q->size];
}

static uint16_t *avail_event(struct virtq *q)
{
	return (uint16_t *)&q->used->ring[q->size];
}

static int refuse(struct virtq *q, int r, const char *why)
{
	q->why = why;
	return r;
}

int virtq_start(struct virtq *q, const struct virtq_cfg *c, const struct gmem *m,
	uint64_t features)
{
	uint16_t n = c->size;

	*q = (struct virtq){
		.mem = m,
		.size = n,
		.index = q->index,
		.on_dirty = q->on_dirty,
		.on_broken = q->on_broken,
		.owner = q->owner,
		.event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1,
		.indirect = features >> VIRTIO_RING_F_INDIRECT_DESC & 1,
	};
	if (!n || n > c->max || n > VIRTQ_MAX || (n & (n - 1)))
		return refuse(q, -EINVAL, "ring size is not a power of two within the maximum");
	/* virtio 1.2, 2.7: alignment of the three parts */
	if ((c->desc & 15) || (c->avail & 1) || (c->used & 3))
		return refuse(q, -EINVAL, "ring is misaligned");
	q->desc = gmem_at(m, c->desc, sizeof(struct vring_desc) * n);
	q->avail = gmem_at(m, c->avail, 6 + 2ull * n);
	q->used = gmem_at(m, c->used, 6 + 8ull * n);
	if (!q->desc || !q->avail || !q->used)
		return refuse(q, -EFAULT, "ring is not in RAM");
	return 0;
}

void virtq_break(struct virtq *q, const char *why)
{
	if (q->broken)
		return;
	q->broken = true;
	q->why = why;
	if (q->on_broken)
		q->on_broken(q);
}

static int broken(struct virtq *q, const char *why)
{
	virtq_break(q, why);
	return -EPROTO;
}

unsigned virtq_index(const struct virtq *q)
{
	return q->index;
}

/* Read the driver's index; -EPROTO if it cannot be. */
static int look(struct virtq *q)
{
	uint16_t idx = LOAD_ACQ(&q->avail->idx);

	if ((uint16_t)(idx - q->published) > q->size ||
		(uint16_t)(idx - q->next_avail) > q->size)
		return broken(q, "available index ran ahead");
	q->seen = idx;
	return 0;
}

bool virtq_waiting(const struct virtq *q)
{
	return !q->broken && (q->seen != q->next_avail || LOAD_ACQ(&q->avail->idx) != q->next_avail);
}

bool virtq_peek(const struct virtq *q)
{
	return !q->broken && LOAD(&q->avail->idx) != q->seen;
}

bool virtq_moved(struct virtq *q)
{
	return virtq_peek(q) && look(q) == 0;
}

void virtq_quiet(struct virtq *q)
{
	q->polled = true;
	if (q->event_idx || q->silent)
		return;
	STORE(&q->used->flags, VRING_USED_F_NO_NOTIFY);
	q->silent = true;
}

void virtq_arm(struct virtq *q)
{
	q->polled = false;
	/* virtio 1.2, 2.7.10: the doorbell rings when the driver fills the entry avail_event names */
	if (q->event_idx)
		STORE(avail_event(q), q->seen);
	else if (q->silent)
		STORE(&q->used->flags, 0);
	q->silent = false;
}

/* The known entries are used up: look for more; then arm and look again, so that no wakeup is lost. */
static int refill(struct virtq *q)
{
	int r = look(q);

	if (r || q->seen != q->next_avail || q->polled)
		return r;
	virtq_arm(q);
	FULL_FENCE();
	return look(q);
}

/* One descriptor, copied in one go; the barrier keeps the compiler from reading the original again. */
static inline struct vring_desc fetch(const struct vring_desc *table, unsigned i)
{
	struct vring_desc d;

	memcpy(&d, (const char *)table + sizeof(d) * i, sizeof(d));
	__asm__ volatile("" : "+m"(d));
	return d;
}

/* Progress of one walk over a chain. */
struct walk {
	const struct vring_desc *table;
	unsigned limit;                 /* entries of table */
	unsigned steps, segs, first_in;
	uint64_t out, in;
	bool nested;
};

static const char *enter_indirect(const struct virtq *q, struct walk *w, const struct vring_desc *d)
{
	/* virtio 1.2, 2.7.5.3: not nested, not together with NEXT */
	if (!q->indirect || w->nested || (d->flags & VRING_DESC_F_NEXT))
		return "indirect table not allowed here";
	if (!d->len || d->len % sizeof(*d) || d->len / sizeof(*d) > VIRTQ_SEGS)
		return "bad length of an indirect table";
	w->table = gmem_at(q->mem, d->addr, d->len);
	if (!w->table)
		return "indirect table is not in RAM";
	w->limit = d->len / sizeof(*d);
	w->nested = true;
	w->steps = 0;
	return NULL;
}

static const char *add_buffer(const struct virtq *q, struct walk *w, const struct vring_desc *d,
	struct iovec *iov)
{
	void *p;

	if (!d->len)
		return "empty buffer";
	p = gmem_at(q->mem, d->addr, d->len);
	if (!p)
		return "buffer is not in RAM";
	if (w->segs == VIRTQ_SEGS)
		return "chain is too long";
	if (d->flags & VRING_DESC_F_WRITE) {
		if (!w->in)
			w->first_in = w->segs;
		w->in += d->len;
	} else if (w->in) {
		return "readable buffer after a writable one";
	} else {
		w->out += d->len;
	}
	iov[w->segs++] = (struct iovec){ p, d->len };
	return NULL;
}

/* Collect the chain at c->head. NULL, or what is wrong with it. */
static const char *walk_chain(struct virtq *q, struct virtq_chain *c)
{
	struct walk w = { .table = q->desc, .limit = q->size };
	unsigned i = c->head;

	for (;;) {
		struct vring_desc d;
		const char *why;

		if (i >= w.limit)
			return "descriptor index out of range";
		if (w.steps++ == w.limit)
			return "descriptor loop";
		d = fetch(w.table, i);
		if (d.flags & VRING_DESC_F_INDIRECT) {
			why = enter_indirect(q, &w, &d);
			if (why)
				return why;
			i = 0;
			continue;
		}
		why = add_buffer(q, &w, &d, c->iov);
		if (why)
			return why;
		if (!(d.flags & VRING_DESC_F_NEXT))
			break;
		i = d.next;
	}
	if (w.out > UINT32_MAX || w.in > UINT32_MAX)
		return "chain longer than 4 GiB";
	if (!w.in)
		w.first_in = w.segs;
	c->out = (struct iov_view){ c->iov, w.first_in, 0, w.out };
	c->in = (struct iov_view){ c->iov + w.first_in, w.segs - w.first_in, 0, w.in };
	q->room[c->head] = (uint32_t)w.in;
	return NULL;
}

int virtq_pop(struct virtq *q, struct virtq_chain *c)
{
	const char *why;

	if (q->broken)
		return -EPROTO;
	if (q->seen == q->next_avail) {
		if (refill(q))
			return -EPROTO;
		if (q->seen == q->next_avail)
			return 0;
	}
	if (!q->event_idx && !q->silent) {
		STORE(&q->used->flags, VRING_USED_F_NO_NOTIFY);
		q->silent = true;
	}
	c->head = LOAD(&q->avail->ring[q->next_avail & (q->size - 1)]);
	if (c->head >= q->size)
		return broken(q, "head out of range");
	if (q->inflight[c->head])
		return broken(q, "head is already in flight");
	why = walk_chain(q, c);
	if (why)
		return broken(q, why);
	q->inflight[c->head] = true;
	q->next_avail++;
	return 1;
}

void virtq_unpop(struct virtq *q, const struct virtq_chain *c)
{
	assert(q->inflight[c->head]);
	q->inflight[c->head] = false;
	q->next_avail--;
}

void virtq_push(struct virtq *q, uint16_t head, uint32_t written)
{
	struct vring_used_elem *e = &q->used->ring[q->next_used & (q->size - 1)];

	assert(head < q->size && q->inflight[head] && written <= q->room[head]);
	q->inflight[head] = false;
	if (q->broken)
		return;
	STORE(&e->id, head);
	STORE(&e->len, written);
	q->next_used++;
	if (q->dirty)
		return;
	q->dirty = true;
	if (q->on_dirty)
		q->on_dirty(q);
}

bool virtq_flush(struct virtq *q)
{
	uint16_t old = q->published, new = q->next_used;
	bool first = !q->signalled;

	if (!q->dirty)
		return false;
	q->dirty = false;
	if (q->broken)
		return false;
	STORE_REL(&q->used->idx, new);
	/* virtio 1.2, 2.7.7.2: what the driver asks for is read after the index it may be waiting for */
	FULL_FENCE();
	q->published = new;
	q->signalled = true;
	if (!q->event_idx)
		return !(LOAD(&q->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
	return first || (uint16_t)(new - LOAD(used_event(q)) - 1) < (uint16_t)(new - old);
}
