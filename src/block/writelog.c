/*
 * The log of a disk's writes.
 *
 * How this works. dm-log-writes logs a write when it can no longer be in a cache: it keeps completed writes on a
 * list; a flush takes with it those that are complete when it is submitted, and when it completes they are
 * logged and then the flush. W1 W2 W3, C3 C2, F, C1, CF (W submitted, C complete) is logged W3 W2 F W1.
 *
 * One queue does the same, and never holds more than what is on its way:
 *
 *      a write, a discard      joins it when it completes
 *      a flush                 joins it when it is submitted, and stands there until it completes
 *      the writer              takes from the front whatever is complete, and waits at a flush that is not
 *
 * So what is in front of a flush was complete when it was submitted, and what completes meanwhile stands behind it.
 * Writes reach the file before their flush does; that changes no order, and the superblock counts entries only as
 * of a flush (or the end), so a vmm that is killed leaves a log that ends where the medium was certain. A FUA
 * write is counted at once, too. A flush that failed leaves the queue: what was in front of it is in front of the next.
 *
 * One operation is under way at a time. A write of zeroes has a hole for its data: the file was empty.
 */
#include "writelog.h"
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "format.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define BATCH_IOVS 64

_Static_assert(sizeof(struct writelog_super) == 28, "as the kernel has it");
_Static_assert(sizeof(struct writelog_entry) == 32, "as the kernel has it");

struct writelog_item {
	struct writelog_item *next;
	bool ready;                     /* complete: may be written */
	bool flush, zero;
	uint64_t nr_sectors;
	void *data;                     /* what is to follow the entry; NULL: nothing, or zeroes */
	size_t len;                     /* of data */
	uint8_t block[WRITELOG_BLOCK];  /* the entry as it will lie in the file */
};

struct writelog {
	int fd;
	char *path;

	/* home loop */
	struct loop *home;
	void (*room)(void *arg);
	void *arg;
	struct writelog_item *first, **last;    /* the queue */
	struct writelog_item *batch;            /* those under way */
	size_t bytes;                           /* memory of all items */
	bool busy, idle;                        /* an operation is under way; nothing is to be done */
	bool super_due, closing;
	uint64_t pos;                           /* end of what was written */
	uint64_t skip;                          /* zeroes from there that end with one block to be written */
	struct loop_op op;
	struct iovec iov[BATCH_IOVS], *next_iov;
	size_t left;                            /* bytes of the operation */
	uint64_t at;                            /* where they go */
	uint8_t super[WRITELOG_BLOCK];
	uint64_t in_super;                      /* nr_entries of the superblock in the file */

	/* written by the home loop */
	_Atomic uint64_t entries;
	_Atomic int error;
};

static const uint8_t zero_block[WRITELOG_BLOCK];

/* ---- main thread ---- */

static void fill_super(struct writelog *w, uint64_t entries)
{
	const struct writelog_super s = { .magic = htole64(WRITELOG_MAGIC), .version = htole64(WRITELOG_VERSION),
		.nr_entries = htole64(entries), .sectorsize = htole32(WRITELOG_BLOCK) };

	memcpy(w->super, &s, sizeof(s));
	w->in_super = entries;
}

/* A slip of the hand in log= must not cost a file. */
static int check_file(int fd, const char *path, struct error *err)
{
	uint64_t magic = 0;
	struct stat st;

	if (fstat(fd, &st))
		return error_errno(err, errno, "cannot look at '%s'", path);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "log: '%s' is not a regular file", path);
	if (st.st_size && (pread(fd, &magic, sizeof(magic), 0) != sizeof(magic) || le64toh(magic) != WRITELOG_MAGIC))
		return error_set(err, EEXIST, "log: '%s' exists and is not a write log: name another file, or remove it",
			path);
	return 0;
}

static int prepare(struct writelog *w, const char *path, struct error *err)
{
	int r;

	w->path = strdup(path);
	if (!w->path)
		return error_set(err, ENOMEM, "out of memory");
	w->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644);
	if (w->fd < 0)
		return error_errno(err, errno, "log: cannot open '%s'", path);
	if ((r = check_file(w->fd, path, err)) || (r = lock_image(w->fd, path, false, err)))
		return r;
	fill_super(w, 0);
	if (ftruncate(w->fd, 0) || pwrite(w->fd, w->super, sizeof(w->super), 0) != sizeof(w->super))
		return error_errno(err, errno, "log: cannot write '%s'", path);
	w->pos = WRITELOG_BLOCK;
	return 0;
}

