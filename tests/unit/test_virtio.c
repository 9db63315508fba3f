/* The virtio core and the MMIO transport, driven by the mock driver on both loop engines. */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "mock_driver.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/vm.h"

#define FEATURE   5
#define EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)
#define RUNS      (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | \
	VIRTIO_CONFIG_S_DRIVER_OK)

/* Copies what it is given into the room it is given. Queue 1 reads from a pipe instead, asynchronously. */
struct echo {
	struct virtio v;
	unsigned starts, stops, notifies;
	int fail_start;
	bool break_in_start;
	bool in_flight, cancelled;
	uint16_t head;
	struct iovec iov;
	struct loop_op op;
	int pipe[2];
};

static struct echo *echo_of(struct virtio *v)
{
	return container_of(v, struct echo, v);
}

static int echo_start(struct virtio *v)
{
	struct echo *e = echo_of(v);

	if (e->break_in_start)
		virtio_break(v, "on request");
	e->starts += !e->fail_start;
	return e->fail_start;
}

static void echo_stop(struct virtio *v)
{
	struct echo *e = echo_of(v);

	e->stops++;
	if (!e->in_flight)
		return;
	loop_cancel(v->home, &e->op);
	loop_drain(v->home, &e->cancelled);
}

static void pipe_done(struct loop_op *op, int res)
{
	struct echo *e = container_of(op, struct echo, op);

	e->in_flight = false;
	e->cancelled = true;
	virtq_push(e->v.vq[1], e->head, res > 0 ? (uint32_t)res : 0);
}

static void echo_notify(struct virtio *v, struct virtq *q)
{
	struct echo *e = echo_of(v);
	VIRTQ_CHAIN(c);
	uint8_t buf[256];

	ON_LOOP(v->home);
	e->notifies++;
	if (virtq_index(q) == 1) {
		if (e->in_flight || virtq_pop(q, &c) <= 0)
			return;
		e->head = c.head;
		e->iov = c.in.iov[0];
		e->in_flight = true;
		e->cancelled = false;
		e->op = (struct loop_op){ .kind = OP_READV, .fd = e->pipe[0], .off = (uint64_t)-1,
			.iov = &e->iov, .cnt = 1, .done = pipe_done };
		loop_submit(v->home, &e->op);
		return;
	}
	while (virtq_pop(q, &c) > 0) {
		size_t n = iov_read(&c.out, buf, sizeof(buf));

		virtq_push(q, c.head, (uint32_t)iov_write(&c.in, buf, n));
	}
}

static void echo_config_write(struct virtio *v, unsigned off, unsigned size, uint64_t val)
{
	ON_LOOP(v->home);
	virtio_config_set(v, off, &val, size);
}

static void echo_free(struct virtio *v)
{
	struct echo *e = echo_of(v);

	close(e->pipe[0]);
	close(e->pipe[1]);
	free(e);
}

static const struct virtio_ops echo_ops = {
	.name = "echo",
	.id = 42,
	.start = echo_start,
	.stop = echo_stop,
	.notify = echo_notify,
	.config_write = echo_config_write,
	.free = echo_free,
};

#define CONFIG_LEN 13

static struct mock *m;
static struct echo *echo;

static void begin(int engine)
{
	static const uint8_t config[CONFIG_LEN] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 };

	m = mock_new(engine ? LOOP_EPOLL : LOOP_URING);
	echo = calloc(1, sizeof(*echo));
	ck_assert_ptr_nonnull(echo);
	ck_assert_int_eq(pipe(echo->pipe), 0);
	virtio_init(&echo->v, &echo_ops, 1ull << FEATURE, CONFIG_LEN);
	virtio_add_queue(&echo->v, 128);
	virtio_add_queue(&echo->v, 16);
	virtio_config_set(&echo->v, 0, config, CONFIG_LEN);
	ck_assert_int_eq(vm_add_virtio(mock_vm(m), &echo->v, NULL), 0);
}

static void end(void)
{
	mock_free(m);
}

static void expect_echo(void)
{
	struct mock_buf out = { mock_alloc(m, 64), 64 }, in = { mock_alloc(m, 64), 64 };

	memset(mock_at(m, out.at, 64), 0x5a, 64);
	ck_assert_uint_eq(mock_request(m, 0, &out, 1, &in, 1), 64);
	ck_assert_mem_eq(mock_at(m, in.at, 64), mock_at(m, out.at, 64), 64);
}

