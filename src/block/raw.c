/*
 * The raw format: guest offset = host offset. The bytes of a raw image are the guest's; what they look
 * like never decides anything, or a guest could write a header that makes the next run open other files.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
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
static void warn_if_foreign(const struct image *i)
{
	uint8_t head[128];
	ssize_t n = file_peek(&i->file, head, sizeof(head), 0);

	for (size_t k = 0; k < ARRAY_LEN(foreign); k++) {
		if (n < (ssize_t)(foreign[k].off + foreign[k].len) ||
			memcmp(head + foreign[k].off, foreign[k].magic, foreign[k].len))
			continue;
		log_warn("'%s' looks like a %s image but is used as raw bytes: 'qemu-img convert -f %s -O raw "
			 "IN OUT' makes it raw; format=raw says that it is", i->path, foreign[k].name,
			foreign[k].name);
		return;
	}
}

static int raw_open(struct image *i, const struct image_how *how, struct error *err)
{
	uint64_t size = i->file.size;

	if (size < SECTOR && !how->share)
		return error_set(err, EINVAL, "it has %llu bytes: a disk needs 512 or more "
			"('truncate -s 1G FILE' makes an empty one)", (unsigned long long)size);
	if (i->file.align > SECTOR && size % i->file.align)
		return error_set(err, EINVAL, "cache=none needs a size that is a multiple of %u here", i->file.align);
	i->size = size - size % SECTOR;         /* a tail shorter than a sector is not shown */
	if (!how->format)
		warn_if_foreign(i);
	return 0;
}

/* Space that is sure to be there: 0 or -errno. Blocks that are there already stay as they are. */
static int provide(const struct host_file *f, uint64_t from, uint64_t to, enum image_prealloc prealloc)
{
	if (prealloc == PREALLOC_FALLOC)
		return fallocate(f->meta_fd, 0, (off_t)from, (off_t)(to - from)) ? -errno : 0;
	return prealloc == PREALLOC_FULL ? meta_fill(f, from, to - from) : 0;
}

static int set_size(const struct host_file *f, uint64_t old, uint64_t size, enum image_prealloc prealloc,
	struct error *err)
{
	int r;

	if (f->blockdev)
		return size <= f->size ? 0 : error_set(err, ENOSPC, "the block device has only %llu bytes",
			(unsigned long long)f->size);
	if (prealloc == PREALLOC_METADATA)
		return error_set(err, EINVAL, "format raw has no metadata: preallocation is off, falloc or full");
	if (ftruncate(f->meta_fd, (off_t)size))
		return error_errno(err, errno, "cannot make it %llu bytes long", (unsigned long long)size);
	r = size > old ? provide(f, old, size, prealloc) : 0;
	if (r) {
		if (ftruncate(f->meta_fd, (off_t)old))
			r = -errno;
		return error_errno(err, -r, "cannot reserve %llu bytes", (unsigned long long)(size - old));
	}
	return 0;
}

static int raw_create(struct host_file *f, const struct image_create *c, struct error *err)
{
	int r;

	if (c->backing)
		return error_set(err, EINVAL, "format raw has no backing files: qcow2 has");
	if (c->cluster || c->version || c->refcount_bits || c->extended_l2 || c->zstd || c->fixed)
		return error_set(err, EINVAL, "format raw has no options but the preallocation");
	r = set_size(f, 0, c->size, c->prealloc, err);
	return r ? r : meta_sync(f);
}

static int raw_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err)
{
	int r = set_size(&i->file, i->size, size, prealloc, err);

	if (!r)
		i->size = i->file.size = size;
	return r;
}

const struct format_ops raw_format = { .name = "raw", .open = raw_open, .create = raw_create, .resize = raw_resize };
