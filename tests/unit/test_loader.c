/* The loader's door: which files it takes, which entry it chooses, initrds, flat binaries, loading
 * again. */
#include <errno.h>
#include <sys/stat.h>
#include "images.h"
#include "unit.h"
#include "vmm/cleanup.h"

#define RAM (64ull << 20)

static int load_flat(size_t len, const char *entry, uint64_t address, bool has_address)
{
	int fd = image_fd(image, len), r;
	struct boot_config cfg = { .kernel = fd_path(fd),
		.entry = entry_index(entry),
		.load_address = address,
		.has_load_address = has_address };

	r = load_config(&cfg);
	close(fd);
	return r;
}

START_TEST(test_what_is_no_kernel_is_named_with_the_fix)
{
	static const struct {
		unsigned off;
		const char *bytes, *what, *fix;
	} t[] = { { 0x8001, "CD001", "an ISO image", "--disk" },
		{ 0, "QFI\xfb", "a qcow2 image", "--disk" },
		{ 0x40, "\x7f\x10\xda\xbe", "a VDI image", "--disk" },
		{ 0, "#!/bin/sh\n", "a script", "kernel" },
		{ 0, "070701", "a cpio archive", "--initrd" },
		{ 0, "MZ", "a PE program without", ".linux" },
		{ 0, "!<arch>\ndebian", "Debian package", "dpkg -x" },
		{ 0x438, "\x53\xef", "file system", "--disk" },
		{ 0, "BZh91AY", "a bzip2 file", "bunzip2" },
		{ 0x1fe, "\x55\xaa", "boot sector", "flat16" },
		{ 0x38, "ARM\x64", "kernel for aarch64", "x86" },
		{ 0, "\1\2", "unknown data", "--load-address" },
		{ 0, "GIF89a", "unknown data", "flat32" } };

	ram_init(RAM);
	for (size_t i = 0; i < ARRAY_LEN(t); i++) {
		memset(image, 0, 0x9000);
		memcpy(image + t[i].off, t[i].bytes, strlen(t[i].bytes));
		ck_assert_int_eq(load_bytes(image, 0x9000, "auto"), -ENOEXEC);
		ck_assert_msg(
			strstr(err.msg, t[i].what) && strstr(err.msg, t[i].fix), "%s", err.msg);
		ck_assert_ptr_nonnull(strstr(err.msg, "accepted are"));
		ck_assert_ptr_null(strchr(err.msg, '\n'));
		ck_assert_uint_lt(strlen(err.msg), sizeof(err.msg) - 1);
	}
	memset(image, 'a', 64);
	ck_assert_int_eq(load_bytes(image, 64, "auto"), -ENOEXEC);
	ck_assert_ptr_nonnull(strstr(err.msg, "a text file"));
	gmem_done(&ram);
}
END_TEST

/* gzip of "#!/bin/sh\n", as gzip -n writes it. */
START_TEST(test_compressed_file_holding_no_kernel_is_named)
{
	static const uint8_t script[] = { 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x53, 0x56, 0xd4,
		0x4f, 0xca, 0xcc, 0xd3, 0x2f, 0xce, 0xe0, 2, 0, 0x1d, 0x9d, 0xfb, 4, 10, 0, 0, 0 };

	ram_init(RAM);
	ck_assert_int_lt(load_bytes(script, sizeof(script), "auto"), 0);
	ck_assert_msg(strstr(err.msg, "found a gzip file holding a script") != NULL, "%s", err.msg);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_entry_of_another_format_is_refused_with_the_words_that_fit)
{
	ram_init(RAM);
	elf64_make(0x200000, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, 0x200000, 0x100, 0x100);
	ck_assert_int_lt(load_bytes(image, 0x2000, "bzimage"), 0);
	ck_assert_msg(
		strstr(err.msg,
			"found an x86 ELF, which has no 'bzimage' entry: --kernel-entry can be "
			"auto, pvh, linux64"),
		"%s", err.msg);
	ck_assert_int_lt(load_bytes(image, 0x2000, "multiboot"), 0);
	ck_assert_int_lt(load_bytes(image, 0x2000, "pvh"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "without a PVH note"));
	ck_assert_int_lt(load_bytes("junk", 4, "linux64"), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "accepted are"));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_kernel_must_be_a_regular_file_with_something_in_it)
{
	char dir[] = "/tmp/loader-XXXXXX", fifo[64];
	struct boot_config cfg = { 0 };
	int fd = image_fd("", 0);

	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(fifo, sizeof(fifo), "%s/fifo", dir);
	ck_assert_int_eq(mkfifo(fifo, 0600), 0);
	ck_assert_int_eq(load_config(&cfg), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "add --kernel"));
	cfg.kernel = fifo;
	ck_assert_int_eq(load_config(&cfg), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "is a pipe"));
	cfg.kernel = dir;
	ck_assert_int_eq(load_config(&cfg), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "is a directory"));
	cfg.kernel = "/dev/zero";
	ck_assert_int_eq(load_config(&cfg), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "is a device"));
	cfg.kernel = "/nonexistent/vmlinuz";
	ck_assert_int_eq(load_config(&cfg), -ENOENT);
	cfg.kernel = fd_path(fd);
	ck_assert_int_eq(load_config(&cfg), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "is empty (0 bytes)"));
	unlink(fifo);
	rmdir(dir);
	close(fd);
}
END_TEST

