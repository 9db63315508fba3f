/*
 * Disks on real files, on both loop engines. The linker routes the calls of loop_submit() and
 * preadv2() through here (--wrap), so that faults and short transfers happen where we say.
 */
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/block.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"

#define SIZE (1u << 20)

static struct error err;
static struct loop *loop;
static struct disk *disk;
static char path[64];

/* ---- faults ---- */

static struct {
	unsigned submitted[OP_WORK + 1];        /* by kind, as the disk asked */
	int fail_kind, fail_with, fail_count;   /* the next fail_count of that kind end so */
	bool shorten;                           /* cut transfers at random lengths, throw in EAGAIN and EINTR */
	bool no_inline;                         /* preadv2() finds nothing cached */
	unsigned slow_writes;                   /* the next so many pwritev2() wait 12 ms */
	bool keep_whole;                        /* shorten in multiples of a page: O_DIRECT */
} fault;
static uint64_t seed;

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed % n);
}

void __real_loop_submit(struct loop *l, struct loop_op *op);
void __wrap_loop_submit(struct loop *l, struct loop_op *op);
ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __real_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);

static int give_fault(struct loop_op *op)
{
	return op->fd;
}

static void fail_op(struct loop_op *op, int res)
{
	op->kind = OP_WORK;
	op->work = give_fault;
	op->fd = res;
}

static void shorten_op(struct loop_op *op)
{
	static struct iovec cut;

	if (rnd(4) == 0)
		return fail_op(op, rnd(2) ? -EAGAIN : -EINTR);
	cut = op->iov[0];
	if (!fault.keep_whole)
		cut.iov_len = MIN(cut.iov_len, 1 + seed % 700);
	else if (cut.iov_len > 4096)
		cut.iov_len = 4096;
	op->iov = &cut;         /* one request at a time: not shared */
	op->cnt = 1;
}

void __wrap_loop_submit(struct loop *l, struct loop_op *op)
{
	fault.submitted[op->kind]++;
	if (fault.fail_count && (int)op->kind == fault.fail_kind) {
		fault.fail_count--;
		fail_op(op, fault.fail_with);
	} else if (fault.shorten && (op->kind == OP_READV || op->kind == OP_WRITEV)) {
		shorten_op(op);
	}
	__real_loop_submit(l, op);
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	struct iovec cut = iov[0];

	if (fault.no_inline) {
		errno = EAGAIN;
		return -1;
	}
	if (!fault.shorten || fault.keep_whole)
		return __real_preadv64v2(fd, iov, cnt, off, flags);
	cut.iov_len = 1 + rnd((unsigned)cut.iov_len);
	return __real_preadv64v2(fd, &cut, 1, off, flags);
}

/* No file system here has RWF_NOWAIT for writes. */
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	struct iovec cut = iov[0];

	if (flags & RWF_NOWAIT) {
		errno = EOPNOTSUPP;
		return -1;
	}
	if (fault.slow_writes) {
		fault.slow_writes--;
		usleep(12000);
	}
	if (!fault.shorten || fault.keep_whole)
		return __real_pwritev64v2(fd, iov, cnt, off, flags);
	cut.iov_len = 1 + rnd((unsigned)cut.iov_len);
	return __real_pwritev64v2(fd, &cut, 1, off, flags);
}

/* ---- set-up ---- */

static void make_file(const char *dir, off_t size)
{
	int fd;

	snprintf(path, sizeof(path), "%s/vmm-disk-XXXXXX", dir);
	fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, size), 0);
	close(fd);
}

static int try_open(const char *keys)
{
	struct opts *o;
	char text[200];
	int r;

	snprintf(text, sizeof(text), "%s%s", path, keys);
	ck_assert_int_eq(opts_parse(&o, "--disk", text, "file", &err), 0);
	disk = NULL;
	r = disk_open(&disk, o, &err);
	if (!r) {
		r = opts_end(o, &err);
		ck_assert_msg(!r, "%s", err.msg);
	}
	opts_free(o);
	return r;
}

