/*
 * The gate in front of a disk, in a world of its own: time stands still unless moved, timers are a short list
 * (--wrap), and the image is a list of requests that a test ends when it likes.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "block/format.h"
#include "block/gate.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"

#define MS     1000000ull
#define SECOND 1000000000ull
#define MANY   4096

static struct gate *gate;
static struct error err;

/* ---- time ---- */

static uint64_t now;
static struct loop_timer *timers[8];

uint64_t __wrap_loop_now(void);
bool __wrap_loop_here(const struct loop *l);
void __wrap_loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns);
void __wrap_loop_del_timer(struct loop *l, struct loop_timer *t);

uint64_t __wrap_loop_now(void)
{
	return now;
}

bool __wrap_loop_here(const struct loop *l)
{
	(void)l;
	return true;
}

void __wrap_loop_del_timer(struct loop *l, struct loop_timer *t)
{
	(void)l;
	for (unsigned i = 0; i < ARRAY_LEN(timers); i++)
		if (timers[i] == t)
			timers[i] = NULL;
}

void __wrap_loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns)
{
	__wrap_loop_del_timer(l, t);
	t->at_ns = at_ns;
	for (unsigned i = 0; i < ARRAY_LEN(timers); i++) {
		if (!timers[i]) {
			timers[i] = t;
			return;
		}
	}
	ck_abort_msg("too many timers");
}

static struct loop_timer *next_timer(void)
{
	struct loop_timer *t = NULL;

	for (unsigned i = 0; i < ARRAY_LEN(timers); i++)
		if (timers[i] && (!t || timers[i]->at_ns < t->at_ns))
			t = timers[i];
	return t;
}

/* late_ns: how late each timer is noticed. */
static void run_late(uint64_t until, uint64_t late_ns)
{
	struct loop_timer *t;

	while ((t = next_timer()) && t->at_ns <= until) {
		now = MAX(now, t->at_ns + late_ns);
		__wrap_loop_del_timer(NULL, t);
		t->fn(t);
	}
	now = MAX(now, until);
}

static void run_until(uint64_t until)
{
	run_late(until, 0);
}

/* ---- the image and the requester ---- */

struct req {
	struct blk_req r;
	struct iovec iov[4];
	unsigned passed, ended;
	uint64_t passed_ns, ended_ns, passed_len;
	int err;
};

static struct req reqs[MANY], *passed[MANY];
static unsigned nr_passed;
static bool by_hand;            /* else the image ends each request at once */
static int image_err;
static uint8_t data[64 << 10];

static void pass(struct blk_req *r)
{
	struct req *q = container_of(r, struct req, r);

	q->passed++;
	q->passed_ns = now;
	q->passed_len = r->len;
	passed[nr_passed++ % MANY] = q;
	for (unsigned i = 0; i < r->cnt; i++)   /* the image consumes them */
		r->iov[i] = (struct iovec){ NULL, 0 };
	if (!by_hand)
		gate_leave(gate, r, image_err, false);
}

static void end(struct blk_req *r, int error)
{
	struct req *q = container_of(r, struct req, r);

	q->ended++;
	q->ended_ns = now;
	q->err = error;
}

static int try_open(const char *keys)
{
	const struct gate_door door = { "test.img", pass, end };
	struct opts *o;
	int r;

	memset(reqs, 0, sizeof(reqs));
	memset(timers, 0, sizeof(timers));
	nr_passed = 0;
	by_hand = false;
	image_err = 0;
	now = 1000 * SECOND;
	gate = NULL;
	ck_assert_int_eq(opts_parse(&o, "--disk", keys, "file", &err), 0);
	r = gate_new(&gate, o, &door, &err);
	if (!r && gate)
		gate_set_home(gate, NULL);
	opts_free(o);
	return r;
}

static void open_gate(const char *keys)
{
	ck_assert_msg(try_open(keys) == 0, "%s", err.msg);
	ck_assert_ptr_nonnull(gate);
}

static void close_gate(void)
{
	gate_drain(gate);
	gate_drained(gate);
	gate_free(gate);
}

