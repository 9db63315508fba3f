/* ACPI tables, MP table, zero page, PVH and Multiboot information, read back as a guest would. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "unit.h"
#include "x86_machine.h"

static uint8_t sum(gpa_t gpa, unsigned len)
{
	const uint8_t *p = gmem_at(&vm.mem, gpa, len);
	uint8_t s = 0;

	ck_assert_ptr_nonnull(p);
	while (len--)
		s += *p++;
	return s;
}

/* ---- ACPI ---- */

static void check_table(gpa_t t, const char *signature)
{
	ck_assert_msg(t >= ACPI_BASE && t < ACPI_END, "%s at %llx", signature, (unsigned long long)t);
	ck_assert_mem_eq(gmem_at(&vm.mem, t, 4), signature, 4);
	ck_assert_msg(sum(t, rd(t + 4, 4)) == 0, "checksum of %s", signature);
}

static void check_tables(void)
{
	gpa_t rsdt, fadt;

	ck_assert_mem_eq(gmem_at(&vm.mem, ACPI_BASE, 8), "RSD PTR ", 8);
	ck_assert(sum(ACPI_BASE, 20) == 0 && sum(ACPI_BASE, 36) == 0);
	rsdt = rd(ACPI_BASE + 16, 4);
	check_table(rsdt, "RSDT");
	check_table(rd(ACPI_BASE + 24, 8), "XSDT");
	ck_assert_uint_eq((rd(rsdt + 4, 4) - 36) / 4, (rd(rd(ACPI_BASE + 24, 8) + 4, 4) - 36) / 8);
	fadt = find_table("FACP");
	check_table(fadt, "FACP");
	check_table(rd(fadt + 40, 4), "DSDT");
	ck_assert_mem_eq(gmem_at(&vm.mem, rd(fadt + 36, 4), 4), "FACS", 4);
	ck_assert_uint_eq(rd(fadt + 36, 4) % 64, 0);
	check_table(find_table("APIC"), "APIC");
}

START_TEST(test_acpi_tables_sum_to_zero)
{
	make(MACHINE_PC, 64 << 20, 4, 0);
	setup();
	check_tables();
	check_table(find_table("MCFG"), "MCFG");
	ck_assert_uint_eq(rd(find_table("MCFG") + 44, 8), PCI_ECAM_BASE);
	done();
	make(MACHINE_MICROVM, 64 << 20, 1, 3);
	setup();
	check_tables();
	ck_assert_uint_eq(find_table("MCFG"), 0);
	done();
}
END_TEST

START_TEST(test_fadt_follows_the_bus)
{
	gpa_t f;

	make(MACHINE_MICROVM, 64 << 20, 1, 0);
	setup();
	f = find_table("FACP");
	ck_assert(rd(f + 56, 4) == PM1_EVT_PORT && rd(f + 64, 4) == PM1_CNT_PORT && rd(f + 46, 2) == IRQ_SCI);
	ck_assert(rd(f + 76, 4) == PM_TMR_PORT && rd(f + 112, 4) >> 8 & 1);
	ck_assert(rd(f + 120, 8) == RESET_PORT && rd(f + 128, 1) == RESET_VALUE);
	ck_assert(!(rd(f + 112, 4) >> 20 & 1) && !(rd(f + 112, 4) >> 4 & 1));
	ck_assert(!(rd(f + 109, 2) >> 1 & 1));
	bus_del(&vm.pio, &ports[2]);
	bus_del(&vm.pio, &ports[3]);
	setup();
	f = find_table("FACP");
	ck_assert(rd(f + 64, 4) == 0 && rd(f + 76, 4) == 0 && !(rd(f + 112, 4) >> 10 & 1));
	done();
}
END_TEST

