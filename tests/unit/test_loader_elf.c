/* ELF kernels: PVH note, Linux 64-bit entry, compressed, and every way an ELF can lie. */
#include <errno.h>
#include <lz4.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>
#include "images.h"
#include "unit.h"

#define RAM  (64ull << 20)
#define BASE 0x200000
#define SIZE 0x3000

/* A text segment with 0x5a at its start and 0xa5 at its end, bss behind, and a PVH note in it
 * unless note is 0. */
static size_t kernel_make(uint32_t note)
{
	elf64_make(BASE + 0x10, note ? 2 : 1);
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, SIZE, SIZE + 0x2000);
	image[0x1000] = 0x5a;
	image[0x1000 + SIZE - 1] = 0xa5;
	if (note)
		elf64_phdr(1, PT_NOTE, 0x2000, 0, pvh_note(0x2000, note), 20);
	return 0x1000 + SIZE;
}

static void expect_placed(void)
{
	ck_assert(ram_is(BASE, 0x5a) && ram_is(BASE + SIZE - 1, 0xa5) && ram_is(BASE + SIZE, 0));
	ck_assert_uint_eq(boot.load_start, BASE);
	ck_assert_uint_eq(boot.load_end, BASE + SIZE + 0x2000);
}

START_TEST(test_elf64_with_pvh_note_enters_by_it)
{
	ram_init(RAM);
	ck_assert_msg(!load_bytes(image, kernel_make(BASE + 0x20), "auto"), "%s", err.msg);
	ck_assert_int_eq(boot.protocol, BOOT_PVH);
	ck_assert_uint_eq(boot.entry, BASE + 0x20);
	ck_assert_uint_eq(boot.setup_header_len, 0);
	ck_assert_str_eq(boot.format, "ELF64 (PVH)");
	ck_assert_str_eq(boot.cmdline, "");
	expect_placed();
	gmem_done(&ram);
}
END_TEST

START_TEST(test_elf32_with_pvh_note_enters_by_it)
{
	ram_init(RAM);
	elf32_make(BASE, 2);
	elf32_phdr(0, PT_LOAD, 0x1000, BASE, 0x100, 0x200);
	elf32_phdr(1, PT_NOTE, 0x1100, 0, pvh_note(0x1100, BASE + 4), 20);
	ck_assert_msg(!load_bytes(image, 0x2000, "auto"), "%s", err.msg);
	ck_assert_int_eq(boot.protocol, BOOT_PVH);
	ck_assert_uint_eq(boot.entry, BASE + 4);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_pvh_note_outside_every_segment_is_found_in_the_file)
{
	ram_init(RAM);
	kernel_make(BASE);
	elf64_phdr(1, PT_NOTE, 0x100000, 0, pvh_note(0x100000, BASE + 8), 20);
	ck_assert_msg(!load_bytes(image, 0x101000, "pvh"), "%s", err.msg);
	ck_assert_uint_eq(boot.entry, BASE + 8);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_vmlinux_gets_a_setup_header_made_for_it)
{
	ram_init(RAM);
	ck_assert_msg(!load_bytes(image, kernel_make(BASE + 0x20), "linux64"), "%s", err.msg);
	ck_assert_int_eq(boot.protocol, BOOT_LINUX64);
	ck_assert_uint_eq(boot.entry, BASE + 0x10);
	ck_assert_uint_ge(boot.setup_header_len, 0x268 - 0x1f1);
	ck_assert_int_eq(memcmp(boot.setup_header + 0x202 - 0x1f1, "HdrS\x0f\x02", 6), 0);
	ck_assert_int_eq(boot.setup_header[0x1fe - 0x1f1], 0x55);
	ck_assert_int_eq(boot.setup_header[0x211 - 0x1f1], 1);
	expect_placed();
	gmem_done(&ram);
}
END_TEST

START_TEST(test_entry_in_virtual_addresses_becomes_physical)
{
	ram_init(RAM);
	elf64_make(0xffffffff80000000 + BASE + 0x30, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, SIZE, SIZE);
	ck_assert_msg(!load_bytes(image, 0x1000 + SIZE, "auto"), "%s", err.msg);
	ck_assert_uint_eq(boot.entry, BASE + 0x30);
	gmem_done(&ram);
}
END_TEST

static size_t pack_gzip(uint8_t *out, size_t room, size_t len)
{
	z_stream z = { .next_in = image, .avail_in = len, .next_out = out, .avail_out = room };

	ck_assert(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, 0) == Z_OK &&
		  deflate(&z, Z_FINISH) == Z_STREAM_END);
	deflateEnd(&z);
	return z.total_out;
}

static size_t pack_xz(uint8_t *out, size_t room, size_t len)
{
	size_t n = 0;

	ck_assert(lzma_easy_buffer_encode(1, LZMA_CHECK_CRC32, NULL, image, len, out, &n, room) ==
		  LZMA_OK);
	return n;
}

