/*
 * One guest request over an image that has a map.
 *
 * How this works. A `work` goes through its request piece by piece, each piece one extent:
 *
 *      read    map -> data: a transfer | zeroes: at once | compressed: a worker unpacks it
 *      write   alloc -> there: a transfer
 *                    -> fresh: [read what surrounds it] -> one transfer -> link or drop
 *      zero, discard   punch; what is less than a cluster is written as zeroes, or left alone
 *
 * Where the format says -EAGAIN the work waits in `stalled` and starts its piece again when a table has come in or a plan
 * is through; where it says -EBUSY (somebody else is filling that cluster), likewise when any fresh piece ends.
 *
 * One plan runs at a time, on a worker. A flush that comes meanwhile waits for the next. A plan's end is not
 * yet the end of what it set free: transfers that were started before it may still move. They carry the
 * epoch of their start; when the last of the old epoch is through, the format may reclaim.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/iov.h"
#include "format.h"

#define FILL_MAX   (32u << 20)  /* bytes of copy-on-write buffers of a disk at once; as many to unpack clusters */
#define ZERO_CHUNK (64u << 10)
#define PIECE_MAX  (2u << 20)   /* most zeroes written as one piece */
#define PIECES_MAX 16           /* of one request in one go; then the loop has its turn */
#define PUNCH_MAX  1024u        /* clusters of one piece of a discard */
#define TIDY_NS    1000000000ull
#define LOAD_TRIES 64           /* fruitless results in a row before the read of a table fails */

enum { STARTING, ENDED, UNDERWAY };

struct work {
	struct disk *disk;
	struct blk_req *req;
	void (*moved)(struct blk_req *r, int err);
	struct work *next;              /* free or stalled */
	uint64_t off, left;
	struct iovec *iov;              /* of what is left; NULL: zeroes */
	unsigned cnt;
	int phase, err;
	bool for_plan;                  /* stalled until a plan has run */

	/* the piece */
	uint64_t n;                     /* guest bytes */
	unsigned epoch;
	struct extent ext;
	struct alloc alloc;
	struct blk_req io;              /* the transfer */
	struct iovec part[BLK_IOVS + 2];
	struct loop_op op;              /* unpacking */
	const struct image *owner;
	uint8_t *buf;                   /* head and tail of a copy-on-write; a compressed cluster, packed and unpacked */
	size_t buf_size, head, tail;
	struct blk_req fill;            /* reads them */
	struct iovec fill_iov;
};

static uint8_t zeroes[ZERO_CHUNK] __attribute__((aligned(4096)));

static void run(struct work *w);
static void wake_all(struct disk *d);
static void plan_start(struct disk *d);
static void reclaim(struct disk *d);

/* ---- works ---- */

static struct work *work_new(struct disk *d)
{
	struct work *w = d->free;

	if (w)
		d->free = w->next;
	else
		w = calloc(1, sizeof(*w));
	return w;
}

static void work_start(struct disk *d, struct blk_req *r, void (*moved)(struct blk_req *r, int err))
{
	struct work *w = work_new(d);

	if (!w)
		return moved(r, -ENOMEM);
	w->disk = d;
	w->req = r;
	w->moved = moved;
	w->off = r->off;
	w->left = r->len;
	w->iov = r->op == BLK_READ || r->op == BLK_WRITE ? r->iov : NULL;
	w->cnt = r->cnt;
	w->err = 0;
	run(w);
}

static void work_end(struct work *w)
{
	struct disk *d = w->disk;
	struct blk_req *r = w->req;
	void (*moved)(struct blk_req *r, int err) = w->moved;
	int err = w->err;

	w->next = d->free;
	d->free = w;
	moved(r, err);
}

static void stall(struct work *w)
{
	w->phase = UNDERWAY;
	w->for_plan = false;
	w->next = w->disk->stalled;
	w->disk->stalled = w;
}

/* The piece is through. */
static void piece_done(struct work *w, int err)
{
	if (err && w->disk->image->marking)
		plan_start(w->disk);    /* the image is to say that it is corrupt */
	if (!err) {
		w->off += w->n;
		w->left -= w->n;
	}
	w->err = err;
	if (w->phase == STARTING)
		w->phase = ENDED;
	else
		run(w);
}

/* ---- transfers ---- */

static void enter_epoch(struct work *w)
{
	w->epoch = w->disk->epoch & 1;
	w->disk->moving[w->epoch]++;
}