START_TEST(test_madt_lists_every_cpu)
{
	unsigned lapics = 0, x2apics = 0, at;
	gpa_t t;

	make(MACHINE_MICROVM, 64 << 20, 1000, 0);
	setup();
	t = find_table("APIC");
	check_table(t, "APIC");
	for (at = 44; at < rd(t + 4, 4); at += rd(t + at + 1, 1)) {
		ck_assert_uint_ge(rd(t + at + 1, 1), 6);
		lapics += rd(t + at, 1) == 0;
		x2apics += rd(t + at, 1) == 9;
	}
	ck_assert_uint_eq(at, rd(t + 4, 4));
	ck_assert(lapics == 255 && x2apics == 745);
	done();
}
END_TEST

START_TEST(test_tables_that_do_not_fit_are_refused)
{
	make(MACHINE_MICROVM, 64 << 20, 10000, 0);
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), -ENOSPC);
	ck_assert_msg(strstr(err.msg, "ACPI"), "%s", err.msg);
	done();
}
END_TEST

/* ---- MP table ---- */

START_TEST(test_mptable_sums_to_zero_and_counts)
{
	static const unsigned size[] = { 20, 8, 8, 8, 8 };
	unsigned cpus = 0, n = 0;
	gpa_t fp, t, at;

	make(MACHINE_PC, 64 << 20, 3, 0);
	setup();
	fp = rd(0x40e, 2) << 4;
	ck_assert_uint_eq(fp, EBDA);
	ck_assert_mem_eq(gmem_at(&vm.mem, fp, 4), "_MP_", 4);
	ck_assert_uint_eq(sum(fp, 16), 0);
	t = rd(fp + 4, 4);
	ck_assert_mem_eq(gmem_at(&vm.mem, t, 4), "PCMP", 4);
	ck_assert_uint_eq(sum(t, rd(t + 4, 2)), 0);
	for (at = t + 44; at < t + rd(t + 4, 2); at += size[rd(at, 1)], n++) {
		ck_assert_uint_lt(rd(at, 1), ARRAY_LEN(size));
		cpus += rd(at, 1) == 0;
	}
	ck_assert(at == t + rd(t + 4, 2) && n == rd(t + 34, 2) && cpus == 3);
	done();
}
END_TEST

/* ---- memory map and zero page ---- */

START_TEST(test_memmap_is_sorted_and_inside_ram)
{
	static const uint64_t sizes[] = { 1 << 20, 2 << 20, 3ull << 30, 5ull << 30 };

	for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
		struct memmap_entry m[MEMMAP_MAX];
		uint64_t last = 0, ram = 0;
		unsigned n;

		make(MACHINE_PC, sizes[i], 1, 0);
		n = boot_memmap(&vm, m);
		ck_assert_uint_le(n, MEMMAP_MAX);
		for (unsigned j = 0; j < n; j++) {
			ck_assert(m[j].size && m[j].base >= last);
			last = m[j].base + m[j].size;
			if (m[j].type == MEMMAP_RAM) {
				ck_assert_ptr_nonnull(gmem_at(&vm.mem, m[j].base, m[j].size));
				ram += m[j].size;
			}
		}
		ck_assert_uint_eq(ram, sizes[i] - (0x100000 - EBDA));
		done();
	}
}
END_TEST

START_TEST(test_zero_page_of_a_bare_vmlinux)
{
	gpa_t zp = BOOT_ZERO_PAGE;

	make(MACHINE_PC, 5ull << 30, 1, 0);
	image.initrd = 0x8000000;
	image.initrd_len = 12345;
	setup();
	ck_assert(rd(zp + 0x1fe, 2) == 0xaa55 && rd(zp + 0x202, 4) == 0x53726448);
	ck_assert(rd(zp + 0x210, 1) == 0xff && rd(zp + 0x211, 1) & 1);
	ck_assert(rd(zp + 0x218, 4) == 0x8000000 && rd(zp + 0x21c, 4) == 12345);
	ck_assert_str_eq(gmem_at(&vm.mem, rd(zp + 0x228, 4), 7), "test=1");
	ck_assert_uint_eq(rd(zp + 0x70, 8), ACPI_BASE);
	ck_assert_uint_eq(rd(zp + 0x1e8, 1), 7);
	ck_assert(rd(zp + 0x2d0, 8) == 0 && rd(zp + 0x2d8, 8) == EBDA && rd(zp + 0x2e0, 4) == 1);
	done();
}
END_TEST

