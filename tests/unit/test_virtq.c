/* virtq: the ring door. Every rule of a split ring, and what happens to a driver that breaks it. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "unit.h"
#include "devices/virtio/virtq.h"
#include <linux/virtio_config.h>

#define N     64
#define RAM   (1u << 20)
#define DESC  0x1000
#define AVAIL 0x2000
#define USED  0x3000
#define TABLE 0x4000

#define EV (1ull << VIRTIO_RING_F_EVENT_IDX)
#define IN (1ull << VIRTIO_RING_F_INDIRECT_DESC)

static uint8_t *ram;
static struct gmem mem;
static struct virtq q;
static struct virtq_chain c;
static struct vring_desc *D, *T;
static struct vring_avail *A;
static struct vring_used *U;

static const struct virtq_cfg good = { .max = N, .size = N, .ready = true, .desc = DESC,
	.avail = AVAIL, .used = USED };

/* A live queue over zeroed RAM: one region here, a second one right behind it in the host's memory. */
static void fresh(uint64_t features)
{
	if (!ram)
		ram = mmap(NULL, 2 * RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ck_assert_ptr_ne(ram, MAP_FAILED);
	memset(ram, 0, 0x5000);
	mem = (struct gmem){ .nr = 2, .fd = -1,
		.region = { { 0, RAM, ram }, { 1ull << 32, RAM, ram + RAM } } };
	q = (struct virtq){ .index = 3 };
	ck_assert_int_eq(virtq_start(&q, &good, &mem, features), 0);
	D = (void *)(ram + DESC);
	T = (void *)(ram + TABLE);
	A = (void *)(ram + AVAIL);
	U = (void *)(ram + USED);
}

static void offer(uint16_t head)
{
	A->ring[A->idx % N] = head;
	A->idx++;
}

static void desc(struct vring_desc *d, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	*d = (struct vring_desc){ addr, len, flags, next };
}

#define NEXT VRING_DESC_F_NEXT
#define WR   VRING_DESC_F_WRITE
#define IND  VRING_DESC_F_INDIRECT

static void expect_broken(const char *why)
{
	ck_assert_int_eq(virtq_pop(&q, &c), -EPROTO);
	ck_assert(q.broken);
	ck_assert_str_eq(q.why, why);
	/* and it stays so, whatever the driver does next */
	desc(&D[0], 0x8000, 16, 0, 0);
	A->idx = q.next_avail + 1;
	ck_assert_int_eq(virtq_pop(&q, &c), -EPROTO);
}

START_TEST(test_pop_splits_a_chain_into_out_and_in)
{
	uint8_t header[16], seven = 7;
	struct iov_view status;
	struct iovec iov[4];

	fresh(EV | IN);
	ram[0x8003] = 42;
	desc(&D[0], 0x8000, 16, NEXT, 1);
	desc(&D[1], 0x9000, 512, NEXT, 2);
	desc(&D[2], 0xa000, 1, WR, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_uint_eq(c.out.len, 528);
	ck_assert_uint_eq(c.in.len, 1);
	ck_assert_uint_eq(iov_read(&c.out, header, 16), 16);
	ck_assert_uint_eq(header[3], 42);
	ck_assert_uint_eq(iov_export(&c.out, iov, 4), 1);
	ck_assert_uint_eq(iov[0].iov_len, 512);
	status = iov_take_back(&c.in, 1);
	ck_assert_uint_eq(iov_write(&status, &seven, 1), 1);
	ck_assert_uint_eq(ram[0xa000], 7);
	virtq_push(&q, c.head, 1);
	ck_assert_uint_eq(U->idx, 0);           /* not before the flush */
	ck_assert(virtq_flush(&q));
	ck_assert_uint_eq(U->idx, 1);
	ck_assert_uint_eq(U->ring[0].len, 1);
	ck_assert(!virtq_flush(&q));
	ck_assert_uint_eq(virtq_index(&q), 3);
}
END_TEST

START_TEST(test_pop_of_write_only_and_read_only_chains)
{
	fresh(0);
	desc(&D[4], 0x8000, 100, WR, 0);
	desc(&D[5], 0x9000, 200, 0, 0);
	offer(4);
	offer(5);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert(c.out.len == 0 && c.in.len == 100);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert(c.out.len == 200 && c.in.len == 0);
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
}
END_TEST

START_TEST(test_pop_follows_direct_buffers_into_an_indirect_table)
{
	fresh(IN);
	desc(&D[0], 0x8000, 16, NEXT, 7);
	/* virtio 1.2, 2.7.5.3.2: the write flag of the table's descriptor is ignored */
	desc(&D[7], TABLE + 4, 32, IND | WR, 0);
	memcpy(ram + TABLE + 4, &(struct vring_desc){ 0x9000, 8, NEXT, 1 }, 16);
	memcpy(ram + TABLE + 20, &(struct vring_desc){ 0xa000, 64, WR, 0 }, 16);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_uint_eq(c.out.len, 24);
	ck_assert_uint_eq(c.in.len, 64);
}
END_TEST

START_TEST(test_unpop_gives_the_same_chain_again)
{
	fresh(EV);
	desc(&D[9], 0x8000, 16, 0, 0);
	offer(9);
	ck_assert(virtq_waiting(&q));
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert(!virtq_waiting(&q));
	virtq_unpop(&q, &c);
	ck_assert(virtq_waiting(&q));
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_uint_eq(c.head, 9);
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
}
END_TEST

START_TEST(test_empty_pop_arms_the_doorbell)
{
	fresh(EV);
	desc(&D[0], 0x8000, 16, 0, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_uint_eq(*(uint16_t *)&U->ring[N], 0);         /* left behind while working */
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
	ck_assert_uint_eq(*(uint16_t *)&U->ring[N], 1);
	fresh(0);
	desc(&D[0], 0x8000, 16, 0, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_uint_eq(U->flags, VRING_USED_F_NO_NOTIFY);
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
	ck_assert_uint_eq(U->flags, 0);
}
END_TEST

START_TEST(test_polled_ring_leaves_the_doorbell_off_until_armed)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, 0, 0);
	virtq_quiet(&q);
	ck_assert_uint_eq(U->flags, VRING_USED_F_NO_NOTIFY);
	offer(0);
	ck_assert(virtq_moved(&q));
	ck_assert(!virtq_moved(&q));            /* told once */
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
	ck_assert_uint_eq(U->flags, VRING_USED_F_NO_NOTIFY);
	virtq_arm(&q);
	ck_assert_uint_eq(U->flags, 0);
	ck_assert(!virtq_peek(&q));
	offer(1);
	ck_assert(virtq_peek(&q) && virtq_peek(&q));
	fresh(EV);
	virtq_quiet(&q);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), -EPROTO);   /* D[0] is empty here: only to move on */
	fresh(EV);
	desc(&D[0], 0x8000, 16, 0, 0);
	virtq_quiet(&q);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	ck_assert_int_eq(virtq_pop(&q, &c), 0);
	ck_assert_uint_eq(*(uint16_t *)&U->ring[N], 0);
	virtq_arm(&q);
	ck_assert_uint_eq(*(uint16_t *)&U->ring[N], 1);
}
END_TEST

