/*
 * PVH start info (Xen public/arch-x86/hvm/start_info.h, version 1) and Multiboot information (Multiboot
 * 0.6.96, 3.3; Multiboot 2.0, 3.6).
 */
#include <errno.h>
#include <string.h>
#include "boot.h"
#include "layout.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/vm.h"

#define LOADER_NAME "vmm"
#define INFO_END    BOOT_CMDLINE

#define PVH_MAGIC   0x336ec578u

struct pvh_start_info {
	uint32_t magic, version, flags, nr_modules;
	uint64_t modules, cmdline, rsdp, memmap;
	uint32_t nr_memmap, reserved;
} __attribute__((packed));

struct pvh_module {
	uint64_t gpa, len, cmdline, reserved;
} __attribute__((packed));

struct pvh_memmap {
	uint64_t base, size;
	uint32_t type, reserved;
} __attribute__((packed));

static unsigned nr_modules(const struct boot_image *b)
{
	return MIN(b->nr_modules, (unsigned)BOOT_MODULES);
}

/* The initrd is the first module, as Linux wants it. */
static unsigned pvh_modules(struct area *strings, const struct boot_image *b, struct pvh_module *m)
{
	unsigned n = 0;

	if (b->initrd_len)
		m[n++] = (struct pvh_module){ .gpa = b->initrd, .len = b->initrd_len };
	for (unsigned i = 0; i < nr_modules(b); i++) {
		const struct boot_module *s = &b->module[i];

		m[n++] = (struct pvh_module){ .gpa = s->gpa, .len = s->len,
			.cmdline = *s->args ? area_put_string(strings, s->args) : 0 };
	}
	return n;
}

int boot_pvh_info(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err)
{
	struct area a = { .mem = &vm->mem, .at = BOOT_PVH_INFO, .end = BOOT_ZERO_PAGE,
		.what = "PVH start info", .err = err };
	struct area strings = { .mem = &vm->mem, .at = BOOT_MULTIBOOT, .end = INFO_END,
		.what = "arguments of the modules", .err = err };
	struct pvh_start_info info = { .magic = PVH_MAGIC, .version = 1, .cmdline = BOOT_CMDLINE,
		.rsdp = rsdp };
	struct pvh_module m[BOOT_MODULES + 1];
	struct memmap_entry map[MEMMAP_MAX];
	gpa_t at = area_put(&a, NULL, sizeof(info), 8);

	info.nr_modules = pvh_modules(&strings, b, m);
	if (info.nr_modules)
		info.modules = area_put(&a, m, info.nr_modules * sizeof(m[0]), 8);
	info.nr_memmap = boot_memmap(vm, map);
	for (unsigned i = 0; i < info.nr_memmap; i++) {
		struct pvh_memmap e = { map[i].base, map[i].size, map[i].type, 0 };
		gpa_t placed = area_put(&a, &e, sizeof(e), 8);

		if (i == 0)
			info.memmap = placed;
	}
	if (area_result(&a) || area_result(&strings))
		return area_result(&a) ? area_result(&a) : area_result(&strings);
	return gmem_write(&vm->mem, at, &info, sizeof(info));
}

/* Multiboot has 32 bits for the address of a module. */
static int check_modules(const struct boot_image *b, struct error *err)
{
	for (unsigned i = 0; i < nr_modules(b); i++) {
		const struct boot_module *m = &b->module[i];

		if (m->gpa >= HIGH_RAM_BASE || m->len > HIGH_RAM_BASE - m->gpa - 1)
			return error_set(err, EFBIG, "module %u does not end below 4 GiB, as Multiboot needs it",
				i + 1);
	}
	return 0;
}

/* Kilobytes below 640 KiB, and from 1 MiB to the first hole. */
#define MEM_LOWER_K (EBDA >> 10)
static uint32_t mem_upper_k(const struct vm *vm)
{
	return (vm->mem.region[0].size - 0x100000) >> 10;
}

enum { MB1_MEMORY = 1 << 0, MB1_CMDLINE = 1 << 2, MB1_MODULES = 1 << 3, MB1_MMAP = 1 << 6, MB1_LOADER = 1 << 9 };

struct mb1_info {
	uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
	uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, loader_name;
	uint32_t apm_table, vbe[4], framebuffer[7];
} __attribute__((packed));

struct mb1_module {
	uint32_t start, end, string, reserved;
} __attribute__((packed));

struct mb1_mmap {
	uint32_t size;                  /* of what follows */
	uint64_t base, len;
	uint32_t type;
} __attribute__((packed));

static void mb1_modules(struct area *a, const struct boot_image *b, struct mb1_info *info)
{
	struct mb1_module m[BOOT_MODULES];

	for (unsigned i = 0; i < nr_modules(b); i++) {
		const struct boot_module *s = &b->module[i];

		m[i] = (struct mb1_module){ .start = s->gpa, .end = s->gpa + s->len,
			.string = area_put_string(a, s->args) };
	}
	info->mods_count = nr_modules(b);
	info->mods_addr = area_put(a, m, nr_modules(b) * sizeof(m[0]), 4);
}

