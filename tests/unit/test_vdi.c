/*
 * VDI images: against QEMU's tools, against a model in memory, without waiting, cut off after every write, and hostile.
 * The linker routes the calls of meta_write(), meta_sync() and preadv2() through here (--wrap).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include "block/format.h"
#include "unit.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/image.h"

#define MIB (1u << 20)
#define MODEL_MOST (40u * MIB)

static struct error err;
static struct image *img;
static char dir[] = "/tmp/vmm-vdi-XXXXXX";
static char path[128], other[128];
static uint8_t model[MODEL_MOST], buf[MODEL_MOST];
static uint64_t seed;

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed >> 16) % n;
}

/* ---- recorded writes, faults ---- */

struct record {
	uint64_t off, size;             /* size: of the file then */
	size_t len;
	unsigned epoch;                 /* syncs before it */
	uint8_t *data;
};
static struct {
	bool on;
	struct record *list;
	unsigned n, epoch;
} tape;
static unsigned fail_writes;            /* the next ones fail */
static bool no_cache;                   /* preadv2() finds nothing, mostly */

int __real_meta_write(const struct host_file *f, const void *data, size_t len, uint64_t off);
int __wrap_meta_write(const struct host_file *f, const void *data, size_t len, uint64_t off);
int __real_meta_sync(const struct host_file *f);
int __wrap_meta_sync(const struct host_file *f);
ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);

int __wrap_meta_write(const struct host_file *f, const void *data, size_t len, uint64_t off)
{
	int r;

	if (fail_writes) {
		fail_writes--;
		return -EIO;
	}
	r = __real_meta_write(f, data, len, off);
	if (tape.on) {
		struct stat st;

		ck_assert_int_eq(fstat(f->fd, &st), 0);
		tape.list = realloc(tape.list, (tape.n + 1) * sizeof(*tape.list));
		tape.list[tape.n] = (struct record){ off, (uint64_t)st.st_size, len, tape.epoch, malloc(len) };
		memcpy(tape.list[tape.n++].data, data, len);
	}
	return r;
}

int __wrap_meta_sync(const struct host_file *f)
{
	(void)f;
	tape.epoch++;
	return 0;       /* nothing is cut off here, and it takes long */
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	if (no_cache && rnd(4)) {
		errno = EAGAIN;
		return -1;
	}
	return __real_preadv64v2(fd, iov, cnt, off, flags);
}

static void wipe_tape(void)
{
	for (unsigned k = 0; k < tape.n; k++)
		free(tape.list[k].data);
	free(tape.list);
	memset(&tape, 0, sizeof(tape));
}

/* ---- set-up ---- */

__attribute__((format(printf, 1, 2)))
static int sh(const char *fmt, ...)
{
	char cmd[600];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(cmd, sizeof(cmd), fmt, ap);
	va_end(ap);
	return system(cmd);
}

static bool no_qemu(const char *test)
{
	bool none = sh("command -v qemu-img >/dev/null");

	if (none)
		printf("SKIP %s: no qemu-img\n", test);
	return none;
}

static void start(void)
{
	seed = 88172645463325252ull;
	fail_writes = 0;
	no_cache = false;
	memcpy(dir, "/tmp/vmm-vdi-XXXXXX", sizeof(dir));
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/a.vdi", dir);
	snprintf(other, sizeof(other), "%s/b", dir);
	memset(model, 0, sizeof(model));
}

static void finish(void)
{
	wipe_tape();
	ck_assert_int_eq(sh("rm -rf %s", dir), 0);
}

static void create(uint64_t size, uint32_t block, bool fixed)
{
	struct image_create c = { .format = "vdi", .size = size, .cluster = block, .fixed = fixed };

	unlink(path);
	ck_assert_msg(!image_create(path, &c, &err), "%s", err.msg);
}

static int try_open(const char *name, bool readonly, bool repair)
{
	struct image_how how = { .format = "vdi", .readonly = readonly, .repair = repair };

	img = NULL;
	err.msg[0] = 0;
	return image_open(&img, name, &how, &err);
}

static void open_image(bool readonly)
{
	ck_assert_msg(!try_open(path, readonly, false), "%s", err.msg);
}

static void close_image(void)
{
	ck_assert_int_eq(image_close(img), 0);
	img = NULL;
}

/* Bytes that are quick to make and differ by place. */
static void pattern(uint8_t *p, size_t n)
{
	uint8_t a = (uint8_t)(rnd(255) + 1);

	for (size_t k = 0; k < n; k++)
		p[k] = (uint8_t)(a + k / 512 + k);
}

static void same_as_model(uint64_t size)
{
	memset(buf, 0xaa, size);
	ck_assert_int_eq(image_read(img, buf, size, 0), 0);
	ck_assert_int_eq(memcmp(buf, model, size), 0);
}

static void check_with(enum image_repair repair, struct image_check *c)
{
	memset(c, 0, sizeof(*c));
	ck_assert_msg(!image_check(img, repair, c, &err), "%s", err.msg);
}

static void check_is_clean(void)
{
	struct image_check c;

	check_with(REPAIR_NONE, &c);
	ck_assert_uint_eq(c.corruptions + c.errors, 0);
	ck_assert_uint_eq(c.leaks, 0);
}

static void write_file(const char *name, const void *data, size_t n)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	ck_assert_int_eq(write(fd, data, n), (ssize_t)n);
	close(fd);
}

/* QEMU sees no fault in the closed image, and the bytes of the model. */
static void qemu_agrees(uint64_t size)
{
	struct stat st;
	int fd;

	ck_assert_int_eq(sh("qemu-img check -q -f vdi %s", path), 0);
	ck_assert_int_eq(sh("qemu-img convert -t unsafe -f vdi -O raw %s %s", path, other), 0);
	fd = open(other, O_RDONLY);
	ck_assert_int_eq(fstat(fd, &st), 0);
	ck_assert_uint_eq((uint64_t)st.st_size, size);
	ck_assert_int_eq(read(fd, buf, size), (ssize_t)size);
	close(fd);
	unlink(other);
	ck_assert_int_eq(memcmp(buf, model, size), 0);
}

/* ---- QEMU's images and ours ---- */

static void fill_model(uint64_t size)
{
	memset(model, 0, size);
	for (unsigned k = 0; k < 12; k++) {
		uint64_t at = rnd((unsigned)(size / 512)) * 512ull, n = rnd(600) * 512ull;

		pattern(model + at, MIN(n, size - at));
	}
}