START_TEST(test_lifecycle_start_work_reset_start_again)
{
	begin(_i);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_MAGIC_VALUE), 0x74726976);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_VERSION), 2);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_DEVICE_ID), 42);
	ck_assert(mock_init(m, ~0ull) >> FEATURE & 1);
	ck_assert_uint_eq(mock_status(m), RUNS);
	ck_assert_uint_ne(echo->v.driver_ok_ns, 0);
	expect_echo();
	mock_indirect(m, true);
	expect_echo();
	mock_reset(m);
	ck_assert_uint_eq(echo->stops, 1);
	ck_assert(!(mock_init(m, 0) >> FEATURE & 1));
	expect_echo();
	virtio_reset(&echo->v);         /* the machine's reset */
	ck_assert_uint_eq(mock_status(m), 0);
	ck_assert_uint_eq(echo->stops, 2);
	end();
}
END_TEST

START_TEST(test_buffers_from_before_the_start_are_noticed_without_a_kick)
{
	struct mock_buf in = { 0, 8 };

	begin(_i);
	mock_setup(m, ~0ull);
	in.at = mock_alloc(m, 8);
	mock_add(m, 0, NULL, 0, &in, 1);
	mock_write(m, VIRTIO_MMIO_STATUS, RUNS);
	ck_assert(mock_wait(m, 0, NULL, NULL));
	end();
}
END_TEST

START_TEST(test_one_turn_raises_one_interrupt)
{
	struct mock_buf in = { 0, 8 };

	begin(_i);
	mock_init(m, ~0ull);
	in.at = mock_alloc(m, 8);
	for (int i = 0; i < 100; i++)
		mock_add(m, 0, NULL, 0, &in, 1);
	mock_kick(m, 0);
	for (int i = 0; i < 100; i++)
		ck_assert(mock_wait(m, 0, NULL, NULL));
	/* The loop may have looked while chains were still being added, but never once a chain. */
	ck_assert_uint_le(echo->v.irqs, 20);
	end();
}
END_TEST

START_TEST(test_start_that_fails_needs_a_reset_and_is_not_stopped)
{
	begin(_i);
	echo->fail_start = -ENOMEM;
	mock_init(m, ~0ull);
	mock_wait_broken(m);
	mock_kick(m, 0);
	mock_reset(m);
	ck_assert_uint_eq(echo->stops, 0);
	echo->fail_start = 0;
	echo->break_in_start = true;
	mock_init(m, ~0ull);
	mock_wait_broken(m);
	mock_reset(m);
	ck_assert_uint_eq(echo->stops, echo->starts);
	echo->break_in_start = false;
	mock_init(m, ~0ull);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_broken_ring_needs_reset_and_a_reset_cures_it)
{
	struct mock_buf bad = { MOCK_HOLE, 8 };

	begin(_i);
	mock_init(m, ~0ull);
	expect_echo();
	mock_add(m, 0, NULL, 0, &bad, 1);
	mock_kick(m, 0);
	mock_wait_broken(m);
	ck_assert(!mock_wait(m, 0, NULL, NULL));
	mock_kick(m, 0);
	mock_kick(m, 1);
	mock_settle(m);
	ck_assert_uint_eq(echo->stops, 0);
	mock_init(m, ~0ull);
	ck_assert_uint_eq(echo->stops, 1);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row15_16_unusable_ring_is_refused_at_the_start)
{
	begin(_i);
	for (int i = 0; i < 4; i++) {
		mock_setup(m, ~0ull);
		mock_write(m, VIRTIO_MMIO_QUEUE_SEL, 0);
		mock_write(m, VIRTIO_MMIO_QUEUE_NUM, i == 0 ? 0 : i == 1 ? 256 : i == 2 ? 0x10040 : 64);
		if (i == 3)
			mock_write(m, VIRTIO_MMIO_QUEUE_USED_HIGH, 0x80000000);
		mock_write(m, VIRTIO_MMIO_STATUS, RUNS);
		mock_wait_broken(m);
	}
	ck_assert_uint_eq(echo->starts, 0);
	mock_init(m, ~0ull);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row20_kicks_of_absent_and_unready_queues_are_ignored)
{
	uint64_t ignored;

	begin(_i);
	mock_kick(m, 0);                /* nothing is set up */
	mock_setup(m, ~0ull);
	mock_write(m, VIRTIO_MMIO_QUEUE_SEL, 1);
	mock_write(m, VIRTIO_MMIO_QUEUE_READY, 0);
	mock_write(m, VIRTIO_MMIO_STATUS, RUNS);
	ignored = echo->v.ignored;
	mock_kick(m, 1);
	mock_kick(m, 2);
	mock_kick(m, 0xffffffff);
	mock_kick(m, 0x80000000);
	ck_assert_uint_eq(echo->v.ignored, ignored + 3);
	mock_settle(m);
	expect_echo();
	ck_assert_uint_eq(mock_status(m), RUNS);
	end();
}
END_TEST

