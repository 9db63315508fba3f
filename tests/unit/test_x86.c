/* CPU features, first registers, RAM: on tables made by hand. */
#include <check.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include "arch/x86_64/cpu.h"
#include "arch/x86_64/cpuid.h"
#include "arch/x86_64/layout.h"
#include "unit.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

static struct error err;

/* ---- --cpu ---- */

START_TEST(test_cpu_spec_accepts_known_names)
{
	ck_assert_int_eq(arch_cpu_parse("host", &err), 0);
	ck_assert_int_eq(arch_cpu_parse("host,-cx16,-xsave,+avx2", &err), 0);
	ck_assert_int_eq(arch_cpu_parse("-cx16", &err), 0);
}
END_TEST

START_TEST(test_cpu_spec_names_near_matches)
{
	ck_assert_int_eq(arch_cpu_parse("host,-cx61", &err), -EINVAL);
	ck_assert_msg(strstr(err.msg, "'cx61'") && strstr(err.msg, "cx16"), "%s", err.msg);
	ck_assert_int_eq(arch_cpu_parse("host,+zzzzzzzz", &err), -EINVAL);
	ck_assert_msg(strstr(err.msg, "/proc/cpuinfo"), "%s", err.msg);
	ck_assert_int_eq(arch_cpu_parse("qemu64", &err), -EINVAL);
	ck_assert_int_eq(arch_cpu_parse("", &err), -EINVAL);
	ck_assert_int_eq(arch_cpu_parse("host,", &err), 0);
	ck_assert_int_eq(arch_cpu_parse("host,,-cx16", &err), -EINVAL);
	ck_assert_int_eq(arch_cpu_parse("host,-", &err), -EINVAL);
}
END_TEST

START_TEST(test_cpu_spec_survives_long_words)
{
	char word[5000] = "host,+";

	memset(word + 6, 'a', sizeof(word) - 7);
	ck_assert_int_eq(arch_cpu_parse(word, &err), -EINVAL);
}
END_TEST

START_TEST(test_features_stand_behind_what_they_need)
{
	for (const struct cpu_feature *f = cpu_features; f->name; f++) {
		const struct cpu_feature *need;

		ck_assert_ptr_eq(cpu_feature_find(f->name, strlen(f->name)), f);
		if (!f->needs)
			continue;
		need = cpu_feature_find(f->needs, strlen(f->needs));
		ck_assert_msg(need && need < f, "%s", f->name);
	}
}
END_TEST

/* A small host: AMD-like unless changed. */
static struct kvm_cpuid2 *host_table(void)
{
	static const struct kvm_cpuid_entry2 e[] = {
		{ .function = 0, .eax = 0x1f, .ebx = 0x756e6547, .edx = 0x49656e69, .ecx = 0x6c65746e },
		{ .function = 1, .ebx = 0x00020800, .ecx = 1 | 1 << 5 | 1 << 13 | 1 << 26 | 1 << 28 | 1 << 12,
			.edx = 0x078bfbff },
		{ .function = 4, .index = 0, .flags = 1, .eax = 0xfc000121 },
		{ .function = 4, .index = 3, .flags = 1, .eax = 0xfc000163 },
		{ .function = 4, .index = 4, .flags = 1 },
		{ .function = 7, .index = 0, .flags = 1, .ebx = 1 << 5 | 1 << 16 },
		{ .function = 0xb, .index = 0, .flags = 1, .edx = 77 },
		{ .function = 0xd, .index = 0, .flags = 1, .eax = 7 },
		{ .function = 0x40000000, .eax = 0x40000001 },
		{ .function = 0x40000001, .eax = 0x01000009 },
		{ .function = 0x80000001, .ecx = 4 },
		{ .function = 0x80000008, .eax = 0x3030, .ecx = 0x7007 },
		{ .function = 0x8000000a, .eax = 1 },
		{ .function = 0x8000001e, .eax = 9 },
	};
	struct kvm_cpuid2 *t = calloc(1, sizeof(*t) + sizeof(e));

	t->nent = ARRAY_LEN(e);
	memcpy(t->entries, e, sizeof(e));
	return t;
}

