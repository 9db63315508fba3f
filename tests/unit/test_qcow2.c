/*
 * qcow2 images: what is written reads back, QEMU's tools agree, and a hostile file is refused. preadv2() goes through here
 * (--wrap), so that a table is not in memory when we say so.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "unit.h"
#include "block/qcow2.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"

#define SIZE (3u << 20)         /* of most images */

static struct error err;
static char dir[64], path[96], base[96];
static uint8_t model[SIZE + 4096], buf[SIZE + 4096];
static uint64_t seed;

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed >> 20) % n;
}

static void set_up(void)
{
	snprintf(dir, sizeof(dir), "/tmp/vmm-qcow2-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/a.qcow2", dir);
	snprintf(base, sizeof(base), "%s/base.qcow2", dir);
	seed = 88172645463325252ull;
	memset(model, 0, sizeof(model));
}

static int shell(const char *fmt, ...)
{
	char text[800];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	ck_assert_int_lt(n, (int)sizeof(text));
	return system(text);
}

static void tear_down(void)
{
	ck_assert_int_eq(shell("rm -rf %s", dir), 0);
}

static bool no_qemu(const char *test)
{
	static int have = -1;

	if (have < 0)
		have = !system("qemu-img --version >/dev/null 2>&1");
	if (!have)
		printf("SKIP %s: there is no qemu-img\n", test);
	return !have;
}

/* ---- images ---- */

static struct image *open_as(const char *file, struct image_how how)
{
	struct image *i = NULL;

	how.format = "qcow2";
	how.backing_dir = "allow";
	ck_assert_msg(!image_open(&i, file, &how, &err), "%s", err.msg);
	i->unsafe = true;       /* no fdatasync(): the test is faster */
	return i;
}

static struct image *open_rw(const char *file)
{
	return open_as(file, (struct image_how){ 0 });
}

static struct image *open_ro(const char *file)
{
	return open_as(file, (struct image_how){ .readonly = true });
}

static int try_open(bool readonly)
{
	struct image_how how = { .format = "qcow2", .readonly = readonly };
	struct image *i;
	int r = image_open(&i, path, &how, &err);

	if (!r)
		image_close(i);
	return r;
}

static void create(const char *file, struct image_create c)
{
	c.format = "qcow2";
	c.overwrite = true;
	c.size = c.size ? c.size : SIZE;
	ck_assert_msg(!image_create(file, &c, &err), "%s", err.msg);
}

static void check_clean(const char *file)
{
	if (no_qemu("qemu-img check"))
		return;
	ck_assert_int_eq(shell("qemu-img check -q %s >%s/out 2>&1 || (cat %s/out; exit 1)", file, dir, dir), 0);
}

static void save_model(const char *name)
{
	char file[128];
	FILE *f;

	snprintf(file, sizeof(file), "%s/%s", dir, name);
	f = fopen(file, "wb");
	ck_assert_ptr_nonnull(f);
	ck_assert_uint_eq(fwrite(model, 1, SIZE, f), SIZE);
	fclose(f);
}

static void compare_with_model(struct image *i)
{
	memset(buf, 0xaa, sizeof(buf));
	ck_assert_int_eq(image_read(i, buf, SIZE, 0), 0);
	for (unsigned at = 0; memcmp(buf, model, SIZE); at++)
		if (buf[at] != model[at])
			ck_abort_msg("byte %u is %02x, should be %02x", at, buf[at], model[at]);
}

/* QEMU reads the same, and finds nothing wrong. */
static void qemu_agrees(const char *file)
{
	if (no_qemu("qemu-img compare"))
		return;
	check_clean(file);
	save_model("model");
	ck_assert_int_eq(shell("qemu-img compare -q -f qcow2 -F raw %s %s/model", file, dir), 0);
}

/* ---- against a model ---- */

static void fill_random(uint8_t *p, uint64_t len)
{
	uint8_t c = (uint8_t)rnd(255);

	for (uint64_t k = 0; k < len; k++)
		p[k] = (uint8_t)(1 + (c + k / 512 + (k & 15) * 7) % 255);
}

static void random_range(uint64_t *off, uint64_t *len, unsigned unit)
{
	static const unsigned sizes[] = { 8, 40, 300, 2000 };

	*len = (1 + (uint64_t)rnd(sizes[rnd(4)])) * unit;
	*len = MIN(*len, SIZE);
	*off = (uint64_t)rnd((unsigned)((SIZE - *len) / unit) + 1) * unit;
}