int writelog_open(struct writelog **ret, const char *path, struct error *err)
{
	struct writelog *w = calloc(1, sizeof(*w));
	int r;

	if (!w)
		return error_set(err, ENOMEM, "out of memory");
	w->fd = -1;
	w->last = &w->first;
	w->idle = true;
	r = prepare(w, path, err);
	if (r)
		writelog_free(w);
	else
		*ret = w;
	return r;
}

void writelog_free(struct writelog *w)
{
	if (!w)
		return;
	if (w->fd >= 0)
		close(w->fd);
	free(w->path);
	free(w);
}

const char *writelog_path(const struct writelog *w)
{
	return w->path;
}

uint64_t writelog_entries(const struct writelog *w)
{
	return atomic_load_explicit(&w->entries, memory_order_relaxed);
}

int writelog_error(const struct writelog *w)
{
	return atomic_load_explicit(&w->error, memory_order_relaxed);
}

void writelog_set_home(struct writelog *w, struct loop *home, void (*room)(void *arg), void *arg)
{
	w->home = home;
	w->room = room;
	w->arg = arg;
}

/* ---- items; home loop ---- */

static void item_free(struct writelog *w, struct writelog_item *i)
{
	w->bytes -= sizeof(*i) + i->len;
	free(i->data);
	free(i);
}

static void push(struct writelog *w, struct writelog_item *i)
{
	i->next = NULL;
	*w->last = i;
	w->last = &i->next;
	w->idle = false;
}

static struct writelog_item *pop(struct writelog *w)
{
	struct writelog_item *i = w->first;

	w->first = i->next;
	if (!w->first)
		w->last = &w->first;
	return i;
}

static void take_out(struct writelog *w, struct writelog_item *i)
{
	struct writelog_item **p;

	for (p = &w->first; *p != i; p = &(*p)->next)
		;
	*p = i->next;
	if (!*p)
		w->last = p;
}

static void copy_out(const struct blk_req *r, uint8_t *to, size_t left)
{
	for (unsigned i = 0; i < r->cnt && left; i++) {
		size_t n = MIN(r->iov[i].iov_len, left);

		memcpy(to, r->iov[i].iov_base, n);
		to += n;
		left -= n;
	}
}

bool writelog_room(const struct writelog *w, const struct blk_req *r)
{
	uint64_t len = r->op == BLK_WRITE ? r->len : 0;

	return r->op == BLK_READ || !w->bytes || writelog_error(w) || (w->bytes < WRITELOG_DATA_MAX && len <= WRITELOG_DATA_MAX - w->bytes);
}

int writelog_begin(struct writelog *w, const struct blk_req *r, struct writelog_item **ret)
{
	struct writelog_item *i;

	*ret = NULL;
	if (r->op == BLK_READ || (r->op != BLK_FLUSH && !r->len) || writelog_error(w))
		return 0;
	if (r->op == BLK_WRITE && r->len > WRITELOG_DATA_MAX)
		return -EIO;
	i = calloc(1, sizeof(*i));
	if (!i)
		return -ENOMEM;
	if (r->op == BLK_WRITE) {
		/* page-aligned: the image may want it for O_DIRECT */
		if (posix_memalign(&i->data, 4096, r->len)) {
			free(i);
			return -ENOMEM;
		}
		i->len = r->len;
		copy_out(r, i->data, i->len);
	}
	i->flush = r->op == BLK_FLUSH;
	i->zero = r->op == BLK_ZERO;
	i->nr_sectors = i->flush ? 0 : r->len / SECTOR;
	memcpy(i->block, &(struct writelog_entry){ .sector = htole64(i->flush ? 0 : r->off / SECTOR),
		.nr_sectors = htole64(i->nr_sectors), .flags = htole64(i->flush ? WRITELOG_FLUSH :
			r->op == BLK_DISCARD ? WRITELOG_DISCARD : 0) }, sizeof(struct writelog_entry));
	w->bytes += sizeof(*i) + i->len;
	if (i->flush)
		push(w, i);
	*ret = i;
	return 0;
}

void *writelog_data(const struct writelog_item *i)
{
	return i->data;
}

/* ---- the writer; home loop ---- */

static void advance(struct writelog *w);
static void submit(struct writelog *w);

static void give_up(struct writelog *w, int err)
{
	atomic_store_explicit(&w->error, err, memory_order_relaxed);
	log_error("log '%s': %s: nothing more is logged", w->path, strerrordesc_np(-err));
}

