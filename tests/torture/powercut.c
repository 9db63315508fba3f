/*
 * Power cuts: what goes to the file is written down; then the file is made anew as a cut could have left it. All of before the last
 * barrier is there; of the rest any part, in which each sector of 512 bytes is there or not. No corruption may come of
 * it, and everything flushed before the cut must be there.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "record.h"
#include "torture.h"
#include "vmm/cleanup.h"

#define OPS     120
#define CUTS    25              /* of each workload */
#define FILE_MAX (24u << 20)

/* After record number at, the disk had data at least as new as in data. */
struct flushed {
	unsigned at;
	uint8_t *data;
};

static uint8_t *base;           /* the file before the workload */
static size_t base_size;

static void read_base(struct world *w)
{
	int fd = open(w->path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) || st.st_size > FILE_MAX)
		broken(w, "a new image of %lld bytes", (long long)st.st_size);
	base = calloc(1, FILE_MAX);
	base_size = (size_t)st.st_size;
	if (read(fd, base, base_size) != st.st_size)
		broken(w, "cannot read the new image");
	close(fd);
}

static void apply(struct world *w, uint8_t *file, size_t *size, const struct record *r, bool partly)
{
	uint64_t end = r->off + r->len;

	if (r->kind == REC_BARRIER)
		return;
	if (end > FILE_MAX)
		broken(w, "the file grew to %llu", (unsigned long long)end);
	for (uint64_t at = r->off; at < end;) {
		uint64_t next = MIN(end, (at / SECTOR + 1) * SECTOR);

		if (!partly || rnd(w, 2)) {
			if (r->kind == REC_WRITE)
				memcpy(file + at, (uint8_t *)r->data + (at - r->off), next - at);
			else
				memset(file + at, 0, next - at);
		}
		at = next;
	}
	if (r->kind != REC_PUNCH)
		*size = MAX(*size, end);
}

static void store(struct world *w, const uint8_t *file, size_t size)
{
	int fd = open(w->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	/* The file's length as the next whole megabyte: growing goes ahead of the data. */
	if (fd < 0 || write(fd, file, size) != (ssize_t)size || ftruncate(fd, (off_t)((size + 0xfffff) & ~0xfffffull)))
		broken(w, "cannot store a cut image");
	close(fd);
}

/* Each sector is as it was when flushed, or as some later write left it. */
static void verify(struct world *w, const struct flushed *f)
{
	static uint8_t is[DISK_MAX];
	struct image *i = world_open(w, true);

	if (image_read(i, is, w->size, 0))
		broken(w, "a cut image cannot be read");
	for (uint64_t at = 0; at < w->size; at += SECTOR) {
		const uint64_t *now = (uint64_t *)(is + at), *then = (uint64_t *)(f->data + at);

		/* A write's bytes tell its number: none may be older than what was flushed. */
		if (memcmp(now, then, SECTOR) && *now >> 32 < *then >> 32 && *now)
			broken(w, "sector %llu is of write %llu, flushed was %llu", (unsigned long long)(at / SECTOR),
				(unsigned long long)(*now >> 32), (unsigned long long)(*then >> 32));
		if (memcmp(now, then, SECTOR) && *now && (uint32_t)*now != at / SECTOR && !*w->base)
			broken(w, "sector %llu holds sector %u", (unsigned long long)(at / SECTOR), (uint32_t)*now);
	}
	image_close(i);
}

static void one_cut(struct world *w, const struct flushed *flushed, unsigned nr_flushed)
{
	unsigned cut = rnd(w, nr_records + 1), barrier = 0, last = 0;
	uint8_t *file = malloc(FILE_MAX);
	size_t size = base_size;

	memcpy(file, base, FILE_MAX);
	for (unsigned k = 0; k < cut; k++)
		if (records[k].kind == REC_BARRIER)
			barrier = k + 1;
	for (unsigned k = 0; k < cut; k++)
		if (k < barrier || rnd(w, 3))
			apply(w, file, &size, &records[k], k >= barrier && rnd(w, 3) == 0);
	for (unsigned k = 0; k < nr_flushed; k++)
		if (flushed[k].at <= cut)
			last = k;
	store(w, file, size);
	free(file);
	world_check(w, false);
	verify(w, &flushed[last]);
	if (rnd(w, 5) == 0) {
		world_repair(w);
		verify(w, &flushed[last]);
	}
}

static int workload(struct world *w)
{
	struct flushed flushed[OPS + 2];
	unsigned n = 20 + rnd(w, OPS - 20), nr = 0;
	struct image *i;

	world_make(w);
	i = world_open(w, false);
	if (image_flush(i))
		broken(w, "flush");
	read_base(w);
	record_start();
	flushed[nr] = (struct flushed){ .at = 0, .data = malloc(DISK_MAX) };
	memcpy(flushed[nr++].data, w->data, DISK_MAX);
	while (n--) {
		struct op_done d;
		unsigned before = w->ops;

		do      /* without sizes and snapshots: their own tests cut those */
			d = world_op(w, i, false);
		while (d.kind == DO_DISCARD && *w->base && w->ops < before + 100);
		if (d.err)
			broken(w, "operation %u failed", w->ops);
		if (d.kind == DO_FLUSH) {
			flushed[nr] = (struct flushed){ .at = nr_records, .data = malloc(DISK_MAX) };
			memcpy(flushed[nr++].data, w->data, DISK_MAX);
		}
	}
	record_stop();
	image_close(i);
	for (unsigned k = 0; k < CUTS; k++)
		one_cut(w, flushed, nr);
	record_clear();
	while (nr)
		free(flushed[--nr].data);
	free(base);
	return CUTS;
}

int mode_powercut(const char *format, uint64_t from, uint64_t to)
{
	int cuts = 0;

	for (uint64_t seed = from; seed < to; seed++) {
		struct world w;

		world_new(&w, format, seed);
		cuts += workload(&w);
		world_free(&w);
	}
	return cuts;
}
