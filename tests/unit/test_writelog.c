/* The log of a disk's writes, byte by byte, and what it says about a disk. */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/format.h"
#include "block/writelog.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"

#define SIZE (1u << 20)

static struct error err;
static struct loop *loop;
static struct writelog *log_;
static char dir[32], log_path[64], disk_path[64];

static void make_dir(void)
{
	strcpy(dir, "/tmp/vmm-log-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(log_path, sizeof(log_path), "%s/log", dir);
	snprintf(disk_path, sizeof(disk_path), "%s/disk", dir);
}

static void remove_dir(void)
{
	unlink(log_path);
	unlink(disk_path);
	ck_assert_int_eq(rmdir(dir), 0);
}

static void on_loop(void (*fn)(void *))
{
	loop_call(loop, fn, NULL);
}

/* ---- the log by itself ---- */

static void no_room(void *arg)
{
	(void)arg;
}

static void open_log(void)
{
	make_dir();
	ck_assert_msg(writelog_open(&log_, log_path, &err) == 0, "%s", err.msg);
	loop = loop_new("io/0", LOOP_AUTO, 0, &err);
	ck_assert_ptr_nonnull(loop);
	writelog_set_home(log_, loop, no_room, NULL);
}

static void settle_here(void *arg)
{
	(void)arg;
	writelog_settle(log_);
}

static void close_log(void)
{
	on_loop(settle_here);
	loop_free(loop);
	writelog_free(log_);
	remove_dir();
}

static struct writelog_item *begin(enum blk_op op, uint64_t sector, uint8_t fill, uint32_t sectors)
{
	static uint8_t buf[64 << 10];
	struct iovec iov = { buf, sectors * 512 };
	struct blk_req r = { .op = op, .off = sector * 512, .len = sectors * 512, .iov = &iov, .cnt = 1 };
	struct writelog_item *i;

	memset(buf, fill, sizeof(buf));
	ck_assert_int_eq(writelog_begin(log_, &r, &i), 0);
	memset(buf, 0xff, sizeof(buf));         /* the guest uses its buffer for something else */
	return i;
}

static void write_now(uint64_t sector, uint8_t fill, uint32_t sectors, bool fua)
{
	writelog_end(log_, begin(BLK_WRITE, sector, fill, sectors), true, fua);
}

static void flush_now(void)
{
	writelog_end(log_, begin(BLK_FLUSH, 0, 0, 0), true, false);
}

static uint8_t file[256 << 10];

static size_t read_log(void)
{
	int fd = open(log_path, O_RDONLY);
	ssize_t n = read(fd, file, sizeof(file));

	ck_assert_int_ge(n, 512);
	close(fd);
	return (size_t)n;
}

static uint64_t super_entries(void)
{
	uint64_t n;

	read_log();
	memcpy(&n, file + 16, 8);
	return le64toh(n);
}

/* "W3 D8+2 F": each entry with its sector, and its length where that is not 1; "!": FUA. Checks the data. */
static const char *story(void)
{
	static char text[400];
	size_t len = read_log(), at = 512, n = 0;
	uint64_t entries = super_entries();

	text[0] = '\0';
	for (uint64_t i = 0; i < entries; i++) {
		struct writelog_entry e;
		uint64_t sector, nr, flags;

		ck_assert_uint_le(at + 512, len);
		memcpy(&e, file + at, sizeof(e));
		sector = le64toh(e.sector);
		nr = le64toh(e.nr_sectors);
		flags = le64toh(e.flags);
		ck_assert_uint_eq(e.data_len, 0);
		at += 512;
		n += (size_t)snprintf(text + n, sizeof(text) - n, "%s%s", i ? " " : "",
			flags & WRITELOG_FLUSH ? "F" : flags & WRITELOG_DISCARD ? "D" : "W");
		if (!(flags & WRITELOG_FLUSH))
			n += (size_t)snprintf(text + n, sizeof(text) - n, "%llu%s", (unsigned long long)sector,
				flags & WRITELOG_FUA ? "!" : "");
		if (nr > 1)
			n += (size_t)snprintf(text + n, sizeof(text) - n, "+%llu", (unsigned long long)nr);
		if (!(flags & WRITELOG_DISCARD)) {
			for (size_t b = 0; b < nr * 512; b++)
				ck_assert_uint_eq(file[at + b], file[at]);
			at += nr * 512;
		}
		ck_assert_uint_le(at, len);
	}
	return text;
}

static void one_of_each(void *arg)
{
	(void)arg;
	write_now(0x1122334455, 7, 2, false);
	flush_now();
	writelog_end(log_, begin(BLK_DISCARD, 16, 0, 100), true, false);
	write_now(1, 9, 1, true);
	writelog_settle(log_);
}

static void put64(uint8_t *to, uint64_t v)
{
	for (unsigned i = 0; i < 8; i++)
		to[i] = (uint8_t)(v >> 8 * i);
}

static void put_entry(uint8_t *to, uint64_t sector, uint64_t nr, uint64_t flags)
{
	put64(to, sector);
	put64(to + 8, nr);
	put64(to + 16, flags);
}

START_TEST(test_the_bytes_are_those_of_dm_log_writes)
{
	static uint8_t want[512 * 8];

	open_log();
	on_loop(one_of_each);
	put64(want, 0x6a736677736872ull);
	put64(want + 8, 1);
	put64(want + 16, 4);
	want[25] = 2;                                   /* 512 */
	put_entry(want + 512, 0x1122334455, 2, 0);
	memset(want + 1024, 7, 1024);
	put_entry(want + 2048, 0, 0, 1);
	put_entry(want + 2560, 16, 100, 4);
	put_entry(want + 3072, 1, 1, 2);
	memset(want + 3584, 9, 512);
	ck_assert_uint_eq(read_log(), sizeof(want));
	ck_assert_int_eq(memcmp(file, want, sizeof(want)), 0);
	ck_assert_uint_eq(writelog_entries(log_), 4);
	close_log();
}
END_TEST

static void documented_order(void *arg)
{
	struct writelog_item *w1 = begin(BLK_WRITE, 1, 1, 1), *w2 = begin(BLK_WRITE, 2, 2, 1);
	struct writelog_item *w3 = begin(BLK_WRITE, 3, 3, 1), *f;

	(void)arg;
	writelog_end(log_, w3, true, false);
	writelog_end(log_, w2, true, false);
	f = begin(BLK_FLUSH, 0, 0, 0);
	writelog_end(log_, w1, true, false);
	writelog_end(log_, f, true, false);
	writelog_settle(log_);
}

static void two_flushes(void *arg)
{
	struct writelog_item *w1 = begin(BLK_WRITE, 1, 1, 1), *f1, *f2;

	(void)arg;
	f1 = begin(BLK_FLUSH, 0, 0, 0);
	writelog_end(log_, w1, true, false);
	f2 = begin(BLK_FLUSH, 0, 0, 0);
	writelog_end(log_, f2, true, false);            /* the second is through first */
	write_now(2, 2, 1, false);
	writelog_end(log_, f1, true, false);
	writelog_settle(log_);
}

START_TEST(test_a_flush_has_before_it_what_was_complete_when_it_came)
{
	open_log();
	on_loop(documented_order);
	ck_assert_str_eq(story(), "W3 W2 F W1");
	close_log();
	open_log();
	on_loop(two_flushes);
	ck_assert_str_eq(story(), "F W1 F W2");
	close_log();
}
END_TEST

static void failures(void *arg)
{
	struct writelog_item *f, *w;

	(void)arg;
	write_now(1, 1, 1, false);
	f = begin(BLK_FLUSH, 0, 0, 0);
	w = begin(BLK_WRITE, 5, 5, 1);
	write_now(2, 2, 1, false);
	writelog_end(log_, w, false, false);
	writelog_end(log_, f, false, false);
	write_now(3, 3, 1, false);
	flush_now();
	f = begin(BLK_FLUSH, 0, 0, 0);
	writelog_end(log_, f, false, false);            /* the last of the queue */
	write_now(4, 4, 1, false);
	writelog_settle(log_);
}

START_TEST(test_what_failed_is_not_in_the_log)
{
	open_log();
	on_loop(failures);
	ck_assert_str_eq(story(), "W1 W2 W3 F W4");
	close_log();
}
END_TEST

static void write_five(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < 5; i++)
		write_now(i, (uint8_t)i, 1, false);
}