static void one_op(struct image *i, bool backed)
{
	uint64_t off, len, c = image_cluster(i);

	random_range(&off, &len, rnd(8) ? 512 : 1);
	switch (rnd(9)) {
	case 0: case 1: case 2: case 3:
		fill_random(model + off, len);
		ck_assert_int_eq(image_write(i, model + off, len, off), 0);
		break;
	case 4:
		memset(model + off, 0, len);
		ck_assert_int_eq(image_zero(i, off, len, rnd(2)), 0);
		break;
	case 5:         /* whole clusters read as zeroes; what else is touched reads as before or as zeroes */
		off -= off % c;
		len = MIN((len + c - 1) / c * c, SIZE - off);
		ck_assert_int_eq(image_discard(i, off, len), 0);
		ck_assert_int_eq(image_read(i, buf, len, off), 0);
		if (!backed || qcow2_of(i)->h.version > 2)
			memset(model + off, 0, len);
		break;
	case 6:
		off -= off % c;
		if (off + c > SIZE)
			break;
		fill_random(model + off, c);
		if (rnd(2))
			memset(model + off + c / 2, 7, c / 2);
		ck_assert_int_eq(image_write_compressed(i, model + off, off), 0);
		break;
	case 7:
		if (!rnd(3))
			ck_assert_int_eq(image_flush(i), 0);
		break;
	default:
		ck_assert_int_eq(image_read(i, buf, len, off), 0);
		ck_assert_int_eq(memcmp(buf, model + off, len), 0);
	}
}

static const struct image_create shapes[] = {
	{ .cluster = 0 },
	{ .version = 2 },
	{ .cluster = 512 },
	{ .cluster = 512, .refcount_bits = 64 },
	{ .cluster = 4096, .refcount_bits = 1 },
	{ .cluster = 1024, .refcount_bits = 2, .zstd = true },
	{ .refcount_bits = 8, .zstd = true },
	{ .cluster = 2u << 20 },
	{ .extended_l2 = true },
	{ .extended_l2 = true, .cluster = 16u << 10, .zstd = true },
	{ .prealloc = PREALLOC_METADATA },
	{ .prealloc = PREALLOC_FALLOC, .cluster = 8192 },
	{ .prealloc = PREALLOC_FULL, .extended_l2 = true },
};

static void random_ops(struct image_create c, uint64_t from, bool backed)
{
	struct image *i;

	if (backed) {
		c.prealloc = PREALLOC_OFF;
		c.backing = "base.qcow2";
		c.backing_format = "qcow2";
	} else {
		memset(model, 0, sizeof(model));
	}
	seed = from * 0x9e3779b97f4a7c15ull + 1;
	create(path, c);
	for (unsigned turn = 0; turn < 3; turn++) {
		i = open_rw(path);
		compare_with_model(i);
		for (unsigned n = 0; n < 60; n++)
			one_op(i, backed);
		compare_with_model(i);
		ck_assert_int_eq(image_close(i), 0);
		qemu_agrees(path);
	}
	unlink(path);
}

START_TEST(test_random_ops_match_a_plain_model)
{
	set_up();
	for (unsigned s = 0; s < ARRAY_LEN(shapes); s++)
		random_ops(shapes[s], s + 1, false);
	tear_down();
}
END_TEST

START_TEST(test_random_ops_over_a_backing_image)
{
	struct image *i;

	set_up();
	for (unsigned s = 0; s < ARRAY_LEN(shapes); s++) {
		memset(model, 0, sizeof(model));
		create(base, (struct image_create){ 0 });
		i = open_rw(base);
		fill_random(model + 100000, 1500000);
		ck_assert_int_eq(image_write(i, model, SIZE, 0), 0);
		ck_assert_int_eq(image_close(i), 0);
		random_ops(shapes[s], s + 100, true);
	}
	tear_down();
}
END_TEST

/* ---- images that QEMU made ---- */

static const char *const qemu_options[] = {
	"-o compat=0.10", "-o compat=1.1", "-o cluster_size=512", "-o cluster_size=2M", "-o refcount_bits=1",
	"-o refcount_bits=64", "-o extended_l2=on", "-o lazy_refcounts=on", "-c", "-c -o compression_type=zstd",
	"-c -o cluster_size=4k", "-c -o compression_type=zstd,cluster_size=2M", "-o preallocation=metadata",
	"-o preallocation=falloc,extended_l2=on", "-o preallocation=full", "-c -o extended_l2=on",
	"-c -o refcount_bits=1",
};

START_TEST(test_images_that_qemu_made_read_the_same_and_can_be_written)
{
	struct image *i;

	if (no_qemu(__func__))
		return;
	set_up();
	fill_random(model + 70000, 900000);
	memset(model + 300000, 0x55, 500000);
	fill_random(model + 2000000, SIZE - 2000000);
	for (unsigned k = 0; k < ARRAY_LEN(qemu_options); k++) {
		save_model("raw");
		ck_assert_int_eq(shell("qemu-img convert -t unsafe -f raw -O qcow2 %s %s/raw %s", qemu_options[k], dir, path), 0);
		i = open_rw(path);
		compare_with_model(i);
		for (unsigned n = 0; n < 40; n++)
			one_op(i, false);
		compare_with_model(i);
		ck_assert_int_eq(image_close(i), 0);
		qemu_agrees(path);
	}
	tear_down();
}
END_TEST

