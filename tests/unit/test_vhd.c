/*
 * VHD images: QEMU's read the same, sector bitmaps, sizes by geometry and by number, without waiting, hostile. The linker
 * routes the calls of preadv2() through here (--wrap).
 */
#include <endian.h>
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
#define MODEL_MOST (64u * MIB)

static struct error err;
static struct image *img;
static char dir[] = "/tmp/vmm-vhd-XXXXXX";
static char path[128], other[128];
static uint8_t model[MODEL_MOST], buf[MODEL_MOST];
static uint64_t seed;
static bool no_cache;                   /* preadv2() finds nothing, mostly */

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed >> 16) % n;
}

ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	if (no_cache && rnd(4)) {
		errno = EAGAIN;
		return -1;
	}
	return __real_preadv64v2(fd, iov, cnt, off, flags);
}

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
	no_cache = false;
	memcpy(dir, "/tmp/vmm-vhd-XXXXXX", sizeof(dir));
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/a.vhd", dir);
	snprintf(other, sizeof(other), "%s/b", dir);
	memset(model, 0, sizeof(model));
}

static void finish(void)
{
	ck_assert_int_eq(sh("rm -rf %s", dir), 0);
}

static int try_open(const char *format)
{
	struct image_how how = { .format = format, .readonly = true };

	img = NULL;
	err.msg[0] = 0;
	return image_open(&img, path, &how, &err);
}

static void open_image(void)
{
	ck_assert_msg(!try_open("vhd"), "%s", err.msg);
}

static void close_image(void)
{
	ck_assert_int_eq(image_close(img), 0);
}

static void pattern(uint8_t *p, size_t n)
{
	uint8_t a = (uint8_t)(rnd(255) + 1);

	for (size_t k = 0; k < n; k++)
		p[k] = (uint8_t)(a + k / 512 + k);
}

static void write_file(const char *name, const void *data, size_t n)
{
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	ck_assert_int_eq(write(fd, data, n), (ssize_t)n);
	close(fd);
}

static void poke(uint64_t off, const void *data, size_t n)
{
	int fd = open(path, O_WRONLY);

	ck_assert_int_eq(pwrite(fd, data, n, (off_t)off), (ssize_t)n);
	close(fd);
}

static uint64_t file_size(void)
{
	struct stat st;

	ck_assert_int_eq(stat(path, &st), 0);
	return (uint64_t)st.st_size;
}

static void same_as_model(uint64_t size)
{
	memset(buf, 0xaa, size);
	ck_assert_int_eq(image_read(img, buf, size, 0), 0);
	ck_assert_int_eq(memcmp(buf, model, size), 0);
}

/* ---- QEMU's images ---- */

static void read_of_qemu(const char *options, uint64_t size)
{
	memset(model, 0, sizeof(model));
	for (unsigned k = 0; k < 12; k++) {
		uint64_t at = rnd((unsigned)(size / 512)) * 512ull, n = rnd(3000) * 512ull;

		pattern(model + at, MIN(n, size - at));
	}
	write_file(other, model, size);
	unlink(path);
	ck_assert_int_eq(sh("qemu-img convert -t unsafe -f raw -O vpc -o %s %s %s", options, other, path), 0);
	ck_assert_int_eq(sh("qemu-img convert -t unsafe -f vpc -O raw %s %s", path, other), 0);
	open_image();
	{
		struct stat st;

		ck_assert_int_eq(stat(other, &st), 0);
		ck_assert_uint_eq(image_size(img), (uint64_t)st.st_size);
		ck_assert_uint_le(size, image_size(img));
	}
	same_as_model(image_size(img));
	for (unsigned k = 0; k < 200; k++) {
		uint64_t off = rnd((unsigned)size), n = rnd(70000);

		n = MIN(n, size - off);
		ck_assert_int_eq(image_read(img, buf, n, off), 0);
		ck_assert_int_eq(memcmp(buf, model + off, n), 0);
	}
	ck_assert_int_eq(image_write(img, buf, 512, 0), -EROFS);
	close_image();
}

START_TEST(test_images_made_by_qemu_read_the_same)
{
	static const char *const options[] = { "subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size",
		"subformat=fixed,force_size" };

	if (no_qemu(__func__))
		return;
	start();
	for (unsigned k = 0; k < ARRAY_LEN(options); k++) {
		read_of_qemu(options[k], 40 * MIB);
		read_of_qemu(options[k], 11 * MIB + 1536);
	}
	finish();
}
END_TEST