static void read_of_qemu(const char *options, uint64_t size)
{
	fill_model(size);
	write_file(other, model, size);
	unlink(path);
	ck_assert_int_eq(sh("qemu-img convert -t unsafe -f raw -O vdi %s %s %s", options, other, path), 0);
	unlink(other);
	open_image(true);
	ck_assert_uint_eq(image_size(img), size);
	ck_assert_uint_eq(image_cluster(img), MIB);
	same_as_model(size);
	for (unsigned k = 0; k < 200; k++) {
		uint64_t off = rnd((unsigned)size), n = rnd(70000);

		n = MIN(n, size - off);
		ck_assert_int_eq(image_read(img, buf, n, off), 0);
		ck_assert_int_eq(memcmp(buf, model + off, n), 0);
	}
	check_is_clean();
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EROFS);
	close_image();
}

START_TEST(test_images_made_by_qemu_read_the_same)
{
	if (no_qemu(__func__))
		return;
	start();
	read_of_qemu("", 24 * MIB);
	read_of_qemu("", 10 * MIB + 1536);
	read_of_qemu("-o static=on", 7 * MIB + 512);
	finish();
}
END_TEST

static void random_write(uint64_t size, size_t most)
{
	uint64_t n = 1 + rnd((unsigned)most), off = rnd((unsigned)size);

	n = MIN(n, size - off);
	pattern(buf, n);
	memcpy(model + off, buf, n);
	ck_assert_int_eq(image_write(img, buf, n, off), 0);
}

START_TEST(test_images_made_here_are_clean_and_read_the_same_in_qemu)
{
	static const uint64_t sizes[] = { 512, 20 * MIB, 5 * MIB + 512 };

	if (no_qemu(__func__))
		return;
	start();
	for (unsigned k = 0; k < 6; k++) {
		uint64_t size = sizes[k / 2];

		memset(model, 0, size);
		create(size, 0, k % 2);
		qemu_agrees(size);
		open_image(false);
		for (unsigned n = 0; n < 30; n++)
			random_write(size, 300000);
		same_as_model(size);
		close_image();
		qemu_agrees(size);
		if (size < MIB)
			continue;
		ck_assert_int_eq(sh("qemu-io -t unsafe -f vdi -c 'write -P 9 700k 3M' %s >/dev/null", path), 0);
		memset(model + 700 * 1024, 9, 3 * MIB);
		open_image(false);
		same_as_model(size);
		check_is_clean();
		close_image();
	}
	finish();
}
END_TEST

START_TEST(test_writing_into_an_image_of_qemu_keeps_it_clean)
{
	if (no_qemu(__func__))
		return;
	start();
	fill_model(20 * MIB);
	write_file(other, model, 20 * MIB);
	ck_assert_int_eq(sh("qemu-img convert -t unsafe -f raw -O vdi %s %s", other, path), 0);
	open_image(false);
	for (unsigned n = 0; n < 40; n++) {
		random_write(20 * MIB, 900000);
		if (n % 8 == 7) {
			uint64_t at = rnd(20) * (uint64_t)MIB;

			ck_assert_int_eq(image_discard(img, at, MIB), 0);
			memset(model + at, 0, MIB);
		}
	}
	same_as_model(20 * MIB);
	close_image();
	qemu_agrees(20 * MIB);
	ck_assert_int_eq(sh("qemu-io -t unsafe -f vdi -c 'write -P 7 0 20M' %s >/dev/null", path), 0);
	memset(model, 7, 20 * MIB);
	open_image(true);
	same_as_model(20 * MIB);
	check_is_clean();
	close_image();
	finish();
}
END_TEST

/* ---- a model, in place ---- */

static uint64_t random_op(uint64_t size, unsigned most)
{
	uint64_t off = rnd((unsigned)size), n = 1 + rnd(most), grown;

	n = MIN(n, size - off);
	switch (rnd(12)) {
	case 0:
	case 1:
	case 2:
	case 3:
		random_write(size, most);
		break;
	case 4:
	case 5:
		ck_assert_int_eq(image_zero(img, off, n, rnd(2)), 0);
		memset(model + off, 0, n);
		break;
	case 6:         /* whole blocks only: parts are left alone */
		off -= off % image_cluster(img);
		n = MIN(MAX(n, image_cluster(img)) / image_cluster(img) * image_cluster(img), size - off);
		ck_assert_int_eq(image_discard(img, off, n), 0);
		ck_assert_int_eq(image_read(img, buf, n, off), 0);
		if (n % image_cluster(img) == 0 || off + n == size)
			ck_assert(buf[0] == 0 && !memcmp(buf, buf + 1, n - 1));
		memset(model + off, 0, n);
		break;
	case 7:
		ck_assert_int_eq(image_flush(img), 0);
		break;
	case 8:
		close_image();
		open_image(false);
		break;
	case 9:
		grown = size + rnd(4) * 512ull * rnd(300);
		if (rnd(8) || grown > MODEL_MOST / 2)
			break;
		ck_assert_msg(!image_resize(img, grown, PREALLOC_OFF, false, &err), "%s", err.msg);
		memset(model + size, 0, grown - size);
		return grown;
	default:
		ck_assert_int_eq(image_read(img, buf, n, off), 0);
		ck_assert_int_eq(memcmp(buf, model + off, n), 0);
	}
	return size;
}

static void random_ops(uint64_t size, uint32_t block, bool fixed, unsigned count)
{
	memset(model, 0, sizeof(model));
	create(size, block, fixed);
	open_image(false);
	for (unsigned k = 0; k < count; k++)
		size = random_op(size, block * 3 / 2);
	same_as_model(size);
	check_is_clean();
	close_image();
	open_image(true);
	same_as_model(size);
	check_is_clean();
	close_image();
	if (block == MIB && !sh("command -v qemu-img >/dev/null"))
		qemu_agrees(size);
}

START_TEST(test_random_operations_match_a_plain_model)
{
	start();
	random_ops(16 * MIB, MIB, false, 150);
	random_ops(9 * MIB + 512, MIB, true, 100);
	for (unsigned k = 0; k < 6; k++)
		random_ops(2 * MIB + 1536 * k, 4096u << k % 3, k % 4 == 3, 500);
	finish();
}
END_TEST

/* ---- without waiting: this is the layer that waits ---- */

static struct plan running;
static bool plan_runs;

static void end_plan(int how)
{
	int r = how;

	if (!plan_runs)
		return;
	r = r ? r : plan_run(&running, &img->file);
	plan_clear(&running);
	img->fmt->gathered(img, r);
	plan_runs = img->gathering = false;
}

static void begin_plan(void)
{
	ck_assert(!plan_runs);
	plan_runs = img->gathering = true;
	ck_assert_int_eq(img->fmt->gather(img, &running), 0);
}

