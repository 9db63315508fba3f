#ifndef VIRTQ_PRIV_H
#define VIRTQ_PRIV_H
/* A live split ring as the core sees it; devices know struct virtq only by name. */
#include <linux/virtio_ring.h>
#include "vmm/virtq.h"

struct virtq {
	/* const from virtq_start() to the next */
	const struct gmem *mem;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t size, index;
	bool event_idx, indirect;
	/* the core's; optional, home loop */
	void (*on_dirty)(struct virtq *q);      /* the first push after a flush */
	void (*on_broken)(struct virtq *q);     /* once, q->why says why */
	void *owner;

	/* home loop only */
	uint16_t seen;          /* avail.idx as last read; not beyond next_avail + size */
	uint16_t next_avail;    /* next entry to pop */
	uint16_t next_used;     /* next entry to fill */
	uint16_t published;     /* used.idx as the driver sees it */
	bool dirty;             /* next_used is ahead of published */
	bool signalled;         /* a flush has happened: the driver's used_event can be trusted */
	bool polled;            /* the loop looks by itself: leave the doorbell alone */
	bool silent;            /* without EVENT_IDX: NO_NOTIFY is set */
	bool broken;
	const char *why;
	bool inflight[VIRTQ_MAX];       /* by head */
	uint32_t room[VIRTQ_MAX];       /* by head: device-to-driver bytes */
};

/* All of these: home loop only. */

/*
 * Make q live on what the guest asked for. mem, features (accepted ones) are kept; index and the on_ hooks
 * are the caller's and survive. 0; -EINVAL: size or alignment; -EFAULT: a part is not in RAM. q->why says
 * which.
 */
int virtq_start(struct virtq *q, const struct virtq_cfg *c, const struct gmem *m,
	uint64_t features);

/* Publish what was pushed. True: the driver wants an interrupt (virtio 1.2, 2.7.7). */
bool virtq_flush(struct virtq *q);

/* True if the driver made buffers available since this, or a pop, last looked. */
bool virtq_moved(struct virtq *q);

/* The same without noting it. */
bool virtq_peek(const struct virtq *q);

/* The loop looks at the ring by itself from now on: ask for no doorbells. */
void virtq_quiet(struct virtq *q);

/* Ask for doorbells again. The caller fences, and then looks once more with virtq_peek(). */
void virtq_arm(struct virtq *q);

/* Stop using the ring: pops fail, pushes are taken back but not published. */
void virtq_break(struct virtq *q, const char *why);
#endif