/* ---- made here: all that the format allows ---- */

#define BLOCK 65536u                    /* 128 sectors, a bitmap of 16 bytes */
#define BAT_AT 1536u

static uint8_t footer[512], dynamic[1024];

static void put32(uint8_t *p, uint32_t v)
{
	v = htobe32(v);
	memcpy(p, &v, 4);
}

static void put64(uint8_t *p, uint64_t v)
{
	v = htobe64(v);
	memcpy(p, &v, 8);
}

static void sum_up(uint8_t *p, size_t n, unsigned at)
{
	uint32_t sum = 0;

	put32(p + at, 0);
	for (size_t k = 0; k < n; k++)
		sum += p[k];
	put32(p + at, ~sum);
}

static void make_headers(uint64_t size, uint32_t block, uint32_t type, const char *creator)
{
	memset(footer, 0, sizeof(footer));
	memset(dynamic, 0, sizeof(dynamic));
	memcpy(footer, "conectix", 8);
	put32(footer + 8, 2);
	put32(footer + 12, 0x10000);
	put64(footer + 16, type == 2 ? UINT64_MAX : 512);
	memcpy(footer + 28, creator, 4);
	put64(footer + 48, size);
	footer[57] = 3;
	footer[58] = 4;
	footer[59] = 17;                /* 204 sectors */
	put32(footer + 60, type);
	sum_up(footer, 512, 64);
	memcpy(dynamic, "cxsparse", 8);
	put64(dynamic + 8, UINT64_MAX);
	put64(dynamic + 16, BAT_AT);
	put32(dynamic + 24, 0x10000);
	put32(dynamic + 28, (uint32_t)((size + block - 1) / block));
	put32(dynamic + 32, block);
	sum_up(dynamic, 1024, 36);
}

/* Headers where they belong, the footer at end. */
static void write_headers(uint64_t end)
{
	poke(0, footer, 512);
	poke(512, dynamic, 1024);
	poke(end, footer, 512);
}

/* A dynamic image of random blocks, of random sectors; where a bit is clear the block has bytes that must not show. */
static uint64_t make_dynamic(uint64_t size, uint32_t block)
{
	uint64_t blocks = (size + block - 1) / block, at = (BAT_AT + blocks * 4 + 511) / 512 * 512;
	uint32_t bitmap = (block / 512 / 8 + 511) / 512 * 512;
	static uint8_t bits[65536];

	memset(model, 0, sizeof(model));
	write_file(path, "", 0);
	make_headers(size, block, 3, "win ");
	for (uint64_t b = 0; b < blocks; b++) {
		uint32_t entry = htobe32(0xffffffff);

		if (rnd(4)) {
			unsigned run = 0, on = 0, longest = rnd(3) ? 40 : 100000;

			memset(bits, 0, sizeof(bits));
			pattern(buf, block);
			for (uint32_t s = 0; s < block / 512; s++) {
				if (!run--) {
					run = rnd(rnd(2) ? longest : 4);
					on = rnd(2);
				}
				bits[s / 8] |= (uint8_t)(on << (7 - s % 8));
				if (on && b * block + s * 512ull < size)
					memcpy(model + b * block + s * 512ull, buf + s * 512ull, 512);
			}
			entry = htobe32((uint32_t)(at / 512));
			poke(at, bits, bitmap);
			poke(at + bitmap, buf, block);
			at += bitmap + block;
		}
		poke(BAT_AT + b * 4, &entry, 4);
	}
	write_headers(at);
	return at;
}