static struct req *enter(unsigned i, enum blk_op op, uint64_t sector, uint32_t sectors)
{
	struct req *q = &reqs[i];

	*q = (struct req){ .r = { .op = op, .off = sector * 512, .len = sectors * 512ull } };
	if (op == BLK_READ || op == BLK_WRITE) {
		q->r.iov = q->iov;
		q->r.cnt = sectors > 1 ? 2 : 1;
		q->iov[0] = (struct iovec){ data, 512 };
		q->iov[1] = (struct iovec){ data + 512, (sectors - 1) * 512ull };
	}
	gate_enter(gate, &q->r);
	return q;
}

static int once(enum blk_op op, uint64_t sector, uint32_t sectors)
{
	struct req *q = enter(0, op, sector, sectors);

	ck_assert_uint_eq(q->ended, 1);
	ck_assert_uint_eq(q->r.len, sectors * 512ull);
	return q->err;
}

/* The numbers (from 1) of the writes of n that failed, as text. */
static const char *failures(unsigned n, enum blk_op op)
{
	static char text[400];
	size_t at = 0;

	text[0] = '\0';
	for (unsigned i = 1; i <= n; i++)
		if (once(op, i, 1))
			at += (size_t)snprintf(text + at, sizeof(text) - at, "%u ", i);
	return text;
}

static uint64_t fact(const char *name)
{
	struct facts *f = facts_new();
	auto_free char *text = NULL;
	char key[64];
	const char *at;

	gate_describe(gate, f);
	text = facts_text(f);
	facts_free(f);
	snprintf(key, sizeof(key), "\"%s\":", name);
	at = strstr(text, key);
	ck_assert_msg(at, "%s in %s", name, text);
	return strtoull(at + strlen(key), NULL, 10);
}

/* ---- faults ---- */

START_TEST(test_a_disk_that_asks_for_nothing_has_no_gate)
{
	ck_assert_int_eq(try_open("x.img,seed=3,timeout=5,werror=report"), 0);
	ck_assert_ptr_null(gate);
}
END_TEST

START_TEST(test_faults_hit_the_request_that_their_conditions_name)
{
	open_gate("fault=write:eio:at=3");
	ck_assert_str_eq(failures(10, BLK_WRITE), "3 ");
	ck_assert_uint_eq(reqs[0].passed, 1);
	ck_assert_uint_eq(fact("faults"), 1);
	close_gate();
	open_gate("fault=write:enospc:every=4:times=2");
	ck_assert_str_eq(failures(20, BLK_READ), "");
	ck_assert_str_eq(failures(20, BLK_WRITE), "4 8 ");
	close_gate();
	open_gate("fault=read:eio:sector=5-7");
	ck_assert_str_eq(failures(10, BLK_READ), "5 6 7 ");
	ck_assert_int_eq(once(BLK_READ, 0, 6), -EIO);
	ck_assert_int_eq(once(BLK_READ, 0, 5), 0);
	ck_assert_int_eq(once(BLK_READ, 7, 4), -EIO);
	ck_assert_int_eq(once(BLK_WRITE, 5, 1), 0);
	close_gate();
	open_gate("fault=read:eio:sector=6:every=2");
	ck_assert_str_eq(failures(6, BLK_READ), "6 ");
	ck_assert_int_eq(once(BLK_READ, 6, 1), 0);
	ck_assert_int_eq(once(BLK_READ, 6, 1), -EIO);
	close_gate();
}
END_TEST

START_TEST(test_an_error_keeps_the_image_untouched_and_says_what_it_was_told)
{
	open_gate("fault=write:enospc:at=1,fault=flush:eio:at=1,fault=discard:eio");
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), -ENOSPC);
	ck_assert_int_eq(once(BLK_FLUSH, 0, 0), -EIO);
	ck_assert_int_eq(once(BLK_DISCARD, 0, 8), -EIO);
	ck_assert_uint_eq(nr_passed, 0);
	ck_assert_int_eq(once(BLK_FLUSH, 0, 0), 0);
	ck_assert_int_eq(once(BLK_ZERO, 0, 8), 0);
	ck_assert_int_eq(once(BLK_DISCARD, 0, 8), -EIO);
	ck_assert_uint_eq(nr_passed, 2);
	close_gate();
	open_gate("fault=write:eio:at=1");              /* zeroes are a write */
	ck_assert_int_eq(once(BLK_ZERO, 0, 8), -EIO);
	close_gate();
}
END_TEST

