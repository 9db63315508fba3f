/*
 * vmm disk commit, rebase: data that goes from an overlay to its backing file, and the other way.
 *
 * How this works. commit writes what the overlay itself holds into the backing image and makes that durable; only
 * then the overlay is emptied: an empty one is made beside it and takes its name, so that at any instant the
 * name stands for an image that reads the same. rebase copies what the new backing file has otherwise into the
 * overlay and makes that durable; only then the overlay names the new one.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "disk.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"

#define CHUNK (1u << 20)

/* ---- commit ---- */

/* The empty overlay will take this one's place: same owner, same mode. */
static int open_fresh(struct disk_args *a, struct error *err)
{
	struct stat st;

	if (asprintf(&a->fresh, "%s.XXXXXX", a->file[0].path) < 0) {
		a->fresh = NULL;
		return error_set(err, ENOMEM, "out of memory");
	}
	a->fresh_fd = mkostemp(a->fresh, O_CLOEXEC);
	if (a->fresh_fd < 0) {
		int r = error_errno(err, errno, "cannot make an empty overlay beside '%s' (-d leaves it as it is)",
			a->file[0].path);

		free(TAKE_PTR(a->fresh));
		return r;
	}
	if (fstat(a->file[0].fd, &st) || fchmod(a->fresh_fd, st.st_mode & 07777) ||
		(fchown(a->fresh_fd, st.st_uid, st.st_gid) && errno != EPERM))
		return error_errno(err, errno, "cannot make '%s' like '%s'", a->fresh, a->file[0].path);
	return 0;
}

int commit_prepare(struct disk_args *a, struct error *err)
{
	int r;

	if (!a->backing && !a->backing_rule)
		return error_set(err, EINVAL, "name the file that is written to (-b FILE), or allow what the image names "
			"(--backing=allow, --backing=DIR)");
	r = disk_open_file(a, 0, true, err);
	if (!r && a->backing) {
		a->backing_at = 1;
		a->file[1].path = a->backing;
		r = disk_open_file(a, 1, true, err);
	}
	if (!r && !a->keep)
		r = open_fresh(a, err);
	return r;
}

int commit_finish(struct disk_args *a, struct error *err)
{
	if (!a->fresh)
		return 0;
	if (rename(a->fresh, a->file[0].path))
		return error_errno(err, errno, "all of it is in the backing file, but '%s' could not be emptied",
			a->file[0].path);
	free(TAKE_PTR(a->fresh));
	return 0;
}

static int open_target(struct disk_args *a, struct image *top, struct image **ret, struct error *err)
{
	unsigned k = 1;

	if (!image_backing_name(top))
		return error_set(err, EINVAL, "'%s' has no backing file", a->file[0].path);
	if (!image_backing_format(top))
		return error_set(err, EINVAL, "'%s' does not say which format its backing file has: 'vmm disk rebase -u -b "
			"FILE -F FORMAT %s' says it", a->file[0].path, a->file[0].path);
	a->file[k].fd = disk_backing_for_writing(a, top, err);
	if (a->file[k].fd < 0)
		return a->file[k].fd;
	a->file[k].path = disk_beside(a->file[0].path, image_backing_name(top));
	if (!a->file[k].path)
		return error_set(err, ENOMEM, "out of memory");
	return disk_image(a, ret, k, image_backing_format(top), (struct image_how){ .readonly = false }, err);
}

static int copy_down(struct image *top, struct image *to, struct disk_progress *p)
{
	auto_free uint8_t *buf = malloc(CHUNK);
	uint64_t size = image_size(top);
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t off = 0; !r && off < size;) {
		struct image_status s;
		uint64_t n;

		r = image_status(top, off, size - off, &s);
		if (r)
			break;
		n = s.len;
		if (s.kind == EXT_DATA || s.kind == EXT_COMPRESSED) {
			n = MIN(n, CHUNK);
			r = image_read(top, buf, n, off);
			r = r ? r : image_write(to, buf, n, off);
		} else if (s.kind == EXT_ZERO) {
			r = image_zero(to, off, n, true);
		}
		off += n;
		disk_progress_at(p, off);
	}
	return r;
}

/* What the overlay was made with, as its description has it. */
static void take_over(void *arg, const char *key, const char *text)
{
	struct image_create *c = arg;

	if (!strcmp(key, "version"))
		c->version = (unsigned)strtoul(text, NULL, 10);
	else if (!strcmp(key, "refcount_bits"))
		c->refcount_bits = (unsigned)strtoul(text, NULL, 10);
	else if (!strcmp(key, "extended_l2"))
		c->extended_l2 = !strcmp(text, "true");
	else if (!strcmp(key, "compression_type"))
		c->zstd = !strcmp(text, "zstd");
}

static int make_fresh(struct disk_args *a, struct image *top, struct error *err)
{
	struct image_create c = { .format = image_format(top), .size = image_size(top), .cluster = image_cluster(top),
		.backing = image_backing_name(top), .backing_format = image_backing_format(top), .overwrite = true,
		.fd = dup(a->fresh_fd) };
	auto_free struct image_snapshot *list = NULL;
	struct facts *f = facts_new();
	unsigned n = 0;

	image_describe(top, f);
	facts_each(f, take_over, &c);
	facts_free(f);
	if (!image_snapshots(top, &list, &n, NULL) && n)
		return error_set(err, EBUSY, "all of it is in the backing file, but '%s' is not emptied: it has %u snapshots "
			"(-d leaves it as it is)", a->file[0].path, n);
	return image_create(a->fresh, &c, err);
}