START_TEST(test_a_snapshot_that_qemu_made_keeps_its_bytes)
{
	struct image *i;
	static const char *const options[] = { "", "-o refcount_bits=2", "-c", "-o cluster_size=512", "-o extended_l2=on" };

	if (no_qemu(__func__))
		return;
	set_up();
	for (unsigned k = 0; k < ARRAY_LEN(options); k++) {
		fill_random(model + 5000, 2000000);
		save_model("raw");
		ck_assert_int_eq(shell("qemu-img convert -t unsafe -f raw -O qcow2 %s %s/raw %s && qemu-img snapshot -c one %s",
			options[k], dir, path, path), 0);
		i = open_rw(path);
		for (unsigned n = 0; n < 60; n++)
			one_op(i, false);
		compare_with_model(i);
		ck_assert_int_eq(image_close(i), 0);
		qemu_agrees(path);
		ck_assert_int_eq(shell("qemu-img snapshot -a one %s && qemu-img compare -q -f qcow2 -F raw %s %s/raw", path,
			path, dir), 0);
	}
	tear_down();
}
END_TEST

/* ---- bytes of a file, changed ---- */

static void poke(uint64_t off, uint64_t val, unsigned bytes)
{
	uint64_t be = htobe64(val << (64 - bytes * 8));
	int fd = open(path, O_RDWR);

	ck_assert_int_eq(pwrite(fd, &be, bytes, (off_t)off), bytes);
	close(fd);
}

static uint64_t peek(uint64_t off)
{
	int fd = open(path, O_RDONLY);
	uint64_t be = 0;

	ck_assert_int_ge(pread(fd, &be, 8, (off_t)off), 0);
	close(fd);
	return be64toh(be);
}

#define FIELD(name)   offsetof(struct qcow2_header, name), sizeof(((struct qcow2_header *)0)->name)

struct bad {
	unsigned off, bytes;
	uint64_t val;
	const char *words;
	bool readable;
};

static const struct bad bad_headers[] = {
	{ FIELD(magic), 0x51464900, "not a qcow2 image" },
	{ FIELD(version), 1, "version 1" }, { FIELD(version), 4, "version 4" },
	{ FIELD(cluster_bits), 0, "2^0" }, { FIELD(cluster_bits), 8, "2^8" }, { FIELD(cluster_bits), 22, "2^22" },
	{ FIELD(cluster_bits), 63, "2^63" }, { FIELD(cluster_bits), 0xffffffff, "clusters" },
	{ FIELD(refcount_order), 7, "2^7" }, { FIELD(refcount_order), 63, "2^63" },
	{ FIELD(size), (64ull << 40) + 1, "64 TiB" }, { FIELD(size), UINT64_MAX, "64 TiB" },
	{ FIELD(size), 1ull << 45, "too few" },
	{ FIELD(crypt_method), 1, "encrypted" }, { FIELD(crypt_method), 2, "LUKS" },
	{ FIELD(l1_size), 0xffffffff, "L1 table" }, { FIELD(l1_size), 0, "too few" },
	{ FIELD(l1_size), 4000000, "does not lie in the file" },
	{ FIELD(l1_offset), 0x30200, "L1" }, { FIELD(l1_offset), 1ull << 40, "L1" }, { FIELD(l1_offset), 0, "L1" },
	{ FIELD(l1_offset), UINT64_MAX << 16, "L1" },
	{ FIELD(header_length), 96, "header" }, { FIELD(header_length), 0x7fffffff, "header" },
	{ FIELD(header_length), 105, "header" },
	{ FIELD(incompatible), 4, "another file" }, { FIELD(incompatible), 1ull << 40, "bit 40" },
	{ FIELD(incompatible), 8, "compression" }, { FIELD(compression_type), 1, "compression" },
	{ FIELD(incompatible), 1, "refcounts may be wrong", true },
	{ FIELD(incompatible), 2, "marked as corrupt", true },
	{ FIELD(autoclear), 1, "bitmaps", true },
	{ FIELD(snapshots), 70000, "snapshots" }, { FIELD(snapshots), 3, "snapshots" },
	{ FIELD(refcount_offset), 0x1234, "refcount table", true },
	{ FIELD(refcount_offset), 1ull << 50, "refcount table", true },
	{ FIELD(refcount_offset), 0, "refcount table", true },
	{ FIELD(refcount_clusters), 0, "refcount table", true },
	{ FIELD(refcount_clusters), 0x7fffffff, "refcount table", true },
};

