/*
 * A disk over a real image with the input as its I/O engine: which requests come, in which order what they caused ends, and how.
 *
 * How this works. The first bytes choose image and keys, the rest is a list of commands: submit a request, do one of
 * the operations that wait and keep its result, end one, let the next timer run, look at the image as a kill now would leave it.
 * Calls that are made at once (preadv2, file_grow, metadata of a plan) fail as the input says. There is one thread and no time.
 *
 * What a sector may hold is a set of writers, a bit each: a write adds itself when it is submitted, and when it succeeds
 * only those that were under way beside it stay in the set. `past` is the same for the file: only a flush takes
 * something out. Every word of a write names the writer and the sector, so other bytes are seen wherever they come from.
 *
 * Source of a command: tests/fuzz/corpus_blk.py.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/format.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"

#define DEPTH       12
#define SECTORS     2061u               /* of the largest disk */
#define LEN_MOST    (160u << 10)
#define WORDS       (SECTOR / 8)
#define WRITERS     63
#define OPS         256                 /* waiting at once */
#define STEPS_MOST  100000u
#define FIRST_WORD  0x3ffull            /* "writer" of what the image held before */
#define KILLS_MOST  6
#define CACHE_LEAST 24u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ---- the input ---- */

static const uint8_t *in, *in_end;

static unsigned byte(void)
{
	return in < in_end ? *in++ : 0;
}

static unsigned two(void)
{
	unsigned n = byte();

	return n | byte() << 8;
}

/* ---- the image ---- */

static const struct shape {
	const char *format;
	uint32_t cluster, sectors;
	unsigned version;
	bool backed, extended, fixed, snapshot, packed;
} shapes[] = {
	{ .format = "raw", .sectors = 512 },
	{ .format = "qcow2", .cluster = 512, .sectors = 1021 },
	{ .format = "qcow2", .cluster = 4096, .sectors = 1021 },
	{ .format = "qcow2", .cluster = 65536, .sectors = 1021 },
	{ .format = "qcow2", .cluster = 512, .sectors = 1021, .backed = true },
	{ .format = "qcow2", .cluster = 4096, .sectors = 1021, .backed = true },
	{ .format = "qcow2", .cluster = 1024, .sectors = 1021, .snapshot = true },
	{ .format = "qcow2", .cluster = 4096, .sectors = 1021, .backed = true, .packed = true, .snapshot = true },
	{ .format = "qcow2", .cluster = 16384, .sectors = 1021, .extended = true },
	{ .format = "qcow2", .cluster = 16384, .sectors = 1021, .extended = true, .backed = true, .packed = true },
	{ .format = "qcow2", .cluster = 4096, .sectors = 1021, .version = 2, .backed = true },
	{ .format = "vdi", .cluster = 4096, .sectors = 1021 },
	{ .format = "vdi", .cluster = 65536, .sectors = 1021 },
	{ .format = "vdi", .cluster = 1u << 20, .sectors = SECTORS },
	{ .format = "vdi", .cluster = 65536, .sectors = 1021, .fixed = true },
	{ .format = "qcow2", .cluster = 4096, .sectors = 1021, .packed = true },
};

static const char *const keys[] = { "", "", ",cache=writethrough", ",cache=unsafe", ",discard=off", ",werror=stop,rerror=stop",
	",werror=enospc", ",iops=1000,bps_wr=4M", ",delay=1ms-9ms", ",fault=write:torn:every=5,werror=stop",
	",fault=read:eio:every=7,fault=flush:eio:every=9", ",cache=writethrough,werror=stop,rerror=stop" };
#define FAULTY 9        /* keys from here on with faults of their own */

static char dir[64], disk_path[80], base_path[80];
static const struct shape *shape;
static struct disk *disk;
static bool small_caches;

/* ---- the model ---- */

static uint64_t may[SECTORS], past[SECTORS];    /* writers */
static bool filled[SECTORS];                    /* before the first: FIRST_WORD, else zeroes */
static struct writer {
	uint64_t first, end;
	bool zero;
} writer[WRITERS + 1];
static unsigned writers;                        /* 1 to WRITERS; 0 is what was there before */

