#ifndef ARCH_X86_64_BOOT_H
#define ARCH_X86_64_BOOT_H
/* What the pieces of arch_boot_setup() share; main thread, before vCPUs run. Private to src/arch/x86_64. */
#include <stdbool.h>
#include <stdint.h>
#include "vmm/gmem.h"
#include "vmm/loader.h"
struct bus;
struct error;
struct vm;

/* A stretch of guest RAM that boot structures are laid into, front to back. */
struct area {
	const struct gmem *mem;
	gpa_t at, end;
	const char *what;               /* for messages: "multiboot information" */
	struct error *err;
	bool failed;                    /* once true, nothing more is written */
};
/* Place len bytes (NULL: zeroes) at the next multiple of align; their address, 0 when there is no room. */
gpa_t area_put(struct area *a, const void *data, uint64_t len, unsigned align);
gpa_t area_put_string(struct area *a, const char *s);
int area_result(const struct area *a);  /* 0 or -ENOSPC; words are set */

/* The memory map, as every protocol tells it: types of ACPI 6.5, 15 (1 RAM, 2 reserved). */
#define MEMMAP_MAX 10
#define MEMMAP_RAM 1
#define MEMMAP_RESERVED 2
struct memmap_entry {
	uint64_t base, size;
	uint32_t type;
};
unsigned boot_memmap(const struct vm *vm, struct memmap_entry *map);    /* sorted, no overlaps; the count */

/* bootinfo.c: PVH and Multiboot. rsdp: where the ACPI tables start. */
int boot_pvh_info(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err);
int boot_multiboot1_info(struct vm *vm, const struct boot_image *b, struct error *err);
int boot_multiboot2_info(struct vm *vm, const struct boot_image *b, gpa_t rsdp, struct error *err);

/* acpi.c: all tables, RSDP at a->at. 0 or -ENOSPC with words. */
int acpi_build(struct vm *vm, struct area *a);
/* mptable.c: table into a, floating pointer where kernels look for it. */
int mptable_build(struct vm *vm, struct area *a);

/* Is something at this port? What is described to the guest follows the bus. */
bool boot_has_port(struct vm *vm, uint16_t port);
#endif