START_TEST(test_row20_kick_storm_is_coalesced)
{
	begin(_i);
	mock_init(m, ~0ull);
	for (int i = 0; i < 200000; i++)
		mock_kick(m, 0);
	mock_settle(m);
	ck_assert_uint_le(echo->notifies, 200001);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row21_queue_setup_after_driver_ok_is_ignored_and_counted)
{
	uint64_t ignored;

	begin(_i);
	mock_init(m, ~0ull);
	ignored = echo->v.ignored;
	mock_write(m, VIRTIO_MMIO_QUEUE_SEL, 0);
	mock_write(m, VIRTIO_MMIO_QUEUE_NUM, 3);
	mock_write(m, VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead0001);
	mock_write(m, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 0xdead);
	mock_write(m, VIRTIO_MMIO_QUEUE_USED_LOW, 0xdead);
	mock_write(m, VIRTIO_MMIO_QUEUE_READY, 0);
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 0);
	ck_assert_uint_eq(echo->v.ignored, ignored + 6);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_QUEUE_READY), 1);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row22_queue_select_out_of_range_reads_zero_and_ignores_writes)
{
	static const uint32_t sels[] = { 2, 34, 65535, 0x80000000, 0xffffffff };

	begin(_i);
	mock_setup(m, ~0ull);
	for (size_t i = 0; i < ARRAY_LEN(sels); i++) {
		mock_write(m, VIRTIO_MMIO_QUEUE_SEL, sels[i]);
		ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
		ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_QUEUE_READY), 0);
		for (unsigned reg = VIRTIO_MMIO_QUEUE_NUM; reg < VIRTIO_MMIO_STATUS; reg += 4) {
			if (reg != VIRTIO_MMIO_QUEUE_NOTIFY && reg != VIRTIO_MMIO_INTERRUPT_ACK)
				mock_write(m, reg, 0xffffffff);
		}
		for (unsigned reg = VIRTIO_MMIO_QUEUE_DESC_LOW; reg <= VIRTIO_MMIO_QUEUE_USED_HIGH; reg += 4)
			mock_write(m, reg, 0xffffffff);
	}
	mock_write(m, VIRTIO_MMIO_STATUS, RUNS);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row23_driver_ok_needs_features_ok)
{
	begin(_i);
	mock_write(m, VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
		VIRTIO_CONFIG_S_DRIVER_OK);
	ck_assert_uint_eq(mock_status(m), VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
	ck_assert_uint_eq(echo->starts, 0);
	/* the driver cannot set NEEDS_RESET */
	mock_write(m, VIRTIO_MMIO_STATUS, 0x43);
	ck_assert_uint_eq(mock_status(m), 3);
	end();
}
END_TEST

START_TEST(test_row23_features_never_offered_are_refused)
{
	begin(_i);
	mock_write(m, VIRTIO_MMIO_STATUS, 3);
	mock_write(m, VIRTIO_MMIO_STATUS, 11);
	ck_assert_uint_eq(mock_status(m), 3);           /* VERSION_1 was not accepted */
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 1);
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 1 << (FEATURE + 1));
	mock_write(m, VIRTIO_MMIO_STATUS, 11);
	ck_assert_uint_eq(mock_status(m), 3);
	mock_write(m, VIRTIO_MMIO_STATUS, RUNS);
	ck_assert_uint_eq(mock_status(m), 3);
	mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 1 << FEATURE);
	mock_write(m, VIRTIO_MMIO_STATUS, 11);
	ck_assert_uint_eq(mock_status(m), 11);
	end();
}
END_TEST

START_TEST(test_row23_feature_select_past_64_bits_reads_zero)
{
	begin(_i);
	for (uint32_t sel = 2; sel; sel *= 2) {
		mock_write(m, VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
		ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_DEVICE_FEATURES), 0);
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 0xffffffff);
	}
	ck_assert_uint_eq(echo->v.acked, 0);
	end();
}
END_TEST