struct slot {
	struct blk_req r;
	struct iovec iov[3];
	uint8_t *data;
	bool busy, chain;
	unsigned ended;
	uint64_t bit, beside;                   /* own; of those that were under way at the same time */
	uint64_t was[SECTORS];
};
static struct slot slot[DEPTH];
static unsigned requests, nested;
static bool failed, soft, unsafe, writethrough, stops;

static uint64_t word_of(unsigned id, uint64_t sector, unsigned n)
{
	if (id ? writer[id].zero : !filled[sector])
		return 0;
	return (id ? id : FIRST_WORD) << 48 | sector << 16 | (n + 1);
}

static bool allowed(uint64_t got, uint64_t set, uint64_t sector, unsigned n)
{
	for (; set; set &= set - 1)
		if (got == word_of((unsigned)__builtin_ctzll(set), sector, n))
			return true;
	return false;
}

/* All of the sector from one of them: the usual case, and fast. */
static bool whole(const uint64_t *w, uint64_t set, uint64_t sector)
{
	uint64_t step = w[0] != 0, diff = 0;

	if (!allowed(w[0], set, sector, 0))
		return false;
	for (uint64_t k = 1; k < WORDS; k++)
		diff |= w[k] ^ (w[0] + k * step);
	return !diff;
}

__attribute__((noreturn))
static void wrong(const char *what, uint64_t sector)
{
	fprintf(stderr, "%s, cluster %u%s: %s (sector %llu)\n", shape->format, shape->cluster, shape->backed ? ", backed" : "", what,
		(unsigned long long)sector);
	abort();
}

static void compare(const void *data, uint64_t first, uint64_t n, const uint64_t *set, const char *what)
{
	const uint64_t *w = data;

	for (uint64_t s = 0; s < n; s++, w += WORDS)
		for (unsigned k = whole(w, set[s], first + s) ? WORDS : 0; k < WORDS; k++)
			if (!allowed(w[k], set[s], first + s, k)) {
				fprintf(stderr, "word %u is %016llx, writers %llx\n", k, (unsigned long long)w[k],
					(unsigned long long)set[s]);
				wrong(what, first + s);
			}
}

/* ---- the image as a kill leaves it ---- */

static unsigned kills;
static bool quiet;              /* calls are what they are: no fault, nothing from the input */

static void complain(struct image_check *c, const char *text)
{
	(void)c;
	fprintf(stderr, "check: %s\n", text);
}

/* exact: nothing leaks. */
static void check_file(const uint64_t *set, bool exact, const char *what)
{
	struct image_how how = { .format = shape->format, .readonly = true, .share = true, .backing_dir = "allow" };
	struct image_check c = { .complain = complain };
	static uint8_t all[SECTORS * SECTOR];
	struct image *i;
	struct error err;
	bool before = quiet;
	int r;

	quiet = true;
	if (image_open(&i, disk_path, &how, &err)) {
		fprintf(stderr, "%s\n", err.msg);
		wrong(what, 0);
	}
	c.complain = NULL;
	r = image_check(i, REPAIR_NONE, &c, &err);
	if (r != -EOPNOTSUPP && (r || c.corruptions || c.errors || (exact && c.leaks))) {
		c = (struct image_check){ .complain = complain };
		image_check(i, REPAIR_NONE, &c, &err);
		fprintf(stderr, "%d: %llu corruptions, %llu leaks, %llu errors\n", r, (unsigned long long)c.corruptions,
			(unsigned long long)c.leaks, (unsigned long long)c.errors);
		wrong(what, 0);
	}
	if (image_read(i, all, shape->sectors * SECTOR, 0))
		wrong(what, 1);
	compare(all, 0, shape->sectors, set, what);
	image_close(i);
	quiet = before;
}

static void kill_now(void)
{
	if (kills++ < KILLS_MOST)
		check_file(past, false, "after a kill");
}

/* ---- the engine ---- */

