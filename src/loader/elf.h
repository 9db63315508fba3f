#ifndef LOADER_ELF_H
#define LOADER_ELF_H
/* ELF executables as kernels: shared by the ELF, Multiboot and bzImage formats. */
#include "place.h"

#define ELF_NOTES 8

struct elf {
	bool is64;
	uint64_t entry;       /* as the header has it: physical, or virtual within a segment */
	struct segments segs; /* checked, not yet against RAM */
	struct {
		uint64_t off, len;
	} note[ELF_NOTES];
	unsigned nr_notes;
};

bool elf_is(const uint8_t *head, size_t len);
/* "aarch64", …, or NULL for a number not known here. */
const char *elf_machine_name(uint16_t machine);

/* -ENOTSUP, with words: an ELF, but no x86 executable. Other failures: a damaged one. */
int elf_parse(struct elf *e, struct source *src, struct error *err);

/* "ELF32" or "ELF64". */
const char *elf_class_name(const struct elf *e);

/* Physical address of entry, which may be virtual; -EINVAL with words when no segment holds it. */
int elf_entry_gpa(const struct elf *e, uint64_t entry, gpa_t *gpa, struct error *err);
#endif
