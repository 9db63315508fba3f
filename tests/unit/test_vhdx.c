/* VHDX: what qemu-img writes is read back; both copies of everything; hostile headers, regions, metadata and BATs. */
#include "unit.h"
#include "crc32c.h"
#include "foreign_image.h"
#include "vmm/facts.h"

#define MIB     (1u << 20)
#define ODD     ((150u << 20) + 37 * 512)
#define HEADER1 (64u << 10)
#define HEADER2 (128u << 10)
#define REGION1 (192u << 10)
#define REGION2 (256u << 10)

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
	run("rm -f disk.vhdx; qemu-img convert -f raw -O vhdx -o %s raw disk.vhdx", options);
}

/* ---- what qemu-img writes ---- */

START_TEST(test_each_subformat_reads_as_the_raw_bytes)
{
	static const char *const options[] = { "subformat=dynamic", "subformat=fixed", "subformat=dynamic,block_size=1M",
		"subformat=fixed,block_size=2M", "subformat=dynamic,block_size=256M", "subformat=dynamic,block_state_zero=off" };
	unsigned tables;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw(ODD, 300);
	for (unsigned k = 0; k < ARRAY_LEN(options); k++) {
		convert(options[k]);
		compare_file("disk.vhdx", "vhdx", NULL);
		tables = 0;
		nothing_cached = true;
		compare_file("disk.vhdx", "vhdx", &tables);
		nothing_cached = false;
		ck_assert_uint_eq(tables, 1);
	}
	dir_remove();
}
END_TEST

/* Blocks of 1 MiB: a sector bitmap entry stands after each 4096. */
START_TEST(test_blocks_of_several_chunks)
{
	unsigned tables = 0;

	if (no_qemu(__func__))
		return;
	dir_make();
	make_raw((9ull << 30) + (3 << 20) + 512, 120);
	convert("subformat=dynamic,block_size=1M");
	compare_file("disk.vhdx", "vhdx", NULL);
	nothing_cached = true;
	compare_file("disk.vhdx", "vhdx", &tables);
	nothing_cached = false;
	ck_assert_uint_ge(tables, 1);
	dir_remove();
}
END_TEST

START_TEST(test_blocks_in_a_row_are_one_extent)
{
	struct image_status s;
	struct image *i;

	if (no_qemu(__func__))
		return;
	dir_make();
	run("head -c 20971520 /dev/urandom > raw");
	convert("subformat=fixed,block_size=1M");
	ck_assert_msg(open_image(&i, "disk.vhdx", "vhdx") == 0, "%s", err.msg);
	ck_assert_int_eq(image_status(i, 4096, 1 << 30, &s), 0);
	ck_assert_int_eq(s.kind, EXT_DATA);
	ck_assert_uint_eq(s.len, (20 << 20) - 4096);
	ck_assert_uint_eq(s.host % MIB, 4096);
	image_close(i);
	dir_remove();
}
END_TEST

/* ---- changed images ---- */

static void sum(uint64_t at, size_t n)
{
	static uint8_t buf[65536];
	int fd = open(in_dir("disk.vhdx"), O_RDWR | O_CLOEXEC);

	ck_assert_int_eq(pread(fd, buf, n, (off_t)at), (ssize_t)n);
	vhdx_checksum(buf, n);
	ck_assert_int_eq(pwrite(fd, buf, n, (off_t)at), (ssize_t)n);
	close(fd);
}

/* Which header holds, and where the regions are. */
static uint64_t header, bat, metadata, other;
static uint32_t bat_entry, metadata_entry;

static void find_parts(void)
{
	bool second = get("disk.vhdx", HEADER2 + 8, 8) > get("disk.vhdx", HEADER1 + 8, 8);

	header = second ? HEADER2 : HEADER1;
	other = second ? HEADER1 : HEADER2;
	ck_assert_uint_eq(get("disk.vhdx", REGION1 + 8, 4), 2);
	bat_entry = get("disk.vhdx", REGION1 + 16, 4) == 0x2dc27766 ? 16 : 48;
	metadata_entry = 64 - bat_entry;
	bat = get("disk.vhdx", REGION1 + bat_entry + 16, 8);
	metadata = get("disk.vhdx", REGION1 + metadata_entry + 16, 8);
}

static void make(void)
{
	dir_make();
	make_raw(20 << 20, 40);
	convert("subformat=dynamic,block_size=1M");
	find_parts();
}