static size_t pack_lzma(uint8_t *out, size_t room, size_t len)
{
	lzma_stream s = LZMA_STREAM_INIT;
	lzma_options_lzma o;
	size_t n;

	ck_assert(!lzma_lzma_preset(&o, 1) && lzma_alone_encoder(&s, &o) == LZMA_OK);
	s.next_in = image;
	s.avail_in = len;
	s.next_out = out;
	s.avail_out = room;
	ck_assert(lzma_code(&s, LZMA_FINISH) == LZMA_STREAM_END);
	n = s.total_out;
	lzma_end(&s);
	return n;
}

static size_t pack_zstd(uint8_t *out, size_t room, size_t len)
{
	return ZSTD_compress(out, room, image, len, 1);
}

/* The legacy frame of lz4: blocks of 8 MiB, here one. */
static size_t pack_lz4(uint8_t *out, size_t room, size_t len)
{
	int n = LZ4_compress_default((char *)image, (char *)out + 8, len, room - 8);

	memcpy(out, "\x02\x21\x4c\x18", 4);
	for (int i = 0; i < 4; i++)
		out[4 + i] = (uint8_t)(n >> 8 * i);
	return 8 + n;
}

static const struct packer {
	const char *name;
	size_t (*pack)(uint8_t *out, size_t room, size_t len);
} packers[] = { { "gzip", pack_gzip }, { "xz", pack_xz }, { "lzma", pack_lzma },
	{ "zstd", pack_zstd }, { "lz4", pack_lz4 } };

START_TEST(test_compressed_elf_loads_as_the_plain_one)
{
	static uint8_t packed[1 << 20];

	for (size_t i = 0; i < sizeof(packers) / sizeof(packers[0]); i++) {
		size_t n = packers[i].pack(packed, sizeof(packed), kernel_make(BASE + 0x20));

		ram_init(RAM);
		ck_assert_msg(!load_bytes(packed, n, "auto"), "%s: %s", packers[i].name, err.msg);
		ck_assert_int_eq(boot.protocol, BOOT_PVH);
		ck_assert_uint_eq(boot.entry, BASE + 0x20);
		ck_assert_ptr_nonnull(strstr(boot.format, packers[i].name));
		expect_placed();
		gmem_done(&ram);
	}
}
END_TEST

START_TEST(test_compressed_elf_cut_short_is_refused)
{
	static uint8_t packed[1 << 20];

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(packers) / sizeof(packers[0]); i++) {
		size_t n = packers[i].pack(packed, sizeof(packed), kernel_make(BASE + 0x20));

		for (size_t cut = 8; cut < n * 9 / 10; cut += 5)
			ck_assert_msg(load_bytes(packed, cut, "auto") < 0, "%s: %zu",
				packers[i].name, cut);
		ck_assert_ptr_nonnull(strstr(err.msg, packers[i].name));
	}
	gmem_done(&ram);
}
END_TEST

/* 3 MiB of zeroes in a few KiB, claimed by a segment to be far more than RAM. */
START_TEST(test_compressed_elf_unfolds_to_no_more_than_ram)
{
	static uint8_t packed[1 << 20];
	size_t n;

	ram_init(8 << 20);
	elf64_make(BASE, 2);
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, SIZE, SIZE);
	elf64_phdr(1, PT_LOAD, 3ull << 30, 0x300000, 0x1000, 0x1000);
	n = pack_gzip(packed, sizeof(packed), 3 << 20);
	ck_assert_int_lt(load_bytes(packed, n, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "an image of"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_segments_out_of_bounds_are_refused)
{
	static const struct {
		uint64_t off, paddr, filesz, memsz;
		const char *words;
	} t[] = {
		{ 0x1000, BASE, SIZE + 1, SIZE + 1, "cut short" },
		{ UINT64_MAX, BASE, 1, 1, "cut short" },
		{ 0x1000, BASE, UINT64_MAX, UINT64_MAX, "cut short" },
		{ 0x1000, BASE, SIZE, SIZE - 1, "in memory" },
		{ 0x1000, UINT64_MAX - 0x1000, 0x1000, 0x2000, "wraps" },
		{ 0x1000, BASE, SIZE, UINT64_MAX - BASE, "past 4 GiB" },
		{ 0x1000, 0xfffff000, SIZE, SIZE, "past 4 GiB" },
		{ 0x1000, 0xfffff000, 0x1000, 0x1000, "outside RAM" },
		{ 0x1000, RAM, SIZE, SIZE, "outside RAM" },
		{ 0x1000, RAM - SIZE, SIZE, SIZE + 1, "outside RAM" },
		{ 0x1000, 1ull << 40, SIZE, SIZE, "past 4 GiB" },
		{ 0x1000, 0, SIZE, SIZE, "boot information" },
		{ 0x1000, 0x2ffff, SIZE, SIZE, "boot information" },
		{ 0x1000, 0x9fc00 - SIZE, SIZE, SIZE + 1, "firmware area" },
		{ 0x1000, 0xfffff, SIZE, SIZE, "firmware area" },
	};

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		elf64_make(t[i].paddr, 1);
		elf64_phdr(0, PT_LOAD, t[i].off, t[i].paddr, t[i].filesz, t[i].memsz);
		ck_assert_msg(load_bytes(image, 0x1000 + SIZE, "auto") < 0, "%zu", i);
		ck_assert_msg(strstr(err.msg, t[i].words) != NULL, "%zu: %s", i, err.msg);
	}
	gmem_done(&ram);
}
END_TEST