START_TEST(test_event_idx_interrupts_exactly_where_asked)
{
	fresh(EV);
	desc(&D[0], 0x8000, 16, WR, 0);
	A->ring[N] = 5;
	for (int i = 0; i < 8; i++) {
		offer(0);
		ck_assert_int_eq(virtq_pop(&q, &c), 1);
		virtq_push(&q, 0, 1);
		/* the first after a start always */
		ck_assert_int_eq(virtq_flush(&q), i == 0 || i == 5);
	}
}
END_TEST

START_TEST(test_no_interrupt_flag_is_honoured_without_event_idx)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, WR, 0);
	A->flags = VRING_AVAIL_F_NO_INTERRUPT;
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	virtq_push(&q, 0, 0);
	ck_assert(!virtq_flush(&q));
	A->flags = 0;
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	virtq_push(&q, 0, 0);
	ck_assert(virtq_flush(&q));
}
END_TEST

START_TEST(test_indexes_wrap_at_65536)
{
	fresh(EV);
	desc(&D[0], 0x8000, 16, WR, 0);
	for (unsigned i = 0; i < 200000; i++) {
		A->ring[N] = (uint16_t)i;
		offer(0);
		ck_assert_int_eq(virtq_pop(&q, &c), 1);
		virtq_push(&q, 0, 16);
		ck_assert(virtq_flush(&q));
	}
	ck_assert_uint_eq(U->idx, 200000 & 0xffff);
}
END_TEST

