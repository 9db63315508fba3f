#include "vmm/block.h"
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "format.h"
#include "gate.h"

static const char *const cache_names[] = { [CACHE_WRITEBACK] = "writeback", [CACHE_NONE] = "none",
	[CACHE_WRITETHROUGH] = "writethrough", [CACHE_UNSAFE] = "unsafe", NULL };

/* ---- opening; main thread ---- */

struct keys {
	const char *file;
	struct image_how how;
	bool discard, snapshot;
	enum cache_mode cache;
};

static int read_format(struct keys *k, struct opts *o, struct error *err)
{
	const char *names[16];
	int i = -1, n = 0, r;

	for (const char *const *f = image_formats(); *f; f++)
		names[n++] = *f;
	names[n++] = "vpc";             /* what QEMU calls vhd */
	names[n] = NULL;
	r = opts_choice(o, "format", names, &i, err);
	k->how.format = !r && i >= 0 ? names[i] : NULL;
	return r;
}

static int read_keys(struct keys *k, struct opts *o, struct error *err)
{
	/* on and off, or as QEMU says it */
	static const char *const discards[] = { "on", "off", "unmap", "ignore", NULL };
	int cache = CACHE_WRITEBACK, discard = 0, r;

	*k = (struct keys){ .file = opts_str(o, "file") };
	if ((r = read_format(k, o, err)) || (r = opts_bool(o, "ro", &k->how.readonly, err)) ||
		(r = opts_bool(o, "readonly", &k->how.readonly, err)) ||
		(r = opts_bool(o, "snapshot", &k->snapshot, err)) ||
		(r = opts_choice(o, "cache", cache_names, &cache, err)) ||
		(r = opts_choice(o, "discard", discards, &discard, err)))
		return r;
	k->how.backing_dir = opts_str(o, "backing");
	if (k->snapshot && k->how.readonly)
		return error_set(err, EINVAL, "%s: snapshot and ro at once: ro takes no writes that could be thrown away",
			opts_option(o));
	/* What is thrown away need not be kept safe. */
	k->cache = k->snapshot ? CACHE_UNSAFE : (enum cache_mode)cache;
	k->how.direct = cache == CACHE_NONE;
	k->how.readonly |= k->snapshot;
	k->discard = discard % 2 == 0;
	if (!k->file || !*k->file)
		return error_set(err, EINVAL, "%s: no file named: file=FILE", opts_option(o));
	return 0;
}

static void start(struct blk_req *r);
static void end(struct blk_req *r, int err);

int disk_open(struct disk **ret, struct opts *o, struct error *err)
{
	struct disk *d;
	struct keys k;
	int r = read_keys(&k, o, err);

	if (r)
		return r;
	d = calloc(1, sizeof(*d));
	if (!d)
		return error_set(err, ENOMEM, "%s: out of memory", opts_option(o));
	d->idle = true;
	d->cache = k.cache;
	d->discard = k.discard;
	d->writethrough = k.cache == CACHE_WRITETHROUGH;
	r = image_open(&d->image, k.file, &k.how, err);
	d->shown = d->image;
	if (!r && k.snapshot)
		r = image_overlay(&d->image, err);
	if (r) {
		error_prefix(err, "%s: ", opts_option(o));
		disk_close(d);
		return r;
	}
	r = gate_new(&d->gate, o, &(struct gate_door){ d->shown->path, start, end }, err);
	if (r) {
		disk_close(d);
		return r;
	}
	d->image->unsafe = k.cache == CACHE_UNSAFE;
	for (struct image *i = d->image; i; i = i->backing)
		i->blocking = false;
	*ret = d;
	return 0;
}

void disk_close(struct disk *d)
{
	int r;

	if (!d)
		return;
	assert(!d->inflight);
	map_free(d);
	gate_free(d->gate);
	r = image_close(d->image);
	if (r)
		log_error("a disk could not be written out: %s", strerrordesc_np(-r));
	free(d);
}

void disk_set_home(struct disk *d, struct loop *home)
{
	d->home = home;
	for (struct image *i = d->image; i; i = i->backing)
		i->file.home = home;
	if (d->gate)
		gate_set_home(d->gate, home);
}

void disk_set_hold(struct disk *d, void (*fn)(void *arg, bool on), void *arg)
{
	if (d->gate)
		gate_set_hold(d->gate, fn, arg);
}

/* ---- any thread ---- */

uint64_t disk_size(const struct disk *d)
{
	return d->image->size;
}

bool disk_readonly(const struct disk *d)
{
	return d->image->file.readonly;
}

bool disk_can_discard(const struct disk *d)
{
	return d->discard && !d->image->file.readonly;
}

bool disk_can_grow(const struct disk *d)
{
	return !d->image->fmt->map;
}

bool disk_has_writeback(const struct disk *d)
{
	return d->cache != CACHE_WRITETHROUGH;
}