static void leave_epoch(struct work *w)
{
	struct disk *d = w->disk;

	d->moving[w->epoch]--;
	if (d->draining && !d->moving[w->epoch] && w->epoch != (d->epoch & 1))
		reclaim(d);
}

/* The iovecs of the next n bytes into part, and past them. Returns how many. */
static unsigned take_iov(struct work *w, struct iovec *part, uint64_t n)
{
	unsigned cnt = 0;

	while (n) {
		size_t len = (size_t)MIN(n, w->iov->iov_len);

		part[cnt++] = (struct iovec){ w->iov->iov_base, len };
		n -= len;
		w->iov->iov_base = (uint8_t *)w->iov->iov_base + len;
		w->iov->iov_len -= len;
		if (!w->iov->iov_len && w->cnt > 1) {
			w->iov++;
			w->cnt--;
		}
	}
	return cnt;
}

static unsigned take_zeroes(struct iovec *part, uint64_t n)
{
	unsigned cnt = 0;

	for (; n; cnt++) {
		part[cnt] = (struct iovec){ zeroes, (size_t)MIN(n, ZERO_CHUNK) };
		n -= part[cnt].iov_len;
	}
	return cnt;
}

static void transfer(struct work *w, enum blk_op op, struct host_file *f, uint64_t pos, uint64_t len, unsigned cnt,
	void (*step)(struct blk_req *io, int err))
{
	w->io = (struct blk_req){ .op = op, .disk = w->disk, .work = w, .pos = pos, .left = len, .iov = w->part,
		.cnt = cnt, .step = step };
	enter_epoch(w);
	file_submit(f, &w->io);
}

static void transferred(struct blk_req *io, int err)
{
	struct work *w = io->work;

	leave_epoch(w);
	piece_done(w, err);
}

/* ---- metadata that is not in memory ---- */

static void load_done(struct loop_op *op, int res);

static void load_more(struct table_load *l)
{
	const struct table *t = l->table;

	l->op = (struct loop_op){ .kind = OP_READV, .fd = t->file->meta_fd, .iov = &t->iov, .cnt = 1,
		.off = t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data), .done = load_done };
	loop_submit(l->disk->home, &l->op);
}

static void load_done(struct loop_op *op, int res)
{
	struct table_load *l = container_of(op, struct table_load, op);
	struct disk *d = l->disk;
	struct tables *owner = l->table->owner;
	uint64_t off = l->table->off;

	if ((res == -EAGAIN || res == -EINTR) && l->tries++ < LOAD_TRIES)
		return load_more(l);
	l->tries = 0;
	table_loaded(l->table, res);
	if (l->table->loading)
		return load_more(l);
	l->table = NULL;
	d->inflight--;
	d->idle = !d->inflight;
	wake_all(d);
	tables_settle(owner, off);
}

/* One place stays for each table; where all are taken the work is woken by the next that ends. */
static void load(struct disk *d, struct table *t)
{
	struct table_load *l = NULL;

	for (unsigned k = 0; k < DISK_LOADS; k++) {
		if (d->load[k].table == t)
			return;
		if (!d->load[k].table)
			l = &d->load[k];
	}
	if (!l)
		return;
	l->disk = d;
	l->table = t;
	l->tries = 0;
	d->inflight++;          /* the request that wants it may end without it */
	d->idle = false;
	load_more(l);
}

/* err from a format: true where the work waits now. */
static bool waits(struct work *w, struct image *i, int err)
{
	struct disk *d = w->disk;

	if (err != -EAGAIN && err != -EBUSY)
		return false;
	stall(w);
	w->for_plan = err == -EAGAIN && i->want == WANT_PLAN;
	if (w->for_plan)
		plan_start(d);
	else if (err == -EAGAIN)
		load(d, i->want_table);
	return true;
}

static void wake_all(struct disk *d)
{
	struct work *w = d->stalled, *in_order = NULL;

	d->stalled = NULL;
	while (w) {
		struct work *next = w->next;

		w->next = in_order;
		in_order = w;
		w = next;
	}
	while (in_order) {
		w = in_order;
		in_order = w->next;
		run(w);
	}
}

/* ---- reading ---- */

static void copy_unpacked(struct work *w, const uint8_t *cluster)
{
	struct iov_view v;
	unsigned cnt = take_iov(w, w->part, w->n);

	v = (struct iov_view){ w->part, cnt, 0, (uint32_t)w->n };
	iov_write(&v, cluster + w->ext.skip, w->n);
}

