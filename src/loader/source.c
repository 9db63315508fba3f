#include "source.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "decompress.h"
#include "file.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define SKIP_CHUNK (64u << 10)

static int plain_read(
	const struct source *s, uint64_t off, void *dst, size_t len, struct error *err)
{
	int r = boot_file_pread(s->fd, s->base + off, dst, len);

	if (r == -ENODATA)
		return error_set(err, ENODATA, "the file became shorter while it was read");
	return r < 0 ? error_errno(err, -r, "cannot read it") : 0;
}

int source_open(
	struct source *s, int fd, uint64_t base, uint64_t len, uint64_t limit, struct error *err)
{
	size_t got = MIN(len, SOURCE_HEAD);
	int r;

	*s = (struct source){ .fd = fd, .base = base, .size = len };
	s->head = malloc(SOURCE_HEAD);
	if (!s->head)
		return error_errno(err, ENOMEM, "cannot read it");
	r = plain_read(s, 0, s->head, got, err);
	if (r < 0)
		return r;
	s->head_len = got;
	s->compression = limit ? unpack_name(s->head, got) : NULL;
	if (!s->compression)
		return 0;
	s->size = limit;
	r = unpack_open(&s->unpack, fd, base, len, s->head, got, err);
	if (!r)
		r = unpack_read(s->unpack, s->head, MIN(limit, SOURCE_HEAD), &got, err);
	if (r < 0)
		return r;
	s->head_len = got;
	s->pos = got;
	if (got < SOURCE_HEAD)
		s->size = got;
	return 0;
}

void source_close(struct source *s)
{
	unpack_close(s->unpack);
	free(s->head);
	s->unpack = NULL;
	s->head = NULL;
}

static int stream_read(struct source *s, void *dst, size_t len, struct error *err)
{
	size_t got;
	int r = unpack_read(s->unpack, dst, len, &got, err);

	s->pos += got;
	if (r < 0)
		return r;
	return got == len ? 0
			  : error_set(err, ENODATA, "its %s data ends after %llu bytes",
				    s->compression, (unsigned long long)s->pos);
}

static int stream_skip(struct source *s, uint64_t to, struct error *err)
{
	auto_free uint8_t *scrap = malloc(SKIP_CHUNK);

	if (!scrap)
		return error_errno(err, ENOMEM, "cannot unpack it");
	while (s->pos < to) {
		int r = stream_read(s, scrap, MIN(to - s->pos, SKIP_CHUNK), err);

		if (r < 0)
			return r;
	}
	return 0;
}

int source_read(struct source *s, uint64_t off, void *dst, uint64_t len, struct error *err)
{
	uint64_t n = off < s->head_len ? MIN(len, s->head_len - off) : 0;
	int r;

	if (off > s->size || len > s->size - off)
		return error_set(err, ENODATA,
			"bytes 0x%llx+0x%llx of it are needed, it has 0x%llx",
			(unsigned long long)off, (unsigned long long)len,
			(unsigned long long)s->size);
	memcpy(dst, s->head + (n ? off : 0), n);
	off += n;
	len -= n;
	dst = (uint8_t *)dst + n;
	if (!len)
		return 0;
	if (!s->unpack)
		return plain_read(s, off, dst, len, err);
	if (off < s->pos)
		return error_set(
			err, ESPIPE, "its parts are not in ascending order: decompress it first");
	r = stream_skip(s, off, err);
	return r < 0 ? r : stream_read(s, dst, len, err);
}
