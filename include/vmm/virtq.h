#ifndef VMM_VIRTQ_H
#define VMM_VIRTQ_H
/* Split virtqueues, device side (virtio 1.2, 2.7). Pop, work, push: a device needs no other verb. */
#include <stdbool.h>
#include <stdint.h>
#include "vmm/gmem.h"
#include "vmm/iov.h"

#define VIRTQ_MAX  1024         /* largest ring, in descriptors */
#define VIRTQ_SEGS 256          /* largest chain; a longer one breaks the ring */

struct virtq;

/* What the guest asked for; becomes a live queue only at DRIVER_OK. */
struct virtq_cfg {
	uint16_t max, size;
	bool ready;
	gpa_t desc, avail, used;
};

struct virtq_chain {
	uint16_t head;
	struct iov_view out, in;        /* driver-to-device bytes; device-to-driver room */
	struct iovec iov[VIRTQ_SEGS];
};

/* A chain on the stack: 4 KiB that hardened builds need not clear, virtq_pop() fills what counts. */
#define VIRTQ_CHAIN(name) __attribute__((uninitialized)) struct virtq_chain name

/* Home loop only. */

/*
 * Take the next chain: all or nothing. 1: a chain, every buffer proven to lie in RAM, readable before
 * writable, each descriptor fetched once. 0: empty; the doorbell is armed again unless the loop polls.
 * -EPROTO: the ring is broken and stays so until the device is reset.
 */
int virtq_pop(struct virtq *q, struct virtq_chain *c);

/* Give a popped chain back, written bytes of its device-to-driver room filled. Any order. */
void virtq_push(struct virtq *q, uint16_t head, uint32_t written);

/* Put the newest popped chain back unused (no room for it now). Newest first. */
void virtq_unpop(struct virtq *q, const struct virtq_chain *c);

/* True if a chain is waiting; does not arm the doorbell. */
bool virtq_waiting(const struct virtq *q);

/* Queue number within its device. */
unsigned virtq_index(const struct virtq *q);
#endif