START_TEST(test_row1_descriptor_loops_break_the_ring)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, NEXT, 0);
	offer(0);
	expect_broken("descriptor loop");
	fresh(0);
	desc(&D[0], 0x8000, 16, NEXT, 1);
	desc(&D[1], 0x8000, 16, NEXT, 0);
	offer(0);
	expect_broken("descriptor loop");
	fresh(0);
	for (unsigned i = 0; i < N; i++)
		desc(&D[i], 0x8000, 16, NEXT, (i + 1) % N);
	offer(5);
	expect_broken("descriptor loop");
	fresh(IN);
	desc(&D[0], TABLE, 32, IND, 0);
	desc(&T[0], 0x8000, 16, NEXT, 1);
	desc(&T[1], 0x8000, 16, NEXT, 0);
	offer(0);
	expect_broken("descriptor loop");
}
END_TEST

START_TEST(test_row2_next_beyond_the_table_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, NEXT, N);
	offer(0);
	expect_broken("descriptor index out of range");
	fresh(IN);
	desc(&D[0], TABLE, 16, IND, 0);
	desc(&T[0], 0x8000, 16, NEXT, 1);
	offer(0);
	expect_broken("descriptor index out of range");
}
END_TEST

START_TEST(test_row3_head_beyond_the_ring_breaks_it)
{
	fresh(0);
	offer(N);
	expect_broken("head out of range");
	fresh(0);
	offer(0xffff);
	expect_broken("head out of range");
}
END_TEST

START_TEST(test_row4_index_running_ahead_breaks_the_ring)
{
	fresh(0);
	A->idx = N + 1;
	expect_broken("available index ran ahead");
	fresh(0);
	A->idx = 0xffff;
	expect_broken("available index ran ahead");
	fresh(0);
	A->idx = N + 1;
	ck_assert(!virtq_moved(&q));
	ck_assert(q.broken);
}
END_TEST

START_TEST(test_row5_a_turn_takes_at_most_one_ring_of_chains)
{
	unsigned n = 0;

	fresh(0);
	desc(&D[0], 0x8000, 16, WR, 0);
	/* A driver that refills as fast as we pop, and reuses what it did not get back yet. */
	do {
		offer(0);
		if (virtq_pop(&q, &c) <= 0)
			break;
		virtq_push(&q, c.head, 0);
	} while (++n < 10 * N);
	ck_assert_uint_eq(n, N);
	ck_assert(q.broken);
}
END_TEST

START_TEST(test_row6_busy_head_breaks_the_ring)
{
	fresh(EV);
	desc(&D[0], 0x8000, 16, 0, 0);
	offer(0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	expect_broken("head is already in flight");
}
END_TEST

START_TEST(test_row7_more_chains_than_the_ring_holds_break_it)
{
	fresh(0);
	for (unsigned i = 0; i < N; i++) {
		desc(&D[i], 0x8000, 16, 0, 0);
		offer(i);
		ck_assert_int_eq(virtq_pop(&q, &c), 1);
	}
	offer(0);
	expect_broken("available index ran ahead");
}
END_TEST

START_TEST(test_row8_wrapping_buffer_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], UINT64_MAX - 15, 32, 0, 0);
	offer(0);
	expect_broken("buffer is not in RAM");
	fresh(0);
	desc(&D[0], 0x8000, UINT32_MAX, 0, 0);
	offer(0);
	expect_broken("buffer is not in RAM");
}
END_TEST

