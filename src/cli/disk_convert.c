/*
 * vmm disk convert.
 *
 * How this works. The main thread walks the map of the source and cuts it into jobs, a chunk of the output each; the
 * crew fetches, decompresses, looks for zeroes and compresses. A raw output is written by the crew, too, each job where it
 * belongs; any other by the main thread, job after job, because an image belongs to one thread:
 *
 *      source map -> job: pieces -> crew: fetch, zeroes? -+-> raw: pwrite there
 *                                                         +-> main: image_write() in order
 *
 * Stretches that the map says are zero are never jobs. Chunks end at clusters of the output, and a cluster is zero or
 * written whole.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "disk.h"
#include "disk_crew.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define CHUNK       (256ull << 10)      /* stays in the cache of a CPU from read to write */
#define CHUNK_MOST  (2ull << 20)
#define UNIT_MOST   (64u << 10)
#define THREADS     16

struct conversion {
	struct disk_args *a;
	struct image *src[DISK_FILES], *dst, *backing;
	unsigned nr_src;
	uint64_t total, done;
	uint64_t chunk;
	size_t unit;            /* bytes that are zero or not as one; 0: all is written */
	bool raw;               /* the crew writes */
	bool blank;             /* where nothing is written, zeroes are read */
	struct crew_how how;
	struct crew *crew;
	struct disk_progress progress;
};

/* ---- parent ---- */

int convert_prepare(struct disk_args *a, struct error *err)
{
	unsigned dst = a->nr - 1;
	int r = disk_parse_create(a, a->out_format, err);

	if (!r && a->backing && !*a->backing)
		r = error_set(err, EINVAL, "-B '': name the backing file, or leave -B out");
	if (!r && a->no_create && (a->options || a->prealloc || a->backing))
		r = error_set(err, EINVAL, "-n writes into an image that is there: -o, -B and --preallocate are for making one");
	if (!r && a->backing && a->nr > 2)
		r = error_set(err, EINVAL, "-B: only one image can become an overlay");
	for (unsigned k = 0; !r && k < dst; k++)
		r = disk_open_file(a, k, false, err);
	r = r ? r : disk_open_backing(a, a->file[dst].path, err);
	if (r)
		return r;
	return a->no_create ? disk_open_file(a, dst, true, err) : disk_open_new(a, dst, err);
}

/* ---- opening; child ---- */

static int open_sources(struct conversion *v, struct error *err)
{
	for (unsigned k = 0; k + 1 < v->a->nr; k++) {
		int r = disk_image(v->a, &v->src[k], k, v->a->format,
			(struct image_how){ .readonly = true, .snapshot = v->a->snapshot }, err);

		if (r)
			return r;
		v->nr_src++;
		if (__builtin_add_overflow(v->total, image_size(v->src[k]), &v->total))
			return error_set(err, EFBIG, "a disk can have at most 64T");
	}
	return 0;
}

static int open_backing(struct conversion *v, struct error *err)
{
	struct disk_args *a = v->a;

	if (!a->backing_at)
		return 0;
	a->create.backing = a->backing;
	a->create.backing_format = a->backing_format;
	return disk_image(a, &v->backing, a->backing_at, a->backing_format, (struct image_how){ .readonly = true }, err);
}

static int open_output(struct conversion *v, struct error *err)
{
	struct disk_args *a = v->a;
	unsigned k = a->nr - 1;
	struct stat st;
	int r;

	if (!a->no_create) {
		a->create.size = v->total;
		a->create.overwrite = true;
		a->create.fd = dup(a->file[k].fd);
		r = image_create(a->file[k].path, &a->create, err);
		if (r)
			return r;
	}
	/* Alone is enough, and -B needs no leave for its name, unless part of a cluster is written. */
	r = disk_image(a, &v->dst, k, a->create.format, (struct image_how){ .alone = !a->no_create }, err);
	if (r)
		return r;
	if (image_size(v->dst) < v->total)
		return error_set(err, ENOSPC, "'%s' has only %llu bytes, %llu are needed", a->file[k].path,
			(unsigned long long)image_size(v->dst), (unsigned long long)v->total);
	if (fstat(a->file[k].fd, &st))
		return error_errno(err, errno, "cannot look at '%s'", a->file[k].path);
	v->blank = !a->no_create && !a->backing_at && S_ISREG(st.st_mode);
	return 0;
}

