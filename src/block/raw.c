/*
 * The raw format: guest offset = host offset. The bytes of a raw image are the guest's; what they look
 * like never decides anything, or a guest could write a header that makes the next run open other files.
 */
#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "format.h"

static const struct {
	unsigned off, len;
	const char *magic;
	const char *name;
} foreign[] = {
	{ 0, 4, "QFI\xfb", "qcow2" },
	{ 0, 4, "QED\0", "qed" },
	{ 0, 4, "KDMV", "vmdk" },
	{ 0, 21, "# Disk DescriptorFile", "vmdk" },
	{ 0, 8, "conectix", "vpc" },
	{ 0, 8, "vhdxfile", "vhdx" },
	{ 0x40, 4, "\x7f\x10\xda\xbe", "vdi" },
};

/* For a person who forgot to convert; nothing else comes of it. */
static void warn_if_foreign(const struct disk *d)
{
	uint8_t head[128];
	ssize_t n = file_peek(&d->file, head, sizeof(head), 0);

	for (size_t i = 0; i < ARRAY_LEN(foreign); i++) {
		if (n < (ssize_t)(foreign[i].off + foreign[i].len) ||
			memcmp(head + foreign[i].off, foreign[i].magic, foreign[i].len))
			continue;
		log_warn("'%s' looks like a %s image but is used as raw bytes: 'qemu-img convert -f %s -O raw "
			 "IN OUT' makes it raw; format=raw says that it is", d->path, foreign[i].name,
			foreign[i].name);
		return;
	}
}

static int raw_open(struct disk *d, bool chosen, struct error *err)
{
	uint64_t size = d->file.size;

	if (size < SECTOR)
		return error_set(err, EINVAL, "'%s' has %llu bytes: a disk needs 512 or more "
			"('truncate -s 1G FILE' makes an empty one)", d->path, (unsigned long long)size);
	if (d->file.align > SECTOR && size % d->file.align)
		return error_set(err, EINVAL, "'%s': cache=none needs a size that is a multiple of %u here",
			d->path, d->file.align);
	d->size = size - size % SECTOR;         /* a tail shorter than a sector is not shown */
	if (!chosen)
		warn_if_foreign(d);
	return 0;
}

const struct format_ops raw_format = { .name = "raw", .open = raw_open };