static void open_disk(const char *dir, const char *keys, enum loop_engine engine)
{
	memset(&fault, 0, sizeof(fault));
	seed = 88172645463325252ull;
	make_file(dir, SIZE);
	ck_assert_msg(try_open(keys) == 0, "%s", err.msg);
	loop = loop_new("io/0", engine, 0, &err);
	ck_assert_msg(loop, "%s", err.msg);
	disk_set_home(disk, loop);
}

static void close_disk(void)
{
	loop_free(loop);
	disk_close(disk);
	unlink(path);
}

/* ---- one request, waited for ---- */

struct wait {
	struct blk_req r;
	struct iovec iov[BLK_IOVS];
	int err;
	unsigned done;
	sem_t sem;
};

static void wait_done(struct blk_req *r, int error)
{
	struct wait *w = container_of(r, struct wait, r);

	w->err = error;
	w->done++;
	sem_post(&w->sem);
}

static void wait_submit(void *arg)
{
	struct wait *w = arg;

	disk_submit(disk, &w->r);
}

static int run(struct wait *w)
{
	w->r.iov = w->iov;
	w->r.done = wait_done;
	sem_init(&w->sem, 0, 0);
	loop_call(loop, wait_submit, w);
	sem_wait(&w->sem);
	sem_destroy(&w->sem);
	ck_assert_uint_eq(w->done, 1);
	return w->err;
}

static int request(enum blk_op op, uint64_t off, uint64_t len, void *buf)
{
	struct wait w = { .r = { .op = op, .off = off, .len = len, .cnt = buf ? 1 : 0 } };

	w.iov[0] = (struct iovec){ buf, len };
	return run(&w);
}

/* The same in pieces of odd sizes. */
static int scattered(enum blk_op op, uint64_t off, uint64_t len, uint8_t *buf)
{
	struct wait w = { .r = { .op = op, .off = off, .len = len } };

	while (len) {
		uint64_t some = 1 + rnd(5000), n = w.r.cnt == 15 ? len : MIN(len, some);

		w.iov[w.r.cnt++] = (struct iovec){ buf, n };
		buf += n;
		len -= n;
	}
	return run(&w);
}

/* ---- against a model ---- */

static uint8_t model[SIZE], buf[SIZE + 64] __attribute__((aligned(4096)));

static void one_random_op(unsigned unit)
{
	uint64_t len = (1 + rnd(rnd(8) ? 24 : 400)) * unit, off;
	uint8_t *at = buf + (rnd(2) ? rnd(64) : 0);
	struct wait w = { .r = { .op = BLK_ZERO, .unmap = rnd(2) } };

	len = MIN(len, SIZE);
	off = (uint64_t)rnd((unsigned)((SIZE - len) / unit) + 1) * unit;
	switch (rnd(5)) {
	case 0:
	case 1:
		for (uint64_t i = 0; i < len; i++)
			at[i] = (uint8_t)rnd(256);
		memcpy(model + off, at, len);
		ck_assert_int_eq(scattered(BLK_WRITE, off, len, at), 0);
		break;
	case 2:
		w.r.off = off;
		w.r.len = len;
		memset(model + off, 0, len);
		ck_assert_int_eq(run(&w), 0);
		break;
	case 3:         /* a hole reads as zeroes */
		if (request(BLK_DISCARD, off, len, NULL) == 0)
			memset(model + off, 0, len);
		break;
	default:
		memset(buf, 0xaa, sizeof(buf));
		ck_assert_int_eq(scattered(BLK_READ, off, len, at), 0);
		ck_assert_int_eq(memcmp(at, model + off, len), 0);
		break;
	}
}

static void random_ops(const char *dir, const char *keys, enum loop_engine engine, unsigned faults)
{
	open_disk(dir, keys, engine);
	memset(model, 0, sizeof(model));
	fault.shorten = faults;
	fault.keep_whole = faults == 2;
	for (unsigned i = 0; i < 150; i++) {
		fault.no_inline = rnd(2);
		one_random_op(512);
	}
	memset(&fault, 0, sizeof(fault));
	ck_assert_int_eq(request(BLK_READ, 0, SIZE, buf), 0);
	ck_assert_int_eq(memcmp(buf, model, SIZE), 0);
	close_disk();
}