START_TEST(test_a_header_that_makes_no_sense_is_refused_with_words)
{
	set_up();
	for (unsigned k = 0; k < ARRAY_LEN(bad_headers); k++) {
		const struct bad *b = &bad_headers[k];
		int r;

		create(path, (struct image_create){ 0 });
		ck_assert_int_eq(try_open(false), 0);
		poke(b->off, b->val, b->bytes);
		r = try_open(false);
		ck_assert_msg(r < 0 && strstr(err.msg, b->words), "%u: %d '%s'", k, r, r ? err.msg : "");
		ck_assert_msg(b->readable == !try_open(true), "%u: read-only", k);
	}
	tear_down();
}
END_TEST

START_TEST(test_header_extensions_and_names_stay_inside_the_header)
{
	set_up();
	create(path, (struct image_create){ 0 });
	poke(112, 0xe2792acaffffffff, 8);
	ck_assert_int_lt(try_open(true), 0);
	poke(112, 0x1234567800010000, 8);
	ck_assert_int_lt(try_open(true), 0);
	poke(112, 0x1234567800000008, 8);       /* unknown, 8 bytes */
	ck_assert_int_eq(try_open(false), 0);
	ck_assert_uint_eq(peek(112), 0x1234567800000008);
	poke(8, 0x200, 8);
	poke(16, 1024, 4);
	ck_assert_int_lt(try_open(true), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "1024"));
	poke(16, 5, 4);
	poke(0x200, 0x6162006465000000, 8);
	ck_assert_int_lt(try_open(true), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "NUL"));
	poke(8, 0xfffe, 8);
	ck_assert_int_lt(try_open(true), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "first cluster"));
	tear_down();
}
END_TEST

START_TEST(test_a_feature_is_named_as_the_image_names_it)
{
	int fd;

	set_up();
	create(path, (struct image_create){ 0 });
	fd = open(path, O_RDWR);
	ck_assert_int_eq(pwrite(fd, "\x68\x03\xf8\x57\0\0\0\x30\0\x21shiny things", 22, 112), 22);
	close(fd);
	poke(72, 1ull << 33, 8);
	ck_assert_int_lt(try_open(true), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "bit 33, 'shiny things'"));
	tear_down();
}
END_TEST

START_TEST(test_autoclear_bits_are_cleared_by_who_does_not_know_them)
{
	set_up();
	create(path, (struct image_create){ 0 });
	poke(88, 1ull << 20, 8);
	ck_assert_int_eq(try_open(true), 0);
	ck_assert_uint_eq(peek(88), 1ull << 20);
	ck_assert_int_eq(try_open(false), 0);
	ck_assert_uint_eq(peek(88), 0);
	tear_down();
}
END_TEST

/* An image with guest clusters 0 to 3 of data; returns where its L2 table is. */
static uint64_t four_clusters(struct image_create c)
{
	struct image *i;

	create(path, c);
	i = open_rw(path);
	memset(buf, 0x11, sizeof(buf));
	ck_assert_int_eq(image_write(i, buf, 4ull * image_cluster(i), 0), 0);
	ck_assert_int_eq(image_close(i), 0);
	return peek(peek(40)) & QCOW2_OFFSET;
}

static const uint64_t bad_l1[] = { QCOW2_COPIED, 1, QCOW2_COPIED | 0x50200, QCOW2_COPIED | 1ull << 55, 1ull << 60 | 0x50000,
	UINT64_MAX };

START_TEST(test_an_l1_entry_that_makes_no_sense_is_an_error)
{
	set_up();
	for (unsigned k = 0; k < ARRAY_LEN(bad_l1); k++) {
		struct image *i;

		four_clusters((struct image_create){ 0 });
		poke(peek(40), bad_l1[k], 8);
		i = open_rw(path);
		ck_assert_int_eq(image_read(i, buf, 512, 0), -EIO);
		ck_assert_int_eq(image_write(i, buf, 512, 0), -EIO);
		ck_assert_int_eq(image_close(i), 0);
		ck_assert_uint_eq(peek(72), QCOW2_CORRUPT);
		ck_assert_int_lt(try_open(false), 0);
	}
	tear_down();
}
END_TEST

/* A write through an entry that leads into metadata. */
START_TEST(test_no_data_is_written_over_metadata)
{
	uint64_t l2, at, before;

	set_up();
	for (unsigned k = 0; k < 6; k++) {
		struct image *i;
		uint64_t where[6];

		l2 = four_clusters((struct image_create){ 0 });
		where[0] = 0;
		where[1] = peek(40);
		where[2] = peek(48);
		where[3] = peek(peek(48));
		where[4] = l2;
		where[5] = l2 & ~0xffffull;
		at = where[k];
		before = peek(at);
		if (k < 5)
			poke(l2 + 8, QCOW2_COPIED | at, 8);
		else
			poke(peek(40), QCOW2_COPIED | peek(48), 8);     /* the L2 table is the refcount table */
		before = peek(at);
		i = open_rw(path);
		ck_assert_int_eq(image_write(i, buf, 512, 65536), -EIO);
		ck_assert_int_eq(image_write(i, buf, 512, 3 * 65536), -EIO);
		ck_assert_int_eq(image_close(i), 0);
		if (at)
			ck_assert_uint_eq(peek(at), before);
		ck_assert_uint_eq(peek(0) >> 32, QCOW2_MAGIC);
		ck_assert_uint_eq(peek(72), QCOW2_CORRUPT);
	}
	tear_down();
}
END_TEST