static int unpack(struct loop_op *op)
{
	struct work *w = container_of(op, struct work, op);
	int r = meta_read(w->ext.file, w->buf + w->owner->cluster, w->ext.csize, w->ext.pos);

	return r ? r : w->owner->fmt->decompress(w->owner, w->buf + w->owner->cluster, w->ext.csize, w->buf);
}

static void unpacked(struct loop_op *op, int res)
{
	struct work *w = container_of(op, struct work, op);
	struct disk *d = w->disk;

	if (!res) {
		copy_unpacked(w, w->buf);
		free(d->z_data);        /* kept: the next read is likely of the same cluster */
		d->z_data = TAKE_PTR(w->buf);
		d->z_image = w->owner;
		d->z_pos = w->ext.pos;
	}
	free(w->buf);
	w->buf = NULL;
	d->z_bytes -= w->buf_size;
	w->buf_size = 0;
	leave_epoch(w);
	piece_done(w, res);
	if (d->stalled)
		wake_all(d);
}

static void read_compressed(struct work *w)
{
	struct disk *d = w->disk;

	if (d->z_image == w->owner && d->z_pos == w->ext.pos) {
		copy_unpacked(w, d->z_data);
		return piece_done(w, 0);
	}
	w->buf_size = (size_t)w->owner->cluster + w->ext.csize;
	if (d->z_bytes && d->z_bytes + w->buf_size > FILL_MAX) {
		w->buf_size = 0;
		return stall(w);        /* others have the memory: when one of them ends */
	}
	w->buf = malloc(w->buf_size);
	if (!w->buf) {
		w->buf_size = 0;
		return piece_done(w, -ENOMEM);
	}
	d->z_bytes += w->buf_size;
	w->op = (struct loop_op){ .kind = OP_WORK, .fd = -1, .work = unpack, .done = unpacked };
	enter_epoch(w);
	loop_submit(d->home, &w->op);
}

static void read_piece(struct work *w)
{
	struct image *owner;
	unsigned cnt;
	int r = image_map(w->disk->image, w->off, w->left, &w->ext, &owner);

	if (waits(w, owner, r))
		return;
	if (r)
		return piece_done(w, r);
	w->n = MIN(w->left, w->ext.len);
	w->owner = owner;
	switch (w->ext.kind) {
	case EXT_COMPRESSED:
		return read_compressed(w);
	case EXT_DATA:
		cnt = take_iov(w, w->part, w->n);
		return transfer(w, BLK_READ, w->ext.file, w->ext.pos, w->n, cnt, transferred);
	case EXT_ZERO:
	case EXT_HOLE:
		cnt = take_iov(w, w->part, w->n);
		for (unsigned i = 0; i < cnt; i++)
			memset(w->part[i].iov_base, 0, w->part[i].iov_len);
		return piece_done(w, 0);
	}
}

/* ---- writing ---- */

static void free_fill(struct work *w)
{
	w->disk->fill_bytes -= w->buf_size;
	free(w->buf);
	w->buf = NULL;
	w->buf_size = 0;
}

static void fresh_written(struct blk_req *io, int err)
{
	struct work *w = io->work;
	struct disk *d = w->disk;

	leave_epoch(w);
	free_fill(w);
	if (err)
		d->image->fmt->drop(d->image, &w->alloc);
	else
		d->image->fmt->link(d->image, &w->alloc);
	d->z_image = NULL;
	piece_done(w, err);
	if (d->stalled)
		wake_all(d);
}

static void write_fresh(struct work *w)
{
	unsigned cnt = 0;

	if (w->head)
		w->part[cnt++] = (struct iovec){ w->buf, w->head };
	cnt += w->iov ? take_iov(w, w->part + cnt, w->n) : take_zeroes(w->part + cnt, w->n);
	if (w->tail)
		w->part[cnt++] = (struct iovec){ w->buf + w->head, w->tail };
	transfer(w, BLK_WRITE, &w->disk->image->file, w->alloc.pos - w->head, w->head + w->n + w->tail, cnt,
		fresh_written);
}

static void fill_failed(struct work *w, int err)
{
	struct disk *d = w->disk;

	free_fill(w);
	d->image->fmt->drop(d->image, &w->alloc);
	piece_done(w, err);
	if (d->stalled)
		wake_all(d);
}

static void read_fill(struct work *w, uint64_t off, size_t len, uint8_t *to, void (*moved)(struct blk_req *, int))
{
	w->fill_iov = (struct iovec){ to, len };
	w->fill = (struct blk_req){ .op = BLK_READ, .disk = w->disk, .work = w, .off = off, .len = len,
		.iov = &w->fill_iov, .cnt = 1 };
	work_start(w->disk, &w->fill, moved);
}

