/*
 * What a kernel finds in memory when it starts: descriptor and page tables, memory map, command line, the
 * zero page of Linux (Documentation/arch/x86/boot.rst, zero-page.rst), and by its protocol PVH or Multiboot
 * information (bootinfo.c), ACPI (acpi.c) and MP tables (mptable.c). Places are those of layout.h.
 */
#include "boot.h"
#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include "layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

gpa_t area_put(struct area *a, const void *data, uint64_t len, unsigned align)
{
	gpa_t at = (a->at + align - 1) / align * align;
	uint8_t *host;

	if (a->failed)
		return 0;
	host = at <= a->end && len <= a->end - at ? gmem_at(a->mem, at, len) : NULL;
	if (!host) {
		a->failed = true;
		error_set(a->err, ENOSPC, "no room for the %s between 0x%llx and 0x%llx", a->what,
			(unsigned long long)a->at, (unsigned long long)a->end);
		return 0;
	}
	if (data)
		memcpy(host, data, len);
	else
		memset(host, 0, len);
	a->at = at + len;
	return at;
}

gpa_t area_put_string(struct area *a, const char *s)
{
	return area_put(a, s, strlen(s) + 1, 1);
}

int area_result(const struct area *a)
{
	return a->failed ? -ENOSPC : 0;
}

static void add_entry(struct memmap_entry *map, unsigned *n, uint64_t base, uint64_t end, uint32_t type)
{
	if (base < end)
		map[(*n)++] = (struct memmap_entry){ base, end - base, type };
}

unsigned boot_memmap(const struct vm *vm, struct memmap_entry *map)
{
	unsigned n = 0;

	for (unsigned i = 0; i < vm->mem.nr; i++) {
		uint64_t base = vm->mem.region[i].base, end = base + vm->mem.region[i].size;

		if (base == 0) {
			add_entry(map, &n, 0, MIN(end, EBDA), MEMMAP_RAM);
			add_entry(map, &n, EBDA, 0xa0000, MEMMAP_RESERVED);
			add_entry(map, &n, ACPI_BASE, ACPI_END, MEMMAP_RESERVED);
			add_entry(map, &n, ACPI_END, end, MEMMAP_RAM);
			if (vm->cfg->machine == MACHINE_PC)
				add_entry(map, &n, PCI_ECAM_BASE, PCI_ECAM_BASE + 0x100000,
					MEMMAP_RESERVED);
			add_entry(map, &n, KVM_IDENTITY_MAP, KVM_TSS_BASE + 0x3000, MEMMAP_RESERVED);
		} else {
			add_entry(map, &n, base, end, MEMMAP_RAM);
		}
	}
	return n;
}

bool boot_has_port(struct vm *vm, uint16_t port)
{
	bool found = false;

	pthread_rwlock_rdlock(&vm->pio.lock);
	for (unsigned i = 0; i < vm->pio.nr; i++) {
		const struct bus_region *r = vm->pio.region[i];

		found = found || (port >= r->base && port - r->base < r->size);
	}
	pthread_rwlock_unlock(&vm->pio.lock);
	return found;
}

/* The descriptors that entry.c has the segment registers hold: code at 0x10, data 0x18, task 0x20. */
static int put_gdt(const struct gmem *mem, bool wide)
{
	const uint64_t gdt[] = { 0, 0, wide ? 0x00af9b000000ffffull : 0x00cf9b000000ffffull,
		0x00cf93000000ffffull, 0x00008b0000000067ull };

	return gmem_write(mem, BOOT_GDT, gdt, sizeof(gdt));
}

/* The first 4 GiB at their own addresses, in pages of 2 MiB: every long-mode CPU has those. */
static int put_page_tables(const struct gmem *mem)
{
	uint64_t *t = gmem_at(mem, BOOT_PAGE_TABLES, 6 * 0x1000);

	if (!t)
		return -EFAULT;
	memset(t, 0, 6 * 0x1000);
	t[0] = (BOOT_PAGE_TABLES + 0x1000) | 3;
	for (unsigned i = 0; i < 4; i++)
		t[512 + i] = (BOOT_PAGE_TABLES + (2 + i) * 0x1000) | 3;
	for (uint64_t i = 0; i < 4 * 512; i++)
		t[2 * 512 + i] = i << 21 | 0x83;
	return 0;
}