/* Nor is it given back, which would punch a hole into it. */
START_TEST(test_no_metadata_is_freed_as_data)
{
	set_up();
	for (unsigned k = 0; k < 12; k++) {
		struct image *i;
		uint64_t l2 = four_clusters((struct image_create){ 0 }), before;
		const uint64_t where[] = { peek(40), peek(48), peek(peek(48)), l2 };
		uint64_t at = where[k % 4];

		poke(l2 + 8, k < 8 ? at : QCOW2_COMPRESSED | at, 8);
		before = peek(at);
		i = open_rw(path);
		if (k < 4)
			ck_assert_int_eq(image_write(i, buf, 512, 65536), -EIO);
		else
			ck_assert_int_eq(image_discard(i, 65536, 65536), -EIO);
		image_close(i);
		ck_assert_uint_eq(peek(at), before);
		ck_assert_uint_eq(peek(72), QCOW2_CORRUPT);
	}
	tear_down();
}
END_TEST

START_TEST(test_options_that_qcow2_does_not_have_are_refused)
{
	static const struct image_create bad[] = {
		{ .lazy_refcounts = true }, { .version = 4 }, { .version = 1 }, { .cluster = 256 }, { .cluster = 4u << 20 },
		{ .cluster = 3000 }, { .refcount_bits = 3 }, { .refcount_bits = 128 }, { .version = 2, .zstd = true },
		{ .version = 2, .refcount_bits = 8 }, { .version = 2, .extended_l2 = true }, { .fixed = true },
		{ .extended_l2 = true, .cluster = 8192 }, { .backing = "x" }, { .size = 1ull << 40, .cluster = 512 },
		{ .backing = "x", .backing_format = "raw", .prealloc = PREALLOC_FULL },
	};

	set_up();
	for (unsigned k = 0; k < ARRAY_LEN(bad); k++) {
		struct image_create c = bad[k];

		c.format = "qcow2";
		c.size = c.size ? c.size : SIZE;
		ck_assert_msg(image_create(path, &c, &err) < 0, "%u", k);
		ck_assert_int_eq(access(path, F_OK), -1);
	}
	tear_down();
}
END_TEST

START_TEST(test_refcounts_that_lie_are_found_before_a_write)
{
	struct image *i;
	uint64_t block, l2;

	set_up();
	/* The refcount of a data cluster that is marked COPIED: 2. */
	l2 = four_clusters((struct image_create){ 0 });
	block = peek(peek(48));
	poke(block + ((peek(l2) & QCOW2_OFFSET) >> 16) * 2, 2, 2);
	i = open_rw(path);
	ck_assert_int_eq(image_write(i, buf, 512, 0), -EIO);
	image_close(i);
	/* Of the L2 table: 2. */
	l2 = four_clusters((struct image_create){ 0 });
	poke(block + (l2 >> 16) * 2, 2, 2);
	i = open_rw(path);
	ck_assert_int_eq(image_write(i, buf, 512, 0), -EIO);
	image_close(i);
	/* Metadata that counts as free. */
	l2 = four_clusters((struct image_create){ 0 });
	poke(block + (l2 >> 16) * 2, 0, 2);
	i = open_rw(path);
	ck_assert_int_eq(image_write(i, buf, 512, 2 << 20), -EIO);
	image_close(i);
	/* Blocks that are the header, the table, each other, past the end. */
	for (unsigned k = 0; k < 5; k++) {
		const uint64_t bad[] = { 0x200, 0x10000, 0x30000, 1ull << 40, 0 };

		four_clusters((struct image_create){ 0 });
		poke(0x10000, bad[k], 8);
		ck_assert_int_lt(try_open(false), 0);
		ck_assert_int_eq(try_open(true), 0);
	}
	four_clusters((struct image_create){ 0 });
	poke(0x10008, 0x20000, 8);
	ck_assert_int_lt(try_open(false), 0);
	tear_down();
}
END_TEST