static void tail_read(struct blk_req *r, int err)
{
	struct work *w = r->work;

	if (err)
		return fill_failed(w, err);
	write_fresh(w);
}

static void head_read(struct blk_req *r, int err)
{
	struct work *w = r->work;

	if (err)
		return fill_failed(w, err);
	if (w->tail)
		read_fill(w, w->off + w->n, w->tail, w->buf + w->head, tail_read);
	else
		write_fresh(w);
}

/* What surrounds the piece in its clusters must be there before they are linked. */
static void fill_around(struct work *w)
{
	struct image *i = w->disk->image;
	const struct alloc *a = &w->alloc;

	w->head = a->off - a->fill_off;
	w->tail = a->fill_end - (a->off + a->len);
	if (a->blank && image_reads_zero(i, a->fill_off, a->off))
		w->head = 0;
	if (a->blank && image_reads_zero(i, a->off + a->len, a->fill_end))
		w->tail = 0;
	if (!w->head && !w->tail)
		return write_fresh(w);
	w->buf_size = w->head + w->tail;
	if (w->disk->fill_bytes && w->disk->fill_bytes + w->buf_size > FILL_MAX) {
		w->buf_size = 0;
		i->fmt->drop(i, &w->alloc);     /* others have the memory: when one of them ends */
		return stall(w);
	}
	w->disk->fill_bytes += w->buf_size;
	if (posix_memalign((void **)&w->buf, 4096, w->buf_size)) {
		w->buf = NULL;
		return fill_failed(w, -ENOMEM);
	}
	if (w->head)
		read_fill(w, a->fill_off, w->head, w->buf, head_read);
	else
		read_fill(w, w->off + w->n, w->tail, w->buf, tail_read);
}

static void write_piece(struct work *w, uint64_t len)
{
	struct image *i = w->disk->image;
	unsigned cnt;
	int r = i->corrupt ? -EIO : i->fmt->alloc(i, w->off, len, &w->alloc);

	if (waits(w, i, r))
		return;
	if (r)
		return piece_done(w, r);
	w->n = w->alloc.len;
	if (w->alloc.fresh)
		return fill_around(w);
	cnt = w->iov ? take_iov(w, w->part, w->n) : take_zeroes(w->part, w->n);
	transfer(w, BLK_WRITE, &i->file, w->alloc.pos, w->n, cnt, transferred);
}

static void tidy(struct loop_timer *t)
{
	plan_start(container_of(t, struct disk, tidy));
}

static void tidy_soon(struct disk *d)
{
	d->tidy.fn = tidy;
	if (!d->tidy.slot)
		loop_set_timer(d->home, &d->tidy, loop_now() + TIDY_NS);
}

static void punch_piece(struct work *w)
{
	struct disk *d = w->disk;
	struct image *i = d->image;
	enum punch_kind kind = w->req->op == BLK_DISCARD ? PUNCH_DISCARD : w->req->unmap ? PUNCH_UNMAP : PUNCH_ZERO;
	uint64_t done = 0, part = w->left, len = MIN(w->left, (uint64_t)PUNCH_MAX * i->cluster);
	int r = i->corrupt ? -EIO : i->fmt->punch ? i->fmt->punch(i, w->off, len, kind, &done, &part) : 0;

	if (waits(w, i, r))
		return;
	if (!r && done) {
		d->z_image = NULL;
		tidy_soon(d);
	}
	w->n = MIN(done ? done : part, w->left);
	if (r || done || kind == PUNCH_DISCARD || image_reads_zero(i, w->off, w->off + w->n))
		return piece_done(w, r);
	write_piece(w, MIN(w->n, PIECE_MAX));
}

/* ---- the request ---- */

static void piece(struct work *w)
{
	switch (w->req->op) {
	case BLK_READ:
		return read_piece(w);
	case BLK_WRITE:
		return write_piece(w, w->left);
	case BLK_DISCARD:
	case BLK_ZERO:
		return punch_piece(w);
	case BLK_FLUSH:
		return piece_done(w, -EINVAL);
	}
}

static int nothing(struct loop_op *op)
{
	(void)op;
	return 0;
}

static void had_its_turn(struct loop_op *op, int res)
{
	(void)res;
	run(container_of(op, struct work, op));
}

/* By way of a worker: a drain waits for what is submitted, and for nothing else. */
static void give_way(struct work *w)
{
	w->phase = UNDERWAY;
	w->op = (struct loop_op){ .kind = OP_WORK, .fd = -1, .work = nothing, .done = had_its_turn };
	loop_submit(w->disk->home, &w->op);
}

