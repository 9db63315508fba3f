#ifndef IMAGE_DOOR_H
#define IMAGE_DOOR_H
/* A hostile image through the door of its format: opened, looked at, read here and there; and the same way as under a guest. */
#include <assert.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include "block/format.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/image.h"

#define DOOR_READ  (64u << 10)
#define DOOR_STEPS 64

static inline int door_file(const void *data, size_t size)
{
	int fd = memfd_create("image", MFD_CLOEXEC);

	if (fd < 0 || pwrite(fd, data, size, 0) != (ssize_t)size)
		abort();
	return fd;
}

static inline void door_extent(const struct image *owner, const struct extent *e, uint64_t len)
{
	assert(e->len >= 1 && e->len <= len);
	if (e->kind == EXT_DATA)
		assert(e->file && e->pos <= e->file->size && e->len <= e->file->size - e->pos);
	if (e->kind == EXT_COMPRESSED)
		assert(e->file && e->csize && e->csize <= 4u << 20 && e->skip < owner->cluster &&
			e->len <= owner->cluster - e->skip);
}

/* The map from off on, by a caller who reads the tables itself. */
static inline void door_map(struct image *i, uint64_t off)
{
	for (unsigned step = 0; step < DOOR_STEPS && off < i->size; step++) {
		struct image *owner;
		struct extent e;
		int r, tries = 0;

		while ((r = image_map(i, off, i->size - off, &e, &owner)) == -EAGAIN) {
			struct table *t = i->want_table;
			ssize_t n = preadv(t->file->meta_fd, &t->iov, 1,
				(off_t)(t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data)));

			assert(i->want == WANT_TABLE && tries++ < 100);
			table_loaded(t, n < 0 ? -errno : (int)n);
		}
		if (r)
			return;
		door_extent(owner, &e, i->size - off);
		off += e.len;
	}
}

static inline void door_try(const char *format, int fd, const struct image_opener *opener)
{
	static uint8_t buf[DOOR_READ];
	const struct image_how how = { .format = format, .readonly = true, .share = true, .opener = opener, .fd = fd };
	struct image *i;
	struct error err;
	struct facts *f;

	if (image_open(&i, "disk.vmdk", &how, &err)) {
		assert(*err.msg);
		return;
	}
	assert(i->size && i->size % 512 == 0 && i->size <= IMAGE_SIZE_MAX);
	assert(i->cluster && !(i->cluster & (i->cluster - 1)));
	for (unsigned k = 0; k < 5; k++) {
		uint64_t off = k < 4 ? i->size / 4 * k : i->size - MIN(i->size, DOOR_READ);

		image_read(i, buf, MIN(DOOR_READ, i->size - off), off);
		i->blocking = false;
		door_map(i, off);
		i->blocking = true;
	}
	f = facts_new();
	image_describe(i, f);
	facts_free(f);
	image_close(i);
}
#endif
