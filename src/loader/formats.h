#ifndef LOADER_FORMATS_H
#define LOADER_FORMATS_H
/* What the kernel formats share with loader.c. A format is one file and one line in loaders[]. */
#include "file.h"
#include "source.h"
#include "vmm/loader.h"

/* Indices of loader_entries[]. */
enum loader_entry {
	ENTRY_AUTO,
	ENTRY_UNPACK,
	ENTRY_BZIMAGE,
	ENTRY_BZIMAGE32,
	ENTRY_PVH,
	ENTRY_LINUX64,
	ENTRY_MULTIBOOT,
	ENTRY_MULTIBOOT2,
	ENTRY_FLAT16,
	ENTRY_FLAT32,
	ENTRY_FLAT64,
	ENTRY_COUNT
};

/* A kernel being looked at or loaded. */
struct image {
	const struct boot_config *cfg;
	enum loader_entry entry;
	struct boot_file file;
	struct source src;
};

struct loader_class {
	const char *name; /* "a Linux bzImage" */
	uint32_t entries; /* bit n: loader_entries[n] can choose it */
	/* 1: mine; 0: not; -errno: mine, but cannot boot, with words. Reads the image's start. */
	int (*probe)(struct image *img, struct error *err);
	/* Place the kernel; fills out, all but initrd, modules and command line. */
	int (*load)(struct image *img, const struct gmem *mem, struct boot_image *out,
		struct error *err);
};

extern const struct loader_class bzimage_loader, elf_loader, multiboot_loader, multiboot2_loader,
	flat_loader;

/* Fill out->format. */
__attribute__((format(printf, 2, 3))) void format_set(struct boot_image *out, const char *fmt, ...);

/* The Linux setup header, Documentation/arch/x86/boot.rst: offsets in the zero page. */
#define SETUP_HEADER       0x1f1 /* setup_sects */
#define SETUP_HEADER_END   0x280
#define SETUP_SYSSIZE      0x1f4
#define SETUP_BOOT_FLAG    0x1fe
#define SETUP_JUMP         0x200 /* jmp, then the header's length past 0x202 */
#define SETUP_MAGIC        0x202
#define SETUP_VERSION      0x206
#define SETUP_KERNEL_NAME  0x20e
#define SETUP_LOADFLAGS    0x211
#define SETUP_CODE32       0x214
#define SETUP_INITRD_MAX   0x22c
#define SETUP_ALIGNMENT    0x230
#define SETUP_RELOCATABLE  0x234
#define SETUP_XLOADFLAGS   0x236
#define SETUP_CMDLINE_SIZE 0x238
#define SETUP_PAYLOAD      0x248
#define SETUP_PAYLOAD_LEN  0x24c
#define SETUP_PREF_ADDRESS 0x258
#define SETUP_INIT_SIZE    0x260

#define LOADFLAGS_HIGH  0x01
#define LOADFLAGS_KASLR 0x02
#define XLF_KERNEL_64   0x01

/* A field of out->setup_header, by its offset in the zero page; 0 past the header's end. */
uint32_t setup_get(const struct boot_image *out, unsigned off, unsigned size);
void setup_put(struct boot_image *out, unsigned off, unsigned size, uint64_t val);

/* initrd.c. They go by out->load_end and by the sizes the files had when they were opened. */
int initrd_load(const struct boot_file *files, const char *const *paths, unsigned nr,
	const struct gmem *mem, struct boot_image *out, struct error *err);
int modules_load(const struct boot_file *files, const char *const *specs, unsigned nr,
	const struct gmem *mem, struct boot_image *out, struct error *err);
/* "FILE[,args]" to its parts; a comma in FILE is written twice. -errno with words. */
int module_spec_parse(const char *spec, char *path, size_t path_size, char *args, size_t args_size,
	struct error *err);

/*
 * identify.c. What the file seems to be by its first plain bytes ("an ISO image"), and what to do.
 * packed: they were in a compressed file.
 */
struct finding {
	const char *what, *fix;
};
void identify(const uint8_t *head, size_t len, bool packed, struct finding *f);
#endif