START_TEST(test_flat_binary_goes_where_and_runs_as_asked)
{
	static const struct {
		const char *entry;
		uint64_t address;
		bool has;
		uint64_t at;
		enum boot_protocol protocol;
	} t[] = { { "flat16", 0, false, 0x7c00, BOOT_FLAT16 },
		{ "flat32", 0, false, 0x100000, BOOT_FLAT32 },
		{ "flat64", 0, false, 0x100000, BOOT_FLAT64 },
		{ "flat16", 0x600, true, 0x600, BOOT_FLAT16 },
		{ "flat32", 0x30000, true, 0x30000, BOOT_FLAT32 },
		{ "auto", 0x8000, true, 0x8000, BOOT_FLAT16 },
		{ "auto", 0x200000, true, 0x200000, BOOT_FLAT32 } };

	for (size_t i = 0; i < ARRAY_LEN(t); i++) {
		ram_init(RAM);
		memset(image, 0xf4, 0x1000);
		ck_assert_msg(
			!load_flat(0x1000, t[i].entry, t[i].address, t[i].has), "%s", err.msg);
		ck_assert_int_eq(boot.protocol, t[i].protocol);
		ck_assert_uint_eq(boot.entry, t[i].at);
		ck_assert(ram_is(t[i].at, 0xf4) && ram_is(t[i].at + 0xfff, 0xf4) &&
			  ram_is(t[i].at + 0x1000, 0));
		gmem_done(&ram);
	}
}
END_TEST

/* What it is is the user's word: bytes that look like something else are loaded as they are. */
START_TEST(test_flat_entry_takes_any_content)
{
	ram_init(RAM);
	memcpy(image, "\x1f\x8b\x08", 3);
	ck_assert_msg(!load_flat(3, "flat64", 0, false), "%s", err.msg);
	ck_assert(ram_is(0x100000, 0x1f));
	gmem_done(&ram);
}
END_TEST

START_TEST(test_flat_binary_outside_ram_or_over_boot_structures_is_refused)
{
	static const struct {
		const char *entry;
		uint64_t address;
	} t[] = { { "flat16", 0x5ff }, { "flat16", 0x9f000 }, { "flat16", 0x100000 },
		{ "flat16", UINT64_MAX }, { "flat32", 0x2ffff }, { "flat32", 0x9f000 },
		{ "flat32", RAM - 0xfff }, { "flat32", 1ull << 32 }, { "flat64", UINT64_MAX },
		{ "flat64", RAM } };

	ram_init(RAM);
	memset(image, 0xf4, 0x1000);
	for (size_t i = 0; i < ARRAY_LEN(t); i++)
		ck_assert_msg(load_flat(0x1000, t[i].entry, t[i].address, true) < 0, "%zu", i);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_load_address_for_a_kernel_that_knows_its_own_is_refused)
{
	ram_init(RAM);
	elf64_make(0x200000, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, 0x200000, 0x100, 0x100);
	ck_assert_int_lt(load_flat(0x2000, "auto", 0x300000, true), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "leave --load-address out"));
	ck_assert_msg(!load_flat(0x2000, "flat64", 0x300000, true), "%s", err.msg);
	gmem_done(&ram);
}
END_TEST

/* A vmlinux of one page at 2 MiB, with what cfg adds. */
static int load_linux(struct boot_config *cfg)
{
	int fd, r;

	elf64_make(0x200000, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, 0x200000, 0x100, 0x1000);
	fd = image_fd(image, 0x2000);
	cfg->kernel = fd_path(fd);
	r = load_config(cfg);
	close(fd);
	return r;
}