static struct pending {
	struct loop_op *op;
	bool performed;
	int res;
} pending[OPS];
static unsigned waiting, steps;
static uint64_t now;
static struct loop_timer *timers[8];
static unsigned at_once, at_once_bit;           /* which of the calls made at once are refused, in turn */
static unsigned grow_in, memory_in;             /* this many calls until one fails */
static unsigned meta_in;                        /* the same of those of the work that runs */
static int meta_err;                            /* 1: a kill is looked at there; 2: some of it, then -EIO */

void __wrap_loop_submit(struct loop *l, struct loop_op *op);
bool __wrap_loop_here(const struct loop *l);
void __wrap_loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns);
void __wrap_loop_del_timer(struct loop *l, struct loop_timer *t);
uint64_t __wrap_loop_now(void);
void __wrap_loop_drain(struct loop *l, const bool *done);
ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __real_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags);
int __real_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __real_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_sync(const struct host_file *f);
int __wrap_meta_sync(const struct host_file *f);
int __real_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
int __real_file_grow(struct host_file *f, uint64_t end);
int __wrap_file_grow(struct host_file *f, uint64_t end);
int __real_plan_write(struct plan *p, uint64_t off, const void *data, size_t len);
int __wrap_plan_write(struct plan *p, uint64_t off, const void *data, size_t len);
struct tables *__real_tables_new(struct image *i, uint32_t size, unsigned most);
struct tables *__wrap_tables_new(struct image *i, uint32_t size, unsigned most);

bool __wrap_loop_here(const struct loop *l)
{
	(void)l;
	return true;
}

uint64_t __wrap_loop_now(void)
{
	return now;
}

void __wrap_loop_del_timer(struct loop *l, struct loop_timer *t)
{
	(void)l;
	for (unsigned k = 0; k < ARRAY_LEN(timers); k++)
		if (timers[k] == t)
			timers[k] = NULL;
	t->slot = 0;
}

void __wrap_loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns)
{
	__wrap_loop_del_timer(l, t);
	t->at_ns = at_ns;
	for (unsigned k = 0; k < ARRAY_LEN(timers); k++)
		if (!timers[k]) {
			timers[k] = t;
			t->slot = k + 1;
			return;
		}
	wrong("too many timers", 0);
}

static bool run_timer(void)
{
	struct loop_timer *t = NULL;

	for (unsigned k = 0; k < ARRAY_LEN(timers); k++)
		if (timers[k] && (!t || timers[k]->at_ns < t->at_ns))
			t = timers[k];
	if (!t)
		return false;
	now = MAX(now, t->at_ns);
	__wrap_loop_del_timer(NULL, t);
	t->fn(t);
	return true;
}

void __wrap_loop_submit(struct loop *l, struct loop_op *op)
{
	(void)l;
	for (unsigned k = 0; k < waiting; k++)
		if (pending[k].op == op)
			wrong("an operation was submitted twice", 0);
	if (waiting == OPS)
		wrong("too many operations", 0);
	pending[waiting++] = (struct pending){ .op = op };
}

static size_t bytes_of(const struct iovec *iov, unsigned cnt)
{
	size_t n = 0;

	while (cnt--)
		n += iov++->iov_len;
	return n;
}

/* The first n bytes of a transfer. */
static int move(enum loop_op_kind kind, int fd, const struct iovec *iov, unsigned cnt, uint64_t off, size_t n)
{
	struct iovec some[BLK_IOVS + 2];
	unsigned k;

	assert(cnt <= ARRAY_LEN(some));
	for (k = 0; k < cnt && n; k++) {
		some[k] = (struct iovec){ iov[k].iov_base, MIN(n, iov[k].iov_len) };
		n -= some[k].iov_len;
	}
	return (int)(kind == OP_READV ? preadv(fd, some, (int)k, (off_t)off) : pwritev(fd, some, (int)k, (off_t)off));
}

static int give(int err)
{
	if (err == -EAGAIN || err == -EINTR)
		soft = true;
	else
		failed = true;
	return err;
}