START_TEST(test_data_past_the_end_of_the_file_reads_as_zeroes)
{
	struct image *i;
	uint64_t l2;

	set_up();
	l2 = four_clusters((struct image_create){ 0 });
	poke(l2 + 8, QCOW2_COPIED | 1ull << 32, 8);
	i = open_ro(path);
	ck_assert_int_eq(image_read(i, buf, 3 * 65536, 0), 0);
	ck_assert_int_eq(buf[65535], 0x11);
	ck_assert_int_eq(buf[65536], 0);
	ck_assert_int_eq(buf[131072], 0x11);
	image_close(i);
	tear_down();
}
END_TEST

START_TEST(test_compressed_bytes_that_make_no_sense_are_an_error)
{
	set_up();
	for (unsigned zstd = 0; zstd < 2; zstd++) {
		struct image *i;
		uint64_t l2, at;

		create(path, (struct image_create){ .zstd = zstd });
		i = open_rw(path);
		memset(model, 0x22, 65536);
		ck_assert_int_eq(image_write_compressed(i, model, 0), 0);
		ck_assert_int_eq(image_close(i), 0);
		l2 = peek(peek(40)) & QCOW2_OFFSET;
		at = peek(l2) & ((1ull << 54) - 1);
		poke(at, 0x1212121212121212, 8);
		i = open_ro(path);
		ck_assert_int_eq(image_read(i, buf, 512, 0), -EIO);
		image_close(i);
		poke(l2, QCOW2_COMPRESSED | 1ull << 40, 8);
		i = open_ro(path);
		ck_assert_int_eq(image_read(i, buf, 512, 0), -EIO);
		image_close(i);
	}
	tear_down();
}
END_TEST

START_TEST(test_a_file_that_claims_much_costs_little)
{
	struct image *i;

	set_up();
	create(path, (struct image_create){ .size = 64ull << 40, .cluster = 2u << 20 });
	i = open_rw(path);
	ck_assert_int_eq(image_write(i, buf, 512, (64ull << 40) - 512), 0);
	ck_assert_int_eq(image_close(i), 0);
	check_clean(path);
	create(path, (struct image_create){ .size = 64ull << 40 });
	check_clean(path);
	ck_assert_int_eq(try_open(false), 0);
	tear_down();
}
END_TEST

START_TEST(test_the_refcount_table_grows)
{
	struct image *i;
	const struct image_create c = { .cluster = 512, .refcount_bits = 64, .size = 8u << 20 };

	set_up();
	create(path, c);
	i = open_rw(path);
	fill_random(model, SIZE);
	for (unsigned k = 0; k < 8; k++)
		ck_assert_int_eq(image_write(i, model, 1u << 20, (uint64_t)k << 20), 0);
	ck_assert_uint_gt(qcow2_of(i)->h.refcount_clusters, 1);
	ck_assert_int_eq(image_close(i), 0);
	check_clean(path);
	i = open_ro(path);
	for (unsigned k = 0; k < 8; k++) {
		ck_assert_int_eq(image_read(i, buf, 1u << 20, (uint64_t)k << 20), 0);
		ck_assert_int_eq(memcmp(buf, model, 1u << 20), 0);
	}
	image_close(i);
	tear_down();
}
END_TEST

/* ---- the request layer, played: nothing waits, several writes and a plan in flight ---- */

static bool not_cached;

ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	if (not_cached && rnd(3)) {
		errno = EAGAIN;
		return -1;
	}
	return __real_preadv64v2(fd, iov, cnt, off, flags);
}

#define FLIGHTS 5
static struct flight {
	bool busy;
	struct alloc a;
	uint8_t *data;
} flights[FLIGHTS];
static struct plan plan;
static unsigned crashes, want_tables, want_plans;

static int apply(int fd, const struct plan_step *st)
{
	struct host_file f = { .fd = fd, .meta_fd = fd };
	struct plan one = { .step = (struct plan_step *)st, .n = 1 };

	return plan_run(&one, &f);
}

/* A kill while the plan runs: all before some barrier reached the file, of what follows up to the next any part. */
static void crash(const struct image *i)
{
	unsigned stop = plan.n ? rnd(plan.n + 1) : 0;
	char copy[128];
	int fd, r;

	snprintf(copy, sizeof(copy), "%s/crash", dir);
	ck_assert_int_eq(shell("cp --sparse=always %s %s", i->path, copy), 0);
	fd = open(copy, O_RDWR);
	while (stop && stop < plan.n && plan.step[stop].kind != PLAN_BARRIER)
		stop--;
	for (unsigned k = 0; k < stop; k++)
		if (plan.step[k].kind != PLAN_BARRIER)
			ck_assert_int_eq(apply(fd, &plan.step[k]), 0);
	for (unsigned k = stop + 1; k < plan.n && plan.step[k].kind != PLAN_BARRIER; k++)
		if (rnd(2))
			ck_assert_int_eq(apply(fd, &plan.step[k]), 0);
	close(fd);
	r = shell("qemu-img check -q %s >%s/out 2>&1", copy, dir);
	if (WEXITSTATUS(r) && WEXITSTATUS(r) != 3) {
		shell("cat %s/out", dir);
		ck_abort_msg("a kill after step %u of %u leaves more than leaks", stop, plan.n);
	}
	crashes++;
}