START_TEST(test_initrds_are_concatenated_at_multiples_of_four_at_the_end_of_ram)
{
	int a = image_fd("abcde", 5), b = image_fd("XYZ", 3);
	const char *paths[] = { fd_path(a), fd_path(b) };
	struct boot_config cfg = { .initrds = paths, .nr_initrds = 2 };

	ram_init(RAM);
	ck_assert_msg(!load_linux(&cfg), "%s", err.msg);
	ck_assert_uint_eq(boot.initrd, RAM - 4096);
	ck_assert_uint_eq(boot.initrd_len, 11);
	ck_assert_int_eq(memcmp(gmem_at(&ram, boot.initrd, 11), "abcde\0\0\0XYZ", 11), 0);
	gmem_done(&ram);
	close(a);
	close(b);
}
END_TEST

START_TEST(test_row87_initrd_stays_below_the_kernels_limit)
{
	static const struct gmem_region l[] = { { .base = 0, .size = 3ull << 30 },
		{ .base = 4ull << 30, .size = 1ull << 30 } };
	int a = image_fd("abcde", 5);
	const char *paths[] = { fd_path(a) };
	struct boot_config cfg = { .initrds = paths, .nr_initrds = 1 };

	ck_assert_int_eq(gmem_init(&ram, l, 2, false, &err), 0);
	ck_assert_msg(!load_linux(&cfg), "%s", err.msg);
	ck_assert_uint_eq(boot.initrd, 0x7ffff000);
	gmem_done(&ram);
	close(a);
}
END_TEST

START_TEST(test_row87_initrd_that_does_not_fit_is_refused_with_both_sizes)
{
	int fd = memfd_create("initrd", MFD_CLOEXEC), empty = image_fd("", 0);
	const char *paths[] = { fd_path(fd), fd_path(fd) };
	struct boot_config cfg = { .initrds = paths, .nr_initrds = 1 };

	ram_init(RAM);
	ck_assert_int_eq(ftruncate(fd, RAM - 0x201000), 0);
	ck_assert_msg(!load_linux(&cfg), "%s", err.msg);
	ck_assert_uint_eq(boot.initrd, 0x201000);
	ck_assert_int_eq(ftruncate(fd, RAM - 0x200fff), 0);
	ck_assert_int_lt(load_linux(&cfg), 0);
	ck_assert_msg(strstr(err.msg, "63485 KiB") && strstr(err.msg, "64 MiB"), "%s", err.msg);
	ck_assert_int_eq(ftruncate(fd, 5ll << 30), 0);
	ck_assert_int_lt(load_linux(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "5120 MiB"));
	cfg.nr_initrds = 2;
	ck_assert_int_eq(ftruncate(fd, 0x80000000), 0);
	ck_assert_int_lt(load_linux(&cfg), 0);
	paths[1] = fd_path(empty);
	ck_assert_int_lt(load_linux(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "is empty (0 bytes)"));
	gmem_done(&ram);
	close(fd);
	close(empty);
}
END_TEST

START_TEST(test_extras_a_protocol_has_no_use_for_are_refused)
{
	int fd = image_fd("abc", 3), flat = image_fd("\xf4", 1);
	const char *paths[] = { fd_path(fd) };
	struct boot_config cfg = { .modules = paths, .nr_modules = 1 };

	ram_init(RAM);
	ck_assert_int_lt(load_linux(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "takes no --module: use --initrd"));
	cfg = (struct boot_config){ .initrds = paths,
		.nr_initrds = 1,
		.kernel = fd_path(flat),
		.entry = entry_index("flat16") };
	ck_assert_int_lt(load_config(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "takes no --initrd"));
	gmem_done(&ram);
	close(fd);
	close(flat);
}
END_TEST

START_TEST(test_row88_cmdline_too_long_or_broken_is_refused)
{
	static char line[BOOT_CMDLINE_MAX + 1];
	struct boot_config cfg = { .cmdline = line };

	ram_init(RAM);
	memset(line, 'x', 2047);
	ck_assert_msg(!load_linux(&cfg), "%s", err.msg);
	line[2047] = 'x';
	ck_assert_int_lt(load_linux(&cfg), 0);
	memset(line, 'x', BOOT_CMDLINE_MAX);
	ck_assert_int_eq(load_linux(&cfg), -E2BIG);
	ck_assert_ptr_nonnull(strstr(err.msg, "has 4096 bytes"));
	memcpy(line, "a\nb", 4);
	ck_assert_int_lt(load_linux(&cfg), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "line break"));
	gmem_done(&ram);
}
END_TEST