static void run(struct work *w)
{
	for (unsigned n = 0; w->left && !w->err; n++) {
		if (n == PIECES_MAX)
			return give_way(w);
		w->phase = STARTING;
		piece(w);
		if (w->phase != ENDED) {
			w->phase = UNDERWAY;
			return;
		}
	}
	work_end(w);
}

void map_submit(struct disk *d, struct blk_req *r, void (*moved)(struct blk_req *r, int err))
{
	work_start(d, r, moved);
}

/* ---- plans ---- */

static void answer(struct blk_req *list, int err)
{
	while (list) {
		struct blk_req *r = list;

		list = r->next;
		r->step(r, err);
	}
}

/* Who waits for a clean table would wait for ever: the plan cannot be written. The others are woken. */
static void fail_stalled(struct disk *d, int err)
{
	struct work *w = TAKE_PTR(d->stalled);

	while (w) {
		struct work *next = w->next;

		if (w->for_plan)
			piece_done(w, err);
		else
			stall(w);
		w = next;
	}
}

static void end_plan(struct disk *d)
{
	d->planning = d->draining = false;
	d->inflight--;
	d->idle = !d->inflight;
	if (d->plan_wanted || d->flush_next)
		plan_start(d);
	wake_all(d);
}

/* The plan ran, and nothing of before it moves any more. Also after a failure: two epochs are told apart, not three. */
static void reclaim(struct disk *d)
{
	struct image *i = d->image;

	if (!d->plan_err && i->fmt->reclaim && i->fmt->reclaim(i))
		tidy_soon(d);
	end_plan(d);
}

static int run_plan(struct loop_op *op)
{
	struct disk *d = container_of(op, struct disk, plan_op);
	struct plan *p = &d->plan;
	int r = d->plan_err ? d->plan_err : plan_run(p, &d->image->file);

	if (r || p->no_barriers || (p->n && p->step[p->n - 1].kind == PLAN_BARRIER))
		return r;
	r = meta_sync(&d->image->file);
	p->sync_failed = r;
	return r;
}

static void plan_done(struct loop_op *op, int res)
{
	struct disk *d = container_of(op, struct disk, plan_op);
	struct blk_req *list = TAKE_PTR(d->flushing);
	struct image *i = d->image;

	if (d->plan.sync_failed)
		disk_sync_failed(d, res);       /* also where no flush asked for this one */
	plan_clear(&d->plan);
	if (i->fmt->gathered)
		i->fmt->gathered(i, res);
	i->gathering = false;
	if (!res && i->corrupt && !i->file.readonly)
		res = -EIO;             /* what is dirty is never written */
	d->z_image = NULL;
	answer(list, res);
	if (res) {
		d->plan_wanted = false;
		answer(TAKE_PTR(d->flush_next), res);
		fail_stalled(d, res);
	}
	d->plan_err = res;
	if (d->moving[(d->epoch + 1) & 1]) {
		d->draining = true;
	} else {
		reclaim(d);
	}
}

/* Formats that are only read have nothing to say. */
static int gather(struct image *i, struct plan *p)
{
	return !i->fmt->gather || (i->corrupt && !i->marking) ? 0 : i->fmt->gather(i, p);
}

/* What cannot be gathered fails like what cannot be written: not before the caller has returned, who may hold a work. */
static void plan_start(struct disk *d)
{
	if (d->planning) {
		d->plan_wanted = true;
		return;
	}
	d->planning = true;
	d->plan_wanted = false;
	d->inflight++;
	d->idle = false;
	d->flushing = TAKE_PTR(d->flush_next);
	d->image->gathering = true;
	d->plan.no_barriers = d->image->unsafe;
	d->epoch++;
	loop_del_timer(d->home, &d->tidy);
	d->plan_err = gather(d->image, &d->plan);
	d->plan_op = (struct loop_op){ .kind = OP_WORK, .fd = -1, .work = run_plan, .done = plan_done };
	loop_submit(d->home, &d->plan_op);
}

void map_flush(struct disk *d, struct blk_req *r)
{
	struct blk_req **at = &d->flush_next;

	while (*at)
		at = &(*at)->next;
	r->next = NULL;
	*at = r;
	plan_start(d);
}

void map_free(struct disk *d)
{
	while (d->free) {
		struct work *w = d->free;

		d->free = w->next;
		free(w);
	}
	free(d->z_data);
	d->z_data = NULL;
}
