/* Multiboot 1 and 2: headers, tags, modules, relocation, and what must be refused. */
#include <errno.h>
#include "images.h"
#include "unit.h"

#define RAM  (64ull << 20)
#define BASE 0x200000
#define HDR  0x1000 /* in the ELFs: at the start of the segment */

static void mb1(size_t off, uint32_t flags)
{
	put(off, 4, 0x1badb002);
	put(off + 4, 4, flags);
	put(off + 8, 4, -(0x1badb002u + flags));
}

/* An ELF with one segment at BASE, the Multiboot header in it. */
static void elf_make(bool is64)
{
	if (is64) {
		elf64_make(BASE + 0x40, 1);
		elf64_phdr(0, PT_LOAD, HDR, BASE, 0x1000, 0x3000);
	} else {
		elf32_make(BASE + 0x40, 1);
		elf32_phdr(0, PT_LOAD, HDR, BASE, 0x1000, 0x3000);
	}
	image[HDR + 0x800] = 0x5a;
}

START_TEST(test_multiboot1_elf32_and_elf64)
{
	ram_init(RAM);
	for (int is64 = 0; is64 < 2; is64++) {
		elf_make(is64);
		mb1(HDR, 3);
		ck_assert_msg(!load_bytes(image, HDR + 0x1000, "auto"), "%s", err.msg);
		ck_assert_int_eq(boot.protocol, BOOT_MULTIBOOT1);
		ck_assert_uint_eq(boot.entry, BASE + 0x40);
		ck_assert_uint_eq(boot.mb_flags, 3);
		ck_assert_uint_eq(boot.load_end, BASE + 0x3000);
		ck_assert(ram_is(BASE + 0x800, 0x5a));
		ck_assert_str_eq(boot.format, is64 ? "Multiboot 1 (ELF64)" : "Multiboot 1 (ELF32)");
	}
	gmem_done(&ram);
}
END_TEST

/* The header at 0x100 of the file, 0x80 past load_addr: the first 0x80 bytes of the file are left
 * out. */
static void kludge_make(void)
{
	memset(image, 0, sizeof(image));
	mb1(0x100, 1 << 16);
	put(0x10c, 4, BASE + 0x80);
	put(0x110, 4, BASE);
	put(0x114, 4, BASE + 0x800);
	put(0x118, 4, BASE + 0x2000);
	put(0x11c, 4, BASE + 0x90);
	image[0x80] = 0x11;
	image[0x80 + 0x7ff] = 0x22;
	image[0x80 + 0x800] = 0x33;
}

START_TEST(test_multiboot1_addresses_place_a_flat_image)
{
	ram_init(RAM);
	kludge_make();
	ck_assert_msg(!load_bytes(image, 0x1000, "auto"), "%s", err.msg);
	ck_assert_uint_eq(boot.entry, BASE + 0x90);
	ck_assert(ram_is(BASE, 0x11) && ram_is(BASE + 0x7ff, 0x22) && ram_is(BASE + 0x800, 0));
	ck_assert_uint_eq(boot.load_end, BASE + 0x2000);
	put(0x114, 4, 0); /* load_end_addr: the whole file */
	put(0x118, 4, 0);
	ck_assert_int_eq(load_bytes(image, 0x1000, "auto"), 0);
	ck_assert(ram_is(BASE + 0x800, 0x33));
	ck_assert_uint_eq(boot.load_end, BASE + 0x1000 - 0x80);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_multiboot1_addresses_that_contradict_are_refused)
{
	static const struct {
		unsigned off;
		uint32_t val;
	} t[] = { { 0x10c, BASE - 1 }, { 0x10c, BASE + 0x101 }, { 0x110, 0 }, { 0x110, 0xfffffff0 },
		{ 0x114, BASE - 1 }, { 0x114, 0xffffffff }, { 0x118, 0xffffffff },
		{ 0x11c, BASE + 0x2000 }, { 0x11c, 0 } };

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		kludge_make();
		put(t[i].off, 4, t[i].val);
		ck_assert_msg(load_bytes(image, 0x1000, "multiboot") < 0, "%zu", i);
		ck_assert(i != 1 || strstr(err.msg, "0x101 bytes before a header found at 0x100"));
	}
	gmem_done(&ram);
}
END_TEST