static const enum loop_engine engines[] = { LOOP_AUTO, LOOP_EPOLL };

START_TEST(test_random_ops_match_a_plain_model)
{
	for (unsigned e = 0; e < 2; e++) {
		random_ops("/tmp", "", engines[e], 0);
		random_ops("/dev/shm", ",cache=unsafe", engines[e], 0);
		random_ops("/tmp", ",cache=writethrough", engines[e], 0);
	}
}
END_TEST

static bool no_direct(const char *test)
{
	int fd;

	make_file("/tmp", SIZE);
	fd = open(path, O_RDONLY | O_DIRECT);
	unlink(path);
	if (fd < 0)
		printf("SKIP %s: /tmp has no O_DIRECT\n", test);
	else
		close(fd);
	return fd < 0;
}

START_TEST(test_direct_io_takes_any_alignment)
{
	if (no_direct(__func__))
		return;
	for (unsigned e = 0; e < 2; e++) {
		random_ops("/tmp", ",cache=none", engines[e], 0);
		random_ops("/tmp", ",cache=none", engines[e], 2);
	}
}
END_TEST

START_TEST(test_row43_short_transfers_eintr_and_eagain_are_continued)
{
	for (unsigned e = 0; e < 2; e++) {
		random_ops("/tmp", "", engines[e], 1);
		random_ops("/dev/shm", "", engines[e], 1);
	}
}
END_TEST

START_TEST(test_row43_endless_eagain_ends)
{
	open_disk("/tmp", "", LOOP_AUTO);
	fault.fail_kind = OP_WRITEV;
	fault.fail_with = -EAGAIN;
	fault.fail_count = 1000000;
	ck_assert_int_lt(request(BLK_WRITE, 0, 512, buf), 0);
	fault.fail_count = 0;
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, buf), 0);
	close_disk();
}
END_TEST

START_TEST(test_row42_bounced_64_mib_uses_one_buffer)
{
	static uint8_t big[(64u << 20) + 16];

	if (no_direct(__func__))
		return;
	memset(&fault, 0, sizeof(fault));
	make_file("/tmp", 64 << 20);
	ck_assert_int_eq(try_open(",cache=none"), 0);
	loop = loop_new("io/0", LOOP_AUTO, 0, &err);
	disk_set_home(disk, loop);
	ck_assert_int_eq(request(BLK_WRITE, 512, 4096, memset(buf, 7, 4096)), 0);
	ck_assert_int_eq(request(BLK_READ, 0, 64 << 20, big + 1), 0);
	ck_assert_uint_eq(big[1 + 511], 0);
	ck_assert_uint_eq(big[1 + 512], 7);
	ck_assert_uint_ge(fault.submitted[OP_READV], (64 << 20) / (64 << 10));
	close_disk();
}
END_TEST

/* ---- ranges and rights ---- */

START_TEST(test_row35_row36_ranges_outside_the_disk_fail_and_touch_nothing)
{
	static const uint64_t bad[][2] = { { SIZE, 512 }, { SIZE - 512, 1024 }, { UINT64_MAX - 511, 512 },
		{ UINT64_MAX & ~511ull, 1024 }, { 0, SIZE + 512 }, { 512, UINT64_MAX & ~511ull },
		{ 1, 512 }, { 0, 511 } };
	static const enum blk_op ops[] = { BLK_READ, BLK_WRITE, BLK_DISCARD, BLK_ZERO };
	struct stat st;

	open_disk("/tmp", "", LOOP_AUTO);
	for (unsigned o = 0; o < ARRAY_LEN(ops); o++)
		for (unsigned i = 0; i < ARRAY_LEN(bad); i++)
			ck_assert_int_eq(request(ops[o], bad[i][0], bad[i][1], buf), -EINVAL);
	ck_assert_uint_eq(fault.submitted[OP_WRITEV] + fault.submitted[OP_FALLOCATE], 0);
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_size, SIZE);
	ck_assert_int_eq(st.st_blocks, 0);
	ck_assert_int_eq(request(BLK_READ, SIZE, 0, NULL), 0);
	close_disk();
}
END_TEST

