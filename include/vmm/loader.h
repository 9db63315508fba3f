#ifndef VMM_LOADER_H
#define VMM_LOADER_H
/*
 * Kernels into guest RAM, chosen by content, never by file name. A loader copies through gmem only,
 * and reports what it placed; src/arch makes the boot information and the first registers from that
 * report.
 */
#include <stdbool.h>
#include <stdint.h>
#include "vmm/gmem.h"
struct error;

enum boot_protocol {
	BOOT_LINUX64,           /* x86 boot protocol, 64-bit entry */
	BOOT_LINUX32,           /* x86 boot protocol, 32-bit entry */
	BOOT_PVH,
	BOOT_MULTIBOOT1,
	BOOT_MULTIBOOT2,
	BOOT_FLAT16,            /* real mode, CS:IP = address >> 4 : address & 15. Anywhere in */
				/* 0x600-0x9fbff: nothing else is to be written there */
	BOOT_FLAT32,            /* protected mode, flat segments, no paging */
	BOOT_FLAT64,            /* long mode, identity-mapped */
};

/*
 * --kernel-entry's words, NULL-terminated: "auto", "unpack" (a bzImage unpacked here, its vmlinux
 * entered), "bzimage" (its own entry), "bzimage32", "pvh", "linux64", "multiboot", "multiboot2",
 * "flat16", "flat32", "flat64".
 *
 * auto: a bzImage is unpacked, and where that cannot be done entered at its own 64-bit entry, or
 * its 32-bit one. An ELF goes by its Multiboot 2 header, Multiboot 1 header, PVH note or (64-bit) as
 * a vmlinux, whichever it has first in this order. What is none of these is flat when there is a load
 * address: 16-bit below 1 MiB, 32-bit above.
 */
extern const char *const loader_entries[];

#define BOOT_MODULES 32
#define BOOT_CMDLINE_MAX 4096

struct boot_module {
	gpa_t gpa;              /* page-aligned */
	uint64_t len;
	char args[256];         /* what follows the file name in --module, "" for nothing */
};

/* What to load; strings live as long as the VM. */
struct boot_config {
	const char *kernel;
	const char *const *initrds;     /* concatenated; not for Multiboot and flat16 */
	unsigned nr_initrds;
	const char *const *modules;     /* "FILE[,args]", ",," a comma; not for Linux, flat16 */
	unsigned nr_modules;
	const char *cmdline;            /* complete */
	unsigned entry;                 /* index into loader_entries */
	uint64_t load_address;          /* flat binaries; without: 0x7c00 (16-bit) or 1 MiB */
	bool has_load_address;
};

/* What was placed where. */
struct boot_image {
	enum boot_protocol protocol;
	const char *format;             /* = format_buf: "bzImage 6.1 (unpacked, zstd)", for logs */
	char format_buf[96];
	gpa_t entry;                    /* below 4 GiB */
	gpa_t load_start, load_end;     /* all that is the kernel's, bss and init_size too */
	gpa_t initrd;                   /* page-aligned; of no meaning when initrd_len is 0 */
	uint64_t initrd_len;
	const char *cmdline;            /* never NULL; within what the kernel takes */
	struct boot_module module[BOOT_MODULES];
	unsigned nr_modules;
	/*
	 * Linux: the setup header, from 0x1f1, as the file had it or as the loader made it for an
	 * ELF; its fields about boot loader, initrd and command line are arch's to fill. Other
	 * protocols: length 0.
	 */
	uint8_t setup_header[0x280 - 0x1f1];
	unsigned setup_header_len;
	/* Multiboot 1: its header's flags. 2: bit 0: wants modules page-aligned (they are). */
	uint32_t mb_flags;
	gpa_t mb_load_base;             /* = load_start: where a relocatable image went */
};

/* The files of a boot_config, opened; kept so that a machine reset can load them again. */
struct loader;

/*
 * Open all files (reads only the start of the kernel), recognise the format and refuse what cannot
 * boot, in one line: what was found, what is accepted, the fix. Main thread.
 */
int  loader_open(struct loader **ret, const struct boot_config *cfg, struct error *err);
/*
 * Place everything. RAM must read as zero where the kernel goes (fresh, or after gmem_clear()). May
 * be called any number of times, and opens nothing. What is placed lies in RAM below 4 GiB, never
 * below 0x30000 (the boot structures; BOOT_FLAT16 excepted) nor in 0x9fc00-0xfffff. Modules follow
 * the kernel, initrds go as high as the kernel can reach. Main thread.
 */
int  loader_load(struct loader *ld, const struct gmem *mem, struct boot_image *out,
	struct error *err);
void loader_free(struct loader *ld);     /* NULL is fine */
/* For fw_cfg: the kernel file as it is. The fd stays the loader's. */
int  loader_kernel_fd(const struct loader *ld, uint64_t *size);
#endif