START_TEST(test_sectors_whose_bit_is_clear_read_as_zeroes)
{
	static const uint32_t blocks[] = { 4096, 8192, BLOCK, 2 * MIB, 32 * MIB };
	struct image_status s;
	uint64_t size;

	start();
	for (unsigned k = 0; k < ARRAY_LEN(blocks); k++) {
		size = blocks[k] > MIB ? 50 * MIB + 512 : 2000ull * MIN(blocks[k], 4096) + 512;
		make_dynamic(size, blocks[k]);
		open_image();
		ck_assert_uint_eq(image_size(img), size);
		ck_assert_uint_eq(image_cluster(img), blocks[k]);
		same_as_model(size);
		for (uint64_t at = 0; at < size; at += s.len) {
			ck_assert_int_eq(image_status(img, at, size - at, &s), 0);
			ck_assert_uint_ge(s.len, 1);
			ck_assert(s.kind == EXT_DATA || s.kind == EXT_HOLE);
			if (s.kind == EXT_DATA) {
				uint64_t n = MIN(s.len, sizeof(buf));

				ck_assert_int_eq(pread(img->file.fd, buf, n, (off_t)s.host), (ssize_t)n);
				ck_assert_int_eq(memcmp(buf, model + at, n), 0);
			}
		}
		close_image();
	}
	finish();
}
END_TEST

static void serve(void)
{
	struct table *t = img->want_table;

	ck_assert_int_eq(img->want, WANT_TABLE);
	while (t->loading) {
		unsigned some = 1 + rnd(5000);
		struct iovec part = { t->iov.iov_base, MIN(t->iov.iov_len, some) };
		uint64_t at = t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data);

		table_loaded(t, (int)preadv(img->file.fd, &part, 1, (off_t)at));
	}
}

START_TEST(test_empty_image_is_one_hole_after_the_other)
{
	static uint8_t none[5000 * 4];
	struct image_status s;

	start();
	make_headers(5000 * 4096, 4096, 3, "win ");
	write_file(path, "", 0);
	poke(BAT_AT, memset(none, 0xff, sizeof(none)), sizeof(none));
	write_headers(24064);
	open_image();
	for (uint64_t at = 0; at < image_size(img); at += s.len) {
		ck_assert_int_eq(image_status(img, at, image_size(img) - at, &s), 0);
		ck_assert(s.kind == EXT_HOLE && s.len && s.len % 4096 == 0);
	}
	same_as_model(5000 * 4096);
	close_image();
	finish();
}
END_TEST

START_TEST(test_nonblocking_reads_match_a_plain_model)
{
	uint64_t size = 30 * MIB + 512, waits = 0;

	start();
	make_dynamic(size, 8192);
	open_image();
	img->blocking = false;
	no_cache = true;
	for (unsigned k = 0; k < 20000; k++) {
		uint64_t off = rnd((unsigned)(size / 512)) * 512ull, n = (1 + rnd(40)) * 512ull;
		struct extent e;
		int r;

		n = MIN(n, size - off);
		while ((r = img->fmt->map(img, off, n, &e)) == -EAGAIN) {
			waits++;
			serve();
		}
		ck_assert_int_eq(r, 0);
		ck_assert(e.len >= 1 && e.len <= n);
		memset(buf, 0, e.len);
		if (e.kind == EXT_DATA)
			ck_assert_int_eq(pread(e.file->fd, buf, e.len, (off_t)e.pos), (ssize_t)e.len);
		ck_assert_int_eq(memcmp(buf, model + off, e.len), 0);
	}
	ck_assert_uint_gt(waits, 1000);
	close_image();
	finish();
}
END_TEST

/* ---- sizes ---- */

START_TEST(test_size_is_by_geometry_only_for_those_who_meant_it)
{
	static const struct {
		char creator[5];
		bool geometry;
	} rows[] = { { "vpc ", true }, { "vs  ", true }, { "qemu", true }, { "qem2", false }, { "win ", false }, { "d2v ", false },
		{ "tap", false }, { "CTXS", false }, { "vbox", false } };
	static const uint8_t largest[4] = { 0xff, 0xff, 16, 255 };

	start();
	for (unsigned k = 0; k < ARRAY_LEN(rows); k++) {
		write_file(path, model, 200 * 1024);
		make_headers(200 * 1024, BLOCK, 2, rows[k].creator);
		poke(200 * 1024, footer, 512);
		open_image();
		ck_assert_uint_eq(image_size(img), rows[k].geometry ? 204 * 512 : 200 * 1024);
		close_image();
		memcpy(footer + 56, largest, 4);
		sum_up(footer, 512, 64);
		poke(200 * 1024, footer, 512);
		open_image();
		ck_assert_uint_eq(image_size(img), 200 * 1024);
		close_image();
	}
	finish();
}
END_TEST