START_TEST(test_row41_readonly_disk_refuses_changes)
{
	open_disk("/tmp", ",ro", LOOP_AUTO);
	ck_assert(disk_readonly(disk) && !disk_can_discard(disk));
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, buf), -EROFS);
	ck_assert_int_eq(request(BLK_ZERO, 0, 512, NULL), -EROFS);
	ck_assert_int_eq(request(BLK_DISCARD, 0, 512, NULL), -EROFS);
	ck_assert_int_eq(request(BLK_READ, 0, 512, buf), 0);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
	close_disk();
}
END_TEST

/* ---- host faults ---- */

START_TEST(test_row98_full_host_fails_the_write_and_later_ones_work)
{
	open_disk("/tmp", "", LOOP_AUTO);
	fault.fail_kind = OP_WRITEV;
	fault.fail_with = -ENOSPC;
	fault.fail_count = 1;
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, memset(buf, 1, 4096)), -ENOSPC);    /* part of a page: by the ring */
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, buf), 0);
	close_disk();
}
END_TEST

START_TEST(test_row99_after_a_failed_flush_every_flush_fails)
{
	open_disk("/tmp", "", LOOP_AUTO);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
	fault.fail_kind = OP_FSYNC;
	fault.fail_with = -EIO;
	fault.fail_count = 1;
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), -EIO);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), -EIO);
	ck_assert_uint_eq(fault.submitted[OP_FSYNC], 2);
	close_disk();
}
END_TEST

static void shrink(const char *dir)
{
	open_disk(dir, "", LOOP_AUTO);
	ck_assert_int_eq(request(BLK_WRITE, 0, 16384, memset(buf, 9, 16384)), 0);
	ck_assert_int_eq(truncate(path, 6000), 0);
	ck_assert_int_eq(request(BLK_READ, 0, 8192, memset(buf, 0xaa, 16384)), 0);
	ck_assert_uint_eq(buf[5999], 9);
	ck_assert_uint_eq(buf[6000], 0);
	ck_assert_uint_eq(buf[8191], 0);
	ck_assert_uint_eq(buf[8192], 0xaa);
	ck_assert_int_eq(request(BLK_READ, 0, 8704, buf), -EIO);
	ck_assert_int_eq(request(BLK_READ, 12288, 8192, buf), -EIO);
	ck_assert_int_eq(request(BLK_READ, 6144, 512, buf), 0);
	ck_assert_int_eq(request(BLK_READ, 8192, 512, buf), -EIO);
	ck_assert_int_eq(request(BLK_READ, 12288, 4096, buf), -EIO);
	ck_assert_int_eq(truncate(path, 4096), 0);
	ck_assert_int_eq(request(BLK_READ, 4096, 512, buf), -EIO);
	ck_assert_int_eq(truncate(path, 0), 0);
	ck_assert_int_eq(request(BLK_READ, 0, 512, buf), -EIO);
	close_disk();
}

START_TEST(test_row82_shrunk_file_reads_zeroes_to_its_block_end_and_fails_beyond)
{
	shrink("/tmp");
	shrink("/dev/shm");
}
END_TEST

/* ---- cache modes ---- */

START_TEST(test_writethrough_syncs_every_write_and_unsafe_none)
{
	open_disk("/tmp", ",cache=writethrough", LOOP_AUTO);
	ck_assert(!disk_has_writeback(disk));
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, buf), 0);
	ck_assert_uint_eq(fault.submitted[OP_FSYNC], 1);
	ck_assert_int_eq(request(BLK_ZERO, 0, 512, NULL), 0);
	ck_assert_uint_eq(fault.submitted[OP_FSYNC], 2);
	ck_assert_int_eq(request(BLK_READ, 0, 512, buf), 0);
	ck_assert_uint_eq(fault.submitted[OP_FSYNC], 2);
	close_disk();
	open_disk("/tmp", ",cache=unsafe", LOOP_AUTO);
	ck_assert_int_eq(request(BLK_WRITE, 0, 512, buf), 0);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
	ck_assert_uint_eq(fault.submitted[OP_FSYNC], 0);
	close_disk();
}
END_TEST