static int perform_transfer(const struct loop_op *op, unsigned how)
{
	size_t n = bytes_of(op->iov, op->cnt);
	size_t unit = disk->image->file.align > 1 ? SECTOR : 8, some = n / unit * (how >> 4) / 16 * unit ?: unit;
	bool writes = op->kind == OP_WRITEV;

	switch (how & 15) {
	case 8:
	case 15:
		return move(op->kind, op->fd, op->iov, op->cnt, op->off, MIN(some, n));
	case 9:
		if (writes)
			failed = true;
		return writes ? 0 : move(op->kind, op->fd, op->iov, op->cnt, op->off, n);
	case 10:
		return give(-EAGAIN);
	case 11:
		return give(-EINTR);
	case 12:
		return give(-EIO);
	case 13:
		return give(writes ? -ENOSPC : -EIO);
	case 14:
		move(op->kind, op->fd, op->iov, op->cnt, op->off, MIN(some, n));
		return give(-EIO);
	}
	return move(op->kind, op->fd, op->iov, op->cnt, op->off, n);
}

static int perform_sync(unsigned how)
{
	static const int errs[16] = { [9] = -EIO, [10] = -EAGAIN, [11] = -EINTR, [12] = -EIO, [13] = -ENOSPC };

	return errs[how & 15] ? give(errs[how & 15]) : 0;
}

static int perform_range(const struct loop_op *op, unsigned how)
{
	static const int errs[16] = { [10] = -EAGAIN, [11] = -EINTR, [12] = -EIO, [13] = -ENOSPC, [14] = -EOPNOTSUPP,
		[15] = -EINVAL };

	if (errs[how & 15])
		return give(errs[how & 15]);
	return fallocate(op->fd, op->mode, (off_t)op->off, (off_t)op->len) ? -errno : 0;
}

static int perform_work(struct loop_op *op, unsigned how)
{
	static const int errs[16] = { [8] = -EIO, [9] = -EAGAIN, [10] = -ENOSPC, [11] = 2, [12] = 1, [13] = 1, [14] = 1, [15] = -EIO };
	int r;

	meta_err = errs[how & 15];
	meta_in = meta_err ? 1 + (how >> 4) : 0;
	r = op->work(op);
	meta_in = 0;
	return r;
}

static void perform(struct pending *p, unsigned how)
{
	if (p->performed)
		return;
	p->performed = true;
	switch (p->op->kind) {
	case OP_READV:
	case OP_WRITEV:
		p->res = perform_transfer(p->op, how);
		return;
	case OP_FSYNC:
		p->res = perform_sync(how);
		return;
	case OP_FALLOCATE:
		p->res = perform_range(p->op, how);
		return;
	case OP_WORK:
		p->res = perform_work(p->op, how);
		return;
	case OP_SENDMSG:
	case OP_RECVMSG:
		break;
	}
	wrong("not an operation of a disk", 0);
}

static void complete(unsigned which, unsigned how)
{
	struct pending p;

	if (!waiting)
		return;
	which %= waiting;
	perform(&pending[which], how);
	p = pending[which];
	waiting--;
	memmove(&pending[which], &pending[which + 1], (waiting - which) * sizeof(p));
	p.op->done(p.op, p.res);
	if (++steps > STEPS_MOST)
		wrong("it does not come to rest", 0);
}

void __wrap_loop_drain(struct loop *l, const bool *done)
{
	(void)l;
	while (!*done) {
		if (!waiting)
			wrong("a drain waits for nothing", 0);
		complete(byte(), byte());
	}
}

/* ---- calls made at once ---- */

static bool refused(void)
{
	return !quiet && at_once >> at_once_bit++ % 8 & 1;
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	(void)flags;
	if (!refused())
		return preadv(fd, iov, cnt, off);
	if (at_once & 1 && at_once != 0xff)
		return move(OP_READV, fd, iov, (unsigned)cnt, (uint64_t)off, 8);
	errno = EAGAIN;
	return -1;
}

ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int cnt, off_t off, int flags)
{
	(void)flags;
	if (!refused())
		return pwritev(fd, iov, cnt, off);
	if (at_once & 1 && at_once != 0xff)
		return move(OP_WRITEV, fd, iov, (unsigned)cnt, (uint64_t)off, 8);
	errno = EAGAIN;
	return -1;
}