static void written(struct writelog *w)
{
	struct writelog_item *i;

	while ((i = w->batch)) {
		struct writelog_entry e;

		w->batch = i->next;
		memcpy(&e, i->block, sizeof(e));
		if (!writelog_error(w))
			atomic_fetch_add_explicit(&w->entries, 1, memory_order_relaxed);
		w->super_due |= le64toh(e.flags) & (WRITELOG_FLUSH | WRITELOG_FUA);
		item_free(w, i);
	}
	advance(w);
	w->room(w->arg);
}

static void op_done(struct loop_op *op, int res)
{
	struct writelog *w = container_of(op, struct writelog, op);
	size_t n = res > 0 ? (size_t)res : 0;

	if (res <= 0) {
		give_up(w, res ? res : -ENOSPC);
		w->left = 0;
	}
	w->left -= n;
	w->at += n;
	while (w->left && n >= w->next_iov->iov_len)
		n -= (w->next_iov++)->iov_len;
	if (w->left) {
		w->next_iov->iov_base = (uint8_t *)w->next_iov->iov_base + n;
		w->next_iov->iov_len -= n;
		return submit(w);
	}
	w->busy = false;
	written(w);
}

/* What is left of w->iov to w->at. */
static void submit(struct writelog *w)
{
	unsigned cnt = 0;

	for (size_t n = 0; n < w->left; cnt++)
		n += w->next_iov[cnt].iov_len;
	w->busy = true;
	w->op = (struct loop_op){ .kind = OP_WRITEV, .fd = w->fd, .off = w->at, .iov = w->next_iov, .cnt = cnt,
		.done = op_done };
	loop_submit(w->home, &w->op);
}

static void start(struct writelog *w, unsigned cnt, uint64_t at)
{
	w->next_iov = w->iov;
	w->at = at;
	w->left = 0;
	for (unsigned i = 0; i < cnt; i++)
		w->left += w->iov[i].iov_len;
	submit(w);
}

/* The last block of a hole, so that the file reaches its end. */
static void write_skipped(struct writelog *w)
{
	w->iov[0] = (struct iovec){ (void *)zero_block, WRITELOG_BLOCK };
	w->pos += w->skip;
	w->skip = 0;
	start(w, 1, w->pos - WRITELOG_BLOCK);
}

static void write_super(struct writelog *w)
{
	fill_super(w, writelog_entries(w));
	w->super_due = false;
	w->iov[0] = (struct iovec){ w->super, sizeof(w->super) };
	start(w, 1, 0);
}

static void write_batch(struct writelog *w)
{
	struct writelog_item **end = &w->batch, *i;
	uint64_t at = w->pos;
	unsigned n = 0;

	do {
		i = pop(w);
		i->next = NULL;
		*end = i;
		end = &i->next;
		w->iov[n++] = (struct iovec){ i->block, sizeof(i->block) };
		w->pos += sizeof(i->block);
		if (i->len)
			w->iov[n++] = (struct iovec){ i->data, i->len };
		w->pos += i->len;
		w->skip = i->zero ? i->nr_sectors * WRITELOG_BLOCK : 0;
	} while (n + 2 <= BATCH_IOVS && !w->skip && w->first && w->first->ready);
	start(w, n, at);
}

/* The next thing to be done, if any. */
static void advance(struct writelog *w)
{
	if (w->busy)
		return;
	while (writelog_error(w) && w->first && w->first->ready)
		item_free(w, pop(w));
	if (writelog_error(w)) {
		w->idle = !w->first;
		return;
	}
	if (w->skip)
		write_skipped(w);
	else if (w->super_due)
		write_super(w);
	else if (w->first && w->first->ready)
		write_batch(w);
	else if (w->closing && !w->first && w->in_super != writelog_entries(w))
		write_super(w);
	else
		w->idle = !w->first;
}

void writelog_end(struct writelog *w, struct writelog_item *i, bool ok, bool fua)
{
	if (fua && !i->flush)   /* flags: bytes 16 to 23, little-endian */
		i->block[offsetof(struct writelog_entry, flags)] |= WRITELOG_FUA;
	i->ready = ok;
	if (!ok) {
		if (i->flush)
			take_out(w, i);
		item_free(w, i);
	} else if (!i->flush) {
		push(w, i);
	}
	w->idle = false;
	advance(w);
}

void writelog_settle(struct writelog *w)
{
	ON_LOOP(w->home);
	w->closing = true;
	w->idle = false;
	advance(w);
	if (!w->idle)
		loop_drain(w->home, &w->idle);
	w->closing = false;
}