START_TEST(test_multiboot1_header_is_found_only_in_8_kib)
{
	ram_init(RAM);
	elf_make(false);
	mb1(8192 - 12, 0);
	ck_assert_int_eq(load_bytes(image, 0x4000, "multiboot"), 0);
	elf_make(false);
	mb1(8192, 0);
	ck_assert_int_lt(load_bytes(image, 0x4000, "multiboot"), 0);
	elf_make(false);
	mb1(HDR, 0);
	put(HDR + 8, 4, 1); /* checksum */
	ck_assert_int_lt(load_bytes(image, 0x4000, "multiboot"), 0);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_multiboot1_wishes_that_cannot_be_met_are_refused)
{
	ram_init(RAM);
	elf_make(false);
	mb1(HDR, 4);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "video mode"));
	mb1(HDR, 8);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "flags 0x8"));
	memset(image, 0, 0x1000);
	mb1(HDR, 0);
	ck_assert_int_lt(load_bytes(image, 0x4000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "no ELF either"));
	gmem_done(&ram);
}
END_TEST

/* A Multiboot 2 header at off being written: tags are appended, then mb2_end() sums it up. */
static size_t mb2_at, mb2_off;

static void mb2_begin(size_t off)
{
	mb2_off = off;
	mb2_at = off + 16;
}

static void mb2_tag(unsigned type, unsigned flags, unsigned nr, const uint32_t *words)
{
	put(mb2_at, 2, type);
	put(mb2_at + 2, 2, flags);
	put(mb2_at + 4, 4, 8 + nr * 4);
	for (unsigned i = 0; i < nr; i++)
		put(mb2_at + 8 + i * 4, 4, words[i]);
	mb2_at = (mb2_at + 8 + nr * 4 + 7) & ~7ul;
}

static void mb2_end(void)
{
	uint32_t len;

	mb2_tag(0, 0, 0, NULL);
	len = mb2_at - mb2_off;
	put(mb2_off, 4, 0xe85250d6);
	put(mb2_off + 4, 4, 0);
	put(mb2_off + 8, 4, len);
	put(mb2_off + 12, 4, -(0xe85250d6u + len));
}

/* An ELF64 with one tag more than it needs. */
static int load_with_tag(unsigned type, unsigned flags, unsigned nr, const uint32_t *words)
{
	elf_make(true);
	mb2_begin(HDR);
	mb2_tag(type, flags, nr, words);
	mb2_end();
	return load_bytes(image, HDR + 0x1000, "auto");
}

#define WORDS(...)                                                                                 \
	sizeof((uint32_t[]){ __VA_ARGS__ }) / 4, (uint32_t[])                                      \
	{                                                                                          \
		__VA_ARGS__                                                                        \
	}

START_TEST(test_multiboot2_elf32_and_elf64)
{
	ram_init(RAM);
	for (int is64 = 0; is64 < 2; is64++) {
		elf_make(is64);
		mb2_begin(HDR);
		mb2_tag(1, 0, WORDS(1, 3, 4, 6, 14, 15, 21));
		mb2_tag(6, 0, 0, NULL);
		mb2_end();
		ck_assert_msg(!load_bytes(image, HDR + 0x1000, "auto"), "%s", err.msg);
		ck_assert_int_eq(boot.protocol, BOOT_MULTIBOOT2);
		ck_assert_uint_eq(boot.entry, BASE + 0x40);
		ck_assert_uint_eq(boot.mb_flags, 1);
		ck_assert_uint_eq(boot.mb_load_base, BASE);
		ck_assert(ram_is(BASE + 0x800, 0x5a));
	}
	gmem_done(&ram);
}
END_TEST

START_TEST(test_multiboot2_entry_tag_rules_over_the_elf_entry)
{
	ram_init(RAM);
	ck_assert_int_eq(load_with_tag(3, 0, WORDS(BASE + 0x50)), 0);
	ck_assert_uint_eq(boot.entry, BASE + 0x50);
	ck_assert_int_lt(load_with_tag(3, 0, WORDS(BASE + 0x3000)), 0);
	gmem_done(&ram);
}
END_TEST

static int load_flat2(uint32_t header, uint32_t load, uint32_t load_end, uint32_t bss_end)
{
	memset(image, 0, sizeof(image));
	mb2_begin(0x100);
	mb2_tag(2, 0, WORDS(header, load, load_end, bss_end));
	mb2_tag(3, 0, WORDS(BASE + 0x110));
	mb2_end();
	image[0] = 0x11;
	image[0x7ff] = 0x22;
	return load_bytes(image, 0x800, "auto");
}

