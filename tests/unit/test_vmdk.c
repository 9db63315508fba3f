/* VMDK: what qemu-img writes is read back; streams as VMware writes them; hostile descriptors, headers and tables. */
#include <sys/resource.h>
#include <zlib.h>
#include "unit.h"
#include "foreign_image.h"
#include "vmm/facts.h"

#define GRAIN 65536u
#define ODD   ((150u << 20) + 37 * 512)  /* five grain tables, the last grain is cut */

static bool nothing_cached;

ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	if (nothing_cached) {
		errno = EAGAIN;
		return -1;
	}
	return __real_preadv64v2(fd, iov, cnt, off, flags);
}

static void convert(const char *options)
{
	run("rm -f disk*; qemu-img convert -f raw -O vmdk -o %s raw disk.vmdk", options);
}

/* ---- what qemu-img writes ---- */

START_TEST(test_each_subformat_reads_as_the_raw_bytes)
{
	static const char *const options[] = { "subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on",
		"subformat=streamOptimized", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat" };
	unsigned tables;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(ODD, 300);
	for (unsigned k = 0; k < ARRAY_LEN(options); k++) {
		convert(options[k]);
		compare_file("disk.vmdk", "vmdk", NULL);
		tables = 0;
		nothing_cached = true;
		compare_file("disk.vmdk", "vmdk", &tables);
		nothing_cached = false;
		ck_assert(!!tables == !strstr(options[k], "Flat"));
	}
	dir_remove();
}
END_TEST

START_TEST(test_split_images_of_several_files)
{
	unsigned tables = 0;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw((4ull << 30) + (5 << 20) + 512, 200);
	convert("subformat=twoGbMaxExtentSparse");
	ck_assert_int_eq(access(in_dir("disk-s003.vmdk"), R_OK), 0);
	compare_file("disk.vmdk", "vmdk", NULL);
	nothing_cached = true;
	compare_file("disk.vmdk", "vmdk", &tables);
	nothing_cached = false;
	ck_assert_uint_ge(tables, 3);
	convert("subformat=twoGbMaxExtentFlat");
	ck_assert_int_eq(access(in_dir("disk-f003.vmdk"), R_OK), 0);
	compare_file("disk.vmdk", "vmdk", NULL);
	dir_remove();
}
END_TEST

START_TEST(test_zeroed_grains_are_zeroes)
{
	struct image_status s;
	struct image *i;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(1 << 20, 0);
	convert("subformat=monolithicSparse,zeroed_grain=on");
	run("qemu-io -f vmdk -c 'write -z 128k 192k' disk.vmdk");
	ck_assert_msg(open_image(&i, "disk.vmdk", "vmdk") == 0, "%s", err.msg);
	ck_assert_int_eq(image_status(i, 131072, 1 << 19, &s), 0);
	ck_assert_int_eq(s.kind, EXT_ZERO);
	ck_assert_uint_eq(s.len, 196608);
	ck_assert_int_eq(image_status(i, 327680, 1 << 19, &s), 0);
	ck_assert_int_eq(s.kind, EXT_HOLE);
	image_close(i);
	dir_remove();
}
END_TEST

/* ---- streams as VMware writes them: tables behind the grains, a footer ---- */

static struct {
	uint8_t *buf;
	size_t n, room;
} out;

static void emit(const void *p, size_t n)
{
	size_t padded = (n + 511) / 512 * 512;

	if (out.n + padded > out.room) {
		out.room = (out.n + padded) * 2;
		out.buf = realloc(out.buf, out.room);
	}
	memset(out.buf + out.n, 0, padded);
	memcpy(out.buf + out.n, p, n);
	out.n += padded;
}

static void emit_marker(uint64_t val, uint32_t type)
{
	uint8_t m[16] = { 0 };

	memcpy(m, &val, 8);
	memcpy(m + 12, &type, 4);
	emit(m, sizeof(m));
}

static void header(uint8_t *h, uint64_t sectors, uint64_t gd)
{
	const uint64_t at12[] = { sectors, GRAIN / 512, 1, 1 };
	const uint32_t gtes = 512, flags = 0x30001, version = 3;
	const uint64_t at56[] = { gd, 128 };

	memset(h, 0, 512);
	memcpy(h, "KDMV", 4);
	memcpy(h + 4, &version, 4);
	memcpy(h + 8, &flags, 4);
	memcpy(h + 12, at12, 32);
	memcpy(h + 44, &gtes, 4);
	memcpy(h + 56, at56, 16);
	memcpy(h + 73, "\n \r\n\1", 5);
}

static void emit_grain(const uint8_t *p, size_t n, uint64_t sector)
{
	static uint8_t z[GRAIN * 2];
	uLongf len = sizeof(z) - 12;
	uint32_t size;

	ck_assert_int_eq(compress2(z + 12, &len, p, n, 1), Z_OK);
	size = (uint32_t)len;
	memcpy(z, &sector, 8);
	memcpy(z + 8, &size, 4);
	emit(z, 12 + len);
}

static size_t wrong_len;        /* not 0: the first grain is made of so many bytes */

/* stream.vmdk from raw. */
static void make_stream(void)
{
	static uint8_t grain[GRAIN + 1], h[512];
	uint32_t gt[512] = { 0 }, gd[64] = { 0 };
	char desc[512];
	int fd = open(in_dir("raw"), O_RDONLY | O_CLOEXEC);
	uint64_t size = (uint64_t)lseek(fd, 0, SEEK_END), grains = (size + GRAIN - 1) / GRAIN;

	out.n = 0;
	header(h, size / 512, UINT64_MAX);
	emit(h, 512);
	snprintf(desc, sizeof(desc), "# Disk DescriptorFile\r\nversion=1\r\nCID=12345678\r\nparentCID=FFFFFFFF\r\n"
		"createType=\"streamOptimized\"\r\n\r\nRDONLY %llu SPARSE \"call me \"\r\nddb.adapterType = \"lsilogic\"\r\n",
		(unsigned long long)size / 512);
	emit(desc, sizeof(desc));
	for (uint64_t g = 0; g < grains; g++) {
		ssize_t n = pread(fd, grain, GRAIN, (off_t)(g * GRAIN));

		if (memcmp(grain, grain + 1, (size_t)n - 1) || *grain) {
			gt[g % 512] = (uint32_t)(out.n / 512);
			emit_grain(grain, g || !wrong_len ? (size_t)n : wrong_len, g * (GRAIN / 512));
		}
		if (g % 512 != 511 && g != grains - 1)
			continue;
		emit_marker(4, 1);
		gd[g / 512] = (uint32_t)(out.n / 512);
		emit(gt, sizeof(gt));
		memset(gt, 0, sizeof(gt));
	}
	close(fd);
	emit_marker(1, 2);
	header(h, size / 512, out.n / 512);
	emit(gd, sizeof(gd));
	emit_marker(1, 3);
	emit(h, 512);
	emit_marker(0, 0);
	unlink(in_dir("stream.vmdk"));
	put_bytes("stream.vmdk", 0, out.buf, out.n);
}

START_TEST(test_stream_with_a_footer)
{
	unsigned tables = 0;

	dir_make();
	make_raw(ODD, 200);
	make_stream();
	compare_file("stream.vmdk", "vmdk", NULL);
	nothing_cached = true;
	compare_file("stream.vmdk", "vmdk", &tables);
	nothing_cached = false;
	ck_assert_uint_gt(tables, 0);
	if (!no_qemu(__func__)) {       /* what we take for a stream is one */
		run("qemu-img convert -f vmdk -O raw stream.vmdk other && cmp raw other");
		run("rm other");
	}
	dir_remove();
}
END_TEST

static void broken_stream(int64_t at, unsigned size, uint64_t val, const char *words)
{
	make_stream();
	put("stream.vmdk", at < 0 ? out.n - (size_t)-at : (size_t)at, size, val);
	if (words)
		refused("stream.vmdk", "vmdk", words);
	else
		eio("stream.vmdk", "vmdk", 0);
}

START_TEST(test_hostile_streams)
{
	uint64_t at;

	dir_make();
	make_raw(3 << 20, 20);
	make_stream();
	at = 1024;                      /* the first grain: its sector, its size, its bytes */
	broken_stream((int64_t)at, 8, 1, NULL);
	broken_stream((int64_t)at, 8, UINT64_MAX, NULL);
	broken_stream((int64_t)at + 8, 4, 0, NULL);
	broken_stream((int64_t)at + 8, 4, 1, NULL);
	broken_stream((int64_t)at + 8, 4, 0x7fffffff, NULL);
	broken_stream((int64_t)at + 8, 4, 0xffffffff, NULL);
	broken_stream((int64_t)at + 12, 2, 0x1111, NULL);
	broken_stream((int64_t)at + 20, 8, 0x1234567812345678, NULL);
	broken_stream(-512 - 512 + 56, 8, UINT64_MAX, "does not say where");
	broken_stream(-512 - 512, 1, 'X', "neither 'KDMV'");
	broken_stream(-512, 1, 1, "cut off");
	broken_stream(-512 - 1024 + 12, 1, 0, "cut off");
	broken_stream(-512 - 512 + 8, 4, 0x10001, "without markers");
	broken_stream(-512 - 512 + 77, 2, 2, "method 2");
	broken_stream(-512 - 512 + 8, 4, 0x70001, "flags");
	make_stream();
	ck_assert_int_eq(truncate(in_dir("stream.vmdk"), (off_t)out.n - 512), 0);
	refused("stream.vmdk", "vmdk", "cut off");
	ck_assert_int_eq(truncate(in_dir("stream.vmdk"), 1024), 0);
	refused("stream.vmdk", "vmdk", "cut off");
	dir_remove();
}
END_TEST

/* A grain that inflates to less or more than its place. */
START_TEST(test_grain_of_the_wrong_length)
{
	dir_make();
	make_raw(3 << 20, 20);
	make_stream();
	compare_file("stream.vmdk", "vmdk", NULL);
	for (wrong_len = GRAIN - 1; wrong_len <= GRAIN + 1; wrong_len += 2) {
		make_stream();
		eio("stream.vmdk", "vmdk", 0);
	}
	wrong_len = 0;
	dir_remove();
}
END_TEST

/* ---- hostile sparse files ---- */

static const char *const sparse = "subformat=monolithicSparse";

static void broken_header(unsigned at, unsigned size, uint64_t val, const char *words)
{
	uint64_t was = get("disk.vmdk", at, size);

	put("disk.vmdk", at, size, val);
	if (words)
		refused("disk.vmdk", "vmdk", words);
	else
		compare_file("disk.vmdk", "vmdk", NULL);
	put("disk.vmdk", at, size, was);
}

START_TEST(test_hostile_headers)
{
	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(40 << 20, 20);
	convert(sparse);
	broken_header(0, 4, 0x44574f43, "COWD");
	broken_header(0, 4, 0, "neither 'KDMV'");
	broken_header(4, 4, 0, "version 0");
	broken_header(4, 4, 4, "version 4");
	broken_header(8, 4, 0x80000003, "flags");
	broken_header(8, 4, 0x10003, "without markers");
	broken_header(75, 1, '\n', "as text");
	broken_header(12, 8, 0, "a disk has");
	broken_header(12, 8, (64ull << 31) + 1, "a disk has");
	broken_header(12, 8, UINT64_MAX, "a disk has");
	broken_header(20, 8, 4, "grains have");
	broken_header(20, 8, 96, "grains have");
	broken_header(20, 8, 4096, "grains have");
	broken_header(20, 8, 1ull << 63, "grains have");
	broken_header(44, 4, 0, "grain tables have");
	broken_header(44, 4, 513, "grain tables have");
	broken_header(44, 4, 0x80000000, "grain tables have");
	broken_header(28, 8, 0, "one part of a split image");
	broken_header(28, 8, 1ull << 62, "descriptor would have");
	broken_header(28, 8, 40, "one part of a split image");
	broken_header(28, 8, 128, "no VMDK descriptor");
	broken_header(36, 8, 0, "one part of a split image");
	broken_header(36, 8, 1ull << 55, "descriptor would have");
	broken_header(36, 8, UINT64_MAX, "descriptor would have");
	broken_header(56, 8, UINT64_MAX, "cut off");
	/* the other directory serves as well, until it is bad too, or has no flag */
	broken_header(56, 8, 0, NULL);
	broken_header(56, 8, 1ull << 60, NULL);
	put("disk.vmdk", 56, 8, 1ull << 60);
	broken_header(48, 8, 1ull << 60, "outside the file");
	broken_header(48, 8, UINT64_MAX, "outside the file");
	broken_header(8, 4, 1, "outside the file");
	broken_header(12, 8, 1ull << 37, "outside the file");
	dir_remove();
}
END_TEST

START_TEST(test_hostile_tables)
{
	uint64_t gd, rgd, gt, gte, size;
	struct stat st;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(70 << 20, 20);
	convert(sparse);
	gd = get("disk.vmdk", 56, 8) * 512;
	rgd = get("disk.vmdk", 48, 8) * 512;
	gt = get("disk.vmdk", gd, 4) * 512;
	gte = get("disk.vmdk", gt, 4);
	ck_assert_int_eq(stat(in_dir("disk.vmdk"), &st), 0);
	size = (uint64_t)st.st_size / 512;
	/* grains in the header, in the tables, at and past the end */
	for (unsigned k = 0; k < 6; k++) {
		put("disk.vmdk", gt, 4, ((const uint64_t[]){ 1, 2, gd / 512, size, size - 127, 0xffffffff })[k]);
		eio("disk.vmdk", "vmdk", 0);
	}
	put("disk.vmdk", gt, 4, gte);
	compare_file("disk.vmdk", "vmdk", NULL);
	/* a table outside: the redundant directory has it, too */
	put("disk.vmdk", gd, 4, size);
	compare_file("disk.vmdk", "vmdk", NULL);
	put("disk.vmdk", gd, 4, 0xffffffff);
	compare_file("disk.vmdk", "vmdk", NULL);
	put("disk.vmdk", rgd, 4, 0xfffffffe);
	eio("disk.vmdk", "vmdk", 0);
	put("disk.vmdk", rgd, 4, 0);
	eio("disk.vmdk", "vmdk", 0);
	dir_remove();
}
END_TEST

START_TEST(test_cut_off_file_fails_where_it_is_cut)
{
	struct stat st;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(3 << 20, 0);
	convert(sparse);
	ck_assert_int_eq(stat(in_dir("disk.vmdk"), &st), 0);
	ck_assert_int_eq(truncate(in_dir("disk.vmdk"), st.st_size - 65536), 0);
	eio("disk.vmdk", "vmdk", (3 << 20) - 512);
	dir_remove();
}
END_TEST

/* 64 TiB, its whole directory full of tables that are everywhere in a file of holes: a bounded part of them is in memory. */
START_TEST(test_memory_is_bounded_whatever_the_header_claims)
{
	static uint8_t buf[512], h[512];
	static uint32_t gd[1 << 21];
	struct rusage before, after;
	char desc[512];
	struct image *i;

	dir_make();
	header(h, 1ull << 37, 4096);
	put("big.vmdk", 0, 8, 0);
	put_bytes("big.vmdk", 0, h, 512);
	put("big.vmdk", 8, 4, 1);
	snprintf(desc, sizeof(desc), "# Disk DescriptorFile\ncreateType=\"monolithicSparse\"\nRW %llu SPARSE \"x\"\n", 1ull << 37);
	put_bytes("big.vmdk", 512, desc, sizeof(desc));
	for (unsigned k = 0; k < ARRAY_LEN(gd); k++)
		gd[k] = (1u << 16) + k * 8;
	put_bytes("big.vmdk", 4096 * 512, gd, sizeof(gd));
	ck_assert_int_eq(truncate(in_dir("big.vmdk"), 16ll << 30), 0);
	ck_assert_msg(open_image(&i, "big.vmdk", "vmdk") == 0, "%s", err.msg);
	ck_assert_uint_eq(image_size(i), 64ull << 40);
	getrusage(RUSAGE_SELF, &before);
	for (unsigned k = 0; k < 2500; k++)
		ck_assert_int_eq(image_read(i, buf, 512, rnd(1ull << 37) * 512), 0);
	getrusage(RUSAGE_SELF, &after);
	if (!SANITIZED)
		ck_assert_int_lt(after.ru_maxrss - before.ru_maxrss, 16 << 10);
	image_close(i);
	dir_remove();
}
END_TEST

/* ---- descriptors ---- */

static void describe(const char *type, const char *lines)
{
	char text[4096];
	int n = snprintf(text, sizeof(text), "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
		"createType=\"%s\"\n%s\n", type, lines);

	unlink(in_dir("disk.vmdk"));
	put_bytes("disk.vmdk", 0, text, (size_t)n);
}

static void bad(const char *lines, const char *words)
{
	describe("monolithicFlat", lines);
	refused("disk.vmdk", "vmdk", words);
}

START_TEST(test_descriptors_are_read_strictly)
{
	dir_make();
	run("truncate -s 8k disk-flat.vmdk");
	bad("RW 17 FLAT \"disk-flat.vmdk\" 0", "16 sectors");
	bad("RW 16 FLAT \"disk-flat.vmdk\" 1", "16 sectors");
	bad("RW 1 FLAT \"disk-flat.vmdk\" 137438953472", "16 sectors");
	bad("RW 1 FLAT \"disk-flat.vmdk\" 137438953473", "offset");
	bad("RW 0 FLAT \"disk-flat.vmdk\" 0", "'0' sectors");
	bad("RW -1 FLAT \"disk-flat.vmdk\" 0", "'-1' sectors");
	bad("RW 0x10 FLAT \"disk-flat.vmdk\" 0", "'0x10' sectors");
	bad("RW 18446744073709551617 FLAT \"disk-flat.vmdk\" 0", "sectors");
	bad("RW 137438953472 ZERO\nRW 1 ZERO", "more than 64T");
	bad("RW 16 FLAT disk-flat.vmdk 0", "in quotes");
	bad("RW 16 FLAT \"disk-flat.vmdk 0", "in quotes");
	bad("RW 16 FLAT \"\" 0", "in quotes");
	bad("RW 16 FLAT", "in quotes");
	bad("RW 16", "type ''");
	bad("RW 16 FLAT \"disk-flat.vmdk\" 0 more", "behind an extent");
	bad("RW 16 FLAT \"disk-flat.vmdk\" x", "offset");
	bad("RW 16 SPARSE \"disk-flat.vmdk\" 1", "offset");
	bad("RW 16 VMFS \"disk-flat.vmdk\" 0", "ESX");
	bad("RW 16 SESPARSE \"disk-flat.vmdk\" 0", "ESX");
	bad("RW 16 BLOB \"disk-flat.vmdk\" 0", "type 'BLOB'");
	bad("RW 16 SPARSE \"disk-flat.vmdk\"", "neither 'KDMV'");
	bad("rw 16 FLAT \"disk-flat.vmdk\" 0", "not understood");
	bad("garbage", "not understood");
	bad("", "no extents");
	bad("createType=\"custom\"", "twice");
	bad("parentCID=ffffffff", "twice");
	bad("version=5\n", "version '5'");
	bad("encryption.keySafe = \"vmware:key/list\"", "encrypted");
	describe("vmfsSparse", "RW 1 ZERO");
	refused("disk.vmdk", "vmdk", "monolithicFlat, twoGbMaxExtentSparse");
	describe("monolithicSparse", "RW 1 ZERO");
	refused("disk.vmdk", "vmdk", "can be read");
	run("printf '# Disk DescriptorFile\nRW 1 ZERO\n' > disk.vmdk");
	refused("disk.vmdk", "vmdk", "no createType");
	run("printf '# Disk DescriptorFile\nparentCID=12345678\n' > disk.vmdk");
	refused("disk.vmdk", "vmdk", "parentCID=12345678");
	run("(printf '# Disk DescriptorFile\n'; head -c 2000 /dev/zero | tr '\\0' x) > disk.vmdk");
	refused("disk.vmdk", "vmdk", "longer than");
	run("printf '# Disk DescriptorFile\n' > disk.vmdk && truncate -s 1G disk.vmdk");
	refused("disk.vmdk", "vmdk", "at most 262144");
	run("(printf '# Disk DescriptorFile\ncreateType=\"monolithicFlat\"\n'; yes 'RW 1 ZERO' | head -1025) > disk.vmdk");
	refused("disk.vmdk", "vmdk", "more than 1024 extents");
	dir_remove();
}
END_TEST

START_TEST(test_only_files_of_the_image_are_opened)
{
	dir_make();
	run("truncate -s 8k disk-flat.vmdk other.vmdk other-flat.vmdk disk2-flat.vmdk disk; mkfifo disk-fifo; mkdir disk-dir sub; "
		"ln -s disk-flat.vmdk disk-link; touch sub/disk-flat.vmdk; truncate -s 8k disk-theirs");
	bad("RW 16 FLAT \"/etc/passwd\" 0", "plain file name");
	bad("RW 16 FLAT \"../disk-flat.vmdk\" 0", "plain file name");
	bad("RW 16 FLAT \"sub/disk-flat.vmdk\" 0", "plain file name");
	bad("RW 16 FLAT \"..\" 0", "plain file name");
	bad("RW 16 FLAT \"other-flat.vmdk\" 0", "not named after");
	bad("RW 16 FLAT \"disk2-flat.vmdk\" 0", "not named after");
	bad("RW 16 FLAT \"disk\" 0", "not named after");
	bad("RW 16 FLAT \"disk.vmdk\" 0", "not named after");
	bad("RW 16 FLAT \"disk-none.vmdk\" 0", "cannot open");
	bad("RW 16 FLAT \"disk-link\" 0", "symbolic link");
	bad("RW 16 FLAT \"disk-fifo\" 0", "regular file");
	bad("RW 16 FLAT \"disk-dir\" 0", "regular file");
	if (!geteuid()) {
		run("chown 1 disk-theirs");
		bad("RW 16 FLAT \"disk-theirs\" 0", "another user");
	}
	describe("monolithicFlat", "RW 16 FLAT \"disk-self\" 0");
	run("ln disk.vmdk disk-self");
	refused("disk.vmdk", "vmdk", "descriptor itself");
	dir_remove();
}
END_TEST

START_TEST(test_zero_and_noaccess_extents)
{
	uint8_t buf[2048];
	struct image *i;

	dir_make();
	run("tr '\\0' a < /dev/zero | head -c 4096 > disk-flat.vmdk");
	describe("monolithicFlat", "RW 2 ZERO\n RDONLY\t1 FLAT \"disk-flat.vmdk\" 3\r\nNOACCESS 3 FLAT \"disk-gone\"\n"
		"rw.extra=1\nRW 1 FLAT \"disk-flat.vmdk\"");
	ck_assert_msg(open_image(&i, "disk.vmdk", "vmdk") == 0, "%s", err.msg);
	ck_assert_uint_eq(image_size(i), 7 * 512);
	ck_assert_int_eq(image_read(i, buf, 1536, 0), 0);
	ck_assert(buf[0] == 0 && buf[1023] == 0 && buf[1024] == 'a' && buf[1535] == 'a');
	ck_assert_int_eq(image_read(i, buf, 1, 1536), -EIO);
	ck_assert_int_eq(image_read(i, buf, 2048, 1024), -EIO);
	ck_assert_int_eq(image_read(i, buf, 512, 3072), 0);
	ck_assert(buf[0] == 'a' && buf[511] == 'a');
	ck_assert_int_eq(image_write(i, buf, 512, 0), -EROFS);
	image_close(i);
	dir_remove();
}
END_TEST

START_TEST(test_split_sparse_parts_are_checked)
{
	char line[100];

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(3 << 20, 20);
	convert("subformat=twoGbMaxExtentSparse");
	refused("disk-s001.vmdk", "vmdk", "split image");
	run("qemu-img convert -f raw -O vmdk -o subformat=streamOptimized raw disk-z.vmdk");
	describe("twoGbMaxExtentSparse", "RW 6144 SPARSE \"disk-z.vmdk\"");
	refused("disk.vmdk", "vmdk", "compressed extent");
	describe("twoGbMaxExtentSparse", "RW 6145 SPARSE \"disk-s001.vmdk\"");
	refused("disk.vmdk", "vmdk", "it has 6144 sectors");
	snprintf(line, sizeof(line), "RW 6144 SPARSE \"disk-s001.vmdk\"");
	describe("twoGbMaxExtentSparse", line);
	compare_file("disk.vmdk", "vmdk", NULL);
	put("disk-s001.vmdk", get("disk-s001.vmdk", get("disk-s001.vmdk", 56, 8) * 512, 4) * 512, 4, 0xffffffff);
	eio("disk.vmdk", "vmdk", 0);
	dir_remove();
}
END_TEST

/* ---- who opens, what is told ---- */

static unsigned opened;

static int give(const struct image_opener *o, const char *name, const char *from, struct error *e)
{
	(void)o;
	(void)e;
	opened++;
	ck_assert_str_eq(from, in_dir("disk.vmdk"));
	return open(in_dir(name), O_RDONLY | O_CLOEXEC);
}

START_TEST(test_extents_come_from_the_opener_where_there_is_one)
{
	const struct image_opener o = { give };
	const struct image_how how = { .format = "vmdk", .readonly = true, .opener = &o };
	struct image *i;

	dir_make();
	run("truncate -s 8k disk-flat.vmdk");
	describe("monolithicFlat", "RW 16 FLAT \"disk-flat.vmdk\" 0");
	ck_assert_msg(image_open(&i, in_dir("disk.vmdk"), &how, &err) == 0, "%s", err.msg);
	ck_assert_uint_eq(opened, 1);
	image_close(i);
	describe("monolithicFlat", "RW 16 FLAT \"passwd\" 0");
	ck_assert_int_eq(image_open(&i, in_dir("disk.vmdk"), &how, &err), -EACCES);
	ck_assert_uint_eq(opened, 1);
	dir_remove();
}
END_TEST

START_TEST(test_guess_and_description)
{
	struct image *i;
	struct facts *f;
	char *text;

	ck_assert_str_eq(image_guess("KDMV\1\0\0\0", 8), "vmdk");
	ck_assert_str_eq(image_guess("COWD", 4), "vmdk");
	ck_assert_str_eq(image_guess("# Disk DescriptorFile\n", 22), "vmdk");
	ck_assert_str_eq(image_guess("# Disk Descriptor", 17), "raw");
	ck_assert_str_eq(image_guess("KDM", 3), "raw");
	ck_assert(!image_can_write("vmdk") && !image_can_create("vmdk"));
	dir_make();
	make_raw(3 << 20, 5);
	make_stream();
	ck_assert_int_eq(open_image(&i, "stream.vmdk", "vmdk"), 0);
	ck_assert_uint_eq(image_cluster(i), GRAIN);
	f = facts_new();
	image_describe(i, f);
	text = facts_text(f);
	ck_assert_msg(strstr(text, "\"create_type\":\"streamOptimized\"") && strstr(text, "\"grain_size\":65536") &&
		strstr(text, "\"compressed\":true"), "%s", text);
	free(text);
	facts_free(f);
	image_close(i);
	dir_remove();
}
END_TEST

UNIT_MAIN("vmdk", test_each_subformat_reads_as_the_raw_bytes, test_split_images_of_several_files,
	test_zeroed_grains_are_zeroes, test_stream_with_a_footer, test_hostile_streams, test_grain_of_the_wrong_length,
	test_hostile_headers, test_hostile_tables, test_cut_off_file_fails_where_it_is_cut,
	test_memory_is_bounded_whatever_the_header_claims, test_descriptors_are_read_strictly,
	test_only_files_of_the_image_are_opened, test_zero_and_noaccess_extents, test_split_sparse_parts_are_checked,
	test_extents_come_from_the_opener_where_there_is_one, test_guess_and_description)