START_TEST(test_row9_buffer_over_the_end_of_a_region_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], RAM - 8, 16, 0, 0);
	offer(0);
	expect_broken("buffer is not in RAM");
	fresh(0);
	desc(&D[0], (1ull << 32) - 8, 16, 0, 0);
	offer(0);
	expect_broken("buffer is not in RAM");
	fresh(0);
	desc(&D[0], 1ull << 32, RAM, WR, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);         /* up to the very end is fine */
}
END_TEST

START_TEST(test_row10_buffer_in_mmio_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], 0xfee00000, 4, WR, 0);
	offer(0);
	expect_broken("buffer is not in RAM");
}
END_TEST

START_TEST(test_row11_empty_buffer_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], 0x8000, 0, 0, 0);
	offer(0);
	expect_broken("empty buffer");
	fresh(0);
	desc(&D[0], 0x8000, 16, NEXT, 1);
	desc(&D[1], 0x8000, 0, WR, 0);
	offer(0);
	expect_broken("empty buffer");
}
END_TEST

START_TEST(test_row12_indirect_without_the_feature_breaks_the_ring)
{
	fresh(EV);
	desc(&D[0], TABLE, 16, IND, 0);
	desc(&T[0], 0x8000, 16, 0, 0);
	offer(0);
	expect_broken("indirect table not allowed here");
}
END_TEST

START_TEST(test_row13_malformed_indirect_breaks_the_ring)
{
	static const uint32_t lens[] = { 0, 1, 15, 17, 16 * (VIRTQ_SEGS + 1), 0xfffffff0 };

	fresh(IN);
	desc(&D[0], TABLE, 16, IND | NEXT, 1);
	offer(0);
	expect_broken("indirect table not allowed here");
	fresh(IN);
	desc(&D[0], TABLE, 16, IND, 0);
	desc(&T[0], TABLE, 16, IND, 0);
	offer(0);
	expect_broken("indirect table not allowed here");
	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		fresh(IN);
		desc(&D[0], TABLE, lens[i], IND, 0);
		offer(0);
		expect_broken("bad length of an indirect table");
	}
	fresh(IN);
	desc(&D[0], RAM - 16, 32, IND, 0);
	offer(0);
	expect_broken("indirect table is not in RAM");
}
END_TEST

START_TEST(test_row13_chain_longer_than_the_cap_breaks_the_ring)
{
	fresh(IN);
	for (unsigned i = 0; i < VIRTQ_SEGS; i++)
		desc(&T[i], 0x8000, 16, NEXT, i + 1);
	T[VIRTQ_SEGS - 1].flags = 0;
	desc(&D[0], TABLE, 16 * VIRTQ_SEGS, IND, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);         /* the cap itself is fine */
	ck_assert_uint_eq(c.out.len, 16 * VIRTQ_SEGS);
	desc(&D[1], 0x8000, 16, NEXT, 2);
	desc(&D[2], TABLE, 16 * VIRTQ_SEGS, IND, 0);
	offer(1);
	expect_broken("chain is too long");
}
END_TEST

START_TEST(test_row14_readable_after_writable_breaks_the_ring)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, WR | NEXT, 1);
	desc(&D[1], 0x9000, 16, 0, 0);
	offer(0);
	expect_broken("readable buffer after a writable one");
}
END_TEST

static int start_with(uint16_t size, gpa_t d, gpa_t a, gpa_t u)
{
	struct virtq_cfg cfg = { .max = N, .size = size, .ready = true, .desc = d, .avail = a, .used = u };

	return virtq_start(&q, &cfg, &mem, 0);
}

START_TEST(test_row15_ring_outside_ram_or_misaligned_is_refused)
{
	fresh(0);
	ck_assert_int_eq(start_with(N, RAM - 16 * N + 16, AVAIL, USED), -EFAULT);
	ck_assert_int_eq(start_with(N, DESC, RAM - 2 * N, USED), -EFAULT);
	ck_assert_int_eq(start_with(N, DESC, AVAIL, RAM - 8 * N), -EFAULT);
	ck_assert_int_eq(start_with(N, 0xc0000000, AVAIL, USED), -EFAULT);
	ck_assert_int_eq(start_with(N, DESC, AVAIL, UINT64_MAX - 3), -EFAULT);
	ck_assert_int_eq(start_with(N, DESC + 8, AVAIL, USED), -EINVAL);
	ck_assert_int_eq(start_with(N, DESC, AVAIL + 1, USED), -EINVAL);
	ck_assert_int_eq(start_with(N, DESC, AVAIL, USED + 2), -EINVAL);
	ck_assert_int_eq(start_with(N, RAM - 16 * N, AVAIL, USED), 0);
}
END_TEST