/* What -EAGAIN asked for. */
static void serve(void)
{
	struct table *t = img->want_table;

	if (img->want == WANT_PLAN) {
		if (!plan_runs)
			begin_plan();
		end_plan(rnd(8) ? 0 : -EIO);
		return;
	}
	ck_assert_int_eq(img->want, WANT_TABLE);
	while (t->loading) {
		unsigned some = 1 + rnd(5000);
		struct iovec part = { t->iov.iov_base, MIN(t->iov.iov_len, some) };
		uint64_t at = t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data);

		table_loaded(t, (int)preadv(img->file.fd, &part, 1, (off_t)at));
	}
}

static struct extent map_of(uint64_t off, uint64_t len)
{
	struct extent e;
	int r;

	while ((r = img->fmt->map(img, off, len, &e)) == -EAGAIN)
		serve();
	ck_assert_int_eq(r, 0);
	ck_assert_uint_ge(e.len, 1);
	return e;
}

static void read_model(uint64_t off, uint64_t len)
{
	while (len) {
		struct extent e = map_of(off, len);
		uint64_t n = MIN(e.len, len);

		memset(buf, 0, n);
		if (e.kind == EXT_DATA)
			ck_assert_int_eq(pread(img->file.fd, buf, n, (off_t)e.pos), (ssize_t)n);
		ck_assert_int_eq(memcmp(buf, model + off, n), 0);
		off += n;
		len -= n;
	}
}

#define OPEN_ALLOCS 4
static struct alloc allocs[OPEN_ALLOCS];
static bool alloc_open[OPEN_ALLOCS];

/* The bytes around it as they read now, the new ones from the model. A write that is dropped never was. */
static void end_alloc(unsigned k, bool drop)
{
	struct alloc *a = &allocs[k];
	uint64_t at = a->pos - (a->off - a->fill_off);

	alloc_open[k] = false;
	if (drop) {
		memset(buf, 0xee, a->len);
		ck_assert_int_eq(pwrite(img->file.fd, buf, a->len, (off_t)a->pos), (ssize_t)a->len);
		return img->fmt->drop(img, a);
	}
	memset(buf, 0, a->fill_end - a->fill_off);
	pattern(buf + (a->off - a->fill_off), a->len);
	memcpy(model + a->off, buf + (a->off - a->fill_off), a->len);
	if (a->blank)
		ck_assert_int_eq(pwrite(img->file.fd, buf + (a->off - a->fill_off), a->len, (off_t)a->pos), (ssize_t)a->len);
	else
		ck_assert_int_eq(pwrite(img->file.fd, buf, a->fill_end - a->fill_off, (off_t)at),
			(ssize_t)(a->fill_end - a->fill_off));
	img->fmt->link(img, a);
}

static void begin_write(uint64_t off, uint64_t len)
{
	unsigned k = 0;
	int r;

	while (k < OPEN_ALLOCS && alloc_open[k])
		k++;
	if (k == OPEN_ALLOCS)
		end_alloc(k = rnd(OPEN_ALLOCS), false);
	memset(&allocs[k], 0, sizeof(allocs[k]));
	while ((r = img->fmt->alloc(img, off, len, &allocs[k])) == -EAGAIN)
		serve();
	if (r == -EBUSY) {
		bool other_has = false;

		for (unsigned n = 0; n < OPEN_ALLOCS; n++)
			other_has |= alloc_open[n] && off >= allocs[n].fill_off && off < allocs[n].fill_end;
		ck_assert(other_has);
		return;
	}
	ck_assert_int_eq(r, 0);
	ck_assert(allocs[k].off == off && allocs[k].len >= 1 && allocs[k].len <= len);
	if (allocs[k].fresh) {
		alloc_open[k] = true;
		return;
	}
	pattern(buf, allocs[k].len);
	memcpy(model + off, buf, allocs[k].len);
	ck_assert_int_eq(pwrite(img->file.fd, buf, allocs[k].len, (off_t)allocs[k].pos), (ssize_t)allocs[k].len);
}

static void punch_some(uint64_t off, uint64_t len)
{
	uint64_t done = 0, part = 0;
	int r;

	while ((r = img->fmt->punch(img, off, len, PUNCH_UNMAP, &done, &part)) == -EAGAIN)
		serve();
	if (r == -EBUSY)
		return;
	ck_assert_int_eq(r, 0);
	ck_assert(done <= len && (done || part));
	memset(model + off, 0, done);
	for (unsigned k = 0; k < OPEN_ALLOCS; k++)
		ck_assert(!done || !alloc_open[k] || off + done <= allocs[k].fill_off || off >= allocs[k].fill_end);
}

static void end_allocs(void)
{
	for (unsigned k = 0; k < OPEN_ALLOCS; k++)
		if (alloc_open[k])
			end_alloc(k, false);
}

static void random_steps(uint64_t size, uint32_t block, unsigned count)
{
	memset(model, 0, sizeof(model));
	create(size, block, false);
	open_image(false);
	img->blocking = false;
	no_cache = true;
	for (unsigned k = 0; k < count; k++) {
		uint64_t off = rnd((unsigned)(size / 512)) * 512ull, len = (1 + rnd(4 * block / 512)) * 512ull;
		unsigned n = rnd(OPEN_ALLOCS);

		len = MIN(len, size - off);
		switch (rnd(8)) {
		case 0:
		case 1:
		case 2:
			begin_write(off, len);
			break;
		case 3:
			if (alloc_open[n])
				end_alloc(n, rnd(4) == 0);
			break;
		case 4:
			punch_some(rnd(2) ? off : off / block * block, len);
			break;
		case 5:
			if (plan_runs)
				end_plan(rnd(4) ? 0 : -EIO);
			else
				begin_plan();
			break;
		default:
			read_model(off, len);
		}
	}
	end_allocs();
	end_plan(0);
	read_model(0, size);
	img->blocking = true;
	no_cache = false;
	same_as_model(size);
	close_image();
	open_image(true);
	same_as_model(size);
	close_image();
}

START_TEST(test_nonblocking_steps_match_a_plain_model)
{
	struct image_check c;

	start();
	for (unsigned k = 0; k < 8; k++) {
		random_steps((9 + k) * MIB + 512 * k, 4096u << k % 4, 3000);
		open_image(true);
		check_with(REPAIR_NONE, &c);
		ck_assert_uint_eq(c.corruptions + c.errors, 0);
		close_image();
	}
	finish();
}
END_TEST