START_TEST(test_segment_of_zeroes_only_may_lie_past_the_files_end)
{
	ram_init(RAM);
	elf64_make(BASE, 2);
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, 0x1000, 0x1000);
	elf64_phdr(1, PT_LOAD, 0x5000, BASE + 0x5000, 0, 0x1000);
	ck_assert_msg(!load_bytes(image, 0x2000, "auto"), "%s", err.msg);
	ck_assert_uint_eq(boot.load_end, BASE + 0x6000);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_overlapping_segments_are_refused)
{
	ram_init(RAM);
	elf64_make(BASE, 2);
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, 0x1000, 0x1001);
	elf64_phdr(1, PT_LOAD, 0x2000, BASE + 0x1000, 0x1000, 0x1000);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "segments overlap at 0x201000"));
	elf64_phdr(0, PT_LOAD, 0x1000, BASE, 0x1000, 0x1000);
	ck_assert_int_eq(load_bytes(image, 0x4000, "auto"), 0);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_program_headers_out_of_bounds_are_refused)
{
	ram_init(RAM);
	kernel_make(0);
	put(56, 2, 0xffff); /* e_phnum */
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	kernel_make(0);
	put(56, 2, 0);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	kernel_make(0);
	put(32, 8, 0x4000 - 55); /* e_phoff */
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "past its end"));
	put(32, 8, UINT64_MAX - 8);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	kernel_make(0);
	put(54, 2, 55); /* e_phentsize */
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_int_lt(load_bytes(image, 20, "auto"), 0);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_entry_outside_the_segments_is_refused)
{
	ram_init(RAM);
	kernel_make(0);
	put(24, 8, BASE + SIZE + 0x2000);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "entry point 0x205000"));
	ck_assert_int_lt(load_bytes(image, kernel_make(BASE - 1), "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "PVH entry 0x1fffff"));
	gmem_done(&ram);
}
END_TEST

/* Notes with absurd lengths end the walk; the ELF is then one without a PVH note. */
START_TEST(test_row86_notes_that_lie_about_their_length_are_no_notes)
{
	static const struct {
		uint32_t namesz, descsz;
	} t[] = { { 0xffffffff, 4 }, { 4, 0xffffffff }, { 0xfffffffd, 0xfffffffd }, { 4, 5 },
		{ 8, 4 }, { 4, 0 } };

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		kernel_make(BASE + 0x20);
		put(0x2000, 4, t[i].namesz);
		put(0x2004, 4, t[i].descsz);
		ck_assert_int_lt(load_bytes(image, 0x1000 + SIZE, "pvh"), 0);
		ck_assert_msg(strstr(err.msg, "without a PVH note") != NULL, "%zu: %s", i, err.msg);
	}
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_what_is_no_x86_kernel_is_named)
{
	static const struct {
		unsigned off, val;
		const char *words;
	} t[] = { { 18, EM_AARCH64, "an ELF for aarch64" }, { 18, EM_RISCV, "an ELF for riscv" },
		{ 18, 0x7777, "another machine" }, { 16, ET_REL, "object file" },
		{ 16, ET_CORE, "type 4" } };

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		kernel_make(0);
		put(t[i].off, 2, t[i].val);
		ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
		ck_assert_msg(strstr(err.msg, t[i].words) != NULL, "%s", err.msg);
	}
	kernel_make(BASE);
	elf64_phdr(1, PT_INTERP, 0x2000, 0, 0x20, 0x20);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "dynamically linked"));
	elf32_make(BASE, 1);
	elf32_phdr(0, PT_LOAD, 0x1000, BASE, 0x100, 0x100);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "32-bit x86 ELF with neither"));
	gmem_done(&ram);
}
END_TEST

UNIT_MAIN("loader_elf", test_elf64_with_pvh_note_enters_by_it,
	test_elf32_with_pvh_note_enters_by_it,
	test_pvh_note_outside_every_segment_is_found_in_the_file,
	test_vmlinux_gets_a_setup_header_made_for_it,
	test_entry_in_virtual_addresses_becomes_physical,
	test_compressed_elf_loads_as_the_plain_one, test_compressed_elf_cut_short_is_refused,
	test_compressed_elf_unfolds_to_no_more_than_ram,
	test_row86_segments_out_of_bounds_are_refused,
	test_segment_of_zeroes_only_may_lie_past_the_files_end,
	test_row86_overlapping_segments_are_refused,
	test_row86_program_headers_out_of_bounds_are_refused,
	test_row86_entry_outside_the_segments_is_refused,
	test_row86_notes_that_lie_about_their_length_are_no_notes,
	test_row86_what_is_no_x86_kernel_is_named)
