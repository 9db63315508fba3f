/* vmm disk compare, bench: images read from one end to the other. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "disk.h"
#include "disk_crew.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/loop.h"

#define CHUNK       (256u << 10)
#define DIFFERENT   1
#define REQUEST_MAX (2u << 20)

/* ---- compare ---- */

int compare_prepare(struct disk_args *a, struct error *err)
{
	int r = disk_open_file(a, 0, false, err);

	return r ? r : disk_open_file(a, 1, false, err);
}

static bool is_data(const struct image_status *s)
{
	return s->kind == EXT_DATA || s->kind == EXT_COMPRESSED;
}

static bool any_set(const uint8_t *buf, size_t n)
{
	return buf[0] || memcmp(buf, buf + 1, n - 1);
}

static int differ(const struct disk_args *a, uint64_t off, const char *what)
{
	if (!a->quiet)
		printf("%s at offset %llu!\n", what, (unsigned long long)off);
	return DIFFERENT;
}

/* One stretch of both from off: 0 the same, DIFFERENT and said, or -errno with words. *len: how far it went. */
static int compare_stretch(struct disk_args *a, struct image *const *i, uint64_t off, uint64_t common, uint8_t *buf,
	uint64_t *len, struct error *err)
{
	struct image_status s[2];

	*len = common - off;
	for (unsigned k = 0; k < 2; k++) {
		int r = image_status(i[k], off, *len, &s[k]);

		if (r)
			return error_errno(err, -r, "'%s': cannot read at offset %llu", a->file[k].path,
				(unsigned long long)off);
		*len = MIN(*len, s[k].len);
	}
	if (a->strict && (s[0].kind == EXT_HOLE) != (s[1].kind == EXT_HOLE))
		return differ(a, off, "Strict mode: allocated in one only,");
	if (!is_data(&s[0]) && !is_data(&s[1]))
		return 0;
	*len = MIN(*len, CHUNK);
	for (unsigned k = 0; k < 2; k++) {
		int r = image_read(i[k], buf + k * CHUNK, *len, off);

		if (r)
			return error_errno(err, -r, "'%s': cannot read at offset %llu", a->file[k].path,
				(unsigned long long)off);
	}
	if (!memcmp(buf, buf + CHUNK, *len))
		return 0;
	while (buf[0] == buf[CHUNK]) {
		buf++;
		off++;
	}
	return differ(a, off, "Content mismatch");
}

/* What one disk has beyond the end of the other must be zeroes. */
static int compare_rest(struct disk_args *a, struct image *const *i, uint64_t common, uint8_t *buf, struct error *err)
{
	unsigned k = image_size(i[1]) > image_size(i[0]);
	uint64_t size = image_size(i[k]);
	struct image_status s;

	for (uint64_t off = common; off < size; off += s.len) {
		int r = image_status(i[k], off, size - off, &s);

		if (!r && is_data(&s)) {
			s.len = MIN(s.len, CHUNK);
			r = image_read(i[k], buf, s.len, off);
		}
		if (r)
			return error_errno(err, -r, "'%s': cannot read at offset %llu", a->file[k].path,
				(unsigned long long)off);
		if (is_data(&s) && any_set(buf, s.len)) {
			while (!*buf++)
				off++;
			return differ(a, off, "Content mismatch beyond the end of the smaller one,");
		}
	}
	return 0;
}

static int compare(struct disk_args *a, struct image *const *i, struct error *err)
{
	uint64_t common = MIN(image_size(i[0]), image_size(i[1])), n;
	auto_free uint8_t *buf = malloc(2 * CHUNK);
	struct disk_progress p;
	int r = 0;

	if (!buf)
		return error_set(err, ENOMEM, "out of memory");
	if (a->strict && image_size(i[0]) != image_size(i[1]))
		return differ(a, common, "Strict mode: the sizes differ, one ends");
	disk_progress_start(&p, a, common);
	for (uint64_t off = 0; !r && off < common; off += n) {
		r = compare_stretch(a, i, off, common, buf, &n, err);
		disk_progress_at(&p, off);
	}
	disk_progress_end(&p, !r);
	if (!r && image_size(i[0]) != image_size(i[1]) && !a->quiet)
		printf("Warning: the sizes differ: %llu and %llu bytes\n", (unsigned long long)image_size(i[0]),
			(unsigned long long)image_size(i[1]));
	r = r ? r : compare_rest(a, i, common, buf, err);
	if (!r && !a->quiet)
		printf("Images are identical.\n");
	return r;
}

int compare_work(struct disk_args *a, struct error *err)
{
	struct image *i[2] = { NULL, NULL };
	int r;

	r = disk_image(a, &i[0], 0, a->format, (struct image_how){ .readonly = true }, err);
	r = r ? r : disk_image(a, &i[1], 1, a->out_format, (struct image_how){ .readonly = true }, err);
	r = r ? r : compare(a, i, err);
	image_close(i[0]);
	image_close(i[1]);
	return r;
}