static void chance_list(const char *keys, char *to, size_t size)
{
	open_gate(keys);
	snprintf(to, size, "%s", failures(600, BLK_READ));
	close_gate();
}

START_TEST(test_the_same_seed_is_the_same_run)
{
	char a[400], b[400], c[400], d[400];

	chance_list("fault=read:eio:p=0.02,seed=7", a, sizeof(a));
	chance_list("fault=read:eio:p=0.02,seed=7", b, sizeof(b));
	chance_list("fault=read:eio:p=0.02,seed=8", c, sizeof(c));
	chance_list("fault=read:eio:p=0.02,fault=read:eio:at=601:p=0.5,seed=7", d, sizeof(d));
	ck_assert_str_eq(a, b);
	ck_assert_str_ne(a, c);
	ck_assert_str_eq(a, d);         /* another fault does not move this one's */
	ck_assert_str_ne(a, "");
	open_gate("fault=read:eio:p=0.25,seed=1");
	for (unsigned i = 0; i < 8000; i++)
		once(BLK_READ, i, 1);
	ck_assert_uint_ge(fact("faults"), 1880);
	ck_assert_uint_le(fact("faults"), 2120);
	close_gate();
}
END_TEST

START_TEST(test_a_torn_write_leaves_a_prefix_of_sectors_and_fails)
{
	unsigned seen = 0;

	open_gate("fault=write:torn");
	for (unsigned i = 0; i < 200; i++) {
		struct req *q = &reqs[0];

		nr_passed = 0;
		ck_assert_int_eq(once(BLK_WRITE, 8, 8), -EIO);
		ck_assert_uint_eq(q->passed_len % 512, 0);
		ck_assert_uint_le(q->passed_len, 7 * 512);
		ck_assert_uint_eq(q->passed, q->passed_len > 0);
		if (q->passed)
			ck_assert_uint_eq(q->r.cnt, q->passed_len > 512 ? 2 : 1);
		seen |= 1u << q->passed_len / 512;
	}
	ck_assert_uint_eq(seen, 0xff);
	ck_assert_int_eq(once(BLK_WRITE, 8, 1), -EIO);
	ck_assert_uint_eq(reqs[0].passed, 0);
	close_gate();
}
END_TEST

START_TEST(test_a_timeout_is_answered_after_its_time_or_at_a_reset)
{
	struct req *q, *other;

	open_gate("fault=read:timeout:at=1");
	q = enter(0, BLK_READ, 0, 1);
	other = enter(1, BLK_READ, 0, 1);
	ck_assert_uint_eq(other->ended, 1);
	run_until(now + 60 * SECOND - 1);
	ck_assert_uint_eq(q->ended, 0);
	run_until(now + 1);
	ck_assert_uint_eq(q->ended, 1);
	ck_assert_int_eq(q->err, -ETIMEDOUT);
	ck_assert_uint_eq(q->passed, 0);
	close_gate();
	open_gate("fault=write:timeout,timeout=5");
	q = enter(0, BLK_WRITE, 0, 1);
	run_until(now + 5 * SECOND);
	ck_assert_uint_eq(q->ended, 1);
	q = enter(0, BLK_WRITE, 0, 1);
	close_gate();
	ck_assert_uint_eq(q->ended, 1);
	ck_assert_int_eq(q->err, -ETIMEDOUT);
}
END_TEST

/* ---- delays ---- */