static struct kvm_cpuid2 *build_with(const char *spec, unsigned index, unsigned cpus)
{
	auto_free struct kvm_cpuid2 *host = host_table();
	struct cpuid_request rq = { spec, index, cpus, 2500000, true };
	struct kvm_cpuid2 *t = cpuid_build(host, &rq, &err);

	ck_assert_msg(t, "%s", err.msg);
	return t;
}

START_TEST(test_cpuid_topology_is_one_package)
{
	auto_free struct kvm_cpuid2 *t = build_with("host", 5, 6);
	struct kvm_cpuid_entry2 *e;

	e = cpuid_find(t, 1, 0);
	ck_assert_uint_eq(e->ebx, 5u << 24 | 8u << 16 | 0x800);
	ck_assert(e->edx >> 28 & 1);
	e = cpuid_find(t, 4, 0);
	ck_assert_uint_eq(e->eax, 0x121 | 7u << 26);
	e = cpuid_find(t, 4, 3);
	ck_assert_uint_eq(e->eax, 0x163 | 7u << 14 | 7u << 26);
	e = cpuid_find(t, 0xb, 0);
	ck_assert(e->eax == 0 && e->ebx == 1 && e->ecx == 0x100 && e->edx == 5);
	e = cpuid_find(t, 0x1f, 1);
	ck_assert(e->eax == 3 && e->ebx == 6 && e->ecx == 0x201 && e->edx == 5);
	ck_assert_uint_eq(cpuid_find(t, 0xb, 2)->ebx, 0);
	ck_assert_uint_eq(cpuid_find(t, 0x80000008, 0)->ecx, 5 | 3 << 12);
	ck_assert_uint_eq(cpuid_find(t, 0x8000001e, 0)->eax, 5);
}
END_TEST

START_TEST(test_cpuid_single_cpu_has_no_siblings)
{
	auto_free struct kvm_cpuid2 *t = build_with(NULL, 0, 1);

	ck_assert_uint_eq(cpuid_find(t, 1, 0)->ebx, 1u << 16 | 0x800);
	ck_assert(!(cpuid_find(t, 1, 0)->edx >> 28 & 1));
	ck_assert_uint_eq(cpuid_find(t, 0xb, 1)->eax, 0);
}
END_TEST

START_TEST(test_row33_nested_virtualisation_is_hidden)
{
	auto_free struct kvm_cpuid2 *t = build_with("host", 0, 1), *on = build_with("host,+vmx", 0, 1);

	ck_assert(!(cpuid_find(t, 1, 0)->ecx >> 5 & 1));
	ck_assert(!(cpuid_find(t, 0x80000001, 0)->ecx >> 2 & 1));
	ck_assert_ptr_null(cpuid_find(t, 0x8000000a, 0));
	ck_assert(cpuid_find(on, 1, 0)->ecx >> 5 & 1);
}
END_TEST

START_TEST(test_cpuid_mask_takes_dependents_along)
{
	auto_free struct kvm_cpuid2 *t = build_with("host,-xsave,-cx16", 0, 1);
	auto_free struct kvm_cpuid2 *back = build_with("host,-xsave,+xsave", 0, 1);

	ck_assert_uint_eq(cpuid_find(t, 1, 0)->ecx & (1 << 13 | 1 << 26 | 1 << 28 | 1 << 12), 0);
	ck_assert_uint_eq(cpuid_find(t, 7, 0)->ebx, 0);
	ck_assert_ptr_null(cpuid_find(t, 0xd, 0));
	ck_assert_uint_eq(cpuid_find(back, 7, 0)->ebx, 1 << 5 | 1 << 16);
}
END_TEST

START_TEST(test_cpuid_refuses_what_kvm_does_not_offer)
{
	auto_free struct kvm_cpuid2 *host = host_table();
	struct cpuid_request rq = { "host,+la57", 0, 1, 0, false };

	ck_assert_ptr_null(cpuid_build(host, &rq, &err));
	ck_assert_int_eq(err.code, EOPNOTSUPP);
	ck_assert_msg(strstr(err.msg, "'la57'"), "%s", err.msg);
}
END_TEST