/* 0: go on; 2: with some of it, then -EIO. */
static int meta_fault(void)
{
	if (quiet || !meta_in || --meta_in)
		return 0;
	if (meta_err != 1) {
		give(meta_err < 0 ? meta_err : -EIO);
		return meta_err;
	}
	kill_now();
	return 0;
}

int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off)
{
	int r = meta_fault();

	if (r == 2)
		__real_meta_write(f, buf, len / 16 * 8, off);
	return r ? r == 2 ? -EIO : r : __real_meta_write(f, buf, len, off);
}

int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len)
{
	int r = meta_fault();

	return r ? r == 2 ? -EIO : r : __real_meta_zero(f, off, len);
}

int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len)
{
	int r = meta_fault();

	return r ? r == 2 ? -EIO : r : __real_meta_punch(f, off, len);
}

int __wrap_meta_sync(const struct host_file *f)
{
	int r = meta_fault();

	return r ? r == 2 ? -EIO : r : __real_meta_sync(f);
}

int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	int r = meta_fault();

	return r ? r == 2 ? -EIO : r : __real_meta_read(f, buf, len, off);
}

int __wrap_file_grow(struct host_file *f, uint64_t end)
{
	if (!quiet && grow_in && !--grow_in)
		return give(-ENOSPC);
	return __real_file_grow(f, end);
}

int __wrap_plan_write(struct plan *p, uint64_t off, const void *data, size_t len)
{
	if (!quiet && memory_in && !--memory_in)
		return give(-ENOMEM);
	return __real_plan_write(p, off, data, len);
}

struct tables *__wrap_tables_new(struct image *i, uint32_t size, unsigned most)
{
	return __real_tables_new(i, size, small_caches ? MIN(most, CACHE_LEAST) : most);
}

/* ---- requests ---- */

static void submit_one(void);

static bool changes(enum blk_op op)
{
	return op == BLK_WRITE || op == BLK_ZERO || op == BLK_DISCARD;
}

static void settle_change(struct slot *s)
{
	bool keeps = s->r.op == BLK_DISCARD;

	for (uint64_t k = s->r.off / SECTOR; k < (s->r.off + s->r.len) / SECTOR && !keeps; k++) {
		may[k] &= s->bit | s->beside;
		if (writethrough)
			past[k] &= s->bit | s->beside;
	}
}

static void settle_flush(const struct slot *s)
{
	for (uint64_t k = 0; k < shape->sectors && !unsafe; k++)
		past[k] &= s->was[k] | s->beside;
}

static void settle_read(struct slot *s)
{
	uint64_t first = s->r.off / SECTOR, n = s->r.len / SECTOR;

	for (uint64_t set = s->beside; set; set &= set - 1) {
		unsigned id = (unsigned)__builtin_ctzll(set);

		for (uint64_t k = MAX(first, writer[id].first); k < MIN(first + n, writer[id].end); k++)
			s->was[k - first] |= 1ull << id;
	}
	compare(s->data, first, n, s->was, "a read");
}

static void done(struct blk_req *r, int err)
{
	struct slot *s = container_of(r, struct slot, r);

	if (!s->busy || s->ended++)
		wrong("a request ended twice", r->off / SECTOR);
	s->busy = false;
	requests--;
	if (err && err != -EINVAL && err != -EOPNOTSUPP && !failed && !soft)
		wrong(strerrordesc_np(-err), r->off / SECTOR);
	if (err == -EINVAL && r->op != BLK_FLUSH && r->off / SECTOR + r->len / SECTOR <= shape->sectors && !failed)
		wrong("a good request is refused", r->off / SECTOR);
	if (!err && changes(r->op))
		settle_change(s);
	else if (!err && r->op == BLK_FLUSH)
		settle_flush(s);
	else if (!err)
		settle_read(s);
	if (s->chain && nested < 3 && in < in_end) {
		nested++;
		submit_one();
		nested--;
	}
}