static int put_cmdline(const struct gmem *mem, const struct boot_image *b, struct error *err)
{
	size_t len = strlen(b->cmdline);

	if (len >= BOOT_CMDLINE_MAX)
		return error_set(err, E2BIG, "the kernel command line has %zu bytes: at most %d fit", len,
			BOOT_CMDLINE_MAX - 1);
	return gmem_write(mem, BOOT_CMDLINE, b->cmdline, len + 1);
}

/* Offsets in the zero page; the setup header is at 0x1f1. */
enum {
	ZP_EXT_MEM_K = 0x002,
	ZP_ACPI_RSDP = 0x070,
	ZP_EXT_RAMDISK_IMAGE = 0x0c0,
	ZP_EXT_RAMDISK_SIZE = 0x0c4,
	ZP_ALT_MEM_K = 0x1e0,
	ZP_E820_ENTRIES = 0x1e8,
	ZP_HEADER = 0x1f1,
	ZP_VID_MODE = 0x1fa,
	ZP_BOOT_FLAG = 0x1fe,
	ZP_MAGIC = 0x202,
	ZP_VERSION = 0x206,
	ZP_TYPE_OF_LOADER = 0x210,
	ZP_LOADFLAGS = 0x211,
	ZP_RAMDISK_IMAGE = 0x218,
	ZP_RAMDISK_SIZE = 0x21c,
	ZP_CMD_LINE_PTR = 0x228,
	ZP_INITRD_ADDR_MAX = 0x22c,
	ZP_CMDLINE_SIZE = 0x238,
	ZP_SETUP_DATA = 0x250,
	ZP_E820_TABLE = 0x2d0,
};
#define LOADED_HIGH 1u
#define KEEP_SEGMENTS 0x40u
#define LOADER_UNDEFINED 0xff
#define SETUP_RNG_SEED 9
#define PROTOCOL_SETUP_DATA 0x209
#define PROTOCOL_CMDLINE_SIZE 0x206

static void put16(uint8_t *p, uint16_t v)
{
	memcpy(p, &v, sizeof(v));
}

static void put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, sizeof(v));
}

static void put64(uint8_t *p, uint64_t v)
{
	memcpy(p, &v, sizeof(v));
}

static uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

/* The image's own setup header, or what a bare vmlinux would have had in it. */
static void zero_page_header(uint8_t *zp, const struct boot_image *b)
{
	unsigned len = MIN(b->setup_header_len, (unsigned)sizeof(b->setup_header));

	memcpy(zp + ZP_HEADER, b->setup_header, len);
	if (memcmp(zp + ZP_MAGIC, "HdrS", 4)) {
		memset(zp + ZP_HEADER, 0, sizeof(b->setup_header));
		memcpy(zp + ZP_MAGIC, "HdrS", 4);
		put16(zp + ZP_VERSION, 0x20f);
		put32(zp + ZP_INITRD_ADDR_MAX, 0x7fffffff);
		put32(zp + ZP_CMDLINE_SIZE, BOOT_CMDLINE_MAX - 1);
	}
	put16(zp + ZP_BOOT_FLAG, 0xaa55);
	put16(zp + ZP_VID_MODE, 0xffff);
	zp[ZP_TYPE_OF_LOADER] = LOADER_UNDEFINED;
	zp[ZP_LOADFLAGS] = (zp[ZP_LOADFLAGS] | LOADED_HIGH) & ~KEEP_SEGMENTS;
}

static void zero_page_e820(uint8_t *zp, const struct vm *vm)
{
	struct memmap_entry map[MEMMAP_MAX];
	unsigned n = boot_memmap(vm, map);
	uint64_t above = (MIN(vm->mem.region[0].size, LOW_RAM_END) - 0x100000) >> 10;

	zp[ZP_E820_ENTRIES] = n;
	for (unsigned i = 0; i < n; i++) {
		uint8_t *e = zp + ZP_E820_TABLE + i * 20;

		put64(e, map[i].base);
		put64(e + 8, map[i].size);
		put32(e + 16, map[i].type);
	}
	put32(zp + ZP_ALT_MEM_K, above);
	put16(zp + ZP_EXT_MEM_K, MIN(above, 0xfc00u));
}