START_TEST(test_zero_page_keeps_the_images_header)
{
	gpa_t zp = BOOT_ZERO_PAGE;
	char longer[400];

	make(MACHINE_PC, 64 << 20, 1, 0);
	image.setup_header_len = 0x268 - 0x1f1;
	memcpy(image.setup_header + 0x202 - 0x1f1, "HdrS", 4);
	memcpy(image.setup_header + 0x206 - 0x1f1, "\x0f\x02", 2);
	memcpy(image.setup_header + 0x230 - 0x1f1, "\0\0\x20\0", 4);
	memcpy(image.setup_header + 0x238 - 0x1f1, "\xff\0\0\0", 4);
	setup();
	ck_assert(rd(zp + 0x206, 2) == 0x20f && rd(zp + 0x230, 4) == 0x200000);
	memset(longer, 'a', sizeof(longer));
	longer[256] = 0;
	image.cmdline = longer;
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), -E2BIG);
	longer[255] = 0;
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), 0);
	done();
}
END_TEST

START_TEST(test_row88_command_line_has_a_limit)
{
	char longer[BOOT_CMDLINE_MAX + 1];

	make(MACHINE_PC, 64 << 20, 1, 0);
	memset(longer, 'a', sizeof(longer));
	longer[BOOT_CMDLINE_MAX] = 0;
	image.cmdline = longer;
	image.protocol = BOOT_PVH;
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), -E2BIG);
	longer[BOOT_CMDLINE_MAX - 1] = 0;
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), 0);
	done();
}
END_TEST

START_TEST(test_seed_is_there_and_new_each_time)
{
	uint64_t first;
	gpa_t d;

	make(MACHINE_PC, 64 << 20, 1, 0);
	setup();
	d = rd(BOOT_ZERO_PAGE + 0x250, 8);
	ck_assert(rd(d, 8) == 0 && rd(d + 8, 4) == 9 && rd(d + 12, 4) == 32);
	first = rd(d + 16, 8);
	setup();
	ck_assert_uint_ne(rd(d + 16, 8), first);
	done();
}
END_TEST

/* ---- PVH and Multiboot ---- */

static void add_modules(unsigned n)
{
	image.nr_modules = n;
	for (unsigned i = 0; i < n; i++) {
		struct boot_module *m = &image.module[i];

		m->gpa = 0x200000 + i * 0x1000;
		m->len = 100 + i;
		snprintf(m->args, sizeof(m->args), "arg %u", i);
	}
}

START_TEST(test_pvh_info_with_most_modules)
{
	gpa_t p = BOOT_PVH_INFO, m;

	make(MACHINE_PC, 5ull << 30, 1, 0);
	image.protocol = BOOT_PVH;
	image.initrd = 0x400000;
	image.initrd_len = 77;
	add_modules(BOOT_MODULES);
	setup();
	ck_assert(rd(p, 4) == 0x336ec578 && rd(p + 4, 4) == 1 && rd(p + 12, 4) == BOOT_MODULES + 1);
	m = rd(p + 16, 8);
	ck_assert(rd(m, 8) == 0x400000 && rd(m + 8, 8) == 77);
	ck_assert(rd(m + 32, 8) == 0x200000 && rd(m + 40, 8) == 100);
	ck_assert_str_eq(gmem_at(&vm.mem, rd(m + 32 * 32 + 16, 8), 7), "arg 31");
	ck_assert_str_eq(gmem_at(&vm.mem, rd(p + 24, 8), 7), "test=1");
	ck_assert(rd(p + 32, 8) == ACPI_BASE && rd(p + 48, 4) == 7);
	ck_assert_uint_eq(rd(rd(p + 40, 8) + 8, 8), EBDA);
	done();
}
END_TEST