/* Machine reset: RAM is cleared and everything placed again, with the paths gone. */
START_TEST(test_load_again_after_clear_places_the_same_without_opening_anything)
{
	char kernel[] = "/tmp/loader-XXXXXX", initrd[] = "/tmp/loader-XXXXXX";
	int k = mkstemp(kernel), i = mkstemp(initrd);
	const char *paths[] = { initrd };
	struct boot_config cfg = {
		.kernel = kernel, .initrds = paths, .nr_initrds = 1, .cmdline = "quiet"
	};
	struct boot_image first;
	struct loader *ld;
	uint64_t size;

	elf64_make(0x200000, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, 0x200000, 0x100, 0x1000);
	image[0x1000] = 0x5a;
	ck_assert_int_eq(write(k, image, 0x2000), 0x2000);
	ck_assert_int_eq(write(i, "abcde", 5), 5);
	ram_init(RAM);
	ck_assert_msg(!loader_open(&ld, &cfg, &err), "%s", err.msg);
	unlink(kernel);
	unlink(initrd);
	close(k);
	close(i);
	ck_assert_msg(!loader_load(ld, &ram, &first, &err), "%s", err.msg);
	ck_assert_int_eq(gmem_clear(&ram, &err), 0);
	ck_assert_msg(!loader_load(ld, &ram, &boot, &err), "%s", err.msg);
	ck_assert(ram_is(0x200000, 0x5a) && ram_is(boot.initrd, 'a'));
	ck_assert_uint_eq(boot.entry, first.entry);
	ck_assert_uint_eq(boot.initrd, first.initrd);
	ck_assert_str_eq(boot.cmdline, "quiet");
	ck_assert_int_ge(loader_kernel_fd(ld, &size), 0);
	ck_assert_uint_eq(size, 0x2000);
	loader_free(ld);
	loader_free(NULL);
	gmem_done(&ram);
}
END_TEST

START_TEST(test_row82_file_that_shrank_since_it_was_opened_is_refused)
{
	int fd, ird = image_fd("abcde", 5);
	const char *paths[] = { fd_path(ird) };
	struct boot_config cfg = { .initrds = paths, .nr_initrds = 1 };
	struct loader *ld;

	ram_init(RAM);
	elf64_make(0x200000, 1);
	elf64_phdr(0, PT_LOAD, 0x1000, 0x200000, 0x20000, 0x20000);
	fd = image_fd(image, 0x21000);
	cfg.kernel = fd_path(fd);
	ck_assert_msg(!loader_open(&ld, &cfg, &err), "%s", err.msg);
	ck_assert_int_eq(ftruncate(ird, 4), 0);
	ck_assert_int_eq(loader_load(ld, &ram, &boot, &err), -ENODATA);
	ck_assert_ptr_nonnull(strstr(err.msg, "became shorter"));
	ck_assert_int_eq(ftruncate(fd, 0x20fff), 0);
	ck_assert_int_eq(loader_load(ld, &ram, &boot, &err), -ENODATA);
	ck_assert_int_eq(ftruncate(fd, 0), 0);
	ck_assert_int_eq(loader_load(ld, &ram, &boot, &err), -ENODATA);
	loader_free(ld);
	gmem_done(&ram);
	close(fd);
	close(ird);
}
END_TEST

UNIT_MAIN("loader", test_what_is_no_kernel_is_named_with_the_fix,
	test_compressed_file_holding_no_kernel_is_named,
	test_entry_of_another_format_is_refused_with_the_words_that_fit,
	test_kernel_must_be_a_regular_file_with_something_in_it,
	test_flat_binary_goes_where_and_runs_as_asked, test_flat_entry_takes_any_content,
	test_flat_binary_outside_ram_or_over_boot_structures_is_refused,
	test_load_address_for_a_kernel_that_knows_its_own_is_refused,
	test_initrds_are_concatenated_at_multiples_of_four_at_the_end_of_ram,
	test_row87_initrd_stays_below_the_kernels_limit,
	test_row87_initrd_that_does_not_fit_is_refused_with_both_sizes,
	test_extras_a_protocol_has_no_use_for_are_refused,
	test_row88_cmdline_too_long_or_broken_is_refused,
	test_load_again_after_clear_places_the_same_without_opening_anything,
	test_row82_file_that_shrank_since_it_was_opened_is_refused)
