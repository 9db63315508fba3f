/* bzImages: the three ways in, what the header must say, and damage. */
#include <errno.h>
#include <lz4.h>
#include "images.h"
#include "unit.h"

#define RAM     (64ull << 20)
#define CODE    0xa00 /* setup_sects 4 */
#define PAYLOAD 0x600 /* from CODE */
#define PREF    0x1000000ull
#define INIT    0x800000u

static uint8_t vmlinux[0x40000];
static size_t vmlinux_len;

/* An ELF64 at 16 MiB, recognisable at both ends. */
static void vmlinux_make(void)
{
	elf64_make(PREF, 2);
	elf64_phdr(0, PT_LOAD, 0x1000, PREF, 0x2000, 0x2000);
	elf64_phdr(1, PT_LOAD, 0x3000, PREF + 0x200000, 0x20000, 0x30000);
	image[0x1000] = 0x5a;
	image[0x3000 + 0x1ffff] = 0xa5;
	vmlinux_len = 0x3000 + 0x20000;
	memcpy(vmlinux, image, vmlinux_len);
}

/* A bzImage of protocol 2.15 around vmlinux, compressed as the kernel's lz4 is; returns its length.
 */
static size_t bzimage_make(void)
{
	size_t n, payload;

	vmlinux_make();
	memset(image, 0, sizeof(image));
	put(0x1f1, 1, 4);
	put(0x1fe, 2, 0xaa55);
	put(0x200, 2, 0x6aeb);
	memcpy(image + 0x202, "HdrS\x0f\x02", 6);
	put(0x20e, 2, 0x600);
	memcpy(image + 0x800, "6.1.0-test (someone@somewhere)", 30);
	put(0x211, 1, 3);
	put(0x214, 4, 0x100000);
	put(0x22c, 4, 0x7fffffff);
	put(0x230, 4, 0x200000);
	put(0x234, 1, 1);
	put(0x236, 2, 0x7f);
	put(0x238, 4, 2047);
	put(0x258, 8, PREF);
	put(0x260, 4, INIT);
	n = LZ4_compress_default(
		(char *)vmlinux, (char *)image + CODE + PAYLOAD + 8, vmlinux_len, 0x80000);
	put(CODE + PAYLOAD, 4, 0x184c2102);
	put(CODE + PAYLOAD + 4, 4, n);
	payload = 8 + n + 4;
	put(CODE + PAYLOAD + 8 + n, 4, vmlinux_len);
	put(0x248, 4, PAYLOAD);
	put(0x24c, 4, payload);
	image[CODE] = 0x11;
	n = (PAYLOAD + payload + 15) & ~15u;
	put(0x1f4, 4, n / 16);
	return CODE + n;
}

static void expect_unpacked(void)
{
	ck_assert_int_eq(boot.protocol, BOOT_LINUX64);
	ck_assert_uint_eq(boot.entry, PREF);
	ck_assert(ram_is(PREF, 0x5a) && ram_is(PREF + 0x200000 + 0x1ffff, 0xa5));
	ck_assert_uint_eq(boot.load_start, PREF);
	ck_assert_uint_eq(boot.load_end, PREF + INIT);
	ck_assert_str_eq(boot.format, "bzImage 6.1.0-test (unpacked, lz4)");
}

START_TEST(test_bzimage_is_unpacked_to_its_place_by_default)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	ck_assert_msg(!load_bytes(image, n, "auto"), "%s", err.msg);
	expect_unpacked();
	ck_assert_uint_eq(boot.setup_header_len, 0x26c - 0x1f1);
	ck_assert_int_eq(memcmp(boot.setup_header + 0x202 - 0x1f1, "HdrS\x0f\x02", 6), 0);
	gmem_done(&ram);
}
END_TEST