START_TEST(test_table_of_an_alloc_stays_while_others_come_and_go)
{
	struct alloc a = { 0 };
	struct image_status s;

	start();
	create(400 * 4ull * MIB, 4096, false);
	open_image(false);
	ck_assert_int_eq(img->fmt->alloc(img, 0, 4096, &a), 0);
	for (uint64_t k = 1; k < 400; k++)
		ck_assert_int_eq(image_status(img, k * 4 * MIB, 512, &s), 0);
	ck_assert_int_eq(pwrite(img->file.fd, memset(buf, 3, 4096), 4096, (off_t)a.pos), 4096);
	img->fmt->link(img, &a);
	close_image();
	open_image(true);
	memset(model, 3, 4096);
	same_as_model(16 * MIB);
	check_is_clean();
	close_image();
	finish();
}
END_TEST

START_TEST(test_dropped_allocs_do_not_stay_counted)
{
	struct alloc a[3] = { 0 };
	uint32_t count = 77;

	start();
	create(MIB, 4096, false);
	open_image(false);
	for (unsigned k = 0; k < 3; k++)
		ck_assert_int_eq(img->fmt->alloc(img, k * 8192, 4096, &a[k]), 0);
	for (unsigned k = 0; k < 3; k++)
		img->fmt->drop(img, &a[k]);
	close_image();
	{
		int fd = open(path, O_RDONLY);

		ck_assert_int_eq(pread(fd, &count, 4, 388), 4);
		close(fd);
	}
	ck_assert_uint_eq(count, 0);
	finish();
}
END_TEST

/* ---- a kill at any instant ---- */

static void poke32(uint64_t off, uint32_t val)
{
	int fd = open(path, O_WRONLY);

	ck_assert_int_eq(pwrite(fd, &val, 4, (off_t)off), 4);
	close(fd);
}

static void make_prefix(int from, unsigned n, unsigned drop_epoch)
{
	int fd = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
	uint64_t size = 0;
	static uint8_t first[MODEL_MOST];
	ssize_t got = pread(from, first, sizeof(first), 0);

	ck_assert_int_eq(write(fd, first, (size_t)got), got);
	size = (uint64_t)got;
	for (unsigned k = 0; k < n; k++) {
		const struct record *r = &tape.list[k];

		if (r->epoch == drop_epoch && rnd(2))
			continue;
		size = MAX(size, r->size);
		ck_assert_int_eq(pwrite(fd, r->data, r->len, (off_t)r->off), (ssize_t)r->len);
	}
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static void prefix_is_sound(void)
{
	struct image_check c;

	ck_assert_msg(!try_open(other, true, false), "%s", err.msg);
	check_with(REPAIR_NONE, &c);
	ck_assert_uint_eq(c.corruptions + c.errors, 0);
	close_image();
}

/* Cut off after each write, and with any of the writes since the last sync missing. */
static void all_prefixes(int from)
{
	for (unsigned n = 0; n <= tape.n; n++) {
		make_prefix(from, n, UINT32_MAX);
		prefix_is_sound();
	}
	for (unsigned e = 0; e <= tape.epoch; e++) {
		unsigned n = 0;

		while (n < tape.n && tape.list[n].epoch <= e)
			n++;
		for (unsigned k = 0; k < 2; k++) {
			make_prefix(from, n, e);
			prefix_is_sound();
		}
	}
}

static int keep_copy(void)
{
	int fd;

	ck_assert_int_eq(sh("cp %s %s/first", path, dir), 0);
	snprintf(other, sizeof(other), "%s/first", dir);
	fd = open(other, O_RDONLY);
	unlink(other);
	snprintf(other, sizeof(other), "%s/b", dir);
	return fd;
}

START_TEST(test_row_kill_after_any_write_leaves_no_corruption)
{
	uint64_t size = 3 * MIB / 2 + 512;
	int from;

	start();
	create(size, 16384, false);
	open_image(false);
	from = keep_copy();
	tape.on = true;
	for (unsigned k = 0; k < 60; k++) {
		random_write(size, 40000);
		if (k % 5 == 0)
			ck_assert_int_eq(image_discard(img, rnd(90) * 16384u, 32768), 0);
		if (rnd(4) == 0)
			ck_assert_int_eq(image_flush(img), 0);
	}
	close_image();
	tape.on = false;
	ck_assert_uint_gt(tape.n, 100);
	all_prefixes(from);
	close(from);
	finish();
}
END_TEST

/* An image as QEMU lays it out: no room behind the map. */
static void pack_map(uint32_t blocks)
{
	static uint8_t whole[MODEL_MOST];
	int fd = open(path, O_RDWR);
	ssize_t n = pread(fd, whole, sizeof(whole), 0);
	uint32_t map = 512, data = 512 + (blocks * 4 + 511) / 512 * 512;

	ck_assert_int_gt(n, MIB - 1);
	memmove(whole + 512, whole + 4096, data - 512);
	memmove(whole + data, whole + MIB, (size_t)n - MIB);
	memcpy(whole + 340, &map, 4);
	memcpy(whole + 344, &data, 4);
	n -= MIB - data;
	ck_assert_int_eq(pwrite(fd, whole, (size_t)n, 0), n);
	ck_assert_int_eq(ftruncate(fd, n), 0);
	close(fd);
}

/* Whatever is cut off of a change that moves data about: it is all there. */
static void all_prefixes_have(int from, uint64_t size)
{
	for (unsigned k = 0; k <= 2 * tape.n; k++) {
		unsigned n = k / 2, epoch = k % 2 && n < tape.n ? tape.list[n].epoch : UINT32_MAX;

		while (k % 2 && n < tape.n && tape.list[n].epoch == epoch)
			n++;
		make_prefix(from, n, epoch);
		prefix_is_sound();
		ck_assert_int_eq(try_open(other, true, false), 0);
		same_as_model(size);
		close_image();
	}
}

static void resize_killed(uint64_t size, uint64_t to, unsigned writes)
{
	int from;

	create(size, 4096, false);
	pack_map((uint32_t)(size / 4096));
	open_image(false);
	memset(model, 0, sizeof(model));
	for (unsigned k = 0; k < writes; k++)
		random_write(size, 9000);
	ck_assert_int_eq(image_flush(img), 0);
	from = keep_copy();
	tape.on = true;
	ck_assert_msg(!image_resize(img, to, PREALLOC_OFF, false, &err), "%s", err.msg);
	tape.on = false;
	ck_assert_uint_eq(image_size(img), to);
	same_as_model(to);
	check_is_clean();
	close_image();
	all_prefixes_have(from, size);
	open_image(false);
	for (unsigned k = 0; k < 20; k++)
		random_write(to, 30000);
	same_as_model(to);
	check_is_clean();
	close_image();
	close(from);
	wipe_tape();
}

START_TEST(test_growth_beyond_the_map_moves_blocks_and_survives_a_kill)
{
	start();
	resize_killed(128 * 4096, 5000 * 4096 + 512, 0);
	resize_killed(128 * 4096, 5000 * 4096 + 512, 2);
	resize_killed(128 * 4096, 5000 * 4096 + 512, 60);
	finish();
}
END_TEST

START_TEST(test_growth_of_an_image_with_a_wrong_entry_fails_and_keeps_the_rest)
{
	start();
	create(128 * 4096, 4096, false);
	pack_map(128);
	open_image(false);
	pattern(model, 5 * 4096);
	ck_assert_int_eq(image_write(img, model, 5 * 4096, 0), 0);
	close_image();
	poke32(512 + 100 * 4, 6);
	open_image(false);
	ck_assert_int_eq(image_resize(img, 5000 * 4096, PREALLOC_OFF, false, &err), -EIO);
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EIO);
	close_image();
	open_image(true);
	ck_assert_uint_eq(image_size(img), 128 * 4096);
	ck_assert_int_eq(image_read(img, buf, 5 * 4096, 0), 0);
	ck_assert_int_eq(memcmp(buf, model, 5 * 4096), 0);
	close_image();
	finish();
}
END_TEST