START_TEST(test_a_delay_holds_each_request_back_and_keeps_their_order)
{
	uint64_t start;

	open_gate("delay=5ms");
	start = now;
	for (unsigned i = 0; i < 20; i++) {
		enter(i, i % 2 ? BLK_READ : BLK_WRITE, i, 1);
		run_until(start + (i + 1) * MS);
	}
	run_until(start + SECOND);
	ck_assert_uint_eq(nr_passed, 20);
	for (unsigned i = 0; i < 20; i++) {
		ck_assert_ptr_eq(passed[i], &reqs[i]);
		ck_assert_uint_eq(reqs[i].passed_ns, start + (i + 5) * MS);
	}
	ck_assert_uint_eq(fact("delayed"), 20);
	close_gate();
}
END_TEST

START_TEST(test_a_delay_can_be_of_one_kind_and_vary)
{
	uint64_t least = UINT64_MAX, most = 0;

	open_gate("delay=read:20us-60us,delay=flush:3ms");
	enter(0, BLK_WRITE, 0, 1);
	ck_assert_uint_eq(reqs[0].ended, 1);
	enter(0, BLK_FLUSH, 0, 0);
	run_until(now + 3 * MS - 1);
	ck_assert_uint_eq(reqs[0].ended, 0);
	run_until(now + 1);
	ck_assert_uint_eq(reqs[0].ended, 1);
	for (unsigned i = 0; i < 500; i++) {
		uint64_t start = now, took;

		enter(0, BLK_READ, 0, 1);
		run_until(now + MS);
		took = reqs[0].passed_ns - start;
		least = MIN(least, took);
		most = MAX(most, took);
	}
	ck_assert_uint_ge(least, 20000);
	ck_assert_uint_lt(least, 22000);
	ck_assert_uint_le(most, 60000);
	ck_assert_uint_gt(most, 58000);
	close_gate();
}
END_TEST

/* ---- limits ---- */

/* How many of a full queue of depth 32 go within ten seconds, after the first burst. */
static unsigned rate(const char *keys, enum blk_op op, uint32_t sectors, uint64_t late_ns)
{
	uint64_t start;
	unsigned n = 0;

	open_gate(keys);
	for (unsigned i = 0; i < 32; i++)
		enter(i, op, 0, sectors);
	for (start = now; now < start + 11 * SECOND;) {
		struct loop_timer *t = next_timer();

		run_late(t ? t->at_ns : now, late_ns);
		for (unsigned i = 0; i < 32; i++) {
			if (!reqs[i].ended)
				continue;
			n += now >= start + SECOND;
			enter(i, op, 0, sectors);
		}
	}
	close_gate();
	return n;
}

static void near(unsigned n, unsigned want)
{
	ck_assert_msg(n * 100 >= want * 98 && n * 100 <= want * 102, "%u, not %u", n, want);
}

START_TEST(test_limits_hold_their_rate_within_two_percent)
{
	near(rate("iops=1000", BLK_READ, 8, 0), 10000);
	near(rate("iops=1000", BLK_READ, 8, 700000), 10000);    /* timers that are late do not matter */
	near(rate("iops=7", BLK_WRITE, 8, 100000), 70);
	near(rate("iops_wr=333", BLK_WRITE, 8, 0), 3330);
	near(rate("bps=1M", BLK_WRITE, 8, 50000), 2560);
	near(rate("bps_rd=10M", BLK_READ, 128, 50000), 1600);
	near(rate("bps=640K", BLK_WRITE, 128, 0), 100);
	near(rate("iops=1000,bps=1M", BLK_WRITE, 8, 0), 2560);
	near(rate("iops=100,iops_max=500", BLK_WRITE, 8, 0), 1000);
}
END_TEST

START_TEST(test_a_burst_is_as_large_as_its_bucket_and_fills_again)
{
	open_gate("iops=100,iops_max=40");
	for (unsigned i = 0; i < 60; i++)
		enter(i, BLK_WRITE, 0, 1);
	ck_assert_uint_eq(nr_passed, 40);
	run_until(now + 10 * MS);
	ck_assert_uint_eq(nr_passed, 41);
	run_until(now + SECOND);
	ck_assert_uint_eq(nr_passed, 60);
	for (unsigned i = 0; i < 60; i++)
		enter(i, BLK_WRITE, 0, 1);
	ck_assert_uint_eq(nr_passed, 100);
	close_gate();
	open_gate("bps=1M,bps_max=256K");
	for (unsigned i = 0; i < 8; i++)
		enter(i, BLK_WRITE, 0, 128);
	ck_assert_uint_eq(nr_passed, 5);        /* the one that empties it goes, too */
	close_gate();
}
END_TEST