static void cut(struct slot *s, unsigned how)
{
	size_t len = s->r.len, a = 1 + how * 37 % len, b = (len - a) / 2;

	s->iov[0] = (struct iovec){ s->data, a };
	s->iov[1] = (struct iovec){ s->data + a, b };
	s->iov[2] = (struct iovec){ s->data + a + b, len - a - b };
	s->r.iov = s->iov;
	s->r.cnt = 1 + !!b + (len - a - b != 0 && b);
	if (!b && len - a) {
		s->iov[1] = s->iov[2];
		s->r.cnt = 2;
	}
}

static void mark(struct slot *s, uint64_t first, uint64_t end)
{
	unsigned id = ++writers;

	writer[id] = (struct writer){ first, end, s->r.op != BLK_WRITE };
	s->bit = 1ull << id;
	for (uint64_t k = first; k < end; k++) {
		may[k] |= s->bit;
		past[k] |= s->bit;
	}
	for (unsigned k = 0; k < DEPTH; k++)
		if (slot[k].busy) {
			slot[k].beside |= s->bit;
			s->beside |= slot[k].bit;
		}
	for (uint64_t k = first; k < end && s->r.op == BLK_WRITE; k++)
		for (unsigned w = 0; w < WORDS; w++)
			((uint64_t *)s->data)[(k - first) * WORDS + w] = word_of(id, k, w);
}

static struct slot *begin(enum blk_op op, uint64_t off, uint64_t len, unsigned how)
{
	struct slot *s = slot;
	bool inside = off <= shape->sectors * SECTOR && len <= shape->sectors * SECTOR - off;

	while (s < slot + DEPTH && s->busy)
		s++;
	if (s == slot + DEPTH)
		return NULL;
	if (changes(op) && writers == WRITERS)
		op = BLK_FLUSH;
	if (op == BLK_FLUSH)
		off = len = 0;
	s->r = (struct blk_req){ .op = op, .off = off, .len = len, .unmap = how & 64, .done = done };
	s->bit = s->beside = 0;
	s->chain = how & 128;
	s->ended = 0;
	if (changes(op) && inside)
		mark(s, off / SECTOR, (off + len) / SECTOR);
	if (op == BLK_READ)
		memset(s->data, 0xee, len);
	if ((op == BLK_READ || op == BLK_WRITE) && len)
		cut(s, how & 63);
	if (op == BLK_READ && inside)
		memcpy(s->was, may + off / SECTOR, len / SECTOR * sizeof(may[0]));
	if (op == BLK_FLUSH)
		memcpy(s->was, may, sizeof(may));
	s->busy = true;
	requests++;
	disk_submit(disk, &s->r);
	return s;
}

static void submit_one(void)
{
	static const enum blk_op ops[8] = { BLK_READ, BLK_WRITE, BLK_WRITE, BLK_FLUSH, BLK_ZERO, BLK_DISCARD, BLK_READ, BLK_WRITE };
	unsigned kind = byte(), how = byte();
	uint64_t off = two() % (shape->sectors + 8), len = byte();
	enum blk_op op = ops[kind & 7];
	bool moves = op == BLK_READ || op == BLK_WRITE;

	if (kind & 0x80)        /* near those before: they meet */
		off = off % 64;
	if (kind & 0x40)
		len *= 17;
	if (kind & 0x20)
		off &= ~(shape->cluster / SECTOR ? shape->cluster / SECTOR - 1 : 7ull);
	if (!(kind & 0x10) && off < shape->sectors)
		len = MIN(len, shape->sectors - off);
	if (moves)
		len = MIN(len, LEN_MOST / SECTOR);
	begin(op, off * SECTOR, len * SECTOR, how);
}

/* ---- one disk ---- */