/* ---- the end of a run that was none ---- */

START_TEST(test_space_behind_the_count_is_used_again_and_shows_nothing_old)
{
	static uint8_t junk[4 * 4096];
	struct stat st;
	off_t before;

	start();
	create(MIB, 4096, false);
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 1, 4096), 4096, 0), 0);
	close_image();
	ck_assert_int_eq(stat(path, &st), 0);
	before = st.st_size;
	memset(junk, 0x55, sizeof(junk));
	{
		int fd = open(path, O_WRONLY | O_APPEND);

		ck_assert_int_eq(write(fd, junk, sizeof(junk)), sizeof(junk));
		close(fd);
	}
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 2, 100), 100, 8192 + 1000), 0);
	memset(model, 1, 4096);
	memset(model + 8192 + 1000, 2, 100);
	same_as_model(MIB);
	close_image();
	ck_assert_int_eq(stat(path, &st), 0);
	ck_assert_int_eq(st.st_size, before + (off_t)sizeof(junk));
	finish();
}
END_TEST

START_TEST(test_entry_behind_the_count_stops_changes_but_not_other_reads)
{
	start();
	create(MIB, 4096, false);
	open_image(false);
	memset(model, 3, 5 * 4096);
	ck_assert_int_eq(image_write(img, model, 5 * 4096, 0), 0);
	close_image();
	poke32(388, 4);
	for (unsigned ro = 0; ro < 2; ro++) {
		open_image(ro);
		ck_assert_int_eq(image_read(img, buf, 4 * 4096, 0), 0);
		ck_assert_int_eq(memcmp(buf, model, 4 * 4096), 0);
		ck_assert_int_eq(image_read(img, buf, 512, 4 * 4096), -EIO);
		ck_assert_int_eq(image_read(img, buf, 512, 5 * 4096), 0);
		ck_assert_int_eq(image_write(img, buf, 512, 0), ro ? -EROFS : -EIO);
		close_image();
	}
	finish();
}
END_TEST

START_TEST(test_entry_behind_the_old_count_is_found_also_when_the_count_has_grown)
{
	start();
	create(8 * MIB, 4096, false);
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 1, 512), 512, 0), 0);
	close_image();
	poke32(4096 + 1500 * 4, 1);
	open_image(false);
	ck_assert_int_eq(image_write(img, buf, 512, 4096), 0);
	ck_assert_int_eq(image_write(img, buf, 512, 1500 * 4096), -EIO);
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EIO);
	close_image();
	finish();
}
END_TEST

START_TEST(test_failed_writes_leave_places_for_the_next)
{
	start();
	create(MIB, 4096, false);
	open_image(false);
	fail_writes = 1;
	ck_assert_int_eq(image_write(img, memset(buf, 9, 4096), 4096, 0), -EIO);
	ck_assert_int_eq(image_write(img, memset(buf, 1, 512), 512, 4096 + 512), 0);
	memset(model + 4096 + 512, 1, 512);
	fail_writes = 1;
	ck_assert_int_eq(image_flush(img), -EIO);
	ck_assert_int_eq(image_flush(img), 0);
	same_as_model(MIB);
	check_is_clean();
	close_image();
	open_image(true);
	same_as_model(MIB);
	check_is_clean();
	close_image();
	finish();
}
END_TEST

/* ---- discard ---- */

START_TEST(test_discard_gives_space_back_and_more_blocks_than_the_list_holds)
{
	uint64_t size = 3000 * 4096, full;

	start();
	create(size, 4096, false);
	open_image(false);
	memset(buf, 5, size);
	ck_assert_int_eq(image_write(img, buf, size, 0), 0);
	ck_assert_int_eq(image_flush(img), 0);
	full = image_disk_usage(img);
	ck_assert_int_eq(image_discard(img, 0, size), 0);
	ck_assert_int_eq(image_write(img, memset(buf, 6, 100), 100, 5000), 0);
	memset(model, 0, size);
	memset(model + 5000, 6, 100);
	same_as_model(size);
	ck_assert_int_eq(image_flush(img), 0);
	ck_assert_uint_lt(image_disk_usage(img), full / 10);
	same_as_model(size);
	check_is_clean();
	close_image();
	open_image(true);
	same_as_model(size);
	close_image();
	finish();
}
END_TEST

START_TEST(test_zero_entries_of_others_read_as_zeroes)
{
	struct image_status s;

	start();
	create(8 * 4096, 4096, false);
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 5, 4096), 4096, 0), 0);
	close_image();
	poke32(4096 + 4, 0xfffffffe);
	open_image(false);
	ck_assert_int_eq(image_status(img, 0, 8 * 4096, &s), 0);
	ck_assert(s.kind == EXT_DATA && s.len == 4096 && s.host == MIB);
	ck_assert_int_eq(image_status(img, 4096, 7 * 4096, &s), 0);
	ck_assert(s.kind == EXT_ZERO && s.len == 4096);
	ck_assert_int_eq(image_status(img, 8192, 6 * 4096, &s), 0);
	ck_assert(s.kind == EXT_HOLE && s.len == 6 * 4096);
	ck_assert_int_eq(image_write(img, buf, 10, 4096 + 10), 0);
	memset(model, 5, 4096);
	memset(model + 4096 + 10, 5, 10);
	same_as_model(8 * 4096);
	check_is_clean();
	close_image();
	finish();
}
END_TEST

