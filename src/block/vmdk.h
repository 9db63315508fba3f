#ifndef BLOCK_VMDK_H
#define BLOCK_VMDK_H
/* The text that describes a VMDK image: of its own in a file, or inside the sparse file. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct error;

#define VMDK_MAGIC    "# Disk DescriptorFile"
#define VMDK_TEXT_MAX (256u << 10)      /* most bytes of text */
#define VMDK_EXTENTS  1024u             /* most extents: 2 TiB in parts of 2 GiB, what VMware makes */

enum vmdk_type { VMDK_FLAT, VMDK_SPARSE, VMDK_ZERO };

struct vmdk_line {
	enum vmdk_type type;
	bool no_access;                 /* NOACCESS */
	uint64_t sectors;               /* 1 to 64 TiB / 512 */
	uint64_t offset;                /* VMDK_FLAT: first sector in the file, as far */
	char name[256];                 /* a plain file name; empty: VMDK_ZERO */
};

struct vmdk_desc {
	char create_type[32];
	struct vmdk_line *line;
	unsigned n, room;
};

/*
 * text[n], up to the first NUL. Refused with words: what is not understood, has a parent, is encrypted, more than 64 TiB in
 * all, no createType, no extent. 0 or -errno; vmdk_desc_free() in any case.
 */
int  vmdk_desc_parse(struct vmdk_desc *d, const char *text, size_t n, struct error *err);
void vmdk_desc_free(struct vmdk_desc *d);
#endif