START_TEST(test_multiboot1_info)
{
	gpa_t p = BOOT_MULTIBOOT, m;
	uint32_t left;

	make(MACHINE_PC, 64 << 20, 1, 0);
	image.protocol = BOOT_MULTIBOOT1;
	add_modules(2);
	setup();
	ck_assert_uint_eq(rd(p, 4), 0x24d);
	ck_assert(rd(p + 4, 4) == 639 && rd(p + 8, 4) == 63 * 1024);
	ck_assert_str_eq(gmem_at(&vm.mem, rd(p + 16, 4), 7), "test=1");
	ck_assert_str_eq(gmem_at(&vm.mem, rd(p + 64, 4), 4), "vmm");
	ck_assert_uint_eq(rd(p + 20, 4), 2);
	m = rd(p + 24, 4) + 16;
	ck_assert(rd(m, 4) == 0x201000 && rd(m + 4, 4) == 0x201000 + 101);
	ck_assert_str_eq(gmem_at(&vm.mem, rd(m + 8, 4), 6), "arg 1");
	left = rd(p + 44, 4);
	for (gpa_t e = rd(p + 48, 4); left; e += rd(e, 4) + 4) {
		ck_assert(rd(e, 4) == 20 && left >= 24);
		left -= 24;
	}
	image.module[0].gpa = 1ull << 32;
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), -EFBIG);
	done();
}
END_TEST

START_TEST(test_multiboot2_tags_walk_to_the_end)
{
	unsigned seen = 0, modules = 0;
	gpa_t p = BOOT_MULTIBOOT, end, t;

	make(MACHINE_PC, 64 << 20, 1, 0);
	image.protocol = BOOT_MULTIBOOT2;
	image.mb_load_base = 0x100000;
	add_modules(BOOT_MODULES);
	setup();
	end = p + rd(p, 4);
	for (t = p + 8; rd(t, 4); t = (t + rd(t + 4, 4) + 7) & ~7ull) {
		ck_assert(t < end && rd(t + 4, 4) >= 8);
		seen |= 1u << rd(t, 4);
		modules += rd(t, 4) == 3;
		if (rd(t, 4) == 21)
			ck_assert_uint_eq(rd(t + 8, 4), 0x100000);
		if (rd(t, 4) == 15)
			ck_assert_mem_eq(gmem_at(&vm.mem, t + 8, 8), "RSD PTR ", 8);
	}
	ck_assert(rd(t + 4, 4) == 8 && t + 8 == end && modules == BOOT_MODULES);
	ck_assert_uint_eq(seen, 1u << 1 | 1u << 2 | 1u << 3 | 1u << 4 | 1u << 6 | 1u << 15 | 1u << 21);
	done();
}
END_TEST

START_TEST(test_row89_one_mebibyte_is_enough_and_less_is_not)
{
	make(MACHINE_PC, 1 << 20, 1, 0);
	image.protocol = BOOT_FLAT32;
	setup();
	check_tables();
	done();
	make(MACHINE_PC, 512 << 10, 1, 0);
	ck_assert_int_eq(arch_boot_setup(&vm, &image, &err), -EINVAL);
	done();
}
END_TEST

UNIT_MAIN("acpi", test_acpi_tables_sum_to_zero, test_fadt_follows_the_bus, test_madt_lists_every_cpu,
	test_tables_that_do_not_fit_are_refused, test_mptable_sums_to_zero_and_counts,
	test_memmap_is_sorted_and_inside_ram, test_zero_page_of_a_bare_vmlinux,
	test_zero_page_keeps_the_images_header, test_row88_command_line_has_a_limit,
	test_seed_is_there_and_new_each_time, test_pvh_info_with_most_modules, test_multiboot1_info,
	test_multiboot2_tags_walk_to_the_end, test_row89_one_mebibyte_is_enough_and_less_is_not)