/* ---- size ---- */

START_TEST(test_resize_grows_shrinks_and_refuses_to_cut_data)
{
	start();
	create(10 * MIB, 0, false);
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 7, 4096), 4096, 4 * MIB), 0);
	memset(model + 4 * MIB, 7, 4096);
	ck_assert_int_eq(image_resize(img, 4 * MIB, PREALLOC_OFF, true, &err), -EEXIST);
	ck_assert_ptr_nonnull(strstr(err.msg, "block at 4194304 is allocated"));
	ck_assert_int_eq(image_resize(img, 5 * MIB, PREALLOC_OFF, false, &err), -EINVAL);
	ck_assert_int_eq(image_resize(img, 5 * MIB, PREALLOC_FULL, true, &err), -EINVAL);
	ck_assert_int_eq(image_resize(img, 4 * MIB + 2048, PREALLOC_OFF, true, &err), 0);
	ck_assert_uint_eq(image_size(img), 4 * MIB + 2048);
	ck_assert_int_eq(image_resize(img, 30 * MIB, PREALLOC_OFF, false, &err), 0);
	memset(model + 4 * MIB + 2048, 0, 2048);
	same_as_model(30 * MIB);
	check_is_clean();
	ck_assert_int_eq(image_resize(img, 1ull << 45, PREALLOC_OFF, false, &err), 0);
	same_as_model(30 * MIB);
	ck_assert_int_eq(image_write(img, memset(buf, 8, 512), 512, (1ull << 45) - 512), 0);
	ck_assert_int_eq(image_resize(img, 1ull << 63, PREALLOC_OFF, false, &err), -EFBIG);
	check_is_clean();
	close_image();
	if (!no_qemu(__func__))
		ck_assert_int_eq(sh("qemu-img check -q -f vdi %s", path), 0);
	finish();
}
END_TEST

static void all_allocated(unsigned blocks)
{
	struct image_check c = { 0 };

	ck_assert_msg(!image_check(img, REPAIR_NONE, &c, &err), "%s", err.msg);
	ck_assert_uint_eq(c.clusters, blocks);
	ck_assert_uint_eq(c.allocated, blocks);
}

START_TEST(test_fixed_images_have_all_blocks_also_when_grown)
{
	start();
	create(5 * MIB, 0, true);
	open_image(false);
	all_allocated(5);
	for (unsigned k = 0; k < 10; k++)
		random_write(5 * MIB, 70000);
	ck_assert_int_eq(image_resize(img, 4 * MIB, PREALLOC_OFF, true, &err), -EOPNOTSUPP);
	ck_assert_msg(!image_resize(img, 9 * MIB + 512, PREALLOC_FALLOC, false, &err), "%s", err.msg);
	ck_assert_uint_ge(image_disk_usage(img), 4 * MIB);
	all_allocated(10);
	same_as_model(9 * MIB + 512);
	check_is_clean();
	close_image();
	if (!no_qemu(__func__))
		qemu_agrees(9 * MIB + 512);
	finish();
}
END_TEST

START_TEST(test_creation_says_what_it_does_not_take)
{
	static const struct {
		struct image_create c;
		const char *words;
	} bad[] = {
		{ { .size = MIB, .backing = "x", .backing_format = "raw" }, "no backing files" },
		{ { .size = MIB, .version = 3 }, "no options but" },
		{ { .size = MIB, .lazy_refcounts = true }, "no options but" },
		{ { .size = MIB, .prealloc = PREALLOC_FULL }, "no preallocation" },
		{ { .size = MIB, .cluster = 5000 }, "power of two" },
		{ { .size = MIB, .cluster = 128 << 20 }, "power of two" },
		{ { .size = 0 }, "0 bytes" },
		{ { .size = 64ull << 40, .cluster = 4096 }, "too small" },
	};

	start();
	for (unsigned k = 0; k < ARRAY_LEN(bad); k++) {
		struct image_create c = bad[k].c;

		c.format = "vdi";
		ck_assert_int_eq(image_create(path, &c, &err), -EINVAL);
		ck_assert_msg(strstr(err.msg, bad[k].words), "%s", err.msg);
		ck_assert_int_eq(access(path, F_OK), -1);
	}
	finish();
}
END_TEST

START_TEST(test_ten_terabytes_are_not_held_in_memory)
{
	uint64_t size = 10ull << 40;
	struct facts *f = facts_new();
	char *text;

	start();
	create(size, 0, false);
	open_image(false);
	ck_assert_uint_lt(image_disk_usage(img), 50 * MIB);
	for (unsigned k = 0; k < 300; k++)
		ck_assert_int_eq(image_write(img, memset(buf, 8, 512), 512, (uint64_t)k * 30000 * MIB), 0);
	ck_assert_int_eq(image_read(img, buf, 512, 299ull * 30000 * MIB), 0);
	ck_assert_uint_eq(buf[511], 8);
	check_is_clean();
	image_describe(img, f);
	text = facts_text(f);
	ck_assert_msg(text && strstr(text, "\"blocks_allocated\":300"), "%s", text);
	ck_assert_ptr_nonnull(strstr(text, "\"subformat\":\"dynamic\""));
	free(text);
	facts_free(f);
	close_image();
	finish();
}
END_TEST

/* ---- check ---- */

static char said[8000];

static void hear(struct image_check *c, const char *text)
{
	(void)c;
	strncat(said, text, sizeof(said) - strlen(said) - 1);
	strncat(said, "\n", sizeof(said) - strlen(said) - 1);
}

static struct image_check checked(enum image_repair repair)
{
	struct image_check c = { .complain = hear };

	said[0] = 0;
	ck_assert_msg(!try_open(path, repair == REPAIR_NONE, repair != REPAIR_NONE), "%s", err.msg);
	ck_assert_msg(!image_check(img, repair, &c, &err), "%s", err.msg);
	return c;
}

/* Six blocks, of them the first five with a place. */
static void make_for_check(void)
{
	create(6 * 4096, 4096, false);
	open_image(false);
	memset(model, 0, 6 * 4096);
	pattern(model, 5 * 4096);
	ck_assert_int_eq(image_write(img, model, 5 * 4096, 0), 0);
	close_image();
}

static void clean_after_repair(void)
{
	close_image();
	open_image(false);
	check_is_clean();
	same_as_model(6 * 4096);
	for (unsigned k = 0; k < 20; k++)
		random_write(6 * 4096, 5000);
	same_as_model(6 * 4096);
	check_is_clean();
	close_image();
}