static void write_first(struct image *i, uint64_t first, uint64_t n)
{
	uint64_t buf[WORDS];

	for (uint64_t s = first; s < first + n && s < shape->sectors; s++) {
		filled[s] = true;
		for (unsigned w = 0; w < WORDS; w++)
			buf[w] = word_of(0, s, w);
		if (image_write(i, buf, SECTOR, s * SECTOR))
			wrong("the image cannot be filled", s);
	}
}

static void pack_first(struct image *i)
{
	static uint64_t buf[(64u << 10) / 8];
	uint64_t per = shape->cluster / SECTOR;

	for (uint64_t c = 4; c < 8; c++) {
		for (uint64_t s = 0; s < per; s++) {
			filled[c * per + s] = true;
			for (unsigned w = 0; w < WORDS; w++)
				buf[s * WORDS + w] = word_of(0, c * per + s, w);
		}
		if (image_write_compressed(i, buf, c * shape->cluster))
			wrong("the image cannot be filled", c * per);
	}
}

static void make(const char *path, const struct image_create *how)
{
	struct image_create c = *how;
	struct error err;

	c.overwrite = true;
	if (image_create(path, &c, &err)) {
		fprintf(stderr, "%s\n", err.msg);
		wrong("the image cannot be made", 0);
	}
}

static struct image *open_tool(const char *path, const char *format)
{
	struct image_how how = { .format = format, .backing_dir = "allow" };
	struct error err;
	struct image *i;

	if (image_open(&i, path, &how, &err)) {
		fprintf(stderr, "%s\n", err.msg);
		wrong("the image cannot be opened", 0);
	}
	return i;
}

static void make_image(void)
{
	struct image_create c = { .format = shape->format, .size = shape->sectors * SECTOR, .cluster = shape->cluster,
		.version = shape->version, .extended_l2 = shape->extended, .fixed = shape->fixed };
	struct image *i;

	memset(filled, 0, sizeof(filled));
	if (shape->backed) {
		c.backing = "base";
		c.backing_format = "raw";
		make(base_path, &(struct image_create){ .format = "raw", .size = c.size - 5 * SECTOR });
		i = open_tool(base_path, "raw");
		write_first(i, 3, 50);
		write_first(i, 200, 33);
		image_close(i);
	}
	make(disk_path, &c);
	i = open_tool(disk_path, shape->format);
	if (shape->packed)
		pack_first(i);
	write_first(i, 17, 23);
	if (shape->snapshot && image_snapshot_create(i, "before", NULL))
		wrong("no snapshot can be made", 0);
	write_first(i, 90, 5);
	if (image_close(i))
		wrong("the image cannot be written", 0);
	for (uint64_t s = 0; s < SECTORS; s++)
		may[s] = past[s] = 1;
}