int boot_multiboot1_info(struct vm *vm, const struct boot_image *b, struct error *err)
{
	struct area a = { .mem = &vm->mem, .at = BOOT_MULTIBOOT, .end = INFO_END,
		.what = "Multiboot information", .err = err };
	struct mb1_info info = { .flags = MB1_MEMORY | MB1_CMDLINE | MB1_MODULES | MB1_MMAP | MB1_LOADER,
		.mem_lower = MEM_LOWER_K, .mem_upper = mem_upper_k(vm), .cmdline = BOOT_CMDLINE };
	struct memmap_entry map[MEMMAP_MAX];
	unsigned n = boot_memmap(vm, map);
	gpa_t at = area_put(&a, NULL, sizeof(info), 8);

	info.loader_name = area_put_string(&a, LOADER_NAME);
	mb1_modules(&a, b, &info);
	for (unsigned i = 0; i < n; i++) {
		struct mb1_mmap e = { sizeof(e) - 4, map[i].base, map[i].size, map[i].type };
		gpa_t placed = area_put(&a, &e, sizeof(e), 4);

		if (i == 0)
			info.mmap_addr = placed;
	}
	info.mmap_length = n * sizeof(struct mb1_mmap);
	if (area_result(&a) || check_modules(b, err))
		return -err->code;
	return gmem_write(&vm->mem, at, &info, sizeof(info));
}

enum {
	MB2_END = 0,
	MB2_CMDLINE = 1,
	MB2_LOADER = 2,
	MB2_MODULE = 3,
	MB2_MEMORY = 4,
	MB2_MMAP = 6,
	MB2_ACPI_NEW = 15,
	MB2_LOAD_BASE = 21,
};

struct mb2_tag {
	uint32_t type, size;
} __attribute__((packed));

/* A tag whose body is two parts, either may be empty. Tags start at multiples of 8. */
static void mb2_put(struct area *a, uint32_t type, const void *one, uint32_t len1, const void *two,
	uint32_t len2)
{
	struct mb2_tag t = { type, sizeof(t) + len1 + len2 };

	area_put(a, &t, sizeof(t), 8);
	if (len1)
		area_put(a, one, len1, 1);
	if (len2)
		area_put(a, two, len2, 1);
}

static void mb2_put_string(struct area *a, uint32_t type, const char *s)
{
	mb2_put(a, type, s, strlen(s) + 1, NULL, 0);
}

static void mb2_modules(struct area *a, const struct boot_image *b)
{
	for (unsigned i = 0; i < nr_modules(b); i++) {
		const struct boot_module *s = &b->module[i];
		uint32_t place[2] = { s->gpa, s->gpa + s->len };

		mb2_put(a, MB2_MODULE, place, sizeof(place), s->args, strlen(s->args) + 1);
	}
}

static void mb2_memory(struct area *a, const struct vm *vm)
{
	struct memmap_entry map[MEMMAP_MAX];
	struct pvh_memmap e[MEMMAP_MAX];        /* the same 24 bytes */
	const uint32_t form[2] = { sizeof(e[0]), 0 };
	unsigned n = boot_memmap(vm, map);
	const uint32_t basic[2] = { MEM_LOWER_K, mem_upper_k(vm) };

	mb2_put(a, MB2_MEMORY, basic, sizeof(basic), NULL, 0);
	for (unsigned i = 0; i < n; i++)
		e[i] = (struct pvh_memmap){ map[i].base, map[i].size, map[i].type, 0 };
	mb2_put(a, MB2_MMAP, form, sizeof(form), e, n * sizeof(e[0]));
}

int boot_multiboot2_info(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err)
{
	struct area a = { .mem = &vm->mem, .at = BOOT_MULTIBOOT, .end = INFO_END,
		.what = "Multiboot information", .err = err };
	uint32_t base = b->mb_load_base, head[2] = { 0 };
	gpa_t at = area_put(&a, head, sizeof(head), 8);
	uint8_t rsdp_copy[36];

	if (gmem_read(&vm->mem, rsdp, rsdp_copy, sizeof(rsdp_copy)))
		return error_set(err, EFAULT, "the ACPI tables are not in guest memory");
	mb2_put_string(&a, MB2_CMDLINE, b->cmdline);
	mb2_put_string(&a, MB2_LOADER, LOADER_NAME);
	mb2_modules(&a, b);
	mb2_memory(&a, vm);
	mb2_put(&a, MB2_ACPI_NEW, rsdp_copy, sizeof(rsdp_copy), NULL, 0);
	mb2_put(&a, MB2_LOAD_BASE, &base, sizeof(base), NULL, 0);
	mb2_put(&a, MB2_END, NULL, 0, NULL, 0);
	if (area_result(&a) || check_modules(b, err))
		return -err->code;
	head[0] = a.at - at;
	return gmem_write(&vm->mem, at, head, sizeof(head));
}