START_TEST(test_check_finds_and_mends_leaks)
{
	struct image_check c;

	start();
	make_for_check();
	poke32(4096 + 4, 0xffffffff);           /* places 1 and 3 are nobody's */
	poke32(4096 + 12, 0xfffffffe);
	memset(model + 4096, 0, 4096);
	memset(model + 3 * 4096, 0, 4096);
	ck_assert_int_eq(truncate(path, MIB + 5 * 4096 + 100), 0);
	c = checked(REPAIR_NONE);
	ck_assert(c.corruptions == 0 && c.leaks == 3 && c.allocated == 3 && c.clusters == 6);
	ck_assert_ptr_nonnull(strstr(said, "3 places are not used by any block"));
	close_image();
	c = checked(REPAIR_LEAKS);
	ck_assert(c.leaks == 3 && c.fixed_leaks == 3);
	ck_assert_uint_eq(img->file.size, MIB + 3 * 4096);
	clean_after_repair();
	finish();
}
END_TEST

START_TEST(test_check_finds_and_mends_a_count_that_is_too_low_or_too_high)
{
	struct image_check c;

	start();
	make_for_check();
	poke32(388, 3);
	c = checked(REPAIR_LEAKS);
	ck_assert(c.corruptions == 2 && c.fixed_corruptions == 0 && c.leaks == 0);
	close_image();
	c = checked(REPAIR_ALL);
	ck_assert(c.corruptions == 2 && c.fixed_corruptions == 2);
	clean_after_repair();
	make_for_check();
	poke32(388, 1000);
	ck_assert_int_eq(try_open(path, false, false), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "counts 1000 blocks allocated of 6"));
	c = checked(REPAIR_ALL);
	ck_assert(c.corruptions == 0 && c.leaks == 995 && c.fixed_leaks == 995);
	clean_after_repair();
	finish();
}
END_TEST

START_TEST(test_check_mends_entries_past_the_end_of_the_file)
{
	struct image_check c;

	start();
	make_for_check();
	ck_assert_int_eq(truncate(path, MIB + 3 * 4096 + 512), 0);
	ck_assert_int_eq(try_open(path, false, false), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "cut short"));
	c = checked(REPAIR_NONE);
	ck_assert(c.corruptions == 2 && c.leaks == 1);
	ck_assert_ptr_nonnull(strstr(said, "block 4 lies in place 4, past the end of the file"));
	ck_assert_ptr_nonnull(strstr(said, "inside its last block"));
	ck_assert_int_eq(image_read(img, buf, 3 * 4096, 0), 0);
	ck_assert_int_eq(memcmp(buf, model, 3 * 4096), 0);
	ck_assert_int_eq(image_read(img, buf, 512, 4 * 4096), -EIO);
	close_image();
	c = checked(REPAIR_ALL);
	ck_assert(c.corruptions == 2 && c.fixed_corruptions == 2 && c.fixed_leaks == 1);
	memset(model + 3 * 4096 + 512, 0, 4096 - 512);
	memset(model + 4 * 4096, 0, 4096);
	clean_after_repair();
	finish();
}
END_TEST

START_TEST(test_duplicates_stop_changes_and_cannot_be_mended)
{
	struct image_check c;

	start();
	make_for_check();
	poke32(4096 + 4, 3);
	open_image(false);
	ck_assert_int_eq(image_read(img, buf, 4096, 4096), 0);
	ck_assert_int_eq(memcmp(buf, model + 3 * 4096, 4096), 0);
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EIO);
	close_image();
	c = checked(REPAIR_ALL);
	ck_assert(c.corruptions == 1 && c.fixed_corruptions == 0 && c.leaks == 1 && c.fixed_leaks == 0);
	ck_assert_ptr_nonnull(strstr(said, "block 3 lies in place 3, and so does another: which of them is right cannot be known"));
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EIO);
	close_image();
	finish();
}
END_TEST

START_TEST(test_mending_of_leaks_survives_a_kill)
{
	uint64_t size = 300 * 4096;
	struct image_check c;
	int from;

	start();
	create(size, 4096, false);
	open_image(false);
	for (unsigned k = 0; k < 120; k++)
		random_write(size, 20000);
	close_image();
	for (unsigned k = 0; k < 60; k++) {
		unsigned block = rnd(300);

		poke32(4096 + 4 * block, 0xffffffff);
		memset(model + block * 4096, 0, 4096);
	}
	ck_assert_msg(!try_open(path, false, true), "%s", err.msg);
	from = keep_copy();
	tape.on = true;
	check_with(REPAIR_LEAKS, &c);
	tape.on = false;
	ck_assert(c.leaks > 20 && c.fixed_leaks == c.leaks && c.corruptions == 0);
	check_is_clean();
	same_as_model(size);
	close_image();
	all_prefixes_have(from, size);
	close(from);
	finish();
}
END_TEST

START_TEST(test_full_disk_uses_the_places_that_a_kill_left)
{
	start();
	create(6 * 4096, 4096, false);
	open_image(false);
	pattern(model, 6 * 4096);
	ck_assert_int_eq(image_write(img, model, 6 * 4096, 0), 0);
	close_image();
	poke32(4096 + 8, 0xffffffff);
	memset(model + 8192, 0, 4096);
	open_image(false);
	ck_assert_int_eq(image_write(img, memset(buf, 4, 10), 10, 8192 + 50), 0);
	memset(model + 8192 + 50, 4, 10);
	same_as_model(6 * 4096);
	check_is_clean();
	close_image();
	finish();
}
END_TEST

/* ---- hostile ---- */

static uint64_t get(const uint8_t *p, unsigned width)
{
	uint64_t v = 0;

	memcpy(&v, p, width);
	return v;
}