/* Every transfer that is not a multiple of 4096 goes through the bounce buffer then. */
static void pretend_direct(struct host_file *f)
{
	f->align = SECTOR;
	f->mem_align = 4096;
	f->bounce = mmap(NULL, BOUNCE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	f->inline_read = f->inline_write = false;
}

static void open_disk(const char *more, bool direct)
{
	struct error err;
	struct opts *o;
	char text[300];

	snprintf(text, sizeof(text), "%s,format=%s,backing=allow%s", disk_path, shape->format, more);
	if (opts_parse(&o, "--disk", text, "file", &err) || disk_open(&disk, o, &err)) {
		fprintf(stderr, "%s\n", err.msg);
		wrong("the disk cannot be opened", 0);
	}
	opts_free(o);
	disk_set_home(disk, (struct loop *)&disk);      /* never looked at */
	if (direct)
		pretend_direct(&disk->image->file);
}

/* No more errors, and time goes on: every request must end, without a drain. */
static void come_to_rest(void)
{
	meta_in = grow_in = memory_in = at_once = 0;
	while (requests) {
		if (disk->flush_failed && stops)        /* a flush is never tried again, and so fails for ever */
			disk_drain(disk);
		else if (waiting)
			complete(0, 0);
		else if (!run_timer())
			wrong("a request waits for nothing", 0);
		else if (++steps > STEPS_MOST)
			wrong("it does not come to rest", 0);
	}
}

static void step(void)
{
	unsigned cmd = byte();

	switch (cmd & 15) {
	case 5: case 6: case 7: case 8: case 9:
		complete(cmd >> 4, byte());
		return;
	case 10:
		if (waiting)
			perform(&pending[(cmd >> 4) % waiting], byte());
		return;
	case 11:
		run_timer();
		return;
	case 12:
		kill_now();
		return;
	case 13:
		disk_drain(disk);
		if (requests)
			wrong("a drain left a request", 0);
		return;
	case 14:
		at_once = byte();
		return;
	case 15:
		if (cmd & 16)
			grow_in = 1 + (cmd >> 5);
		else
			memory_in = 1 + (cmd >> 5);
		return;
	}
	submit_one();
}

static void read_all(void)
{
	for (uint64_t s = 0; s < shape->sectors; s += LEN_MOST / SECTOR) {
		struct slot *one = begin(BLK_READ, s * SECTOR, MIN(LEN_MOST / SECTOR, shape->sectors - s) * SECTOR, 5);

		come_to_rest();
		assert(one->ended == 1);
	}
}

/* Errors are over: what comes now is done. */
static void use_again(bool faulty)
{
	bool was_failed, was_soft;

	while (waiting)         /* what nobody waits for may have failed already */
		complete(0, 0);
	was_failed = failed;
	was_soft = soft;
	failed = soft = faulty;
	in = in_end;
	read_all();
	if (writers < WRITERS && !(writethrough && disk->flush_failed)) {
		begin(BLK_WRITE, 7 * SECTOR, 30 * SECTOR, 9);
		come_to_rest();
	}
	failed |= was_failed;
	soft |= was_soft;
}

static void forget(void)
{
	failed = soft = false;
	writers = waiting = steps = requests = nested = kills = 0;
	at_once = at_once_bit = grow_in = memory_in = meta_in = 0;
	memset(timers, 0, sizeof(timers));
	now = 1000000000;
	for (unsigned k = 0; k < DEPTH; k++)
		if (!slot[k].data && posix_memalign((void **)&slot[k].data, 4096, LEN_MOST))
			abort();
}

static void clean_up(void)
{
	unlink(disk_path);
	unlink(base_path);
	rmdir(dir);
}

static void make_dir(void)
{
	if (*dir)
		return;
	strcpy(dir, access("/dev/shm", W_OK) ? "/tmp/vmm-fuzz-XXXXXX" : "/dev/shm/vmm-fuzz-XXXXXX");
	if (!mkdtemp(dir))
		abort();
	snprintf(disk_path, sizeof(disk_path), "%s/disk", dir);
	snprintf(base_path, sizeof(base_path), "%s/base", dir);
	atexit(clean_up);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	unsigned flags, key;

	log_set_level(LOG_ERROR);
	make_dir();
	in = data;
	in_end = data + MIN(size, 4096);
	shape = &shapes[byte() % ARRAY_LEN(shapes)];
	key = byte() % ARRAY_LEN(keys);
	flags = byte();
	forget();
	unsafe = strstr(keys[key], "unsafe");
	writethrough = strstr(keys[key], "writethrough");
	stops = strstr(keys[key], "werror=");
	small_caches = flags & 1;
	quiet = true;
	make_image();
	open_disk(keys[key], flags & 2);
	quiet = false;
	failed = key >= FAULTY && key < FAULTY + 2;
	at_once = byte();
	while (in < in_end)
		step();
	if (flags & 4)
		disk_drain(disk);
	come_to_rest();
	use_again(key >= FAULTY && key < FAULTY + 2);
	disk_drain(disk);
	if (waiting || requests || disk->image->corrupt)
		wrong(disk->image->corrupt ? "the image is said to be corrupt" : "a drain left something", 0);
	check_file(past, false, "at the end");
	quiet = true;
	disk_close(disk);
	check_file(may, !failed && !soft, "after the close");
	return 0;
}