START_TEST(test_cpuid_tells_frequencies)
{
	auto_free struct kvm_cpuid2 *t = build_with("host", 0, 1);
	struct kvm_cpuid_entry2 *e = cpuid_find(t, 0x40000010, 0);

	ck_assert_uint_eq(cpuid_find(t, 0x40000000, 0)->eax, 0x40000010);
	ck_assert(e->eax == 2500000 && e->ebx == 1000000);
	e = cpuid_find(t, 0x15, 0);
	ck_assert_uint_eq((uint64_t)e->ecx * e->ebx / e->eax, 2500000000ull);
	ck_assert_uint_eq(cpuid_find(t, 0x16, 0)->eax, 2500);
	ck_assert(cpuid_find(t, 1, 0)->ecx >> 24 & 1 && cpuid_find(t, 1, 0)->ecx >> 31);
}
END_TEST

/* ---- memory ---- */

START_TEST(test_ram_goes_around_the_hole)
{
	struct gmem_region r[2];

	ck_assert_uint_eq(arch_ram_layout(1 << 20, r, 2), 1);
	ck_assert_uint_eq(r[0].size, 1 << 20);
	ck_assert_uint_eq(arch_ram_layout(3ull << 30, r, 2), 1);
	ck_assert_uint_eq(arch_ram_layout((3ull << 30) + 4096, r, 2), 2);
	ck_assert(r[1].base == 1ull << 32 && r[1].size == 4096);
}
END_TEST

/* ---- registers ---- */

START_TEST(test_first_registers_by_protocol)
{
	static const struct {
		enum boot_protocol p;
		uint64_t rax, rbx, rsi;
		bool wide;
	} t[] = { { BOOT_LINUX64, 0, 0, BOOT_ZERO_PAGE, true }, { BOOT_LINUX32, 0, 0, BOOT_ZERO_PAGE, false },
		{ BOOT_PVH, 0, BOOT_PVH_INFO, 0, false },
		{ BOOT_MULTIBOOT1, 0x2badb002, BOOT_MULTIBOOT, 0, false },
		{ BOOT_MULTIBOOT2, 0x36d76289, BOOT_MULTIBOOT, 0, false },
		{ BOOT_FLAT32, 0, BOOT_PVH_INFO, 0, false }, { BOOT_FLAT64, 0, BOOT_PVH_INFO, 0, true } };

	for (size_t i = 0; i < ARRAY_LEN(t); i++) {
		struct boot_image b = { .protocol = t[i].p, .entry = 0x123456 };
		struct kvm_regs r = { 0 };
		struct kvm_sregs s = { 0 };

		ck_assert_int_eq(cpu_first_registers(&b, &r, &s, &err), 0);
		ck_assert(r.rip == 0x123456 && r.rax == t[i].rax && r.rbx == t[i].rbx);
		ck_assert(r.rsi == t[i].rsi && r.rflags == 2);
		ck_assert(s.cs.l == t[i].wide && s.cs.db == !t[i].wide && !(s.efer >> 10) == !t[i].wide);
		ck_assert(!!(s.cr0 & CR0_PG) == t[i].wide);
	}
}
END_TEST

START_TEST(test_first_registers_of_a_boot_sector)
{
	struct boot_image b = { .protocol = BOOT_FLAT16, .entry = 0x7c05 };
	struct kvm_regs r;
	struct kvm_sregs s = { 0 };

	ck_assert_int_eq(cpu_first_registers(&b, &r, &s, &err), 0);
	ck_assert(s.cs.selector == 0x7c0 && s.cs.base == 0x7c00 && r.rip == 5);
	b.entry = 0x100000;
	ck_assert_int_eq(cpu_first_registers(&b, &r, &s, &err), -EINVAL);
	b = (struct boot_image){ .protocol = BOOT_FLAT64, .entry = 1ull << 32 };
	ck_assert_int_eq(cpu_first_registers(&b, &r, &s, &err), -EINVAL);
}
END_TEST

UNIT_MAIN("x86", test_cpu_spec_accepts_known_names, test_cpu_spec_names_near_matches,
	test_cpu_spec_survives_long_words, test_features_stand_behind_what_they_need,
	test_cpuid_topology_is_one_package, test_cpuid_single_cpu_has_no_siblings,
	test_row33_nested_virtualisation_is_hidden, test_cpuid_mask_takes_dependents_along,
	test_cpuid_refuses_what_kvm_does_not_offer, test_cpuid_tells_frequencies,
	test_ram_goes_around_the_hole, test_first_registers_by_protocol,
	test_first_registers_of_a_boot_sector)