/* ---- bench ---- */

int bench_prepare(struct disk_args *a, struct error *err)
{
	if (!a->request || a->request % 512 || a->request > REQUEST_MAX)
		return error_set(err, EINVAL, "-s: a multiple of 512 up to 2M");
	if (!a->depth || !a->count)
		return error_set(err, EINVAL, "-c and -d: 1 or more");
	if (a->write && a->depth > 1)
		return error_set(err, EINVAL, "-d %llu: writes go one at a time, -d 1", (unsigned long long)a->depth);
	if (a->cache && (!a->write || (strcmp(a->cache, "writeback") && strcmp(a->cache, "writethrough") &&
					      strcmp(a->cache, "unsafe"))))
		return error_set(err, EINVAL, "-t %s: with -w it can be writeback, writethrough or unsafe; reads go through "
			"the page cache", a->cache);
	return disk_open_file(a, 0, a->write, err);
}

static int bench_write(struct disk_args *a, struct image *i)
{
	auto_free uint8_t *buf = calloc(1, a->request);
	uint64_t off = 0;
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t n = 0; !r && n < a->count; n++) {
		r = image_write(i, buf, a->request, off);
		if (!r && a->cache && !strcmp(a->cache, "writethrough"))
			r = image_flush(i);
		off += a->request;
		off = off + a->request > image_size(i) ? 0 : off;
	}
	return r || (a->cache && !strcmp(a->cache, "unsafe")) ? r : image_flush(i);
}

static int bench_read_alone(struct disk_args *a, struct image *i)
{
	auto_free uint8_t *buf = malloc(a->request);
	uint64_t off = 0;
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t n = 0; !r && n < a->count; n++) {
		r = image_read(i, buf, a->request, off);
		off += a->request;
		off = off + a->request > image_size(i) ? 0 : off;
	}
	return r;
}

static int take_back(struct crew *c, bool *none)
{
	struct crew_job *j = crew_done(c, true);
	int r = j ? j->r : 0;

	*none = !j;
	if (j)
		crew_release(c, j);
	return r;
}

static int bench_read(struct disk_args *a, struct image *i)
{
	struct crew_how how = { .threads = (unsigned)a->depth, .room = a->request, .raw_fd = -1 };
	struct crew *c = crew_new(&how);
	uint64_t off = 0;
	bool none = false;
	int r = c ? 0 : -errno;

	for (uint64_t n = 0; !r && n < a->count; n++) {
		struct crew_job *j;

		while (!r && !(j = crew_idle(c)))
			r = take_back(c, &none);
		while (!r && j->len < a->request && j->nr < CREW_PIECES) {
			r = image_piece(i, off + j->len, a->request - j->len, &j->piece[j->nr]);
			if (!r)
				j->len += j->piece[j->nr++].len;
		}
		if (r)
			break;
		crew_submit(c, j);
		off += a->request;
		off = off + a->request > image_size(i) ? 0 : off;
	}
	while (!r && !none)
		r = take_back(c, &none);
	crew_free(c);
	return r;
}

int bench_work(struct disk_args *a, struct error *err)
{
	struct image *i;
	uint64_t start;
	double seconds;
	int r;

	r = disk_image(a, &i, 0, a->format, (struct image_how){ .readonly = !a->write }, err);
	if (r)
		return r;
	if (a->request > image_size(i)) {
		image_close(i);
		return error_set(err, EINVAL, "-s: the disk has only %llu bytes", (unsigned long long)image_size(i));
	}
	start = loop_now();
	r = a->write ? bench_write(a, i) : a->depth > 1 ? bench_read(a, i) : bench_read_alone(a, i);
	seconds = (double)(loop_now() - start) / 1e9;
	image_close(i);
	if (r)
		return error_errno(err, -r, "'%s'", a->file[0].path);
	if (a->json) {
		struct facts *f = facts_new();
		auto_free char *text = NULL;

		facts_u64(f, "requests", a->count);
		facts_u64(f, "request-size", a->request);
		facts_bool(f, "write", a->write);
		facts_f64(f, "seconds", seconds);
		facts_f64(f, "iops", (double)a->count / seconds);
		text = facts_text(f);
		printf("%s\n", text ? text : "{}");
		facts_free(f);
		return 0;
	}
	printf("%llu %s of %llu bytes: %.3f s, %.0f IOPS, %.1f MiB/s\n", (unsigned long long)a->count,
		a->write ? "writes" : "reads", (unsigned long long)a->request, seconds, (double)a->count / seconds,
		(double)a->count * (double)a->request / seconds / (1 << 20));
	return 0;
}
