#ifndef IMAGES_H
#define IMAGES_H
/* Kernel images made in memory, handed to the loader as /proc/self/fd/N. */
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/gmem.h"
#include "vmm/loader.h"

#define IMAGE_MAX (4u << 20)

/* One image at a time; put*() write little-endian. */
static uint8_t image[IMAGE_MAX] __attribute__((unused));
static struct error err __attribute__((unused));
static struct gmem ram __attribute__((unused));
static struct boot_image boot __attribute__((unused));

static inline void put(size_t off, unsigned size, uint64_t val)
{
	for (unsigned i = 0; i < size; i++)
		image[off + i] = (uint8_t)(val >> 8 * i);
}

static inline int image_fd(const void *buf, size_t len)
{
	int fd = memfd_create("image", MFD_CLOEXEC);

	if (fd < 0 || write(fd, buf, len) != (ssize_t)len)
		return -1;
	return fd;
}

static inline const char *fd_path(int fd)
{
	static char path[40][32];
	static unsigned n;

	n = (n + 1) % 40;
	snprintf(path[n], sizeof(path[n]), "/proc/self/fd/%d", fd);
	return path[n];
}

static inline unsigned entry_index(const char *word)
{
	unsigned i = 0;

	while (loader_entries[i] && strcmp(loader_entries[i], word))
		i++;
	return i;
}

static inline void ram_init(uint64_t bytes)
{
	const struct gmem_region l = { .base = 0, .size = bytes };

	if (gmem_init(&ram, &l, 1, false, &err))
		abort();
}

/* Open and load what cfg says; boot, ram and err hold what came of it. */
static inline int load_config(const struct boot_config *cfg)
{
	struct loader *ld;
	int r = loader_open(&ld, cfg, &err);

	if (r < 0)
		return r;
	r = loader_load(ld, &ram, &boot, &err);
	loader_free(ld);
	return r;
}

/* The same for buf as the kernel. */
static inline int load_bytes(const void *buf, size_t len, const char *entry)
{
	int fd = image_fd(buf, len), r;
	struct boot_config cfg = { .kernel = fd_path(fd), .entry = entry_index(entry) };

	r = load_config(&cfg);
	close(fd);
	return r;
}

/* An ELF64 for x86-64: header and nr program headers, all zero but their type. */
static inline void elf64_make(uint64_t entry, unsigned nr)
{
	Elf64_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, 1 },
		.e_type = ET_EXEC,
		.e_machine = EM_X86_64,
		.e_version = 1,
		.e_entry = entry,
		.e_phoff = 64,
		.e_ehsize = 64,
		.e_phentsize = sizeof(Elf64_Phdr),
		.e_phnum = nr };

	memset(image, 0, sizeof(image));
	memcpy(image, &h, sizeof(h));
}

static inline void elf64_phdr(
	unsigned n, uint32_t type, uint64_t off, uint64_t paddr, uint64_t filesz, uint64_t memsz)
{
	Elf64_Phdr p = { .p_type = type,
		.p_flags = PF_R | PF_X,
		.p_offset = off,
		.p_paddr = paddr,
		.p_vaddr = paddr + 0xffffffff80000000,
		.p_filesz = filesz,
		.p_memsz = memsz };

	memcpy(image + 64 + n * sizeof(p), &p, sizeof(p));
}

static inline void elf32_make(uint32_t entry, unsigned nr)
{
	Elf32_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, 1 },
		.e_type = ET_EXEC,
		.e_machine = EM_386,
		.e_version = 1,
		.e_entry = entry,
		.e_phoff = 52,
		.e_ehsize = 52,
		.e_phentsize = sizeof(Elf32_Phdr),
		.e_phnum = nr };

	memset(image, 0, sizeof(image));
	memcpy(image, &h, sizeof(h));
}

static inline void elf32_phdr(
	unsigned n, uint32_t type, uint32_t off, uint32_t paddr, uint32_t filesz, uint32_t memsz)
{
	Elf32_Phdr p = { .p_type = type,
		.p_flags = PF_R | PF_X,
		.p_offset = off,
		.p_paddr = paddr,
		.p_vaddr = paddr,
		.p_filesz = filesz,
		.p_memsz = memsz };

	memcpy(image + 52 + n * sizeof(p), &p, sizeof(p));
}

/* A Xen note of type 18 at off; returns its length. */
static inline size_t pvh_note(size_t off, uint32_t entry)
{
	put(off, 4, 4);
	put(off + 4, 4, 4);
	put(off + 8, 4, 18);
	memcpy(image + off + 12, "Xen", 4);
	put(off + 16, 4, entry);
	return 20;
}

/* Is the byte at gpa in RAM this one? */
static inline int ram_is(gpa_t gpa, uint8_t byte)
{
	const uint8_t *p = gmem_at(&ram, gpa, 1);

	return p && *p == byte;
}
#endif