START_TEST(test_multiboot2_address_tag_places_a_flat_image)
{
	ram_init(RAM);
	ck_assert_msg(!load_flat2(BASE + 0x100, BASE, BASE + 0x800, BASE + 0x1000), "%s", err.msg);
	ck_assert(ram_is(BASE, 0x11) && ram_is(BASE + 0x7ff, 0x22));
	ck_assert_uint_eq(boot.load_end, BASE + 0x1000);
	ck_assert_uint_eq(boot.entry, BASE + 0x110);
	ck_assert_int_eq(load_flat2(BASE + 0x100, 0xffffffff, 0, 0), 0);
	ck_assert_uint_eq(boot.load_start, BASE);
	ck_assert_uint_eq(boot.load_end, BASE + 0x800);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_multiboot2_addresses_that_contradict_are_refused)
{
	ram_init(RAM);
	ck_assert_int_lt(load_flat2(BASE + 0x101, BASE, 0, 0), 0);
	ck_assert_int_lt(load_flat2(BASE - 1, BASE, 0, 0), 0);
	ck_assert_int_lt(load_flat2(0x80, 0xffffffff, 0, 0), 0);
	ck_assert_int_lt(load_flat2(BASE + 0x100, BASE, BASE - 1, 0), 0);
	ck_assert_int_lt(load_flat2(BASE + 0x100, BASE, BASE + 0x801, 0), 0);
	ck_assert_int_lt(load_flat2(BASE + 0x100, BASE, 0, 0xffffffff), 0);
	ck_assert_int_lt(load_flat2(0x100, 0, 0, 0), 0);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_multiboot2_required_tags_not_met_are_refused_and_optional_ones_are_not)
{
	static const struct {
		unsigned type;
		const char *words;
	} t[] = { { 4, "text console" }, { 5, "framebuffer" }, { 99, "tag 99" }, { 1, "type 77" } };

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		uint32_t words[] = { t[i].type == 1 ? 77 : 1, 0, 0 };

		ck_assert_int_lt(load_with_tag(t[i].type, 0, 3, words), 0);
		ck_assert_msg(strstr(err.msg, t[i].words) != NULL, "%s", err.msg);
		ck_assert_msg(!load_with_tag(t[i].type, 1, 3, words), "%s", err.msg);
	}
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row86_multiboot2_tags_that_lie_about_their_length_are_refused)
{
	static const struct {
		unsigned type;
		uint32_t size;
	} t[] = { { 1, 7 }, { 1, 0 }, { 1, 0xffffffff }, { 2, 20 }, { 3, 8 }, { 5, 12 }, { 10, 20 },
		{ 99, 0x1000 } };

	ram_init(RAM);
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		elf_make(true);
		mb2_begin(HDR);
		mb2_tag(t[i].type, 1, 4, (uint32_t[4]){ 0 });
		put(HDR + 16 + 4, 4, t[i].size);
		mb2_end();
		ck_assert_msg(load_bytes(image, HDR + 0x1000, "auto") < 0, "%zu", i);
		ck_assert_ptr_nonnull(strstr(err.msg, "has a tag"));
	}
	elf_make(true);
	put(HDR, 4, 0xe85250d6); /* header_length past the window */
	put(HDR + 8, 4, 32768);
	put(HDR + 12, 4, -(0xe85250d6u + 32768));
	ck_assert_int_lt(load_bytes(image, 0x10000, "auto"), 0);
	put(HDR + 8, 4, 16); /* no end tag */
	put(HDR + 12, 4, -(0xe85250d6u + 16));
	ck_assert_int_lt(load_bytes(image, 0x10000, "auto"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "no end tag"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_multiboot2_relocatable_image_stays_or_moves_as_its_tag_says)
{
	ram_init(RAM);
	ck_assert_int_eq(load_with_tag(10, 0, WORDS(0x100000, 0xffffffff, 0x1000, 1)), 0);
	ck_assert_uint_eq(boot.mb_load_base, BASE);
	ck_assert_int_eq(load_with_tag(10, 0, WORDS(0x300001, 0xffffffff, 0x100000, 1)), 0);
	ck_assert_uint_eq(boot.mb_load_base, 0x400000);
	ck_assert_uint_eq(boot.entry, 0x400040);
	ck_assert(ram_is(0x400800, 0x5a));
	ck_assert_int_eq(load_with_tag(10, 0, WORDS(0x300000, 0x5fffff, 0x1000, 2)), 0);
	ck_assert_uint_eq(boot.mb_load_base, 0x5fd000);
	ck_assert_int_lt(load_with_tag(10, 0, WORDS(0x300000, 0x301000, 0x1000, 0)), 0);
	ck_assert_int_lt(load_with_tag(10, 0, WORDS(0x300000, 0xffffffff, 0x1001, 0)), 0);
	ck_assert_int_lt(load_with_tag(10, 0, WORDS(RAM - 0x1000, 0xffffffff, 1, 0)), 0);
	gmem_done(&ram);
}
END_TEST

static int load_with_modules(const char *const *specs, unsigned nr)
{
	int fd, r;
	struct boot_config cfg = { .modules = specs, .nr_modules = nr };

	elf_make(false);
	mb1(HDR, 1);
	fd = image_fd(image, 0x4000);
	cfg.kernel = fd_path(fd);
	r = load_config(&cfg);
	close(fd);
	return r;
}

START_TEST(test_modules_follow_the_kernel_page_aligned_with_their_arguments)
{
	int a = image_fd("first", 5), b = image_fd("second module", 13);
	char spec[64];
	const char *specs[] = { fd_path(a), spec };

	ram_init(RAM);
	snprintf(spec, sizeof(spec), "%s,x=1 y,,z", fd_path(b));
	ck_assert_msg(!load_with_modules(specs, 2), "%s", err.msg);
	ck_assert_uint_eq(boot.nr_modules, 2);
	ck_assert_uint_eq(boot.module[0].gpa, BASE + 0x3000);
	ck_assert_uint_eq(boot.module[0].len, 5);
	ck_assert_str_eq(boot.module[0].args, "");
	ck_assert_uint_eq(boot.module[1].gpa, BASE + 0x4000);
	ck_assert_str_eq(boot.module[1].args, "x=1 y,,z");
	ck_assert_int_eq(memcmp(gmem_at(&ram, BASE + 0x4000, 13), "second module", 13), 0);
	gmem_done(&ram);
	close(a);
	close(b);
}
END_TEST

START_TEST(test_modules_that_do_not_fit_or_make_no_sense_are_refused)
{
	int fd = memfd_create("module", MFD_CLOEXEC);
	const char *specs[BOOT_MODULES + 1];
	char longargs[400];

	ram_init(RAM);
	ck_assert_int_eq(ftruncate(fd, RAM - BASE - 0x3000), 0);
	for (unsigned i = 0; i <= BOOT_MODULES; i++)
		specs[i] = fd_path(fd);
	ck_assert_msg(!load_with_modules(specs, 1), "%s", err.msg);
	ck_assert_int_lt(load_with_modules(specs, 2), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "give more --mem"));
	ck_assert_int_lt(load_with_modules(specs, BOOT_MODULES + 1), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "32 is the most"));
	specs[0] = ",args";
	ck_assert_int_lt(load_with_modules(specs, 1), 0);
	memset(longargs, 'x', sizeof(longargs));
	longargs[1] = ',';
	longargs[258] = 0;
	specs[0] = longargs;
	ck_assert_int_lt(load_with_modules(specs, 1), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "256 bytes, 255 is the most"));
	gmem_done(&ram);
	close(fd);
}
END_TEST

UNIT_MAIN("loader_multiboot", test_multiboot1_elf32_and_elf64,
	test_multiboot1_addresses_place_a_flat_image,
	test_row86_multiboot1_addresses_that_contradict_are_refused,
	test_multiboot1_header_is_found_only_in_8_kib,
	test_multiboot1_wishes_that_cannot_be_met_are_refused, test_multiboot2_elf32_and_elf64,
	test_multiboot2_entry_tag_rules_over_the_elf_entry,
	test_multiboot2_address_tag_places_a_flat_image,
	test_row86_multiboot2_addresses_that_contradict_are_refused,
	test_multiboot2_required_tags_not_met_are_refused_and_optional_ones_are_not,
	test_row86_multiboot2_tags_that_lie_about_their_length_are_refused,
	test_multiboot2_relocatable_image_stays_or_moves_as_its_tag_says,
	test_modules_follow_the_kernel_page_aligned_with_their_arguments,
	test_modules_that_do_not_fit_or_make_no_sense_are_refused)