/* Change it, expect words (NULL: it reads as before), change it back. sums: the structure at base has n bytes and a checksum. */
static void changed(uint64_t base, unsigned at, unsigned size, uint64_t val, size_t n, const char *words)
{
	uint64_t was = get("disk.vhdx", base + at, size);

	put("disk.vhdx", base + at, size, val);
	if (n)
		sum(base, n);
	if (words)
		refused("disk.vhdx", "vhdx", words);
	else
		compare_file("disk.vhdx", "vhdx", NULL);
	put("disk.vhdx", base + at, size, was);
	if (n)
		sum(base, n);
}

static void bad_header(unsigned at, unsigned size, uint64_t val, const char *words)
{
	changed(header, at, size, val, 4096, words);
}

START_TEST(test_the_newer_whole_header_holds)
{
	if (no_qemu(__func__))
		return;
	make();
	/* the one not in use may be anything */
	changed(other, 0, 4, 0, 0, NULL);
	changed(other, 4000, 4, 1, 0, NULL);
	changed(other, 66, 2, 9, 4096, NULL);
	/* the one in use, broken: the other holds */
	changed(header, 4000, 4, 1, 0, NULL);
	changed(header, 0, 4, 0, 4096, NULL);
	put("disk.vhdx", other, 4, 0);
	changed(header, 4000, 4, 1, 0, "neither of its two headers");
	changed(header, 0, 4, 0, 4096, "neither of its two headers");
	put("disk.vhdx", other, 4, 0x64616568);
	changed(other, 8, 8, get("disk.vhdx", header + 8, 8), 4096, "same sequence number");
	/* the older one becomes the newer one, with a log */
	put("disk.vhdx", other + 48, 1, 1);
	changed(other, 8, 8, UINT64_MAX, 4096, "not closed properly");
	dir_remove();
}
END_TEST

START_TEST(test_hostile_headers)
{
	if (no_qemu(__func__))
		return;
	make();
	changed(0, 0, 1, 'V', 0, "no 'vhdxfile'");
	bad_header(66, 2, 2, "version 2");
	bad_header(48, 1, 1, "not closed properly");
	bad_header(63, 1, 0x80, "qemu-img check -r all");
	bad_header(72, 8, 512 << 10, "log would have");
	bad_header(72, 8, MIB + 4096, "log would have");
	bad_header(72, 8, 1ull << 40, "log would have");
	bad_header(72, 8, UINT64_MAX - MIB + 1, "log would have");
	bad_header(68, 4, 4096, "log would have");
	bad_header(68, 4, 0xfff00000, "log would have");
	bad_header(72, 8, bat, "overlap");
	bad_header(72, 8, metadata, "overlap");
	bad_header(68, 4, 0, NULL);
	dir_remove();
}
END_TEST

static void bad_region(unsigned at, unsigned size, uint64_t val, const char *words)
{
	changed(REGION1, at, size, val, 65536, words);
}

START_TEST(test_hostile_region_tables)
{
	if (no_qemu(__func__))
		return;
	make();
	changed(REGION1, 0, 4, 0, 65536, NULL);         /* the second one serves */
	changed(REGION1, 60000, 1, 1, 0, NULL);
	put("disk.vhdx", REGION2, 4, 0);
	changed(REGION1, 0, 4, 0, 65536, "neither of its two region tables");
	changed(REGION1, 60000, 1, 1, 0, "neither of its two region tables");
	bad_region(8, 4, 2048, "2048 entries");
	bad_region(8, 4, 0xffffffff, "4294967295 entries");
	bad_region(8, 4, 0, "no BAT region");
	bad_region(8, 4, 1, "region");
	bad_region(bat_entry, 4, 0x11223344, "no BAT region");
	bad_region(metadata_entry, 4, 0x11223344, "no metadata region");
	bad_region(bat_entry + 16, 8, 0, "BAT would have");
	bad_region(bat_entry + 16, 8, MIB / 2, "BAT would have");
	bad_region(bat_entry + 16, 8, bat + 4096, "BAT would have");
	bad_region(bat_entry + 16, 8, 1ull << 40, "BAT would have");
	bad_region(bat_entry + 16, 8, UINT64_MAX - MIB + 1, "BAT would have");
	bad_region(bat_entry + 24, 4, 0, "BAT would have");
	bad_region(bat_entry + 24, 4, MIB + 1, "BAT would have");
	bad_region(bat_entry + 24, 4, 0xfff00000, "BAT would have");
	bad_region(bat_entry + 16, 8, metadata, "overlap");
	bad_region(metadata_entry + 16, 8, 0, "metadata region would have");
	bad_region(metadata_entry + 16, 8, bat, "overlap");
	/* an unknown region that is not required changes nothing */
	put("disk.vhdx", REGION1 + 80, 8, 12345);
	bad_region(8, 4, 3, NULL);
	put("disk.vhdx", REGION1 + 80 + 28, 4, 1);
	bad_region(8, 4, 3, "unknown kind (id 00003039");
	dir_remove();
}
END_TEST