/* The KASLR flag tells the kernel that its decompressor randomised: nobody did. */
START_TEST(test_unpacked_kernel_sees_kaslr_flag_clear)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	ck_assert_int_eq(load_bytes(image, n, "unpack"), 0);
	ck_assert_int_eq(boot.setup_header[0x211 - 0x1f1], 1);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_bzimage_own_entries)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	ck_assert_int_eq(load_bytes(image, n, "bzimage"), 0);
	ck_assert_int_eq(boot.protocol, BOOT_LINUX64);
	ck_assert_uint_eq(boot.entry, 0x100200);
	ck_assert(ram_is(0x100000, 0x11));
	ck_assert_uint_eq(boot.load_start, 0x100000);
	ck_assert_uint_eq(boot.load_end, PREF + INIT);
	ck_assert_int_eq(load_bytes(image, n, "bzimage32"), 0);
	ck_assert_int_eq(boot.protocol, BOOT_LINUX32);
	ck_assert_uint_eq(boot.entry, 0x100000);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_unknown_compression_falls_back_to_own_entry)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	memcpy(image + CODE + PAYLOAD, "BZh9", 4);
	ck_assert_msg(!load_bytes(image, n, "auto"), "%s", err.msg);
	ck_assert_uint_eq(boot.entry, 0x100200);
	ck_assert_str_eq(boot.format, "bzImage 6.1.0-test (own 64-bit entry)");
	ck_assert_int_lt(load_bytes(image, n, "unpack"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "compressed in a way not known here"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_vmlinux_linked_elsewhere_falls_back_to_own_entry)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	put(0x258, 8, PREF + 0x200000);
	ck_assert_msg(!load_bytes(image, n, "auto"), "%s", err.msg);
	ck_assert_uint_eq(boot.entry, 0x100200);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_32_bit_kernel_is_entered_by_its_32_bit_entry)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	put(0x236, 2, 0);
	ck_assert_int_eq(load_bytes(image, n, "auto"), 0);
	ck_assert_int_eq(boot.protocol, BOOT_LINUX32);
	ck_assert_int_lt(load_bytes(image, n, "unpack"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "bzimage32"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row84_setup_sects_zero_means_four)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	put(0x1f1, 1, 0);
	ck_assert_msg(!load_bytes(image, n, "auto"), "%s", err.msg);
	expect_unpacked();
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row84_file_shorter_than_its_setup_is_refused)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	put(0x1f1, 1, 255);
	ck_assert_int_lt(load_bytes(image, 256 * 512, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "cut short"));
	bzimage_make();
	for (size_t cut = 0x206; cut < n - 16; cut += 997)
		ck_assert_msg(load_bytes(image, cut, "auto") < 0, "%zu", cut);
	ck_assert_ptr_nonnull(strstr(err.msg, "cut short"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row85_wrong_magic_and_old_protocols_are_refused)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	memcpy(image, "MZ", 2);
	image[0x202] = 'h';
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "a PE program without the Linux header"));
	bzimage_make();
	put(0x206, 2, 0x205);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "boot protocol 2.05"));
	bzimage_make();
	put(0x211, 1, 0);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "zImage"));
	bzimage_make();
	put(0x201, 1, 0x20);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "setup header ends"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row85_init_size_beyond_ram_is_refused_with_what_is_needed)
{
	size_t n = bzimage_make();

	ram_init(PREF + INIT - 0x1000);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "give at least 24 MiB"));
	put(0x260, 4, 0xffffffff);
	ck_assert_int_lt(load_bytes(image, n, "bzimage"), 0);
	put(0x258, 8, UINT64_MAX - 0x1000);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	gmem_done(&ram);
	bzimage_make();
	ram_init(PREF + INIT);
	ck_assert_msg(!load_bytes(image, n, "auto"), "%s", err.msg);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_damaged_payload_is_refused)
{
	size_t n = bzimage_make();

	ram_init(RAM);
	memset(image + CODE + PAYLOAD + 12, 0xff, 64);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "damaged"));
	bzimage_make();
	put(0x248, 4, 0xfffffff0);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "lies past its end"));
	bzimage_make();
	put(0x24c, 4, 0xffffffff);
	ck_assert_int_lt(load_bytes(image, n, "auto"), 0);
	gmem_done(&ram);
}
END_TEST

/* The trailer of the payload bounds what is unpacked, whatever the stream holds. */
START_TEST(test_payload_unfolds_to_no_more_than_it_declares)
{
	size_t n = bzimage_make(), trailer = CODE + PAYLOAD;
	uint32_t len;

	ram_init(RAM);
	memcpy(&len, image + 0x24c, 4);
	trailer += len - 4;
	put(trailer, 4, vmlinux_len - 1);
	ck_assert_int_lt(load_bytes(image, n, "unpack"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "cut short"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row88_cmdline_past_the_kernels_limit_is_refused)
{
	size_t n = bzimage_make();
	int fd = image_fd(image, n);
	char line[2050];
	struct boot_config cfg = { .kernel = fd_path(fd), .cmdline = line };

	ram_init(RAM);
	memset(line, 'x', sizeof(line));
	line[2047] = 0;
	ck_assert_msg(!load_config(&cfg), "%s", err.msg);
	ck_assert_ptr_eq(boot.cmdline, line);
	line[2047] = 'x';
	line[2048] = 0;
	ck_assert_int_lt(load_config(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "has 2048 bytes, this kernel takes 2047"));
	gmem_done(&ram);
	close(fd);
}
END_TEST

UNIT_MAIN("loader_bzimage", test_bzimage_is_unpacked_to_its_place_by_default,
	test_unpacked_kernel_sees_kaslr_flag_clear, test_bzimage_own_entries,
	test_unknown_compression_falls_back_to_own_entry,
	test_vmlinux_linked_elsewhere_falls_back_to_own_entry,
	test_32_bit_kernel_is_entered_by_its_32_bit_entry, test_row84_setup_sects_zero_means_four,
	test_row84_file_shorter_than_its_setup_is_refused,
	test_row85_wrong_magic_and_old_protocols_are_refused,
	test_row85_init_size_beyond_ram_is_refused_with_what_is_needed,
	test_damaged_payload_is_refused, test_payload_unfolds_to_no_more_than_it_declares,
	test_row88_cmdline_past_the_kernels_limit_is_refused)