START_TEST(test_row24_reset_with_a_read_in_flight_leaves_guest_memory_alone)
{
	struct mock_buf in = { 0, 64 };
	uint8_t zero[64] = { 0 };

	begin(_i);
	mock_init(m, ~0ull);
	in.at = mock_alloc(m, 64);
	mock_add(m, 1, NULL, 0, &in, 1);
	mock_kick(m, 1);
	mock_settle(m);
	ck_assert(echo->in_flight);
	mock_reset(m);
	ck_assert(!echo->in_flight);
	ck_assert_int_eq(write(echo->pipe[1], "stray", 5), 5);
	mock_init(m, ~0ull);
	expect_echo();
	ck_assert_mem_eq(mock_at(m, in.at, 64), zero, 64);
	/* and it works again afterwards */
	ck_assert_uint_eq(mock_request(m, 1, NULL, 0, &in, 1), 5);
	ck_assert_mem_eq(mock_at(m, in.at, 5), "stray", 5);
	end();
}
END_TEST

START_TEST(test_freed_with_a_read_in_flight)
{
	struct mock_buf in = { 0, 64 };

	begin(_i);
	mock_init(m, ~0ull);
	in.at = mock_alloc(m, 64);
	mock_add(m, 1, NULL, 0, &in, 1);
	mock_kick(m, 1);
	mock_settle(m);
	ck_assert(echo->in_flight);
	end();
}
END_TEST

static unsigned open_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	ck_assert_ptr_nonnull(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

#define CYCLES 50000    /* by each of two vCPUs */

static void *reset_cycles(void *arg)
{
	for (int i = 0; i < CYCLES; i++) {
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
		mock_write(m, VIRTIO_MMIO_DRIVER_FEATURES, 1);
		mock_write(m, VIRTIO_MMIO_STATUS, 11);
		mock_write(m, VIRTIO_MMIO_STATUS, i % 8 ? 11 : RUNS);
		mock_kick(m, i & 3);
		mock_write(m, VIRTIO_MMIO_STATUS, 0);
	}
	return arg;
}

START_TEST(test_row25_100000_resets_from_two_vcpus_leak_nothing)
{
	pthread_t t;
	unsigned fds;

	begin(_i);
	mock_init(m, ~0ull);
	fds = open_fds();
	ck_assert_int_eq(pthread_create(&t, NULL, reset_cycles, NULL), 0);
	reset_cycles(NULL);
	pthread_join(t, NULL);
	ck_assert_uint_eq(open_fds(), fds);
	mock_reset(m);
	ck_assert_uint_eq(echo->starts, echo->stops);
	ck_assert_uint_ge(echo->starts, 100);
	mock_init(m, ~0ull);
	expect_echo();
	end();
}
END_TEST

START_TEST(test_row26_config_reads_stop_at_the_end_and_writes_past_it_are_ignored)
{
	uint64_t ignored;

	begin(_i);
	ck_assert_uint_eq(mock_config(m, 0, 1), 1);
	ck_assert_uint_eq(mock_config(m, 1, 2), 0x0302);
	ck_assert_uint_eq(mock_config(m, 3, 4), 0x07060504);
	ck_assert_uint_eq(mock_config(m, 0, 8), 0x0807060504030201);
	ck_assert_uint_eq(mock_config(m, 12, 4), 13);
	ck_assert_uint_eq(mock_config(m, 9, 8), 0x0d0c0b0a);
	ck_assert_uint_eq(mock_config(m, 13, 4), 0);
	ck_assert_uint_eq(mock_config(m, 248, 8), 0);
	mock_config_write(m, 2, 2, 0xbbaa);
	ck_assert_uint_eq(mock_config(m, 0, 8), 0x08070605bbaa0201);
	ignored = echo->v.ignored;
	mock_config_write(m, 10, 4, 0xffffffff);
	mock_config_write(m, 13, 1, 0xff);
	mock_config_write(m, 200, 8, ~0ull);
	ck_assert_uint_eq(echo->v.ignored, ignored + 3);
	ck_assert_uint_eq(mock_config(m, 8, 8), 0x0d0c0b0a09);
	end();
}
END_TEST

START_TEST(test_row27_registers_take_aligned_words_only)
{
	struct bus *b;
	uint64_t base, val;

	begin(_i);
	b = &mock_vm(m)->mmio;
	base = b->region[0]->base;
	for (unsigned size = 1; size <= 8; size *= 2) {
		bus_read(b, base + (size == 4 ? 2 : 0), size, &val);
		ck_assert_uint_eq(val, size == 8 ? ~0ull : (1ull << 8 * size) - 1);
		bus_write(b, base + VIRTIO_MMIO_STATUS + (size == 4 ? 2 : 0), size, 0x01010101);
	}
	ck_assert_uint_eq(mock_status(m), 0);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_SHM_LEN_LOW), 0xffffffff);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_SHM_BASE_HIGH), 0xffffffff);
	end();
}
END_TEST

static void change_config(struct loop_task *t)
{
	uint8_t x = 99;

	virtio_config_set(&echo->v, 0, &x, 1);
	virtio_config_changed(&echo->v);
	(void)t;
}