START_TEST(test_hot_read_of_a_file_in_memory_needs_no_ring)
{
	struct statfs fs;

	ck_assert_int_eq(statfs("/dev/shm", &fs), 0);
	if (fs.f_type != 0x01021994) {
		printf("SKIP %s: /dev/shm is no tmpfs\n", __func__);
		return;
	}
	open_disk("/dev/shm", "", LOOP_AUTO);
	ck_assert_int_eq(request(BLK_WRITE, 4096, 4096, memset(buf, 3, 4096)), 0);
	ck_assert_int_eq(request(BLK_READ, 4096, 4096, buf), 0);
	ck_assert_uint_eq(fault.submitted[OP_READV] + fault.submitted[OP_WRITEV], 0);
	close_disk();
}
END_TEST

static void write_page(void)
{
	ck_assert_int_eq(request(BLK_WRITE, 8192, 4096, memset(buf, 9, 4096)), 0);
}

START_TEST(test_a_write_at_once_that_waits_makes_the_next_ones_take_the_ring)
{
	struct statfs fs;

	ck_assert_int_eq(statfs("/tmp", &fs), 0);
	if (fs.f_type == 0x01021994) {
		printf("SKIP %s: /tmp is a tmpfs\n", __func__);
		return;
	}
	open_disk("/tmp", "", LOOP_AUTO);
	write_page();
	ck_assert_uint_eq(fault.submitted[OP_WRITEV], 0);
	ck_assert_int_eq(request(BLK_WRITE, 512, 512, memset(buf, 9, 512)), 0);
	ck_assert_uint_eq(fault.submitted[OP_WRITEV], 1);       /* a part of a page may have to be read */
	fault.slow_writes = 2;
	write_page();                                           /* slow: from now on looked at */
	write_page();                                           /* waited */
	ck_assert_uint_eq(fault.slow_writes, 0);
	write_page();
	ck_assert_uint_eq(fault.submitted[OP_WRITEV], 2);
	usleep(200000);
	write_page();
	ck_assert_uint_eq(fault.submitted[OP_WRITEV], 2);
	close_disk();
	open_disk("/tmp", ",cache=none", LOOP_AUTO);
	write_page();
	ck_assert_uint_eq(fault.submitted[OP_WRITEV], 1);
	close_disk();
}
END_TEST

/* ---- discard and zeroes ---- */

START_TEST(test_discard_gives_space_back_unless_told_not_to)
{
	struct stat st;

	open_disk("/tmp", "", LOOP_AUTO);
	ck_assert(disk_can_discard(disk));
	ck_assert_int_eq(request(BLK_WRITE, 0, SIZE, memset(buf, 1, SIZE)), 0);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
	ck_assert_int_eq(request(BLK_DISCARD, 0, SIZE, NULL), 0);
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_blocks, 0);
	ck_assert_int_eq(st.st_size, SIZE);
	close_disk();
	open_disk("/tmp", ",discard=off", LOOP_AUTO);
	ck_assert(!disk_can_discard(disk));
	ck_assert_int_eq(request(BLK_DISCARD, 0, SIZE, NULL), -EOPNOTSUPP);
	close_disk();
}
END_TEST

