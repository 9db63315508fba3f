#ifndef LOADER_DOOR_H
#define LOADER_DOOR_H
/* A hostile file through the loader's whole door; what it reports must lie in RAM and outside the
 * boot structures. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/gmem.h"
#include "vmm/loader.h"

#define DOOR_RAM (48ull << 20)

static inline unsigned door_entry(const char *word)
{
	unsigned i = 0;

	while (loader_entries[i] && strcmp(loader_entries[i], word))
		i++;
	return i;
}

static inline void door_check(const struct gmem *ram, const struct boot_image *b)
{
	assert(b->load_start >= 0x30000 && b->load_start < b->load_end);
	assert(gmem_at(ram, b->load_start, b->load_end - b->load_start));
	assert(b->load_end <= 0x9fc00 || b->load_end > 0x100000);
	assert(b->load_start < 0x9fc00 || b->load_start >= 0x100000);
	assert(b->entry >= b->load_start && b->entry < b->load_end);
	assert(b->setup_header_len <= sizeof(b->setup_header));
	assert(strlen(b->format) < sizeof(b->format_buf));
	assert(!b->initrd_len ||
		(gmem_at(ram, b->initrd, b->initrd_len) && b->initrd >= b->load_end));
}

/* Load data as a kernel by the entry named, with itself as initrd where the format takes one. */
static inline void door_try(const uint8_t *data, size_t size, const char *entry)
{
	static struct gmem ram = { .fd = -1 };
	static int fd = -1;
	const struct gmem_region layout = { .base = 0, .size = DOOR_RAM };
	struct boot_image boot;
	struct error err;
	struct loader *ld;
	char path[32];
	const char *paths[] = { path };
	struct boot_config cfg = { .kernel = path,
		.initrds = paths,
		.nr_initrds = 1,
		.entry = door_entry(entry),
		.cmdline = "console=ttyS0" };

	if (fd < 0) {
		fd = memfd_create("input", MFD_CLOEXEC);
		if (fd < 0 || gmem_init(&ram, &layout, 1, false, &err))
			abort();
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
		abort();
	cfg.nr_initrds = strncmp(entry, "multiboot", 9) != 0;
	if (loader_open(&ld, &cfg, &err))
		return;
	if (!loader_load(ld, &ram, &boot, &err))
		door_check(&ram, &boot);
	gmem_clear(&ram, &err);
	loader_free(ld);
}
#endif