START_TEST(test_limits_are_first_come_first_served_but_reads_do_not_wait_for_writes)
{
	open_gate("iops_wr=10,iops_rd=1000");
	for (unsigned i = 0; i < 20; i++)
		enter(i, BLK_WRITE, 0, 1);
	for (unsigned i = 20; i < 40; i++)
		enter(i, BLK_READ, 0, 1);
	enter(40, BLK_FLUSH, 0, 0);
	ck_assert_uint_eq(reqs[40].ended, 1);
	run_until(now + 30 * MS);
	for (unsigned i = 20; i < 40; i++)
		ck_assert_uint_eq(reqs[i].ended, 1);
	run_until(now + 5 * SECOND);
	for (unsigned i = 1; i < 20; i++)
		ck_assert_uint_gt(reqs[i].passed_ns, reqs[i - 1].passed_ns);
	close_gate();
	open_gate("iops=10");
	for (unsigned i = 0; i < 20; i++)
		enter(i, i % 3 ? BLK_WRITE : BLK_READ, 0, 1);
	run_until(now + 5 * SECOND);
	for (unsigned i = 0; i < 20; i++)
		ck_assert_ptr_eq(passed[i], &reqs[i]);
	close_gate();
}
END_TEST

/* ---- error policy ---- */

static int held = -1;
static unsigned hold_calls;

static void on_hold(void *arg, bool on)
{
	(void)arg;
	held = on;
	hold_calls++;
}

static void open_policy(const char *keys)
{
	open_gate(keys);
	gate_set_hold(gate, on_hold, NULL);
	held = 0;
	hold_calls = 0;
}

START_TEST(test_report_and_ignore)
{
	open_policy("fault=write:eio:at=1,werror=report");
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), -EIO);
	close_gate();
	open_policy("werror=ignore");
	image_err = -ENOSPC;
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), 0);
	ck_assert_int_eq(once(BLK_FLUSH, 0, 0), 0);
	ck_assert_int_eq(once(BLK_READ, 0, 1), -ENOSPC);
	ck_assert_uint_eq(fact("errors_ignored"), 2);
	image_err = -EOPNOTSUPP;
	ck_assert_int_eq(once(BLK_DISCARD, 0, 1), -EOPNOTSUPP);         /* not an error: the driver asks */
	close_gate();
	open_policy("rerror=ignore");
	image_err = -EIO;
	ck_assert_int_eq(once(BLK_READ, 0, 1), 0);
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), -EIO);
	close_gate();
	ck_assert_uint_eq(hold_calls, 0);
}
END_TEST

START_TEST(test_stop_keeps_the_request_and_tries_again_each_second_until_it_works)
{
	open_policy("werror=stop");
	image_err = -ENOSPC;
	enter(0, BLK_WRITE, 0, 4);
	ck_assert_int_eq(held, 1);
	ck_assert_uint_eq(fact("stops"), 1);
	run_until(now + 3 * SECOND + MS);
	ck_assert_uint_eq(reqs[0].passed, 4);
	ck_assert_uint_eq(reqs[0].ended, 0);
	ck_assert_uint_eq(hold_calls, 1);
	image_err = 0;
	run_until(now + SECOND);
	ck_assert_uint_eq(reqs[0].passed, 5);
	ck_assert_uint_eq(reqs[0].ended, 1);
	ck_assert_int_eq(reqs[0].err, 0);
	ck_assert_int_eq(held, 0);
	ck_assert_uint_eq(hold_calls, 2);
	ck_assert_uint_eq(fact("retries"), 4);
	ck_assert_ptr_null(next_timer());
	close_gate();
}
END_TEST

