/*
 * virtio-blk (virtio 1.2, 5.2).
 *
 * How this works. A chain is a 16-byte header, data, and one status byte, cut into descriptors anywhere.
 * What carries data gets a slot: the disk's request, the iovecs of the data and the place of the status
 * byte. Slots come from slabs that are made when the guest's depth first asks for them and are kept;
 * there can never be more than the rings have heads. All queues live on one loop, so the slots need no
 * lock. A request that the guest got wrong fails with a status; one without a place for a status, or
 * that breaks a rule of its kind's shape, breaks the device.
 *
 * Discard and write zeroes may have several segments. They are copied into the slot, all checked, and then
 * done one after the other with the slot's one disk request:
 *
 *      check all -> [segment] -> done: next segment | failed, or the last: answer
 */
#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ids.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include "blk_config.h"
#include "vmm/block.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

#define SECTOR     BLK_SECTOR
#define SLAB_SLOTS 16
#define RESIZE_NS  1000000000ull        /* between two looks at the host file's size */

struct slot {
	struct blk_req req;
	struct blk *b;
	struct virtq *q;
	uint16_t head;
	uint32_t in_len;                /* bytes that a success stores before the status byte */
	uint8_t *status;
	struct slot *next;              /* free */
	unsigned segs, at;              /* discard, write zeroes: segments in all, and done */
	bool submitting;                /* run_segments() is on the stack */
	bool ended;                     /* the segment it submitted is; with err */
	int err;
	union {
		struct iovec iov[BLK_IOVS];
		struct virtio_blk_discard_write_zeroes seg[BLK_IOVS];
	};
};

struct slab {
	struct slab *next;
	struct slot slot[SLAB_SLOTS];
};

struct count {
	_Atomic uint64_t n;             /* written by the home loop only */
};

struct blk {
	struct virtio v;
	struct vm *vm;
	struct disk *disk;
	struct blk_shape shape;

	/* home loop */
	struct slot *free;
	struct slab *slabs;
	struct loop_timer resize;
	bool shrunk;                    /* the host file is smaller than the disk, and that was said */
	bool live;                      /* between start and stop */
	bool writeback;                 /* what the driver wants, where it may choose */
	struct count reads, writes, flushes, discards, bytes_read, bytes_written, errors;
};

static void count_add(struct count *c, uint64_t n)
{
	atomic_store_explicit(&c->n, atomic_load_explicit(&c->n, memory_order_relaxed) + n,
		memory_order_relaxed);
}

static uint64_t count_get(const struct count *c)
{
	return atomic_load_explicit(&c->n, memory_order_relaxed);
}

/* ---- slots; home loop ---- */

static void put_slot(struct blk *b, struct slot *s)
{
	s->next = b->free;
	b->free = s;
}

static int add_slab(struct blk *b)
{
	struct slab *slab = calloc(1, sizeof(*slab));

	if (!slab)
		return -ENOMEM;
	slab->next = b->slabs;
	b->slabs = slab;
	for (unsigned i = 0; i < SLAB_SLOTS; i++) {
		slab->slot[i].b = b;
		put_slot(b, &slab->slot[i]);
	}
	return 0;
}

static struct slot *take_slot(struct blk *b)
{
	struct slot *s;

	if (!b->free && add_slab(b))
		return NULL;
	s = b->free;
	b->free = s->next;
	return s;
}

/* ---- completion; home loop ---- */

/* written: bytes stored before the status byte, as a length from the chain's start. */
static void answer(struct blk *b, struct virtq *q, uint16_t head, uint8_t *at, uint8_t status,
	uint32_t written)
{
	if (status != VIRTIO_BLK_S_OK)
		count_add(&b->errors, 1);
	*(volatile uint8_t *)at = status;
	virtq_push(q, head, written + 1);
}