static void flush_it(void *arg)
{
	(void)arg;
	flush_now();
}

static void write_fua(void *arg)
{
	(void)arg;
	write_now(9, 9, 1, true);
}

static void wait_for_entries(uint64_t n)
{
	for (unsigned i = 0; i < 5000 && super_entries() != n; i++)
		usleep(1000);
	ck_assert_uint_eq(super_entries(), n);
}

START_TEST(test_the_superblock_counts_what_was_flushed)
{
	open_log();
	on_loop(write_five);
	for (unsigned i = 0; i < 5000 && writelog_entries(log_) != 5; i++)
		usleep(1000);
	ck_assert_uint_eq(super_entries(), 0);          /* a vmm that is killed now leaves an empty log */
	on_loop(flush_it);
	wait_for_entries(6);
	on_loop(write_five);
	on_loop(write_fua);
	wait_for_entries(12);
	on_loop(write_five);
	on_loop(settle_here);
	ck_assert_uint_eq(super_entries(), 17);
	close_log();
}
END_TEST

static void zeroes(void *arg)
{
	(void)arg;
	writelog_end(log_, begin(BLK_ZERO, 0, 0, 64), true, false);
	write_now(3, 3, 1, false);
	flush_now();
	writelog_end(log_, begin(BLK_ZERO, 8, 0, 128), true, false);
	writelog_settle(log_);
}