uint32_t disk_block_size(const struct disk *d)
{
	return MAX(d->image->file.physical, d->image->file.align);
}

/* ---- requests; home loop ---- */

static void end(struct blk_req *r, int err)
{
	struct disk *d = r->disk;

	if (err == -ENOSPC || err == -EDQUOT || err == -EFBIG)
		log_guest(&d->limit, "'%s': a write failed: %s", d->image->path, strerrordesc_np(-err));
	d->inflight--;
	d->idle = d->inflight == 0;
	r->done(r, err);
}

static void finish(struct blk_req *r, int err)
{
	struct disk *d = r->disk;

	if (d->gate)
		gate_leave(d->gate, r, err, d->writethrough);
	else
		end(r, err);
}

/*
 * The kernel reports a lost write to one fdatasync() and then forgets it: the next would succeed although
 * the data is gone. So a failed one is never asked again. Metadata that could not be written is another matter:
 * it is still in memory, and the next flush tries again.
 */
void disk_sync_failed(struct disk *d, int err)
{
	if (!d->flush_failed)
		log_guest(&d->limit, "'%s': a flush failed (%s): every later one fails too", d->image->path,
			strerrordesc_np(-err));
	d->flush_failed = true;
}

static void synced(struct blk_req *r, int err)
{
	struct disk *d = r->disk;

	if (err && !d->image->fmt->map)
		disk_sync_failed(d, err);
	finish(r, err);
}

static void sync_request(struct disk *d, struct blk_req *r)
{
	if (d->cache == CACHE_UNSAFE)
		return finish(r, 0);
	if (d->flush_failed)
		return finish(r, -EIO);
	r->tries = 0;
	r->step = synced;
	if (d->image->fmt->map)
		map_flush(d, r);
	else
		file_sync(&d->image->file, r);
}

static void moved(struct blk_req *r, int err)
{
	struct disk *d = r->disk;

	if (!err && r->op != BLK_READ && r->op != BLK_DISCARD && d->writethrough)
		return sync_request(d, r);
	finish(r, err);
}

static int check(const struct disk *d, const struct blk_req *r)
{
	if (r->op == BLK_FLUSH)
		return 0;
	if (r->off > d->image->size || r->len > d->image->size - r->off || r->off % SECTOR || r->len % SECTOR)
		return -EINVAL;
	if (r->op != BLK_READ && d->image->file.readonly)
		return -EROFS;
	if (r->op == BLK_DISCARD && !d->discard)
		return -EOPNOTSUPP;
	return 0;
}

static void start(struct blk_req *r)
{
	struct disk *d = r->disk;

	if (r->op == BLK_FLUSH)
		return sync_request(d, r);
	if (!r->len)
		return finish(r, 0);
	if (d->image->fmt->map)
		return map_submit(d, r, moved);
	r->pos = r->off;
	r->left = r->len;
	r->step = moved;
	file_submit(&d->image->file, r);
}

void disk_submit(struct disk *d, struct blk_req *r)
{
	int err;

	ON_LOOP(d->home);
	r->disk = d;
	d->inflight++;
	d->idle = false;
	err = check(d, r);
	if (err)
		end(r, err);
	else if (d->gate)
		gate_enter(d->gate, r);
	else
		start(r);
}

void disk_drain(struct disk *d)
{
	ON_LOOP(d->home);
	loop_del_timer(d->home, &d->tidy);
	if (d->gate)
		gate_drain(d->gate);
	if (!d->idle)
		loop_drain(d->home, &d->idle);
	assert(d->idle);
	loop_del_timer(d->home, &d->tidy);      /* the last plan may have asked for another */
	if (d->gate)
		gate_drained(d->gate);
}

int disk_refresh_size(struct disk *d)
{
	struct image *i = d->image;
	off_t end = lseek(i->file.meta_fd, 0, SEEK_END);        /* of a block device, too */
	uint64_t size;

	ON_LOOP(d->home);
	if (end < 0)
		return -errno;
	size = (uint64_t)end - (uint64_t)end % MAX(SECTOR, i->file.align);
	if (size <= i->size)
		return size < i->size ? -ERANGE : 0;
	i->size = size;
	i->file.size = (uint64_t)end;
	return 1;
}

void disk_set_writethrough(struct disk *d, bool on)
{
	ON_LOOP(d->home);
	d->writethrough = on;
}

/* ---- main thread ---- */

void disk_describe(const struct disk *d, struct facts *f)
{
	facts_str(f, "file", d->shown->path);
	facts_str(f, "format", d->shown->fmt->name);
	facts_bool(f, "snapshot", d->shown != d->image);
	facts_u64(f, "size", d->image->size);
	facts_bool(f, "readonly", d->image->file.readonly);
	facts_str(f, "cache", cache_names[d->cache]);
	if (d->gate)
		gate_describe(d->gate, f);
}