START_TEST(test_config_change_has_a_new_generation_and_an_interrupt)
{
	struct loop_task t = { .fn = change_config };
	uint32_t gen;

	begin(_i);
	gen = mock_read(m, VIRTIO_MMIO_CONFIG_GENERATION);
	loop_post(mock_vm(m)->io, &t);
	mock_init(m, ~0ull);
	mock_settle(m);
	ck_assert_uint_ne(mock_read(m, VIRTIO_MMIO_CONFIG_GENERATION), gen);
	gen = mock_read(m, VIRTIO_MMIO_CONFIG_GENERATION);
	loop_post(mock_vm(m)->io, &t);
	mock_wait_config(m);
	ck_assert_uint_ne(mock_read(m, VIRTIO_MMIO_CONFIG_GENERATION), gen);
	ck_assert_uint_eq(mock_config(m, 0, 1), 99);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
	end();
}
END_TEST

/* The doorbell rule of virtio 1.2, 2.7.7: ring only where the device asks for it. */
static bool doorbell_wanted(bool event_idx, uint16_t old)
{
	struct vring *r = mock_ring(m, 0);

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (event_idx)
		return vring_need_event(__atomic_load_n(&vring_avail_event(r), __ATOMIC_RELAXED),
			r->avail->idx, old);
	return !(__atomic_load_n(&r->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
}

START_TEST(test_polling_hands_over_to_doorbells_without_losing_one)
{
	struct mock_buf in = { 0, 8 };
	unsigned kicks = 0;

	for (int ev = 0; ev < 2; ev++) {
		begin(_i);
		mock_init(m, ev ? ~0ull : ~EVENT_IDX);
		in.at = mock_alloc(m, 8);
		srandom(7);
		for (int i = 0; i < 20000; i++) {
			unsigned n = 1 + random() % 3;
			uint16_t old = mock_ring(m, 0)->avail->idx;

			for (unsigned k = 0; k < n; k++)
				mock_add(m, 0, NULL, 0, &in, 1);
			/* some time for the loop to fall asleep, or not */
			if (doorbell_wanted(ev, old)) {
				mock_kick(m, 0);
				kicks++;
			}
			for (unsigned k = 0; k < n; k++)
				ck_assert(mock_wait(m, 0, NULL, NULL));
			for (volatile int spin = random() % 4096; spin; spin--)
				;
		}
		end();
	}
	ck_assert_uint_ge(kicks, 1);
}
END_TEST

#define ON_BOTH(fn) tcase_add_loop_test(tc, fn, 0, 2)

int main(void)
{
	Suite *s = suite_create("virtio");
	TCase *tc = tcase_create("virtio");
	SRunner *sr;
	int failed;

	ON_BOTH(test_lifecycle_start_work_reset_start_again);
	ON_BOTH(test_buffers_from_before_the_start_are_noticed_without_a_kick);
	ON_BOTH(test_one_turn_raises_one_interrupt);
	ON_BOTH(test_start_that_fails_needs_a_reset_and_is_not_stopped);
	ON_BOTH(test_broken_ring_needs_reset_and_a_reset_cures_it);
	ON_BOTH(test_row15_16_unusable_ring_is_refused_at_the_start);
	ON_BOTH(test_row20_kicks_of_absent_and_unready_queues_are_ignored);
	ON_BOTH(test_row20_kick_storm_is_coalesced);
	ON_BOTH(test_row21_queue_setup_after_driver_ok_is_ignored_and_counted);
	ON_BOTH(test_row22_queue_select_out_of_range_reads_zero_and_ignores_writes);
	ON_BOTH(test_row23_driver_ok_needs_features_ok);
	ON_BOTH(test_row23_features_never_offered_are_refused);
	ON_BOTH(test_row23_feature_select_past_64_bits_reads_zero);
	ON_BOTH(test_row24_reset_with_a_read_in_flight_leaves_guest_memory_alone);
	ON_BOTH(test_freed_with_a_read_in_flight);
	ON_BOTH(test_row25_100000_resets_from_two_vcpus_leak_nothing);
	ON_BOTH(test_row26_config_reads_stop_at_the_end_and_writes_past_it_are_ignored);
	ON_BOTH(test_row27_registers_take_aligned_words_only);
	ON_BOTH(test_config_change_has_a_new_generation_and_an_interrupt);
	ON_BOTH(test_polling_hands_over_to_doorbells_without_losing_one);
	tcase_set_timeout(tc, 240);
	suite_add_tcase(s, tc);
	sr = srunner_create(s);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
