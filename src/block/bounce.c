/*
 * O_DIRECT transfers that the file system would refuse: guest buffers, offsets or lengths that are not
 * aligned as it wants.
 *
 * How this works. One aligned buffer per file (64 KiB, however large and many the requests are); the
 * first request in the queue owns it, the others wait. The owner moves in chunks: the aligned stretch
 * around the next bytes is read, then either copied out, or overlaid with the guest's bytes and written
 * back. A write that fills its stretch is not read first.
 *
 *   chunk -> [reading -> copy out | overlay] -> [writing] -> chunk … -> step(), next in the queue
 *
 * The owner being alone is what makes read-modify-write safe between unaligned writes. An aligned write
 * in flight covers whole blocks, so it can only collide with one of these where the guest itself writes
 * the same bytes twice at once.
 */
#include <errno.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/iov.h"
#include "format.h"

bool bounce_wanted(const struct host_file *f, const struct blk_req *r)
{
	uint64_t mem = 0;

	if (f->align == 1)
		return false;
	for (unsigned i = 0; i < r->cnt; i++)
		mem |= (uintptr_t)r->iov[i].iov_base | r->iov[i].iov_len;
	return (r->pos | r->left) % f->align || mem % f->mem_align;
}

static void chunk(struct host_file *f);

/* Copy n bytes between the buffer and the request, and advance it. */
static void copy(struct host_file *f, struct blk_req *r, size_t n)
{
	struct iov_view v = { r->iov, r->cnt, 0, r->left };
	uint8_t *at = (uint8_t *)f->bounce + (r->pos - f->bounce_base);

	if (r->op == BLK_READ)
		iov_write(&v, at, n);
	else
		iov_read(&v, at, n);
	/* The view moved over whole iovecs; cut the one it stands in. */
	r->cnt -= (unsigned)(v.iov - r->iov);
	r->iov = (struct iovec *)v.iov;
	if (v.skip) {
		r->iov->iov_base = (uint8_t *)r->iov->iov_base + v.skip;
		r->iov->iov_len -= v.skip;
	}
	r->left -= n;
	r->pos += n;
	r->tries = 0;
}

static void finish(struct host_file *f, int err)
{
	struct blk_req *r = f->bounce_first;

	f->bounce_first = r->next;
	if (f->bounce_first)
		chunk(f);
	r->step(r, err);
}

/* Bytes of the request that lie in the present stretch. */
static size_t wanted(const struct host_file *f, const struct blk_req *r)
{
	return (size_t)MIN(r->left, f->bounce_base + f->bounce_span - r->pos);
}

static void stretch_submit(struct host_file *f, enum loop_op_kind kind, void (*done)(struct loop_op *, int))
{
	struct blk_req *r = f->bounce_first;

	r->one = (struct iovec){ (uint8_t *)f->bounce + f->bounce_got, f->bounce_span - f->bounce_got };
	r->io = (struct loop_op){ .kind = kind, .fd = f->fd, .off = f->bounce_base + f->bounce_got,
		.iov = &r->one, .cnt = 1, .done = done };
	loop_submit(f->home, &r->io);
}

static void write_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);
	struct host_file *f = file_of(r);

	/* A short O_DIRECT write that is not aligned cannot be continued. */
	if (res == 0 || (res > 0 && (unsigned)res % f->align))
		return finish(f, -EIO);
	if (res < 0 && !file_retry(r, res))
		return finish(f, res);
	f->bounce_got += res > 0 ? (unsigned)res : 0;
	if (f->bounce_got < f->bounce_span)
		return stretch_submit(f, OP_WRITEV, write_done);
	if (!r->left)
		return finish(f, 0);
	chunk(f);
}

static void overlay_and_write(struct host_file *f, struct blk_req *r)
{
	copy(f, r, wanted(f, r));
	f->bounce_got = 0;
	stretch_submit(f, OP_WRITEV, write_done);
}

/* The file ends inside the stretch. */
static void read_short(struct host_file *f, struct blk_req *r)
{
	size_t have = f->bounce_got, skip = (size_t)(r->pos - f->bounce_base);
	int err;

	if (r->op == BLK_WRITE) {       /* it may grow: what it did not have was zero */
		memset((uint8_t *)f->bounce + have, 0, f->bounce_span - have);
		return overlay_and_write(f, r);
	}
	if (have > skip)
		copy(f, r, MIN(wanted(f, r), have - skip));
	err = r->left ? file_at_end(r) : 0;
	finish(f, err);
}

static void read_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);
	struct host_file *f = file_of(r);

	if (res < 0 && !file_retry(r, res))
		return finish(f, res);
	f->bounce_got += res > 0 ? (unsigned)res : 0;
	if (f->bounce_got < f->bounce_span) {
		if (res == 0 || f->bounce_got % f->align)
			return read_short(f, r);
		return stretch_submit(f, OP_READV, read_done);
	}
	if (r->op == BLK_WRITE)
		return overlay_and_write(f, r);
	copy(f, r, wanted(f, r));
	if (!r->left)
		return finish(f, 0);
	chunk(f);
}

static void chunk(struct host_file *f)
{
	struct blk_req *r = f->bounce_first;
	uint64_t end;

	f->bounce_base = r->pos - r->pos % f->align;
	end = r->pos + MIN(r->left, BOUNCE_SIZE - (r->pos - f->bounce_base));
	f->bounce_span = (size_t)((end + f->align - 1) / f->align * f->align - f->bounce_base);
	f->bounce_got = 0;
	if (r->op == BLK_WRITE && r->pos == f->bounce_base && end == f->bounce_base + f->bounce_span)
		overlay_and_write(f, r);
	else
		stretch_submit(f, OP_READV, read_done);
}

void bounce_submit(struct host_file *f, struct blk_req *r)
{
	bool busy = f->bounce_first;

	r->next = NULL;
	if (busy)
		f->bounce_last->next = r;
	else
		f->bounce_first = r;
	f->bounce_last = r;
	if (!busy)
		chunk(f);
}