static int choose(struct conversion *v, struct error *err)
{
	struct disk_args *a = v->a;
	uint32_t cluster = image_cluster(v->dst);
	unsigned threads = a->threads ? (unsigned)a->threads : MIN(a->cpus, THREADS);

	v->raw = !cluster;
	if (a->compress && v->raw)
		return error_set(err, EOPNOTSUPP, "-c: format %s has no compression", image_format(v->dst));
	for (unsigned k = 0; a->compress && k + 1 < v->nr_src; k++)
		if (image_size(v->src[k]) % cluster)
			return error_set(err, EINVAL, "-c: '%s' does not end with a cluster: join the images first, then compress",
				a->file[k].path);
	if (a->compress && cluster > CHUNK_MOST)
		return error_set(err, EOPNOTSUPP, "-c: clusters of more than 2M");
	v->chunk = MIN(MAX(CHUNK, cluster), CHUNK_MOST);
	/* A cluster is written whole, unless it is so large that what stays a hole in the file is worth it. */
	v->unit = a->sparse ? MAX(a->sparse, MIN(cluster, UNIT_MOST)) : 0;
	v->how = (struct crew_how){ .threads = threads, .room = v->chunk, .unit = v->unit,
		.packs = a->compress && image_compresses(v->dst) ? v->dst : NULL,
		.raw_fd = v->raw ? a->file[a->nr - 1].fd : -1 };
	v->crew = crew_new(&v->how);
	return v->crew ? 0 : error_errno(err, errno, "cannot start %u threads (-m)", threads);
}

/* ---- what comes back ---- */

static int put_zeroes(struct conversion *v, uint64_t off, uint64_t len)
{
	return v->blank || !len ? 0 : image_zero(v->dst, off, len, true);
}

static int put_cluster(struct conversion *v, struct crew_job *j, uint64_t at, uint32_t cluster)
{
	uint64_t end = MIN(at + cluster, j->len), off = j->off + at;
	size_t packed = v->how.packs ? j->z_len[at / cluster] : 0;

	if (crew_zero(&v->how, j, at, end))
		return put_zeroes(v, off, end - at);
	if (!v->how.packs)
		return image_write_compressed(v->dst, j->buf + at, off);
	return packed ? image_write_packed(v->dst, j->z + at, packed, off)
		      : image_write(v->dst, j->buf + at, end - at, off);
}

static int put_compressed(struct conversion *v, struct crew_job *j)
{
	uint32_t cluster = image_cluster(v->dst);
	int r = 0;

	if (j->len % cluster)
		memset(j->buf + j->len, 0, cluster - j->len % cluster);
	for (uint64_t at = 0; !r && at < j->len; at += cluster)
		r = put_cluster(v, j, at, cluster);
	return r;
}

static int put_plain(struct conversion *v, struct crew_job *j)
{
	uint64_t at = 0;
	int r = 0;

	while (!r && at < j->len) {
		bool zero = v->unit && j->zero[at / v->unit];
		uint64_t end = at;

		while (end < j->len && (v->unit && j->zero[end / v->unit]) == zero)
			end = v->unit ? MIN(end + v->unit, j->len) : j->len;
		if (zero)
			r = put_zeroes(v, j->off + at, end - at);
		else if (!v->raw)
			r = image_write(v->dst, j->buf + at, end - at, j->off + at);
		at = end;
	}
	return r;
}

/* Take one back and put it where it belongs. 0 also where none is out: *none. */
static int put_one(struct conversion *v, bool *none, struct error *err)
{
	struct crew_job *j = crew_done(v->crew, v->raw || v->a->unordered);
	const char *dst = v->a->file[v->a->nr - 1].path;
	int r;

	*none = !j;
	if (!j)
		return 0;
	r = j->r;
	if (r)
		error_errno(err, -r, "offset %llu: cannot copy it%s", (unsigned long long)j->off,
			r == -EIO ? " (a damaged image: 'vmm disk check' tells more)" : "");
	if (!r) {
		r = v->a->compress ? put_compressed(v, j) : put_plain(v, j);
		if (r)
			error_errno(err, -r, "'%s': cannot write at offset %llu", dst, (unsigned long long)j->off);
	}
	v->done += j->len;
	disk_progress_at(&v->progress, v->done);
	crew_release(v->crew, j);
	return r;
}

/* ---- the walk ---- */

static bool is_nothing(const struct image_piece *p)
{
	return p->kind == EXT_ZERO || p->kind == EXT_HOLE;
}

static void add_piece(struct crew_job *j, const struct image_piece *p)
{
	struct image_piece *last = j->nr ? &j->piece[j->nr - 1] : NULL;

	if (last && last->kind == EXT_DATA && p->kind == EXT_DATA && last->file == p->file &&
		last->host + last->len == p->host)
		last->len += p->len;
	else
		j->piece[j->nr++] = *p;
	j->len += p->len;
}

/* What is the backing file's in both needs no copy: compare, a cluster at a time. */
static int keep_difference(struct conversion *v, struct image *src, struct crew_job *j, uint64_t at, uint64_t len)
{
	auto_free uint8_t *other = malloc(len);
	uint32_t cluster = MIN(image_cluster(v->dst), CHUNK_MOST);
	uint64_t size = image_size(v->backing);
	uint64_t have = j->off < size ? MIN(len, size - j->off) : 0;
	int r = other ? image_read(src, j->buf, len, at) : -ENOMEM;

	if (!r && have)
		r = image_read(v->backing, other, have, j->off);
	if (!r)
		memset(other + have, 0, len - have);
	for (uint64_t k = 0; !r && k < len; k += cluster) {
		uint64_t n = MIN(cluster, len - k);

		if (memcmp(j->buf + k, other + k, n))
			r = image_write(v->dst, j->buf + k, n, j->off + k);
	}
	return r;
}