START_TEST(test_unsupported_fallocate_is_remembered_and_zeroes_are_written)
{
	struct wait w = { .r = { .op = BLK_ZERO, .unmap = true, .len = SIZE - 512 } };

	open_disk("/tmp", "", LOOP_AUTO);
	ck_assert_int_eq(request(BLK_WRITE, 0, SIZE, memset(buf, 1, SIZE)), 0);
	fault.fail_kind = OP_FALLOCATE;
	fault.fail_with = -EOPNOTSUPP;
	fault.fail_count = 100;
	ck_assert_int_eq(run(&w), 0);
	ck_assert_uint_eq(fault.submitted[OP_FALLOCATE], 2);
	ck_assert_int_eq(request(BLK_READ, 0, SIZE, buf), 0);
	for (unsigned i = 0; i < SIZE; i++)
		ck_assert(buf[i] == (i >= SIZE - 512));
	ck_assert_int_eq(request(BLK_ZERO, 0, 512, NULL), 0);
	ck_assert_uint_eq(fault.submitted[OP_FALLOCATE], 2);
	ck_assert_int_eq(request(BLK_DISCARD, 0, 512, NULL), -EOPNOTSUPP);
	ck_assert_int_eq(request(BLK_DISCARD, 0, 512, NULL), -EOPNOTSUPP);
	ck_assert_uint_eq(fault.submitted[OP_FALLOCATE], 3);
	close_disk();
}
END_TEST

/* ---- drain ---- */

#define MANY 64
static struct wait many[MANY];

static void submit_many_and_drain(void *arg)
{
	unsigned *left = arg;

	for (unsigned i = 0; i < MANY; i++)
		disk_submit(disk, &many[i].r);
	disk_drain(disk);
	for (unsigned i = 0; i < MANY; i++)
		*left += many[i].done != 1 || many[i].err;
}

START_TEST(test_drain_returns_with_every_request_done_once)
{
	for (unsigned e = 0; e < 2; e++) {
		unsigned left = 0;

		open_disk("/tmp", "", engines[e]);
		fault.no_inline = true;
		memset(many, 0, sizeof(many));
		for (unsigned i = 0; i < MANY; i++) {
			many[i].r = (struct blk_req){ .op = i % 3 ? BLK_WRITE : BLK_READ, .off = i * 4096u,
				.len = 4096, .iov = many[i].iov, .cnt = 1, .done = wait_done };
			if (i % 16 == 15)
				many[i].r = (struct blk_req){ .op = BLK_FLUSH, .done = wait_done };
			many[i].iov[0] = (struct iovec){ buf + i * 4096u, 4096 };
			sem_init(&many[i].sem, 0, 0);
		}
		loop_call(loop, submit_many_and_drain, &left);
		ck_assert_uint_eq(left, 0);
		close_disk();
	}
}
END_TEST

/* ---- what may be a disk ---- */

static int open_path(const char *p, const char *keys)
{
	int r;

	snprintf(path, sizeof(path), "%s", p);
	r = try_open(keys);
	disk_close(disk);
	return r;
}

START_TEST(test_row81_only_files_and_block_devices_are_disks)
{
	char fifo[] = "/tmp/vmm-fifo-XXXXXX";

	ck_assert_int_eq(open_path("/tmp", ""), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "a directory"));
	ck_assert_int_eq(open_path("/dev/null", ""), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "a character device"));
	ck_assert_int_eq(open_path("/proc/self/mem", ",ro"), -EINVAL);
	ck_assert_int_eq(open_path("/nonexistent/x", ""), -ENOENT);
	ck_assert_ptr_nonnull(strstr(err.msg, "--disk: cannot open '/nonexistent/x'"));
	ck_assert_ptr_nonnull(mkdtemp(fifo));
	ck_assert_int_eq(rmdir(fifo), 0);
	ck_assert_int_eq(mkfifo(fifo, 0600), 0);
	ck_assert_int_eq(open_path(fifo, ""), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "a pipe"));
	unlink(fifo);
}
END_TEST

START_TEST(test_row81_tail_shorter_than_a_sector_is_hidden_and_empty_files_refused)
{
	make_file("/tmp", 1023);
	ck_assert_int_eq(try_open(""), 0);
	ck_assert_uint_eq(disk_size(disk), 512);
	disk_close(disk);
	ck_assert_int_eq(truncate(path, 511), 0);
	ck_assert_int_eq(try_open(""), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "has 511 bytes"));
	ck_assert_int_eq(truncate(path, 0), 0);
	ck_assert_int_eq(try_open(""), -EINVAL);
	unlink(path);
}
END_TEST