START_TEST(test_hostile_headers_are_refused_with_what_was_found)
{
	static const struct {
		unsigned at, width;
		uint64_t val;
		const char *words;
	} bad[] = {
		{ 64, 4, 0, "no VDI image: its signature is 0x00000000" },
		{ 68, 4, 0x00010000, "version 1.0" },
		{ 68, 4, 2, "version 0.2" },
		{ 72, 4, 4, "header says that it has 4 bytes" },
		{ 72, 4, UINT32_MAX, "inside the header" },
		{ 76, 4, 0, "image type 0" },
		{ 76, 4, 99, "image type 99" },
		{ 76, 4, 3, "undo image" },
		{ 76, 4, 4, "differencing image" },
		{ 424, 4, 1, "differencing image" },
		{ 440, 4, 1, "differencing image" },
		{ 340, 4, 0, "begins at byte 0, inside the header" },
		{ 340, 4, 100, "multiples of 512" },
		{ 340, 4, 0xfffffe00, "but the file ends at" },
		{ 344, 4, 4096, "inside the block map" },
		{ 344, 4, 5000, "multiples of 512" },
		{ 360, 4, 4096, "sectors of 4096 bytes" },
		{ 368, 8, 0, "a disk of 0 bytes" },
		{ 368, 8, (64ull << 40) + 512, "64T" },
		{ 368, 8, UINT64_MAX, "64T" },
		{ 368, 8, 2 * MIB, "too few" },
		{ 376, 4, 0, "blocks of 0 bytes" },
		{ 376, 4, 5000, "blocks of 5000 bytes" },
		{ 376, 4, 1u << 31, "blocks of 2147483648 bytes" },
		{ 376, 4, 2048, "blocks of 2048 bytes" },
		{ 380, 4, 512, "512 extra bytes" },
		{ 384, 4, 0, "too few" },
		{ 384, 4, 3, "too few" },
		{ 384, 4, UINT32_MAX, "inside the block map" },
		{ 384, 4, 0x40000001, "inside the block map" },
		{ 388, 4, 7, "cut short" },
		{ 388, 4, UINT32_MAX, "blocks allocated of" },
	};
	static uint8_t whole[MIB];
	int fd;

	start();
	create(MIB, 4096, false);
	fd = open(path, O_RDWR);
	ck_assert_int_eq(pread(fd, whole, sizeof(whole), 0), sizeof(whole));
	for (unsigned k = 0; k < ARRAY_LEN(bad); k++) {
		int r;

		ck_assert_uint_ne(get(whole + bad[k].at, bad[k].width), bad[k].val);
		ck_assert_int_eq(pwrite(fd, whole, 512, 0), 512);
		ck_assert_int_eq(pwrite(fd, &bad[k].val, bad[k].width, bad[k].at), (ssize_t)bad[k].width);
		r = try_open(path, false, false);
		ck_assert_msg((r == -EINVAL || r == -EOPNOTSUPP) && strstr(err.msg, bad[k].words) && !strchr(err.msg, '\n'),
			"row %u: %d: %s", k, r, err.msg);
	}
	close(fd);
	finish();
}
END_TEST

START_TEST(test_claims_of_much_that_are_a_hole_cost_little)
{
	uint32_t blocks = 0x3ff0000, data = 8192 + blocks * 4;
	uint64_t size = blocks * 4096ull;
	struct image_check c = { .complain = hear };

	start();
	create(MIB, 4096, false);
	poke32(344, data);
	poke32(368, (uint32_t)size);
	poke32(372, (uint32_t)(size >> 32));
	poke32(384, blocks);
	poke32(388, blocks);
	ck_assert_int_eq(truncate(path, (off_t)(data + size)), 0);
	open_image(false);
	ck_assert_int_eq(image_read(img, buf, 512, size / 2), 0);
	ck_assert_int_eq(image_write(img, buf, 512, size / 2), -EIO);
	said[0] = 0;
	ck_assert_int_eq(image_check(img, REPAIR_ALL, &c, &err), 0);
	ck_assert(c.corruptions > 1000 && c.errors == 1 && !c.fixed_corruptions && !c.fixed_leaks);
	ck_assert_ptr_nonnull(strstr(said, "the rest of the block map was not looked at"));
	ck_assert_int_eq(image_write(img, buf, 512, size / 2), -EIO);
	close_image();
	finish();
}
END_TEST

START_TEST(test_truncated_files_are_refused)
{
	start();
	create(4 * MIB, 4096, false);
	ck_assert_int_eq(truncate(path, 4096 + 100), 0);
	ck_assert_int_eq(try_open(path, true, false), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "cut short: the block map ends at byte 8192, the file at 4196"));
	ck_assert_int_eq(truncate(path, 4096), 0);
	ck_assert_int_eq(try_open(path, true, false), -EINVAL);
	ck_assert_int_eq(truncate(path, 511), 0);
	ck_assert_int_eq(try_open(path, true, false), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "it has 511 bytes"));
	ck_assert_int_eq(truncate(path, 0), 0);
	ck_assert_int_eq(try_open(path, true, false), -EINVAL);
	finish();
}
END_TEST

START_TEST(test_formats_are_listed_and_guessed)
{
	uint8_t head[512] = { [64] = 0x7f, 0x10, 0xda, 0xbe };

	ck_assert_str_eq(image_guess(head, sizeof(head)), "vdi");
	ck_assert_str_eq(image_guess(head, 67), "raw");
	ck_assert(image_can_write("vdi") && image_can_create("vdi"));
}
END_TEST

UNIT_MAIN("vdi", test_images_made_by_qemu_read_the_same, test_images_made_here_are_clean_and_read_the_same_in_qemu,
	test_writing_into_an_image_of_qemu_keeps_it_clean, test_random_operations_match_a_plain_model,
	test_nonblocking_steps_match_a_plain_model,
	test_table_of_an_alloc_stays_while_others_come_and_go, test_dropped_allocs_do_not_stay_counted,
	test_row_kill_after_any_write_leaves_no_corruption,
	test_growth_beyond_the_map_moves_blocks_and_survives_a_kill,
	test_growth_of_an_image_with_a_wrong_entry_fails_and_keeps_the_rest,
	test_space_behind_the_count_is_used_again_and_shows_nothing_old,
	test_entry_behind_the_count_stops_changes_but_not_other_reads,
	test_entry_behind_the_old_count_is_found_also_when_the_count_has_grown, test_failed_writes_leave_places_for_the_next,
	test_discard_gives_space_back_and_more_blocks_than_the_list_holds, test_zero_entries_of_others_read_as_zeroes,
	test_resize_grows_shrinks_and_refuses_to_cut_data, test_fixed_images_have_all_blocks_also_when_grown,
	test_creation_says_what_it_does_not_take, test_ten_terabytes_are_not_held_in_memory, test_check_finds_and_mends_leaks,
	test_check_finds_and_mends_a_count_that_is_too_low_or_too_high, test_check_mends_entries_past_the_end_of_the_file,
	test_duplicates_stop_changes_and_cannot_be_mended, test_full_disk_uses_the_places_that_a_kill_left,
	test_mending_of_leaks_survives_a_kill,
	test_hostile_headers_are_refused_with_what_was_found,
	test_claims_of_much_that_are_a_hole_cost_little, test_truncated_files_are_refused,
	test_formats_are_listed_and_guessed)