static uint8_t status_of(int err)
{
	return !err ? VIRTIO_BLK_S_OK : err == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

static void count_success(struct blk *b, const struct blk_req *r)
{
	switch (r->op) {
	case BLK_READ:
		count_add(&b->reads, 1);
		count_add(&b->bytes_read, r->len);
		break;
	case BLK_WRITE:
		count_add(&b->writes, 1);
		count_add(&b->bytes_written, r->len);
		break;
	case BLK_FLUSH:
		count_add(&b->flushes, 1);
		break;
	case BLK_DISCARD:
	case BLK_ZERO:
		count_add(&b->discards, 1);
		break;
	}
}

static void request_done(struct blk_req *r, int err)
{
	struct slot *s = container_of(r, struct slot, req);
	struct blk *b = s->b;

	if (!err)
		count_success(b, r);
	answer(b, s->q, s->head, s->status, status_of(err), err ? 0 : s->in_len);
	put_slot(b, s);
}

/* ---- requests; home loop ---- */

/* One chain, taken apart: the header and the status byte are off its ends. */
struct parsed {
	struct virtq *q;
	uint16_t head;
	uint32_t type;
	uint64_t sector;
	struct iov_view out, in;        /* what is between them */
	uint8_t *status;
};

static void fail(struct blk *b, const struct parsed *p, uint8_t status)
{
	answer(b, p->q, p->head, p->status, status, 0);
}

static struct slot *slot_for(struct blk *b, const struct parsed *p, enum blk_op op)
{
	struct slot *s = take_slot(b);

	if (!s)
		return NULL;
	s->q = p->q;
	s->head = p->head;
	s->status = p->status;
	s->in_len = 0;
	s->req.op = op;
	s->req.unmap = false;
	s->req.off = s->req.len = 0;
	s->req.iov = s->iov;
	s->req.cnt = 0;
	s->req.done = request_done;
	return s;
}

static bool whole_blocks(const struct blk *b, uint64_t sectors)
{
	return !(sectors & (b->shape.logical / SECTOR - 1));
}

static bool segments_fit(const struct blk *b, const struct slot *s)
{
	for (unsigned i = 0; b->shape.size_max && i < s->req.cnt; i++)
		if (s->iov[i].iov_len > b->shape.size_max)
			return false;
	return true;
}

static void transfer(struct blk *b, const struct parsed *p, enum blk_op op)
{
	const struct iov_view *data = op == BLK_READ ? &p->in : &p->out;
	struct slot *s;

	/* In sectors, so that nothing can wrap; the disk proves the range again in bytes. */
	if (data->len % b->shape.logical || !whole_blocks(b, p->sector) || p->sector > UINT64_MAX / SECTOR)
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	s = slot_for(b, p, op);
	if (!s)
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	s->req.off = p->sector * SECTOR;
	s->req.len = data->len;
	s->req.cnt = iov_export(data, s->iov, b->shape.seg_max);
	if ((!s->req.cnt && data->len) || !segments_fit(b, s)) {        /* seg_max, size_max */
		put_slot(b, s);
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	}
	if (op == BLK_READ)
		s->in_len = (uint32_t)data->len;
	disk_submit(b->disk, &s->req);
}

static void flush(struct blk *b, const struct parsed *p)
{
	struct slot *s;

	if (p->out.len || p->in.len)
		return virtio_break(&b->v, "flush request with data");
	s = slot_for(b, p, BLK_FLUSH);
	if (!s)
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	disk_submit(b->disk, &s->req);
}

static void get_id(struct blk *b, struct parsed *p)
{
	answer(b, p->q, p->head, p->status, VIRTIO_BLK_S_OK,
		(uint32_t)iov_write(&p->in, b->shape.serial, sizeof(b->shape.serial)));
}

/* Segment by segment. A disk that answers at once does not nest: the loop here goes on. */
static void run_segments(struct slot *s)
{
	s->submitting = true;
	do {
		const struct virtio_blk_discard_write_zeroes *seg = &s->seg[s->at];

		s->ended = false;
		s->req.off = le64toh(seg->sector) * SECTOR;
		s->req.len = (uint64_t)le32toh(seg->num_sectors) * SECTOR;
		s->req.unmap = le32toh(seg->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
		disk_submit(s->b->disk, &s->req);
	} while (s->ended && s->at < s->segs);
	s->submitting = false;
	if (s->ended)
		request_done(&s->req, s->err);
}

static void segment_done(struct blk_req *r, int err)
{
	struct slot *s = container_of(r, struct slot, req);

	s->ended = true;
	s->err = err;
	s->at = err ? s->segs : s->at + 1;
	if (s->submitting)
		return;
	if (s->at < s->segs)
		run_segments(s);
	else
		request_done(r, err);
}

static uint8_t check_segment(const struct blk *b, const struct virtio_blk_discard_write_zeroes *seg,
	enum blk_op op)
{
	uint64_t sector = le64toh(seg->sector), most = op == BLK_ZERO ? b->shape.zeroes_max : b->shape.discard_max;
	uint32_t n = le32toh(seg->num_sectors), flags = le32toh(seg->flags);

	/* virtio 1.2, 5.2.6.2: unknown flags, and unmap in a discard, are unsupported */
	if (flags & ~(op == BLK_ZERO ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0u))
		return VIRTIO_BLK_S_UNSUPP;
	if (n > most / SECTOR || !whole_blocks(b, sector | n) || sector > disk_size(b->disk) / SECTOR ||
		n > disk_size(b->disk) / SECTOR - sector)
		return VIRTIO_BLK_S_IOERR;
	return VIRTIO_BLK_S_OK;
}

/* Discard and write zeroes: nothing is done unless all segments are right. */
static void range(struct blk *b, struct parsed *p, enum blk_op op)
{
	uint32_t most = op == BLK_ZERO ? b->shape.zeroes_seg : b->shape.discard_seg;
	size_t n = p->out.len / sizeof(struct virtio_blk_discard_write_zeroes);
	uint8_t status = VIRTIO_BLK_S_OK;
	struct slot *s;

	if (!virtio_has(&b->v, op == BLK_ZERO ? VIRTIO_BLK_F_WRITE_ZEROES : VIRTIO_BLK_F_DISCARD))
		return fail(b, p, VIRTIO_BLK_S_UNSUPP);
	if (!n || n > most || p->out.len % sizeof(s->seg[0]))
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	s = slot_for(b, p, op);
	if (!s)
		return fail(b, p, VIRTIO_BLK_S_IOERR);
	iov_read(&p->out, s->seg, n * sizeof(s->seg[0]));
	for (size_t i = 0; i < n && status == VIRTIO_BLK_S_OK; i++)
		status = check_segment(b, &s->seg[i], op);
	if (status != VIRTIO_BLK_S_OK) {
		put_slot(b, s);
		return fail(b, p, status);
	}
	s->segs = (unsigned)n;
	s->at = 0;
	s->req.done = segment_done;
	run_segments(s);
}

static void request(struct blk *b, struct parsed *p)
{
	switch (p->type) {
	case VIRTIO_BLK_T_IN:
		return transfer(b, p, BLK_READ);
	case VIRTIO_BLK_T_OUT:
		return transfer(b, p, BLK_WRITE);
	case VIRTIO_BLK_T_FLUSH:
		return flush(b, p);
	case VIRTIO_BLK_T_GET_ID:
		return get_id(b, p);
	case VIRTIO_BLK_T_DISCARD:
		return range(b, p, BLK_DISCARD);
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return range(b, p, BLK_ZERO);
	default:
		return fail(b, p, VIRTIO_BLK_S_UNSUPP);
	}
}

/* False: it has no place for an answer, and the device is broken. */
static bool parse(struct blk *b, struct virtq *q, struct virtq_chain *c, struct parsed *p)
{
	struct virtio_blk_outhdr h;
	struct iov_view last;
	struct iovec byte;

	if (!IOV_GET(&c->out, &h)) {
		virtio_break(&b->v, "request shorter than its header");
		return false;
	}
	last = iov_take_back(&c->in, 1);
	if (iov_export(&last, &byte, 1) != 1) {
		virtio_break(&b->v, "request without a status byte");
		return false;
	}
	*p = (struct parsed){ .q = q, .head = c->head, .type = le32toh(h.type),
		.sector = le64toh(h.sector), .out = c->out, .in = c->in, .status = byte.iov_base };
	return true;
}

/* ---- the device; home loop ---- */

static void blk_notify(struct virtio *v, struct virtq *q)
{
	struct blk *b = container_of(v, struct blk, v);
	struct virtq_chain c;
	struct parsed p;

	ON_LOOP(v->home);
	while (virtq_pop(q, &c) > 0) {
		if (!parse(b, q, &c, &p))
			return;
		request(b, &p);
	}
}

static void apply_cache(struct blk *b, bool writeback)
{
	uint8_t wce = writeback;

	virtio_config_set(&b->v, offsetof(struct virtio_blk_config, wce), &wce, 1);
	if (b->live)
		disk_set_writethrough(b->disk, !writeback);
}

/* The host file has grown: the driver reads the new capacity after a configuration interrupt. */
static void tell_capacity(struct blk *b)
{
	uint64_t sectors = htole64(blk_shape_capacity(&b->shape, b->disk));

	virtio_config_set(&b->v, offsetof(struct virtio_blk_config, capacity), &sectors, sizeof(sectors));
	virtio_config_changed(&b->v);
}

static void look_at_size(struct loop_timer *t)
{
	struct blk *b = container_of(t, struct blk, resize);
	int r = disk_refresh_size(b->disk);

	if (r > 0)
		tell_capacity(b);
	if (r == -ERANGE && !b->shrunk)
		log_warn("%s: the file has become smaller than the disk: the guest is not told, and what is cut off fails",
			b->v.name);
	b->shrunk = r == -ERANGE;
	loop_set_timer(b->v.home, t, loop_now() + RESIZE_NS);
}

static int blk_start(struct virtio *v)
{
	struct blk *b = container_of(v, struct blk, v);

	disk_set_home(b->disk, v->home);
	b->live = true;
	if (b->shape.resize)
		loop_set_timer(v->home, &b->resize, loop_now() + RESIZE_NS);
	/* virtio 1.2, 5.2.5.2: a driver that cannot flush gets a write-through disk */
	apply_cache(b, b->writeback && virtio_has(v, VIRTIO_BLK_F_FLUSH));
	return 0;
}

static void blk_stop(struct virtio *v)
{
	struct blk *b = container_of(v, struct blk, v);

	loop_del_timer(v->home, &b->resize);
	disk_drain(b->disk);
	b->live = false;
	b->writeback = disk_has_writeback(b->disk);     /* the next driver starts afresh */
	apply_cache(b, b->writeback);
}

static void blk_config_write(struct virtio *v, unsigned off, unsigned size, uint64_t val)
{
	struct blk *b = container_of(v, struct blk, v);

	/* virtio 1.2, 5.2.5.1: the cache mode is the only writable field */
	if (off != offsetof(struct virtio_blk_config, wce) || size != 1 || val > 1 ||
		!virtio_has(v, VIRTIO_BLK_F_CONFIG_WCE))
		return;
	b->writeback = val;
	apply_cache(b, b->writeback);
}

/* ---- main thread ---- */

static void blk_facts(struct virtio *v, struct facts *f)
{
	struct blk *b = container_of(v, struct blk, v);

	disk_describe(b->disk, f);
	facts_u64(f, "reads", count_get(&b->reads));
	facts_u64(f, "writes", count_get(&b->writes));
	facts_u64(f, "flushes", count_get(&b->flushes));
	facts_u64(f, "discards", count_get(&b->discards));
	facts_u64(f, "bytes_read", count_get(&b->bytes_read));
	facts_u64(f, "bytes_written", count_get(&b->bytes_written));
	facts_u64(f, "errors", count_get(&b->errors));
}

/* What the guest wrote and did not flush: an image's metadata lies in our memory only. */
static void blk_finish(struct virtio *v)
{
	struct blk *b = container_of(v, struct blk, v);

	disk_close(b->disk);
	b->disk = NULL;
}

static void blk_free(struct virtio *v)
{
	struct blk *b = container_of(v, struct blk, v);

	disk_close(b->disk);
	for (struct slab *s = b->slabs, *next; s; s = next) {
		next = s->next;
		free(s);
	}
	free(b);
}

static const struct virtio_ops blk_ops = {
	.name = "blk",
	.id = VIRTIO_ID_BLOCK,
	.start = blk_start,
	.stop = blk_stop,
	.notify = blk_notify,
	.config_write = blk_config_write,
	.facts = blk_facts,
	.finish = blk_finish,
	.free = blk_free,
};

/* Everything but handing it to the machine. */
static int make(struct blk **ret, struct opts *o, struct error *err)
{
	struct blk *b = calloc(1, sizeof(*b));
	struct virtio_blk_config config;
	int r;

	if (!b)
		return error_set(err, ENOMEM, "%s: out of memory", opts_option(o));
	r = disk_open(&b->disk, o, err);
	if (!r)
		r = blk_shape_read(&b->shape, b->disk, o, err);
	if (r) {
		disk_close(b->disk);
		free(b);
		return r;
	}
	b->writeback = disk_has_writeback(b->disk);
	virtio_init(&b->v, &blk_ops, blk_shape_features(&b->shape, b->disk), sizeof(config));
	b->resize.fn = look_at_size;
	for (unsigned i = 0; i < b->shape.queues; i++)
		virtio_add_queue(&b->v, b->shape.queue_size);
	blk_shape_config(&b->shape, b->disk, &config);
	virtio_config_set(&b->v, 0, &config, sizeof(config));
	*ret = b;
	return 0;
}

static void hold(void *arg, bool on)
{
	struct blk *b = arg;

	vm_hold(b->vm, on);
}

static int blk_create(struct vm *vm, struct opts *o, struct error *err)
{
	struct blk *b = NULL;
	int r = make(&b, o, err);

	if (r)
		return r;
	b->vm = vm;
	disk_set_hold(b->disk, hold, b);
	r = vm_iothread(vm, b->shape.iothread, b->shape.poll_us, &b->v.home, err);
	if (r)
		error_prefix(err, "%s: ", opts_option(o));
	else
		r = vm_add_virtio(vm, &b->v, err);
	if (r)
		blk_free(&b->v);
	return r;
}

const struct device_class blk_class = {
	.name = "blk",
	.help = "file=FILE[,format=raw][,ro][,cache=writeback|none|writethrough|unsafe][,discard=on|off]"
		"[,serial=TEXT][,queues=1-16][,queue_size=2-1024][,logical=512-4096][,physical=512-64K][,resize=auto]"
		"[,iothread=0-7][,poll_us=N]"
		"[,fault=KIND:WHAT:WHEN...][,delay=TIME][,iops=N][,bps=SIZE][,werror=report|stop|ignore][,rerror=...]"
		"[,log=FILE] (docs/disk-testing.md)",
	.implied = "file",
	.create = blk_create,
};