static unsigned whole;

static void check_buffers(struct blk_req *r)
{
	whole += r->cnt == 2 && r->iov[0].iov_base == data && r->iov[0].iov_len == 512 &&
		r->iov[1].iov_base == data + 512 && r->iov[1].iov_len == 3 * 512;
	pass(r);
}

START_TEST(test_a_retry_has_all_of_the_buffers_again)
{
	const struct gate_door door = { "test.img", check_buffers, end };
	struct opts *o;

	try_open("werror=stop");
	gate_free(gate);
	ck_assert_int_eq(opts_parse(&o, "--disk", "werror=stop,fault=write:torn:at=2", "file", &err), 0);
	ck_assert_int_eq(gate_new(&gate, o, &door, &err), 0);
	opts_free(o);
	whole = 0;
	image_err = -EIO;
	enter(0, BLK_WRITE, 0, 4);
	run_until(now + 2 * SECOND);
	ck_assert_uint_eq(whole, 2);    /* not the torn one */
	image_err = 0;
	run_until(now + SECOND);
	ck_assert_uint_eq(whole, 3);
	ck_assert_uint_eq(reqs[0].ended, 1);
	ck_assert_uint_eq(reqs[0].r.len, 2048);
	close_gate();
}
END_TEST

START_TEST(test_several_stopped_requests_go_on_in_order_and_the_machine_after_the_last)
{
	open_policy("werror=stop");
	image_err = -EIO;
	for (unsigned i = 0; i < 5; i++)
		enter(i, BLK_WRITE, i, 1);
	ck_assert_uint_eq(hold_calls, 1);
	ck_assert_uint_eq(fact("stops"), 1);
	run_until(now + 2 * SECOND);
	image_err = 0;
	nr_passed = 0;
	run_until(now + SECOND);
	ck_assert_uint_eq(nr_passed, 5);
	for (unsigned i = 0; i < 5; i++) {
		ck_assert_ptr_eq(passed[i], &reqs[i]);
		ck_assert_uint_eq(reqs[i].ended, 1);
	}
	ck_assert_uint_eq(hold_calls, 2);
	ck_assert_int_eq(held, 0);
	close_gate();
}
END_TEST

START_TEST(test_enospc_policy_stops_for_a_full_host_only)
{
	open_policy("werror=enospc");
	image_err = -EIO;
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), -EIO);
	ck_assert_uint_eq(hold_calls, 0);
	image_err = -EDQUOT;
	enter(0, BLK_WRITE, 0, 1);
	ck_assert_int_eq(held, 1);
	ck_assert_uint_eq(reqs[0].ended, 0);
	close_gate();
	ck_assert_int_eq(reqs[0].err, -EDQUOT);
	ck_assert_int_eq(held, 0);
}
END_TEST

START_TEST(test_an_injected_fault_stops_too_and_its_retry_counts)
{
	open_policy("fault=write:enospc:at=2,fault=write:enospc:at=3,werror=stop");
	ck_assert_int_eq(once(BLK_WRITE, 0, 1), 0);
	enter(0, BLK_WRITE, 0, 1);
	run_until(now + SECOND);
	ck_assert_uint_eq(reqs[0].ended, 0);
	run_until(now + SECOND);
	ck_assert_uint_eq(reqs[0].ended, 1);
	ck_assert_int_eq(reqs[0].err, 0);
	ck_assert_uint_eq(fact("faults"), 2);
	close_gate();
}
END_TEST

/* ---- drain ---- */