START_TEST(test_short_footer_of_old_versions_is_found)
{
	start();
	pattern(model, 200 * 1024);
	write_file(path, model, 200 * 1024);
	make_headers(200 * 1024, BLOCK, 2, "win ");
	poke(200 * 1024, footer, 511);
	ck_assert_uint_eq(file_size(), 200 * 1024 + 511);
	open_image();
	same_as_model(200 * 1024);
	close_image();
	finish();
}
END_TEST

/* ---- broken ---- */

static void open_listening(char *said, size_t size)
{
	int keep = dup(2), p[2];
	ssize_t n;

	ck_assert_int_eq(pipe2(p, O_NONBLOCK), 0);
	dup2(p[1], 2);
	open_image();
	dup2(keep, 2);
	n = read(p[0], said, size - 1);
	said[n > 0 ? n : 0] = '\0';
	close(keep);
	close(p[0]);
	close(p[1]);
}

START_TEST(test_copy_of_the_footer_serves_with_a_warning)
{
	char said[1000];
	uint64_t end;

	start();
	end = make_dynamic(MIB, BLOCK);
	poke(end + 100, "x", 1);
	open_listening(said, sizeof(said));
	ck_assert_ptr_nonnull(strstr(said, "the footer at its end is missing or broken: the copy at its start is used"));
	same_as_model(MIB);
	close_image();
	ck_assert_int_eq(truncate(path, (off_t)end), 0);
	open_listening(said, sizeof(said));
	ck_assert_ptr_nonnull(strstr(said, "missing or broken"));
	same_as_model(MIB);
	close_image();
	poke(10, "x", 1);
	ck_assert_int_eq(try_open("vhd"), -EINVAL);
	finish();
}
END_TEST

static uint64_t get(const uint8_t *p, unsigned width)
{
	uint64_t v = 0;

	for (unsigned k = 0; k < width; k++)
		v = v << 8 | p[k];
	return v;
}

static void put(uint8_t *p, unsigned width, uint64_t val)
{
	for (unsigned k = 0; k < width; k++)
		p[k] = (uint8_t)(val >> 8 * (width - 1 - k));
}

static void is_refused(unsigned row, const char *words)
{
	int r = try_open("vhd");

	ck_assert_msg((r == -EINVAL || r == -EOPNOTSUPP) && strstr(err.msg, words) && !strchr(err.msg, '\n'), "row %u: %d: %s", row,
		r, err.msg);
}

START_TEST(test_hostile_headers_are_refused_with_what_was_found)
{
	static const struct {
		bool dynamic;
		unsigned at, width;
		uint64_t val;
		const char *words;
	} bad[] = {
		{ false, 0, 8, 0, "does not end with a 'conectix' footer" },
		{ false, 12, 4, 0x20000, "VHD version 2.0" },
		{ false, 60, 4, 4, "differencing" },
		{ false, 60, 4, 0, "disk type 0" },
		{ false, 60, 4, 99, "disk type 99" },
		{ false, 48, 8, 0, "a disk of 0 bytes" },
		{ false, 48, 8, (2ull << 40) + 512, "2T" },
		{ false, 48, 8, UINT64_MAX, "2T" },
		{ false, 48, 8, 4 * MIB, "too few" },
		{ false, 60, 4, 2, "a disk of 1048576 bytes, but the footer is at byte" },
		{ false, 16, 8, UINT64_MAX, "is not in the file" },
		{ false, 16, 8, 1ull << 62, "is not in the file" },
		{ false, 16, 8, 0, "no 'cxsparse' header at byte 0" },
		{ true, 0, 8, 0, "no 'cxsparse' header at byte 512" },
		{ true, 24, 4, 0x30000, "header version 3.0" },
		{ true, 32, 4, 0, "blocks of 0 bytes" },
		{ true, 32, 4, 2048, "blocks of 2048 bytes" },
		{ true, 32, 4, 5000, "blocks of 5000 bytes" },
		{ true, 32, 4, 1u << 31, "blocks of 2147483648 bytes" },
		{ true, 28, 4, 15, "too few" },
		{ true, 28, 4, 0, "too few" },
		{ true, 16, 8, 0, "inside a header" },
		{ true, 16, 8, 1024, "inside a header" },
		{ true, 16, 8, 1540, "not on a sector" },
		{ true, 16, 8, UINT64_MAX & ~511ull, "cut short" },
		{ true, 16, 8, 512ull << 20, "cut short" },
	};
	uint64_t end;

	start();
	end = make_dynamic(MIB, BLOCK);
	ck_assert_uint_lt(end, MIB);
	for (unsigned k = 0; k < ARRAY_LEN(bad); k++) {
		uint8_t *p;

		make_headers(MIB, BLOCK, 3, "win ");
		p = bad[k].dynamic ? dynamic : footer;
		ck_assert_uint_ne(get(p + bad[k].at, bad[k].width), bad[k].val);
		put(p + bad[k].at, bad[k].width, bad[k].val);
		sum_up(footer, 512, 64);
		sum_up(dynamic, 1024, 36);
		write_headers(end);
		is_refused(k, bad[k].words);
	}
	make_headers(MIB, BLOCK, 3, "win ");
	footer[500] ^= 1;
	write_headers(end);
	is_refused(100, "the checksum of its footer is 0x");
	make_headers(MIB, BLOCK, 3, "win ");
	dynamic[900] ^= 1;
	write_headers(end);
	is_refused(101, "the checksum of its dynamic header is 0x");
	write_file(path, model, 300);
	is_refused(102, "it has 300 bytes");
	write_file(path, model, 0);
	is_refused(103, "it has 0 bytes");
	finish();
}
END_TEST