START_TEST(test_zeroes_are_a_write_with_a_hole_for_data)
{
	open_log();
	on_loop(zeroes);
	ck_assert_str_eq(story(), "W0+64 W3 F W8+128");
	ck_assert_uint_eq(read_log(), 512 + 65 * 512 + 2 * 512 + 512 + 129 * 512);
	close_log();
}
END_TEST

/* ---- what may be a log ---- */

static int try_log(const char *path)
{
	int r = writelog_open(&log_, path, &err);

	if (!r)
		writelog_free(log_);
	return r;
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
	close(fd);
}

START_TEST(test_a_file_that_is_no_log_is_not_overwritten)
{
	struct stat st;

	make_dir();
	put(log_path, "precious");
	ck_assert_int_eq(try_log(log_path), -EEXIST);
	ck_assert_ptr_nonnull(strstr(err.msg, "is not a write log"));
	ck_assert_int_eq(stat(log_path, &st), 0);
	ck_assert_int_eq(st.st_size, 8);
	put(log_path, "");
	ck_assert_int_eq(try_log(log_path), 0);
	ck_assert_int_eq(try_log(log_path), 0);         /* an old log is */
	unlink(log_path);
	ck_assert_int_eq(mkfifo(log_path, 0600), 0);
	ck_assert_int_eq(try_log(log_path), -EINVAL);
	ck_assert_int_lt(try_log("/dev/null"), 0);
	ck_assert_int_lt(try_log(dir), 0);
	remove_dir();
}
END_TEST

/* ---- behind a disk ---- */

static struct disk *disk;
static uint8_t buf[SIZE], model[SIZE], replayed[SIZE];

struct wait {
	struct blk_req r;
	struct iovec iov[2];
	int err;
	sem_t sem;
};

static void wait_done(struct blk_req *r, int error)
{
	struct wait *w = container_of(r, struct wait, r);

	w->err = error;
	sem_post(&w->sem);
}

static void wait_submit(void *arg)
{
	struct wait *w = arg;

	disk_submit(disk, &w->r);
}

static int request(enum blk_op op, uint64_t off, uint64_t len, void *data)
{
	struct wait w = { .r = { .op = op, .off = off, .len = len, .cnt = data ? 2 : 0, .done = wait_done } };

	w.r.iov = w.iov;
	w.iov[0] = (struct iovec){ data, len / 3 };
	w.iov[1] = (struct iovec){ (uint8_t *)data + len / 3, len - len / 3 };
	sem_init(&w.sem, 0, 0);
	loop_call(loop, wait_submit, &w);
	sem_wait(&w.sem);
	sem_destroy(&w.sem);
	return w.err;
}