/* The table entry of the item whose id begins so. */
static uint64_t item(uint32_t id)
{
	for (unsigned k = 0; k < 16; k++)
		if (get("disk.vhdx", metadata + 32 + k * 32, 4) == id)
			return metadata + 32 + k * 32;
	ck_abort_msg("no metadata item %x", id);
	return 0;
}

static uint64_t value(uint32_t id)
{
	return metadata + get("disk.vhdx", item(id) + 16, 4);
}

#define PARAMETERS 0xcaa16737
#define DISK_SIZE  0x2fa54224
#define LOGICAL    0x8141bf1d
#define PHYSICAL   0xcda348c7
#define PAGE83     0xbeca12ab

START_TEST(test_hostile_metadata)
{
	uint64_t end;

	if (no_qemu(__func__))
		return;
	make();
	changed(metadata, 0, 1, 0, 0, "no valid table");
	changed(metadata, 10, 2, 2048, 0, "no valid table");
	changed(metadata, 10, 2, 0, 0, "has no file parameters");
	changed(item(PARAMETERS), 0, 4, 1, 0, "unknown kind (id 00000001");
	changed(item(PAGE83), 24, 4, 0, 0, NULL);
	put("disk.vhdx", item(PAGE83) + 24, 4, 0);
	end = item(PAGE83);
	changed(end, 0, 4, 1, 0, NULL);                 /* unknown, not required */
	changed(item(DISK_SIZE), 16, 4, 100, 0, "virtual disk size would have");
	changed(item(DISK_SIZE), 16, 4, 0xffffffff, 0, "virtual disk size would have");
	changed(item(DISK_SIZE), 16, 4, MIB - 4, 0, "virtual disk size would have");
	changed(item(DISK_SIZE), 20, 4, 0xffffffff, 0, "virtual disk size would have");
	changed(item(DISK_SIZE), 20, 4, 4, 0, "virtual disk size would have");
	changed(item(LOGICAL), 0, 4, PHYSICAL, 0, "unknown kind");
	changed(value(PARAMETERS), 0, 4, 0, 0, "blocks have 0");
	changed(value(PARAMETERS), 0, 4, 3 << 20, 0, "blocks have");
	changed(value(PARAMETERS), 0, 4, 512 << 20, 0, "blocks have");
	changed(value(PARAMETERS), 0, 4, MIB / 2, 0, "blocks have");
	changed(value(PARAMETERS), 4, 4, 2, 0, "changes to another image");
	changed(value(PARAMETERS), 4, 4, 1, 0, NULL);
	changed(value(LOGICAL), 0, 4, 0, 0, "sectors have");
	changed(value(LOGICAL), 0, 4, 1024, 0, "sectors have");
	changed(value(PHYSICAL), 0, 4, 0, 0, "sectors have");
	changed(value(LOGICAL), 0, 4, 4096, 0, NULL);
	changed(value(DISK_SIZE), 0, 8, 0, 0, "its disk has");
	changed(value(DISK_SIZE), 0, 8, 511, 0, "its disk has");
	changed(value(DISK_SIZE), 0, 8, (64ull << 40) + 512, 0, "its disk has");
	changed(value(DISK_SIZE), 0, 8, UINT64_MAX - 511, 0, "its disk has");
	changed(value(DISK_SIZE), 0, 8, 64ull << 40, 0, "too short for");
	changed(value(DISK_SIZE), 0, 8, (131072 - 30) * (uint64_t)MIB, 0, "too short for");
	/* two of them, a parent */
	put_bytes("disk.vhdx", item(PAGE83), (const uint8_t[]){ 0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d,
		0xbe, 0xd8, 0x3b, 0xf4, 0xb8 }, 16);
	changed(end, 20, 4, 8, 0, "twice");
	put_bytes("disk.vhdx", end, (const uint8_t[]){ 0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8,
		0x48, 0x34, 0xab, 0x0c }, 16);
	refused("disk.vhdx", "vhdx", "changes to another image");
	dir_remove();
}
END_TEST