START_TEST(test_entry_past_the_end_fails_its_block_only)
{
	uint32_t far = htobe32(0xfffffffe);

	start();
	make_dynamic(MIB, BLOCK);
	poke(BAT_AT + 8, &far, 4);
	open_image();
	ck_assert_int_eq(image_read(img, buf, 512, 2 * BLOCK), -EIO);
	ck_assert_int_eq(image_read(img, buf, 2 * BLOCK, 0), 0);
	ck_assert_int_eq(memcmp(buf, model, 2 * BLOCK), 0);
	ck_assert_int_eq(image_read(img, buf, MIB - 3 * BLOCK, 3 * BLOCK), 0);
	ck_assert_int_eq(memcmp(buf, model + 3 * BLOCK, MIB - 3 * BLOCK), 0);
	close_image();
	finish();
}
END_TEST

START_TEST(test_claims_of_two_terabytes_cost_nothing)
{
	uint64_t size = 2ull << 40;

	start();
	write_file(path, "", 0);
	make_headers(size, 512 * 4096, 3, "win ");
	write_headers(16 * MIB);        /* between them zeroes: every block at sector 0 */
	open_image();
	ck_assert_int_eq(image_read(img, buf, 512, size - 512), 0);
	ck_assert_int_eq(image_read(img, buf, 512, size / 2), 0);
	close_image();
	finish();
}
END_TEST

START_TEST(test_it_is_read_only_and_has_an_alias)
{
	struct image_how how = { .format = "vhd" };
	struct facts *f = facts_new();
	char *text;

	start();
	make_dynamic(MIB, BLOCK);
	ck_assert_int_eq(image_open(&img, path, &how, &err), -EROFS);
	ck_assert(!image_can_write("vhd") && !image_can_create("vhd"));
	ck_assert_str_eq(image_guess(footer, 512), "vhd");
	ck_assert_int_eq(try_open("vpc"), 0);
	ck_assert_str_eq(image_format(img), "vhd");
	image_describe(img, f);
	text = facts_text(f);
	ck_assert_msg(strstr(text, "\"subformat\":\"dynamic\"") && strstr(text, "\"creator\":\"win \""), "%s", text);
	free(text);
	facts_free(f);
	close_image();
	finish();
}
END_TEST

UNIT_MAIN("vhd", test_images_made_by_qemu_read_the_same, test_sectors_whose_bit_is_clear_read_as_zeroes,
	test_empty_image_is_one_hole_after_the_other, test_nonblocking_reads_match_a_plain_model,
	test_size_is_by_geometry_only_for_those_who_meant_it,
	test_short_footer_of_old_versions_is_found, test_copy_of_the_footer_serves_with_a_warning,
	test_hostile_headers_are_refused_with_what_was_found, test_entry_past_the_end_fails_its_block_only,
	test_claims_of_two_terabytes_cost_nothing, test_it_is_read_only_and_has_an_alias)
