/*
 * The ring door under a hostile driver. The input is a list of operations: write guest RAM, offer chains,
 * pop, push in any order, flush, poll, reset. What a popped chain promises is checked here, and a device's
 * work is done on it, so that a sanitizer sees any byte that is not the guest's.
 */
#include <assert.h>
#include <linux/virtio_config.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "devices/virtio/virtq.h"

#define RAM   0x8000u
#define N     16
#define DESC  0x1000
#define AVAIL 0x2000
#define USED  0x3000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
	const uint8_t *p;
	size_t left;
};

static struct gmem mem = { .nr = 2, .fd = -1 };
static struct virtq q;
static uint16_t held[VIRTQ_MAX];        /* popped heads and their room */
static uint32_t room[VIRTQ_MAX];
static unsigned nr_held;

static uint8_t next(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->p++;
}

static uint16_t next16(struct input *in)
{
	uint8_t low = next(in);

	return (uint16_t)(low | next(in) << 8);
}

static struct vring_avail *avail(void)
{
	return (void *)(mem.region[0].host + AVAIL);
}

static void start(struct input *in)
{
	struct virtq_cfg cfg = { .max = N, .size = N, .ready = true, .desc = DESC, .avail = AVAIL,
		.used = USED };
	uint8_t how = next(in);
	uint64_t features = (uint64_t)(how & 1) << VIRTIO_RING_F_EVENT_IDX |
		(uint64_t)(how >> 1 & 1) << VIRTIO_RING_F_INDIRECT_DESC;

	/* All-ones bytes make it illegal: otherwise most inputs would end here. */
	if (how == 0xff) {
		cfg.size = next16(in);
		cfg.desc = (uint64_t)next16(in) << (next(in) & 48);
		cfg.avail = next16(in);
		cfg.used = next16(in);
	}
	nr_held = 0;
	if (virtq_start(&q, &cfg, &mem, features)) {
		cfg = (struct virtq_cfg){ .max = N, .size = N, .desc = DESC, .avail = AVAIL, .used = USED };
		assert(virtq_start(&q, &cfg, &mem, features) == 0);
	}
}

static void write_desc(struct input *in)
{
	unsigned at = next(in) % 64;    /* past the ring: an indirect table behind it */
	struct vring_desc d = { .addr = next16(in), .len = next(in), .flags = next(in) & 7,
		.next = next(in) % (N + 1) };
	uint8_t odd = next(in);

	if (odd == 0xff)
		d.addr |= (uint64_t)next16(in) << 48;
	if (odd == 0xfe)
		d.len = 0xffffff00 | d.len;
	if (odd == 0xfd)
		d.next = next16(in);
	memcpy(mem.region[0].host + DESC + 16 * at, &d, sizeof(d));
}

static void poke(struct input *in)
{
	uint16_t at = next16(in) % RAM;

	mem.region[0].host[at] = next(in);
}

static void offer(struct input *in)
{
	uint16_t head = next(in);
	struct vring_avail *a = avail();

	a->ring[a->idx % N] = head == 0xff ? next16(in) : head % N;
	a->idx++;
}

static void pop(void)
{
	struct virtq_chain c;
	uint8_t byte = 0x5a;
	uint32_t got = 0;
	size_t total;

	if (virtq_pop(&q, &c) <= 0)
		return;
	for (unsigned i = 0; i < nr_held; i++)
		assert(held[i] != c.head);
	total = c.out.len + c.in.len;
	assert(total && c.head < N && nr_held < N);
	room[nr_held] = (uint32_t)c.in.len;
	held[nr_held++] = c.head;
	while (c.in.len && got < 4096)
		got += (uint32_t)iov_write(&c.in, &byte, 1);
	while (c.out.len > 1 && total-- > 1)
		iov_read(&c.out, &byte, 1);
}

static void push(struct input *in)
{
	unsigned i;

	if (!nr_held)
		return;
	i = next(in) % nr_held;
	virtq_push(&q, held[i], room[i]);
	nr_held--;
	held[i] = held[nr_held];
	room[i] = room[nr_held];
}

static void operate(struct input *in)
{
	switch (next(in) % 12) {
	case 0:
		write_desc(in);
		break;
	case 1:
		offer(in);
		break;
	case 2:
	case 3:
		pop();
		break;
	case 4:
		push(in);
		break;
	case 5:
		virtq_flush(&q);
		break;
	case 6:
		poke(in);
		break;
	case 7:
		virtq_quiet(&q);
		break;
	case 8:
		virtq_arm(&q);
		assert(!q.polled);
		break;
	case 9:
		virtq_moved(&q);
		assert(q.broken || virtq_waiting(&q) || q.seen == q.next_avail);
		break;
	case 10:
		avail()->idx = next16(in);
		break;
	case 11:
		start(in);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };

	for (unsigned i = 0; i < mem.nr; i++) {
		if (!mem.region[i].host)
			mem.region[i] = (struct gmem_region){ .base = i ? 1ull << 48 : 0, .size = RAM,
				.host = aligned_alloc(4096, RAM) };
		if (!mem.region[i].host)
			return 0;
		memset(mem.region[i].host, 0, RAM);
	}
	start(&in);
	while (in.left) {
		operate(&in);
		assert((uint16_t)(q.next_avail - q.published) <= N || q.broken);
	}
	return 0;
}