static int try_disk(const char *keys)
{
	struct opts *o;
	char text[300];
	int r;

	snprintf(text, sizeof(text), "%s,log=%s%s", disk_path, log_path, keys);
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

static void make_disk(uint64_t size)
{
	int fd = open(disk_path, O_RDWR | O_CREAT | O_TRUNC, 0600);

	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static void open_disk(uint64_t size, const char *keys)
{
	make_dir();
	make_disk(size);
	ck_assert_msg(try_disk(keys) == 0, "%s", err.msg);
	loop = loop_new("io/0", LOOP_AUTO, 0, &err);
	disk_set_home(disk, loop);
}

static void drain_here(void *arg)
{
	(void)arg;
	disk_drain(disk);
}

static void close_disk(void)
{
	on_loop(drain_here);
	loop_free(loop);
	disk_close(disk);
}

static unsigned rnd(unsigned n)
{
	static uint64_t seed = 88172645463325252ull;

	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed % n);
}

static void replay(void)
{
	int fd = open(log_path, O_RDONLY);
	struct writelog_super s;
	uint64_t at = 512;

	memset(replayed, 0, sizeof(replayed));
	ck_assert_int_eq(pread(fd, &s, sizeof(s), 0), (ssize_t)sizeof(s));
	for (uint64_t i = 0; i < le64toh(s.nr_entries); i++, at += 512) {
		struct writelog_entry e;
		uint64_t off, len;

		ck_assert_int_eq(pread(fd, &e, sizeof(e), (off_t)at), (ssize_t)sizeof(e));
		off = le64toh(e.sector) * 512;
		len = le64toh(e.nr_sectors) * 512;
		ck_assert_uint_le(off + len, SIZE);
		if (le64toh(e.flags) & WRITELOG_DISCARD) {
			memset(replayed + off, 0, len);
			continue;
		}
		ck_assert_int_eq(pread(fd, replayed + off, len, (off_t)at + 512), (ssize_t)len);
		at += len;
	}
	close(fd);
}

static void random_disk(const char *keys)
{
	memset(model, 0, sizeof(model));
	open_disk(SIZE, keys);
	for (unsigned i = 0; i < 300; i++) {
		uint64_t len = (1 + rnd(64)) * 512, off = rnd((unsigned)(SIZE - len) / 512) * 512ull;

		switch (rnd(8)) {
		case 0:
			ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
			break;
		case 1:
			ck_assert_int_eq(request(BLK_ZERO, off, len, NULL), 0);
			memset(model + off, 0, len);
			break;
		case 2:
			ck_assert_int_eq(request(BLK_DISCARD, off, len, NULL), 0);
			memset(model + off, 0, len);
			break;
		case 3:
			ck_assert_int_eq(request(BLK_READ, off, len, buf), 0);
			ck_assert_int_eq(memcmp(buf, model + off, len), 0);
			break;
		default:
			for (uint64_t b = 0; b < len; b++)
				buf[b] = (uint8_t)rnd(256);
			memcpy(model + off, buf, len);
			ck_assert_int_eq(request(BLK_WRITE, off, len, buf), 0);
			break;
		}
	}
	ck_assert_int_eq(request(BLK_READ, 0, SIZE, buf), 0);
	close_disk();
	replay();
	ck_assert_int_eq(memcmp(buf, model, SIZE), 0);
	ck_assert_int_eq(memcmp(buf, replayed, SIZE), 0);
	remove_dir();
}

START_TEST(test_a_replayed_log_is_the_disk)
{
	random_disk("");
	random_disk(",cache=writethrough");
	random_disk(",cache=unsafe,delay=0-200us");
}
END_TEST

/* A write that tears fails, and the log has what reached the disk. */
START_TEST(test_a_torn_write_is_in_the_log_as_far_as_it_went)
{
	uint8_t on_disk[SIZE];
	unsigned failed = 0;

	open_disk(SIZE, ",fault=write:torn:every=3,fault=write:eio:every=5,seed=4");
	for (unsigned i = 0; i < 60; i++) {
		memset(buf, (int)i + 1, 16384);
		failed += request(BLK_WRITE, rnd(60) * 16384u, 16384, buf) != 0;
	}
	ck_assert_uint_eq(failed, 20 + 12 - 4);
	ck_assert_int_eq(request(BLK_READ, 0, SIZE, on_disk), 0);
	close_disk();
	replay();
	ck_assert_int_eq(memcmp(on_disk, replayed, SIZE), 0);
	remove_dir();
}
END_TEST

static struct wait many[24];
static uint8_t *large;

static void submit_many(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < ARRAY_LEN(many); i++)
		disk_submit(disk, &many[i].r);
}