START_TEST(test_row15_overlapping_rings_harm_nobody)
{
	fresh(0);
	ck_assert_int_eq(start_with(N, DESC, DESC, DESC), 0);
	for (unsigned i = 0; i < 3 * N && virtq_pop(&q, &c) > 0; i++) {
		virtq_push(&q, c.head, 0);
		virtq_flush(&q);
	}
	ck_assert_int_eq(start_with(N, DESC, DESC + 256, DESC + 8), 0);
	desc((void *)(ram + DESC + 256), 0x00010001, 1, 1, 1);
	for (unsigned i = 0; i < 3 * N && virtq_pop(&q, &c) > 0; i++) {
		virtq_push(&q, c.head, 0);
		virtq_flush(&q);
	}
}
END_TEST

START_TEST(test_row16_bad_ring_size_is_refused)
{
	static const uint16_t sizes[] = { 0, 3, 63, 65, 2 * N, 0x8000, 0xffff };

	fresh(0);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		ck_assert_int_eq(start_with(sizes[i], DESC, AVAIL, USED), -EINVAL);
	for (uint16_t n = 1; n <= N; n *= 2)
		ck_assert_int_eq(start_with(n, DESC, AVAIL, USED), 0);
}
END_TEST

/* A second thread that rewrites what the first one is reading. */
static _Atomic bool flipping;

static void *flip(void *arg)
{
	volatile struct vring_desc *d = (void *)(ram + DESC);

	for (unsigned i = 0; flipping; i++) {
		d[0].addr = i & 1 ? 0x8000 : 0xdead0000;
		d[0].len = i & 2 ? 16 : 0xffffffff;
		d[0].flags = i & 4 ? WR : IND;
		d[1].next = (uint16_t)i;
	}
	return arg;
}

START_TEST(test_row17_descriptors_are_fetched_once)
{
	pthread_t t;

	fresh(IN);
	flipping = true;
	ck_assert_int_eq(pthread_create(&t, NULL, flip, NULL), 0);
	for (unsigned i = 0; i < 20000; i++) {
		q.broken = false;
		q.seen = A->idx = q.next_avail + 1;
		q.published = q.next_used = q.next_avail;
		if (virtq_pop(&q, &c) <= 0)
			continue;
		/* A chain that was let through is what was checked, however the ring looks by now. */
		ck_assert_uint_eq(c.out.len + c.in.len, 16);
		ck_assert_ptr_eq(c.iov[0].iov_base, ram + 0x8000);
		virtq_push(&q, c.head, (uint32_t)c.in.len);
	}
	flipping = false;
	pthread_join(t, NULL);
}
END_TEST