START_TEST(test_image_stays_locked_until_closed)
{
	struct disk *first;

	make_file("/tmp", SIZE);
	ck_assert_int_eq(try_open(""), 0);
	first = disk;
	ck_assert_int_eq(try_open(""), -EBUSY);
	ck_assert_ptr_nonnull(strstr(err.msg, "in use"));
	disk_close(first);
	ck_assert_int_eq(try_open(""), 0);
	disk_close(disk);
	unlink(path);
}
END_TEST

/* What try_open() prints on stderr. */
static void open_listening(const char *keys, char *said, size_t size)
{
	int keep = dup(2), p[2];
	ssize_t n;

	ck_assert_int_eq(pipe2(p, O_NONBLOCK), 0);
	dup2(p[1], 2);
	ck_assert_int_eq(try_open(keys), 0);
	dup2(keep, 2);
	n = read(p[0], said, size - 1);
	said[n > 0 ? n : 0] = '\0';
	close(keep);
	close(p[0]);
	close(p[1]);
}

START_TEST(test_row60_image_that_looks_like_qcow2_stays_raw_with_a_warning)
{
	static const char head[] = "QFI\xfb\0\0\0\3";
	char said[1024];
	int fd;

	make_file("/tmp", SIZE);
	fd = open(path, O_WRONLY);
	ck_assert_int_eq(write(fd, head, 8), 8);
	close(fd);
	open_listening("", said, sizeof(said));
	ck_assert_ptr_nonnull(strstr(said, "looks like a qcow2 image"));
	ck_assert_ptr_nonnull(strstr(said, "format=raw"));
	ck_assert_uint_eq(disk_size(disk), SIZE);
	disk_close(disk);
	open_listening(",format=raw", said, sizeof(said));
	ck_assert_str_eq(said, "");
	disk_close(disk);
	unlink(path);
}
END_TEST

START_TEST(test_options_are_checked_by_name)
{
	make_file("/tmp", SIZE);
	ck_assert_int_eq(try_open(",format=qed"), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "expected raw, qcow2"));
	ck_assert_int_eq(try_open(",cache=maybe"), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "writeback, none, writethrough or unsafe"));
	ck_assert_int_eq(try_open(",discard=x"), -EINVAL);
	ck_assert_int_eq(try_open(",ro=x"), -EINVAL);
	ck_assert_int_eq(try_open(",readonly=on,discard=ignore"), 0);
	ck_assert(disk_readonly(disk));
	disk_close(disk);
	unlink(path);
	path[0] = '\0';
	ck_assert_int_eq(try_open(""), -EINVAL);
}
END_TEST

UNIT_MAIN("disk", test_random_ops_match_a_plain_model, test_direct_io_takes_any_alignment,
	test_row43_short_transfers_eintr_and_eagain_are_continued, test_row43_endless_eagain_ends,
	test_row42_bounced_64_mib_uses_one_buffer,
	test_row35_row36_ranges_outside_the_disk_fail_and_touch_nothing,
	test_row41_readonly_disk_refuses_changes,
	test_row98_full_host_fails_the_write_and_later_ones_work,
	test_row99_after_a_failed_flush_every_flush_fails,
	test_row82_shrunk_file_reads_zeroes_to_its_block_end_and_fails_beyond,
	test_writethrough_syncs_every_write_and_unsafe_none,
	test_hot_read_of_a_file_in_memory_needs_no_ring,
	test_a_write_at_once_that_waits_makes_the_next_ones_take_the_ring,
	test_discard_gives_space_back_unless_told_not_to,
	test_unsupported_fallocate_is_remembered_and_zeroes_are_written,
	test_drain_returns_with_every_request_done_once,
	test_row81_only_files_and_block_devices_are_disks,
	test_row81_tail_shorter_than_a_sector_is_hidden_and_empty_files_refused,
	test_image_stays_locked_until_closed,
	test_row60_image_that_looks_like_qcow2_stays_raw_with_a_warning,
	test_options_are_checked_by_name)