/* Fill j with [at, at + len) of src. Raw: less is fine. */
static int fill(struct conversion *v, struct image *src, struct crew_job *j, uint64_t at, uint64_t len, bool *nothing,
	bool *shared)
{
	uint64_t end = at + len;

	*nothing = true;
	*shared = false;
	for (uint64_t pos = at; pos < end;) {
		struct image_piece p;
		int r;

		if (j->nr == CREW_PIECES) {
			if (v->raw)
				return 0;
			j->filled = true;
			j->len = len;
			*nothing = false;
			return image_read(src, j->buf, len, at);
		}
		r = image_piece(src, pos, end - pos, &p);
		if (r)
			return r;
		*nothing = *nothing && is_nothing(&p);
		*shared = *shared || p.depth || p.kind == EXT_HOLE;
		add_piece(j, &p);
		pos += p.len;
	}
	return 0;
}

/* Whole chunks of zeroes at this offset, in bytes; 0: look closer. */
static int skip(struct conversion *v, struct image *src, uint64_t at, uint64_t off, uint64_t *len)
{
	uint64_t left = image_size(src) - at;
	struct image_piece p;
	int r = image_piece(src, at, left, &p);

	*len = 0;
	if (r || !is_nothing(&p) || !v->unit || v->backing)
		return r;
	*len = p.len == left ? left : p.len - MIN(p.len, (off + p.len) % v->chunk);
	return 0;
}

static int source_failed(struct conversion *v, unsigned k, uint64_t at, int r, struct error *err)
{
	return error_errno(err, -r, "'%s': cannot read at offset %llu", v->a->file[k].path, (unsigned long long)at);
}

static int copy_chunk(struct conversion *v, unsigned k, uint64_t at, uint64_t off, uint64_t *done, struct error *err)
{
	struct image *src = v->src[k];
	uint64_t len = MIN(v->chunk - off % v->chunk, image_size(src) - at);
	bool nothing, shared, none;
	struct crew_job *j;
	int r = 0;

	while (!r && !(j = crew_idle(v->crew)))
		r = put_one(v, &none, err);
	if (r)
		return r;
	j->off = off;
	r = fill(v, src, j, at, len, &nothing, &shared);
	*done = j->len;
	if (!r && v->backing && shared) {
		*done = len;
		v->done += len;
		r = keep_difference(v, src, j, at, len);
	} else if (!r && nothing && v->unit) {
		v->done += j->len;
		r = put_zeroes(v, off, j->len);
	} else if (!r) {
		crew_submit(v->crew, j);
	}
	return r ? source_failed(v, k, at, r, err) : 0;
}

static int copy_source(struct conversion *v, unsigned k, uint64_t base, struct error *err)
{
	uint64_t size = image_size(v->src[k]), n;
	int r = 0;

	for (uint64_t at = 0; !r && at < size; at += n) {
		r = skip(v, v->src[k], at, base + at, &n);
		if (r)
			return source_failed(v, k, at, r, err);
		if (!n) {
			r = copy_chunk(v, k, at, base + at, &n, err);
			continue;
		}
		v->done += n;
		r = put_zeroes(v, base + at, n);
		if (r)
			error_errno(err, -r, "'%s': cannot write zeroes", v->a->file[v->a->nr - 1].path);
		disk_progress_at(&v->progress, v->done);
	}
	return r;
}

static int copy(struct conversion *v, struct error *err)
{
	uint64_t base = 0;
	bool none = false;
	int r = 0;

	disk_progress_start(&v->progress, v->a, v->total);
	for (unsigned k = 0; !r && k < v->nr_src; k++) {
		r = copy_source(v, k, base, err);
		base += image_size(v->src[k]);
	}
	if (!r && v->a->no_create)
		r = put_zeroes(v, base, image_size(v->dst) - base);
	while (!r && !none)
		r = put_one(v, &none, err);
	disk_progress_end(&v->progress, !r);
	return r;
}

int convert_work(struct disk_args *a, struct error *err)
{
	static struct conversion v;
	int r, e;

	v = (struct conversion){ .a = a };
	r = open_sources(&v, err);
	r = r ? r : open_backing(&v, err);
	r = r ? r : open_output(&v, err);
	r = r ? r : choose(&v, err);
	r = r ? r : copy(&v, err);
	crew_free(v.crew);
	e = image_close(v.dst);
	if (!r && e)
		r = error_errno(err, -e, "'%s': cannot write its metadata", a->file[a->nr - 1].path);
	image_close(v.backing);
	for (unsigned k = 0; k < v.nr_src; k++)
		image_close(v.src[k]);
	return r;
}