int commit_work(struct disk_args *a, struct error *err)
{
	struct image *top, *to = NULL;
	struct disk_progress p;
	int r, e;

	r = disk_image(a, &top, 0, a->format, (struct image_how){ .alone = true }, err);
	if (r)
		return r;
	r = open_target(a, top, &to, err);
	if (!r && image_size(to) < image_size(top))
		r = image_resize(to, image_size(top), PREALLOC_OFF, false, err);
	if (!r) {
		disk_progress_start(&p, a, image_size(top));
		r = copy_down(top, to, &p);
		r = r ? r : image_flush(to);
		disk_progress_end(&p, !r);
		if (r)
			error_errno(err, -r, "cannot write it into '%s'; nothing is lost, '%s' still has all of it",
				a->file[1].path, a->file[0].path);
	}
	e = image_close(to);
	if (!r && e)
		r = error_errno(err, -e, "'%s': cannot write its metadata", a->file[1].path);
	if (!r && a->fresh)
		r = make_fresh(a, top, err);
	image_close(top);
	return r;
}

/* ---- rebase ---- */

int rebase_prepare(struct disk_args *a, struct error *err)
{
	int r;

	if (!a->backing)
		return error_set(err, EINVAL, "say also the new backing file: -b FILE -F FMT, or -b '' for none");
	if (!*a->backing && a->backing_format)
		return error_set(err, EINVAL, "-F %s: the format of a backing file, but -b '' says there is none", a->backing_format);
	r = disk_open_file(a, 0, true, err);
	if (r || !*a->backing)
		return r;
	if (!a->unsafe)
		return disk_open_backing(a, a->file[0].path, err);
	return a->backing_format ? 0 : error_set(err, EINVAL, "-b %s: say also its format (-F raw, -F qcow2)", a->backing);
}

static int read_beyond(struct image *i, uint8_t *buf, size_t len, uint64_t off)
{
	size_t have = !i || off >= image_size(i) ? 0 : MIN(len, image_size(i) - off);

	memset(buf + have, 0, len - have);
	return have ? image_read(i, buf, have, off) : 0;
}

/* [off, off + len) comes from the backing file: keep what differs in the new one. */
static int keep_stretch(struct image *top, struct image *to, uint64_t off, uint64_t len, uint8_t *buf)
{
	size_t unit = image_cluster(top) ? MIN(image_cluster(top), CHUNK) : CHUNK;

	while (len) {
		size_t n = MIN(len, unit - off % unit);
		int r = image_read(top, buf, n, off);

		r = r ? r : read_beyond(to, buf + CHUNK, n, off);
		if (!r && memcmp(buf, buf + CHUNK, n))
			r = image_write(top, buf, n, off);
		if (r)
			return r;
		off += n;
		len -= n;
	}
	return 0;
}

static int keep_content(struct image *top, struct image *to, struct disk_progress *p)
{
	auto_free uint8_t *buf = malloc(2 * CHUNK);
	uint64_t size = image_size(top);
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t off = 0; !r && off < size;) {
		struct image_status s;

		r = image_status(top, off, MIN(size - off, 64ull * CHUNK), &s);
		if (r)
			break;
		if (s.depth || s.kind == EXT_HOLE) {
			s.len = MIN(s.len, CHUNK);
			/* Neither has anything there. */
			if (s.kind != EXT_HOLE || to)
				r = keep_stretch(top, to, off, s.len, buf);
		}
		off += s.len;
		disk_progress_at(p, off);
	}
	return r ? r : image_flush(top);
}

static int rebase_safely(struct disk_args *a, struct image *top, struct error *err)
{
	struct image *to = NULL;
	struct disk_progress p;
	int r = 0;

	if (a->backing_at)
		r = disk_image(a, &to, a->backing_at, a->backing_format, (struct image_how){ .readonly = true }, err);
	if (r)
		return r;
	disk_progress_start(&p, a, image_size(top));
	r = keep_content(top, to, &p);
	disk_progress_end(&p, !r);
	image_close(to);
	return r ? error_errno(err, -r, "cannot copy what the backing files have otherwise; '%s' is as it was", a->file[0].path)
		 : 0;
}

int rebase_work(struct disk_args *a, struct error *err)
{
	const char *name = *a->backing ? a->backing : NULL;
	struct image *top;
	int r, e;

	r = disk_image(a, &top, 0, a->format, (struct image_how){ .alone = a->unsafe }, err);
	if (r)
		return r;
	if (!a->unsafe)
		r = rebase_safely(a, top, err);
	if (!r)
		r = image_set_backing(top, name, name ? a->backing_format : NULL, err);
	if (r && !err->msg[0])
		error_errno(err, -r, "'%s': cannot change the name of its backing file", a->file[0].path);
	e = image_close(top);
	return !r && e ? error_errno(err, -e, "'%s': cannot write its metadata", a->file[0].path) : r;
}