static int put_rng_seed(const struct gmem *mem, struct error *err)
{
	struct {
		uint64_t next;
		uint32_t type, len;
		uint8_t seed[32];
	} d = { .type = SETUP_RNG_SEED, .len = sizeof(d.seed) };

	if (getrandom(d.seed, sizeof(d.seed), 0) != sizeof(d.seed))
		return error_errno(err, errno, "cannot get random bytes for the guest's seed");
	return gmem_write(mem, BOOT_SETUP_DATA, &d, sizeof(d));
}

static int check_linux_cmdline(const uint8_t *zp, const struct boot_image *b, uint16_t version,
	struct error *err)
{
	uint32_t room = version >= PROTOCOL_CMDLINE_SIZE ? get32(zp + ZP_CMDLINE_SIZE) : 255;

	if (room && strlen(b->cmdline) > room)
		return error_set(err, E2BIG, "the kernel command line has %zu bytes: this kernel takes %u",
			strlen(b->cmdline), room);
	return 0;
}

static int put_zero_page(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err)
{
	uint8_t *zp = gmem_at(&vm->mem, BOOT_ZERO_PAGE, 0x1000);
	uint16_t version;
	int r;

	if (!zp)
		return -EFAULT;
	memset(zp, 0, 0x1000);
	zero_page_header(zp, b);
	zero_page_e820(zp, vm);
	memcpy(&version, zp + ZP_VERSION, sizeof(version));
	r = check_linux_cmdline(zp, b, version, err);
	if (r)
		return r;
	put32(zp + ZP_CMD_LINE_PTR, BOOT_CMDLINE);
	if (b->initrd_len) {
		put32(zp + ZP_RAMDISK_IMAGE, (uint32_t)b->initrd);
		put32(zp + ZP_EXT_RAMDISK_IMAGE, b->initrd >> 32);
		put32(zp + ZP_RAMDISK_SIZE, (uint32_t)b->initrd_len);
		put32(zp + ZP_EXT_RAMDISK_SIZE, b->initrd_len >> 32);
	}
	put64(zp + ZP_ACPI_RSDP, rsdp);
	if (version < PROTOCOL_SETUP_DATA)
		return 0;
	put64(zp + ZP_SETUP_DATA, BOOT_SETUP_DATA);
	return put_rng_seed(&vm->mem, err);
}

static int put_protocol_info(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err)
{
	switch (b->protocol) {
	case BOOT_LINUX64:
	case BOOT_LINUX32:
		return put_zero_page(vm, b, rsdp, err);
	case BOOT_PVH:
	case BOOT_FLAT32:
	case BOOT_FLAT64:
		return boot_pvh_info(vm, b, rsdp, err);
	case BOOT_MULTIBOOT1:
		return boot_multiboot1_info(vm, b, err);
	case BOOT_MULTIBOOT2:
		return boot_multiboot2_info(vm, b, rsdp, err);
	case BOOT_FLAT16:
		return 0;
	}
	return -EINVAL;
}

int arch_boot_setup(struct vm *vm, const struct boot_image *b, struct error *err)
{
	struct area firmware = { .mem = &vm->mem, .at = ACPI_BASE, .end = ACPI_END,
		.what = "ACPI and MP tables", .err = err };
	bool wide = b->protocol == BOOT_LINUX64 || b->protocol == BOOT_FLAT64;
	int r;

	if (!gmem_at(&vm->mem, 0, ACPI_END))
		return error_set(err, EINVAL, "guest memory is too small: at least 1 MiB is needed");
	r = acpi_build(vm, &firmware);
	if (!r)
		r = mptable_build(vm, &firmware);
	/* A boot sector lives at 0x7c00 and wants the rest of low memory as it is. */
	if (r || b->protocol == BOOT_FLAT16)
		return r;
	r = put_gdt(&vm->mem, wide);
	if (!r && wide)
		r = put_page_tables(&vm->mem);
	if (!r)
		r = put_cmdline(&vm->mem, b, err);
	return r ? r : put_protocol_info(vm, b, ACPI_BASE, err);
}
