#ifndef LOADER_PLACE_H
#define LOADER_PLACE_H
/* Where a kernel's parts go in guest RAM: every format's segments end here, and are proven here. */
#include "source.h"
#include "vmm/gmem.h"
struct boot_image;
struct error;

#define PLACE_LOW_LIMIT 0x30000ull  /* RAM below belongs to the boot structures */
#define PLACE_BIOS      0x9fc00ull  /* EBDA, then the legacy hole and ACPI tables … */
#define PLACE_BIOS_END  0x100000ull /* … up to here */
#define PLACE_SEGMENTS  128

struct segment {
	uint64_t off, filesz; /* in the image */
	gpa_t gpa;
	uint64_t memsz; /* the rest past filesz reads as zero */
	uint64_t vaddr;
};

struct segments {
	unsigned nr;
	struct segment seg[PLACE_SEGMENTS];
	gpa_t start, end; /* lowest and past the highest byte; segments_check() */
};

/* -ENOSPC with words when there are too many. Segments of no size are left out. */
int segments_add(struct segments *s, const struct segment *seg, struct error *err);

/*
 * Sort by place in the image and refuse: nothing to load, bytes outside the image, more bytes than
 * memory, wrap, 4 GiB, overlap, boot structures.
 */
int segments_check(struct segments *s, const struct source *src, struct error *err);

/* After segments_check(): every segment in RAM? */
int segments_fit(const struct segments *s, const struct gmem *mem, struct error *err);

/* After both: copy. RAM is zero before. */
int segments_load(
	const struct segments *s, struct source *src, const struct gmem *mem, struct error *err);

/* Is gpa in one of them? */
bool segments_hold(const struct segments *s, gpa_t gpa);

/*
 * A free place for len bytes, page-aligned, clear of [used, used_end) and of everything below 1
 * MiB, as high as possible below limit or as low as possible above used_end. UINT64_MAX: there is
 * none.
 */
gpa_t place_high(const struct gmem *mem, uint64_t len, gpa_t limit, gpa_t used_end);
gpa_t place_low(const struct gmem *mem, uint64_t len, gpa_t from);
#endif