START_TEST(test_hostile_block_tables)
{
	uint64_t was, size;
	struct stat st;
	uint8_t buf[512], zero[512] = { 0 };
	struct image *i;

	if (no_qemu(__func__))
		return;
	make();
	was = get("disk.vhdx", bat, 8);
	ck_assert_uint_eq(was & 7, 6);
	ck_assert_int_eq(stat(in_dir("disk.vhdx"), &st), 0);
	size = ((uint64_t)st.st_size + MIB - 1) / MIB;
	for (unsigned state = 4; state < 8; state++) {
		if (state == 6)
			continue;
		put("disk.vhdx", bat, 8, (was & ~7ull) | state);
		eio("disk.vhdx", "vhdx", 0);
	}
	/* in the headers, the log, the BAT, the metadata, at the end and far behind it */
	for (unsigned k = 0; k < 6; k++) {
		const uint64_t at[] = { 0, get("disk.vhdx", header + 72, 8) / MIB, bat / MIB, metadata / MIB, size, (1ull << 44) - 1 };

		put("disk.vhdx", bat, 8, at[k] << 20 | 6);
		eio("disk.vhdx", "vhdx", 0);
	}
	for (unsigned state = 0; state < 4; state++) {
		put("disk.vhdx", bat, 8, (was & ~7ull) | state);
		ck_assert_msg(open_image(&i, "disk.vhdx", "vhdx") == 0, "%s", err.msg);
		ck_assert_int_eq(image_read(i, buf, 512, 0), 0);
		ck_assert(!memcmp(buf, zero, 512));
		image_close(i);
	}
	put("disk.vhdx", bat, 8, was);
	compare_file("disk.vhdx", "vhdx", NULL);
	/* cut off in its last block */
	was = get("disk.vhdx", bat + 19 * 8, 8) & ~7ull;
	ck_assert_int_eq(truncate(in_dir("disk.vhdx"), (off_t)was + MIB - 512), 0);
	eio("disk.vhdx", "vhdx", (20 << 20) - 512);
	dir_remove();
}
END_TEST

START_TEST(test_cut_off_files_are_refused)
{
	static const uint64_t lengths[] = { 8, 65536, HEADER1 + 4096, REGION1, REGION1 + 65535, MIB };

	if (no_qemu(__func__))
		return;
	make();
	for (unsigned k = ARRAY_LEN(lengths); k--;) {
		ck_assert_int_eq(truncate(in_dir("disk.vhdx"), (off_t)lengths[k]), 0);
		refused("disk.vhdx", "vhdx", "");
	}
	dir_remove();
}
END_TEST

START_TEST(test_guess_and_description)
{
	struct image *i;
	struct facts *f;
	char *text;

	ck_assert_str_eq(image_guess("vhdxfileQ", 9), "vhdx");
	ck_assert_str_eq(image_guess("vhdxfil", 7), "raw");
	ck_assert(!image_can_write("vhdx") && !image_can_create("vhdx"));
	if (no_qemu(__func__))
		return;
	make();
	ck_assert_int_eq(open_image(&i, "disk.vhdx", "vhdx"), 0);
	ck_assert_uint_eq(image_cluster(i), MIB);
	f = facts_new();
	image_describe(i, f);
	text = facts_text(f);
	ck_assert_msg(strstr(text, "\"block_size\":1048576") && strstr(text, "\"logical_sector_size\":512"), "%s", text);
	free(text);
	facts_free(f);
	image_close(i);
	dir_remove();
}
END_TEST

UNIT_MAIN("vhdx", test_each_subformat_reads_as_the_raw_bytes, test_blocks_of_several_chunks,
	test_blocks_in_a_row_are_one_extent, test_the_newer_whole_header_holds, test_hostile_headers,
	test_hostile_region_tables, test_hostile_metadata, test_hostile_block_tables, test_cut_off_files_are_refused,
	test_guess_and_description)