START_TEST(test_a_drain_holds_nothing_back)
{
	open_policy("delay=read:10s,iops_wr=1,werror=stop,fault=flush:timeout");
	image_err = -ENOSPC;
	enter(0, BLK_WRITE, 0, 1);
	ck_assert_int_eq(held, 1);
	image_err = 0;
	enter(1, BLK_READ, 0, 1);
	for (unsigned i = 2; i < 10; i++)
		enter(i, BLK_WRITE, 0, 1);
	enter(10, BLK_FLUSH, 0, 0);
	by_hand = true;
	enter(11, BLK_READ, 0, 1);
	gate_drain(gate);
	enter(12, BLK_WRITE, 0, 1);     /* comes while it drains */
	ck_assert_uint_eq(reqs[12].passed, 1);
	ck_assert_int_eq(reqs[0].err, -ENOSPC);
	ck_assert_int_eq(reqs[10].err, -ETIMEDOUT);
	for (unsigned i = 0; i < 13; i++) {
		if (reqs[i].r.held)
			gate_leave(gate, &reqs[i].r, i == 5 ? -EIO : 0, false);
		ck_assert_uint_eq(reqs[i].ended, 1);
		if (i && i < 10)
			ck_assert_int_eq(reqs[i].err, i == 5 ? -EIO : 0);
	}
	ck_assert_int_eq(held, 0);
	ck_assert_ptr_null(next_timer());
	gate_drained(gate);
	by_hand = false;
	enter(0, BLK_READ, 0, 1);       /* the next driver finds all as before */
	ck_assert_uint_eq(reqs[0].ended, 0);
	run_until(now + 10 * SECOND);
	ck_assert_uint_eq(reqs[0].ended, 1);
	gate_drain(gate);
	gate_drained(gate);
	gate_free(gate);
}
END_TEST

/* ---- keys ---- */

START_TEST(test_keys_that_make_no_sense_are_refused_with_words)
{
	static const char *const bad[] = { "fault=write", "fault=write:", "fault=:eio", "fault=any:eio", "fault=read:torn",
		"fault=read:enospc", "fault=write:eio:at", "fault=write:eio:at=", "fault=write:eio:at=0",
		"fault=write:eio:p=0", "fault=write:eio:p=1.5", "fault=write:eio:p=nan", "fault=write:eio:p=-1",
		"fault=write:eio:sector=9-3", "fault=write:eio:sector=a", "fault=flush:eio:sector=3", "fault=write:eio:x=1",
		"fault=write:eio:every=-1", "delay=5", "delay=x", "delay=write:", "delay=zero:5ms", "delay=5ms-1ms",
		"delay=2h", "iops=0", "iops=x", "bps=1", "iops_max=5", "bps_rd_max=1M,bps=1M", "werror=maybe",
		"rerror=enospc", "timeout=x", "timeout=2h", "seed=-1", "log=/nonexistent/x/y" };

	for (unsigned i = 0; i < ARRAY_LEN(bad); i++) {
		if (!strcmp(bad[i], "delay=5")) {       /* seconds: fine */
			open_gate(bad[i]);
			close_gate();
			continue;
		}
		ck_assert_msg(try_open(bad[i]) < 0, "%s was taken", bad[i]);
		ck_assert_msg(strstr(err.msg, "--disk: "), "%s: %s", bad[i], err.msg);
	}
}
END_TEST

UNIT_MAIN("gate", test_a_disk_that_asks_for_nothing_has_no_gate,
	test_faults_hit_the_request_that_their_conditions_name,
	test_an_error_keeps_the_image_untouched_and_says_what_it_was_told, test_the_same_seed_is_the_same_run,
	test_a_torn_write_leaves_a_prefix_of_sectors_and_fails,
	test_a_timeout_is_answered_after_its_time_or_at_a_reset,
	test_a_delay_holds_each_request_back_and_keeps_their_order, test_a_delay_can_be_of_one_kind_and_vary,
	test_limits_hold_their_rate_within_two_percent, test_a_burst_is_as_large_as_its_bucket_and_fills_again,
	test_limits_are_first_come_first_served_but_reads_do_not_wait_for_writes, test_report_and_ignore,
	test_stop_keeps_the_request_and_tries_again_each_second_until_it_works,
	test_a_retry_has_all_of_the_buffers_again,
	test_several_stopped_requests_go_on_in_order_and_the_machine_after_the_last,
	test_enospc_policy_stops_for_a_full_host_only, test_an_injected_fault_stops_too_and_its_retry_counts,
	test_a_drain_holds_nothing_back, test_keys_that_make_no_sense_are_refused_with_words)