static void start_plan(struct image *i)
{
	int r;

	if (i->gathering)
		return;
	i->gathering = true;
	r = i->fmt->gather(i, &plan);
	ck_assert_int_eq(r, 0);
}

static void finish_plan(struct image *i)
{
	bool fails = !rnd(6);           /* on the way */
	int r = fails ? -EIO : 0;

	if (!i->gathering)
		return;
	if (plan.n && !rnd(6) && !no_qemu("qemu-img check"))
		crash(i);
	/* Without the barriers: nobody pulls the plug, and they take long. */
	for (unsigned k = 0, n = fails && plan.n ? rnd(plan.n) : plan.n; k < n; k++)
		if (plan.step[k].kind != PLAN_BARRIER)
			ck_assert_int_eq(apply(i->file.meta_fd, &plan.step[k]), 0);
	plan_clear(&plan);
	i->fmt->gathered(i, r);
	i->gathering = false;
	if (!r && rnd(4))
		i->fmt->reclaim(i);
}

static void finish_flights(struct image *i, unsigned n);

/* What -EAGAIN asks for. */
static void serve(struct image *i, int r)
{
	struct table *t = i->want_table;

	if (r == -EBUSY)
		return finish_flights(i, 1);
	ck_assert_int_eq(r, -EAGAIN);
	if (i->want == WANT_TABLE) {
		want_tables++;
		while (t->loading)
			table_loaded(t, (int)__real_preadv64v2(i->file.fd, &t->iov, 1,
				(off_t)(t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data)), 0));
		return;
	}
	ck_assert_int_eq(i->want, WANT_PLAN);
	want_plans++;
	start_plan(i);
	finish_plan(i);
	i->fmt->reclaim(i);
	if (!rnd(3))
		finish_flights(i, 1);
}

static void nb_read(struct image *i, uint8_t *to, uint64_t len, uint64_t off)
{
	while (len) {
		struct extent e = { .kind = EXT_ZERO, .len = len };
		int r = off < i->size ? i->fmt->map(i, off, MIN(len, i->size - off), &e) : 0;
		uint64_t n = MIN(e.len, len);

		if (r) {
			serve(i, r);
			continue;
		}
		if (off < i->size)
			n = MIN(n, i->size - off);
		ck_assert_int_ne(e.kind, EXT_COMPRESSED);
		memset(to, 0, n);
		if (e.kind == EXT_DATA)
			ck_assert_int_eq(meta_read(e.file, to, n, e.pos), 0);
		to += n;
		len -= n;
		off += n;
	}
}

static bool any_set(const uint8_t *p, uint64_t n)
{
	while (n && !*p) {
		p++;
		n--;
	}
	return n;
}

static void nb_fill(struct image *i, const struct alloc *a, uint64_t from, uint64_t to)
{
	uint8_t *bytes = malloc(to - from + 1);

	nb_read(i, bytes, to - from, from);
	if (from < to && (!a->blank || any_set(bytes, to - from)))
		ck_assert_int_eq(meta_write(&i->file, bytes, to - from, a->pos + from - a->off), 0);
	free(bytes);
}

static void finish_flight(struct image *i, struct flight *f)
{
	struct alloc *a = &f->a;

	f->busy = false;
	if (!rnd(6)) {
		ck_assert_int_eq(meta_write(&i->file, f->data, a->len / 2, a->pos), 0);
		i->fmt->drop(i, a);
	} else {
		nb_fill(i, a, a->fill_off, a->off);
		nb_fill(i, a, a->off + a->len, a->fill_end);
		ck_assert_int_eq(meta_write(&i->file, f->data, a->len, a->pos), 0);
		i->fmt->link(i, a);
		memcpy(model + a->off, f->data, a->len);
	}
	free(f->data);
}

static void finish_flights(struct image *i, unsigned n)
{
	for (unsigned k = rnd(FLIGHTS), left = FLIGHTS; left && n; left--, k = (k + 1) % FLIGHTS)
		if (flights[k].busy) {
			finish_flight(i, &flights[k]);
			n--;
		}
}

static void nb_write(struct image *i, uint64_t off, uint64_t len)
{
	while (len) {
		struct flight *f = flights;
		int r;

		while (f < flights + FLIGHTS && f->busy)
			f++;
		if (f == flights + FLIGHTS) {
			finish_flights(i, 2);
			continue;
		}
		r = i->fmt->alloc(i, off, len, &f->a);
		if (r) {
			serve(i, r);
			continue;
		}
		ck_assert_uint_eq(f->a.off, off);
		ck_assert_uint_le(f->a.len, len);
		f->data = malloc(f->a.len);
		fill_random(f->data, f->a.len);
		off += f->a.len;
		len -= f->a.len;
		f->busy = f->a.fresh;
		if (f->busy)
			continue;
		ck_assert_int_eq(meta_write(&i->file, f->data, f->a.len, f->a.pos), 0);
		memcpy(model + f->a.off, f->data, f->a.len);
		free(f->data);
	}
}