START_TEST(test_copies_in_memory_are_bounded)
{
	struct wait w = { .r = { .op = BLK_WRITE, .done = wait_done } };
	struct rlimit old, tight;

	large = calloc(1, 65 << 20);
	open_disk(1ull << 30, ",cache=unsafe");
	for (unsigned i = 0; i < ARRAY_LEN(many); i++) {        /* 192 MiB */
		many[i] = (struct wait){ .r = { .op = BLK_WRITE, .off = i * (8ull << 20), .len = 8 << 20, .cnt = 1,
			.iov = many[i].iov, .done = wait_done }, .iov = { { large, 8 << 20 } } };
		sem_init(&many[i].sem, 0, 0);
	}
	ck_assert_int_eq(getrlimit(RLIMIT_DATA, &old), 0);
	tight = old;
	tight.rlim_cur = 220 << 20;
	if (!SANITIZED)
		ck_assert_int_eq(setrlimit(RLIMIT_DATA, &tight), 0);
	on_loop(submit_many);
	for (unsigned i = 0; i < ARRAY_LEN(many); i++) {
		sem_wait(&many[i].sem);
		ck_assert_int_eq(many[i].err, 0);
	}
	w.r.len = 65 << 20;                     /* one that would never fit */
	w.r.iov = w.iov;
	w.r.cnt = 1;
	w.iov[0] = (struct iovec){ large, 65 << 20 };
	sem_init(&w.sem, 0, 0);
	loop_call(loop, wait_submit, &w);
	sem_wait(&w.sem);
	ck_assert_int_eq(w.err, -EIO);
	setrlimit(RLIMIT_DATA, &old);
	close_disk();
	remove_dir();
	free(large);
}
END_TEST

START_TEST(test_a_full_log_ends_the_log_and_not_the_disk)
{
	struct rlimit old, small;
	struct facts *f = facts_new();
	auto_free char *text = NULL;

	signal(SIGXFSZ, SIG_IGN);
	open_disk(SIZE, "");
	ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &old), 0);
	small = old;
	small.rlim_cur = SIZE;
	setrlimit(RLIMIT_FSIZE, &small);
	for (unsigned i = 0; i < 40; i++)
		ck_assert_int_eq(request(BLK_WRITE, 0, 65536, buf), 0);
	ck_assert_int_eq(request(BLK_FLUSH, 0, 0, NULL), 0);
	setrlimit(RLIMIT_FSIZE, &old);
	disk_describe(disk, f);
	text = facts_text(f);
	facts_free(f);
	ck_assert_msg(strstr(text, "\"log_error\": \"File too large\"") || strstr(text, "\"log_error\":\"File too large\""),
		"%s", text);
	close_disk();
	remove_dir();
}
END_TEST

START_TEST(test_the_disk_itself_is_no_log)
{
	make_dir();
	make_disk(SIZE);
	snprintf(log_path, sizeof(log_path), "%s", disk_path);
	ck_assert_int_lt(try_disk(""), 0);
	put(disk_path, "rhswfsj");      /* even one that looks like a log: it is in use */
	make_disk(SIZE);
	ck_assert_int_lt(try_disk(""), 0);
	unlink(disk_path);
	rmdir(dir);
}
END_TEST

UNIT_MAIN("writelog", test_the_bytes_are_those_of_dm_log_writes,
	test_a_flush_has_before_it_what_was_complete_when_it_came, test_what_failed_is_not_in_the_log,
	test_the_superblock_counts_what_was_flushed, test_zeroes_are_a_write_with_a_hole_for_data,
	test_a_file_that_is_no_log_is_not_overwritten, test_a_replayed_log_is_the_disk,
	test_a_torn_write_is_in_the_log_as_far_as_it_went, test_copies_in_memory_are_bounded,
	test_a_full_log_ends_the_log_and_not_the_disk, test_the_disk_itself_is_no_log)