START_TEST(test_row18_used_length_is_what_the_device_said_not_the_guest)
{
	fresh(0);
	desc(&D[0], 0x8000, 100, WR, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	D[0].len = 5;           /* too late */
	virtq_push(&q, c.head, 100);
	virtq_flush(&q);
	ck_assert_uint_eq(U->ring[0].len, 100);
}
END_TEST

START_TEST(test_row19_any_event_value_only_moves_interrupts)
{
	unsigned interrupts = 0;

	fresh(EV);
	desc(&D[0], 0x8000, 16, WR, 0);
	srandom(19);
	for (unsigned i = 0; i < 100000; i++) {
		A->ring[N] = (uint16_t)random();
		A->flags = (uint16_t)random();
		*(uint16_t *)&U->ring[N] = (uint16_t)random();
		U->flags = 0xffff;
		U->idx = (uint16_t)random();    /* ours to write: a driver's scribble does not count */
		offer(0);
		ck_assert_int_eq(virtq_pop(&q, &c), 1);
		virtq_push(&q, 0, 1);
		interrupts += virtq_flush(&q);
		ck_assert_uint_eq(U->idx, (uint16_t)(i + 1));
	}
	ck_assert_uint_ge(interrupts, 1);
}
END_TEST

START_TEST(test_broken_ring_takes_pushes_back_but_publishes_nothing)
{
	fresh(0);
	desc(&D[0], 0x8000, 16, WR, 0);
	offer(0);
	ck_assert_int_eq(virtq_pop(&q, &c), 1);
	virtq_break(&q, "test");
	virtq_push(&q, c.head, 16);
	ck_assert(!virtq_flush(&q));
	ck_assert_uint_eq(U->idx, 0);
	ck_assert(!virtq_waiting(&q) && !virtq_moved(&q) && !virtq_peek(&q));
}
END_TEST

/* What an rng does, as small as a device gets. */
static void work(void)
{
	unsigned n = 0;

	while (virtq_pop(&q, &c) > 0) {
		uint8_t x = 0xa5;
		uint32_t got = 0;

		while (c.in.len)
			got += iov_write(&c.in, &x, 1);
		while (c.out.len)
			iov_read(&c.out, &x, 1);
		virtq_push(&q, c.head, got);
		ck_assert_uint_le(++n, N);
	}
}

START_TEST(test_200000_hostile_rings_neither_crash_nor_hang)
{
	unsigned broke = 0, clean = 0;

	srandom(1);
	for (int t = 0; t < 200000; t++) {
		fresh(random() & 1 ? EV | IN : IN);
		for (int i = 0; i < N; i++)
			desc(&D[i], random() & 7 ? random() % RAM & ~15u : (uint64_t)random() << 33 | random(),
				1 + random() % 300, random() % 16 ? random() & 3 : random() & 7,
				random() % (N + (random() & 1)));
		for (int i = 0; i < N; i++)
			T[i] = D[random() % N];
		A->idx = random() % (N + 2);
		for (int i = 0; i < N; i++)
			A->ring[i] = random() % (N + !(random() & 31));
		work();
		virtq_flush(&q);
		if (q.broken)
			broke++;
		else
			clean++;
	}
	ck_assert_uint_ge(broke, 1000);
	ck_assert_uint_ge(clean, 1000);
}
END_TEST

UNIT_MAIN("virtq", test_pop_splits_a_chain_into_out_and_in,
	test_pop_of_write_only_and_read_only_chains,
	test_pop_follows_direct_buffers_into_an_indirect_table, test_unpop_gives_the_same_chain_again,
	test_empty_pop_arms_the_doorbell, test_polled_ring_leaves_the_doorbell_off_until_armed,
	test_event_idx_interrupts_exactly_where_asked,
	test_no_interrupt_flag_is_honoured_without_event_idx, test_indexes_wrap_at_65536,
	test_row1_descriptor_loops_break_the_ring, test_row2_next_beyond_the_table_breaks_the_ring,
	test_row3_head_beyond_the_ring_breaks_it, test_row4_index_running_ahead_breaks_the_ring,
	test_row5_a_turn_takes_at_most_one_ring_of_chains, test_row6_busy_head_breaks_the_ring,
	test_row7_more_chains_than_the_ring_holds_break_it, test_row8_wrapping_buffer_breaks_the_ring,
	test_row9_buffer_over_the_end_of_a_region_breaks_the_ring,
	test_row10_buffer_in_mmio_breaks_the_ring, test_row11_empty_buffer_breaks_the_ring,
	test_row12_indirect_without_the_feature_breaks_the_ring,
	test_row13_malformed_indirect_breaks_the_ring,
	test_row13_chain_longer_than_the_cap_breaks_the_ring,
	test_row14_readable_after_writable_breaks_the_ring,
	test_row15_ring_outside_ram_or_misaligned_is_refused,
	test_row15_overlapping_rings_harm_nobody, test_row16_bad_ring_size_is_refused,
	test_row17_descriptors_are_fetched_once,
	test_row18_used_length_is_what_the_device_said_not_the_guest,
	test_row19_any_event_value_only_moves_interrupts,
	test_broken_ring_takes_pushes_back_but_publishes_nothing,
	test_200000_hostile_rings_neither_crash_nor_hang)