static void nb_punch(struct image *i, uint64_t off, uint64_t len)
{
	while (len) {
		uint64_t done, part;
		int r = i->fmt->punch(i, off, len, rnd(2) ? PUNCH_ZERO : PUNCH_UNMAP, &done, &part);

		if (r) {
			serve(i, r);
			continue;
		}
		memset(model + off, 0, done);
		done = done ? done : MIN(part, len);
		ck_assert_uint_gt(done, 0);
		off += done;
		len -= done;
	}
}

static void nb_op(struct image *i)
{
	uint64_t off, len;
	unsigned what = rnd(10);

	random_range(&off, &len, 512);
	if (what < 5)
		nb_write(i, off, len);
	else if (what < 7)
		nb_punch(i, off, len);
	else if (what == 7)
		start_plan(i);
	else if (what == 8)
		finish_plan(i);
	else if (rnd(2))
		finish_flights(i, 3);
	else {
		finish_flights(i, FLIGHTS);     /* one that ends while we read would change what we compare with */
		nb_read(i, buf, len, off);
		ck_assert_int_eq(memcmp(buf, model + off, len), 0);
	}
}

/* With few tables in memory: they come and go, and plans must run. */
static void shrink_caches(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);

	qcow2_forget_last(i);
	tables_free(q->l2);
	tables_free(q->refs);
	q->l2 = tables_new(i, 1u << q->slice_bits, 12);
	q->refs = tables_new(i, 1u << q->slice_bits, 24);
}

static const struct image_create nb_shapes[] = {
	{ .cluster = 512 }, { .cluster = 512, .refcount_bits = 64 }, { .cluster = 4096 }, { .extended_l2 = true, .cluster = 16u << 10 },
	{ .cluster = 512, .version = 2 }, { .cluster = 1024, .refcount_bits = 64 }, { .cluster = 0 },
};

static void nothing_waits(struct image_create c, bool snapshot)
{
	struct image *i;

	memset(model, 0, sizeof(model));
	create(path, c);
	i = open_rw(path);
	fill_random(model, SIZE / 2);
	ck_assert_int_eq(image_write(i, model, SIZE / 2, 0), 0);
	ck_assert_int_eq(image_close(i), 0);
	if (snapshot)
		ck_assert_int_eq(shell("qemu-img snapshot -c one %s", path), 0);
	i = open_rw(path);
	shrink_caches(i);
	i->blocking = i->unsafe = false;
	not_cached = true;
	for (unsigned n = 0; n < 150; n++)
		nb_op(i);
	finish_flights(i, FLIGHTS);
	finish_plan(i);
	not_cached = false;
	i->blocking = i->unsafe = true;
	compare_with_model(i);
	ck_assert_int_eq(image_close(i), 0);
	qemu_agrees(path);
}

START_TEST(test_nothing_waits_and_a_kill_only_leaks)
{
	set_up();
	crashes = want_tables = want_plans = 0;
	for (unsigned s = 0; s < ARRAY_LEN(nb_shapes); s++) {
		seed = 1234567 + s;
		nothing_waits(nb_shapes[s], false);
		if (!no_qemu("snapshots"))
			nothing_waits(nb_shapes[s], true);
	}
	ck_assert_uint_gt(want_tables, 100);
	ck_assert_uint_gt(want_plans, 10);
	tear_down();
}
END_TEST

UNIT_MAIN("qcow2", test_random_ops_match_a_plain_model, test_random_ops_over_a_backing_image,
	test_images_that_qemu_made_read_the_same_and_can_be_written, test_a_snapshot_that_qemu_made_keeps_its_bytes,
	test_a_header_that_makes_no_sense_is_refused_with_words, test_header_extensions_and_names_stay_inside_the_header,
	test_a_feature_is_named_as_the_image_names_it, test_autoclear_bits_are_cleared_by_who_does_not_know_them,
	test_an_l1_entry_that_makes_no_sense_is_an_error, test_no_data_is_written_over_metadata,
	test_no_metadata_is_freed_as_data, test_options_that_qcow2_does_not_have_are_refused,
	test_refcounts_that_lie_are_found_before_a_write, test_data_past_the_end_of_the_file_reads_as_zeroes,
	test_compressed_bytes_that_make_no_sense_are_an_error, test_a_file_that_claims_much_costs_little,
	test_the_refcount_table_grows, test_nothing_waits_and_a_kill_only_leaks)
