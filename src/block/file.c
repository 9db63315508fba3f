/*
 * The host file behind a disk: what may be one, and every way bytes go in and out of it.
 *
 * How this works. A transfer is a state machine of one state: [pos, pos+left) is still to do. Each
 * result moves pos, and what is left is asked for again, so short transfers, EINTR and EAGAIN need no
 * case of their own. Small reads are first tried at once with RWF_NOWAIT: a page-cache hit costs 0.7 us
 * that way and at least 1 us through the ring, at any queue depth. A file in memory (tmpfs) refuses
 * RWF_NOWAIT and io_uring hands its reads to a worker (40 us and more), but it never waits for a
 * medium, so there the plain call is made. What the page cache does not have goes to the ring.
 *
 * Small writes of whole pages into the page cache are made at once, too: 2 us, where the ring hands them to
 * a worker on most file systems (ext4 has no RWF_NOWAIT for them). They may wait, for the journal or
 * because too much is dirty; one that did closes this way for as long as it waited, the next one for twice
 * as long and so on to WAIT_TIMES, so the loop is hardly ever held up:
 *
 *      at once --slow--> at once, and looked at --waited--> ring only, for a while
 *         ^                     |    ^                             |
 *         +--SUSPECT_WRITES ok--+    +-----------------------------+
 *
 * Slow alone proves nothing: the thread may merely have lost its CPU.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "format.h"

#define INLINE_MAX (128u << 10) /* largest transfer tried on the loop's own thread */
#define WRITE_PAGE 4096u        /* a write of less may have to read first */
#define SLOW_NS    10000000u    /* a write at once that takes this long may have been held back; journals take less */
#define WAIT_TIMES 32
#define SUSPECT_WRITES 64
#define TRIES_MAX  64           /* fruitless results in a row before a request fails */
#define TAIL_BLOCK 4096u        /* a read that ends in the file's last block of this size is zero-filled */
#define ZERO_CHUNK (64u << 10)
#define ZERO_IOVS  16
#define GROW_STEP  (16u << 20)
#define SPACE_MAX  (256u << 20) /* most space taken at once: an image may point anywhere, and space is not free */

/* Zeroes to write from. Never stored to, so they cost no memory; not const, so they cost no file either. */
static uint8_t zeroes[ZERO_CHUNK] __attribute__((aligned(4096)));

/* ---- opening; main thread ---- */

static int check_kind(const char *path, const struct stat *st, struct error *err)
{
	const char *what = S_ISDIR(st->st_mode) ? "a directory"
		: S_ISFIFO(st->st_mode)		? "a pipe"
		: S_ISSOCK(st->st_mode)		? "a socket"
						: "a character device";

	if (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode))
		return 0;
	return error_set(err, EINVAL, "'%s' is %s: a disk is a regular file or a block device", path, what);
}

/* The same file without O_DIRECT; a path that leads elsewhere meanwhile is refused. */
static int open_again(const char *path, int flags, const struct stat *st)
{
	auto_close int fd = open(path, flags);
	struct stat again;

	if (fd < 0 || fstat(fd, &again))
		return -errno;
	if (again.st_dev != st->st_dev || again.st_ino != st->st_ino)
		return -EBUSY;
	return TAKE_FD(fd);
}

int file_open(struct host_file *f, const char *path, bool readonly, bool direct, struct error *err)
{
	/* O_NONBLOCK: should the path become a pipe between stat and open, do not wait for its other end. */
	int flags = (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	auto_close int fd = -1;
	struct stat st;
	int r;

	*f = (struct host_file){ .fd = -1, .meta_fd = -1, .readonly = readonly, .align = 1, .mem_align = 1 };
	if (stat(path, &st))            /* first: merely opening some devices does something */
		return error_errno(err, errno, "cannot open '%s'", path);
	r = check_kind(path, &st, err);
	if (r)
		return r;
	fd = open(path, flags | (direct ? O_DIRECT : 0));
	if (fd < 0 && !readonly && (errno == EACCES || errno == EROFS || errno == EPERM))
		return error_set(err, errno, "cannot open '%s' for writing: %s (ro opens it read-only)", path,
			strerrordesc_np(errno));
	if (fd < 0 && direct && errno == EINVAL)
		return error_set(err, EINVAL, "'%s': its file system has no O_DIRECT: cache=none cannot be had",
			path);
	if (fd < 0)
		return error_errno(err, errno, "cannot open '%s'", path);
	if (fstat(fd, &st))
		return error_errno(err, errno, "cannot look at '%s'", path);
	r = check_kind(path, &st, err);
	if (r)
		return r;
	if (direct) {
		f->meta_fd = open_again(path, flags, &st);
		if (f->meta_fd < 0)
			return error_errno(err, -f->meta_fd, "cannot open '%s' a second time", path);
	}
	f->blockdev = S_ISBLK(st.st_mode);
	f->align = direct ? SECTOR : 1; /* file_prepare() asks for the true value */
	f->fd = TAKE_FD(fd);
	if (!direct)
		f->meta_fd = f->fd;
	return 0;
}

int file_adopt(struct host_file *f, int fd, const char *path, bool readonly, struct error *err)
{
	struct stat st;
	int r;

	*f = (struct host_file){ .fd = fd, .meta_fd = fd, .readonly = readonly, .align = 1, .mem_align = 1 };
	if (fstat(fd, &st))
		r = error_errno(err, errno, "cannot look at '%s'", path);
	else
		r = check_kind(path, &st, err);
	f->blockdev = !r && S_ISBLK(st.st_mode);
	return r;
}

int confined_open(const char *dir, const char *name)
{
	struct open_how how = { .flags = O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS };
	auto_close int top = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	long fd;

	if (top < 0)
		return -errno;
	fd = syscall(SYS_openat2, top, name, &how, sizeof(how));
	return fd < 0 ? -errno : (int)fd;
}

/* What O_DIRECT wants aligned here (statx since Linux 6.1; else a page serves every file system). */
static void ask_alignment(struct host_file *f)
{
	struct statx sx;
	int logical;

	f->align = f->mem_align = 4096;
	if (f->blockdev && !ioctl(f->fd, BLKSSZGET, &logical) && logical >= (int)SECTOR && logical <= 4096)
		f->align = f->mem_align = (uint32_t)logical;
	else if (!statx(f->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) && sx.stx_mask & STATX_DIOALIGN &&
		!(sx.stx_dio_offset_align & (sx.stx_dio_offset_align - 1)) &&
		sx.stx_dio_offset_align >= 1 && sx.stx_dio_offset_align <= BOUNCE_SIZE / 2 &&
		sx.stx_dio_mem_align >= 1 && sx.stx_dio_mem_align <= 4096) {
		f->align = MAX(sx.stx_dio_offset_align, SECTOR);
		f->mem_align = sx.stx_dio_mem_align;
	}
}

static void choose_paths(struct host_file *f, bool direct)
{
	struct statfs fs;

	/* With O_DIRECT even RWF_NOWAIT waits for the medium. */
	f->inline_read = f->inline_write = !direct;
	f->inline_flags = f->write_flags = f->meta_flags = RWF_NOWAIT;
	f->wait_times = 1;
	if (!f->blockdev && !fstatfs(f->fd, &fs) && fs.f_type == TMPFS_MAGIC) {
		f->meta_flags = 0;
		f->in_memory = true;
		if (!direct)
			f->inline_flags = f->write_flags = 0;
	}
}

int file_prepare(struct host_file *f, struct error *err)
{
	bool direct = f->align > 1;
	unsigned physical = 0;
	struct stat st;

	if (fstat(f->fd, &st))
		return error_errno(err, errno, "cannot look at it");
	f->size = (uint64_t)st.st_size;
	physical = (unsigned)st.st_blksize;
	if (f->blockdev) {
		if (ioctl(f->fd, BLKGETSIZE64, &f->size))
			return error_errno(err, errno, "cannot ask the block device for its size");
		if (ioctl(f->fd, BLKPBSZGET, &physical))
			physical = SECTOR;
	}
	/* A power of two, and no more than a page: what guests are used to. */
	f->physical = physical >= 4096 ? 4096 : physical >= 1024 && !(physical & (physical - 1)) ? physical : SECTOR;
	if (direct) {
		ask_alignment(f);
		f->bounce = mmap(NULL, BOUNCE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (f->bounce == MAP_FAILED) {
			f->bounce = NULL;
			return error_errno(err, errno, "no memory for an O_DIRECT buffer");
		}
	}
	choose_paths(f, direct);
	return 0;
}

void file_close(struct host_file *f)
{
	if (f->bounce)
		munmap(f->bounce, BOUNCE_SIZE);
	if (f->meta_fd >= 0 && f->meta_fd != f->fd)
		close(f->meta_fd);
	if (f->fd >= 0)
		close(f->fd);
	f->fd = f->meta_fd = -1;
	f->bounce = NULL;
}

/*
 * Under a guest: space that is there already takes a third less time to write into than a hole, and lies
 * together. A tool's holes stay holes; memory is not taken before it is needed.
 */
static bool grow_with_space(struct host_file *f, uint64_t size)
{
	if (!f->home || f->in_memory || f->no_space || size - f->size > SPACE_MAX)
		return false;
	f->no_space = fallocate(f->meta_fd, 0, (off_t)f->size, (off_t)(size - f->size)) != 0;
	if (!f->no_space)
		f->size = size;
	return !f->no_space;
}

int file_grow(struct host_file *f, uint64_t end)
{
	uint64_t size = (end + GROW_STEP - 1) / GROW_STEP * GROW_STEP;

	if (end <= f->size)
		return 0;
	if (f->blockdev)
		return -ENOSPC;
	if (size > INT64_MAX)
		return -EFBIG;
	if (grow_with_space(f, size))
		return 0;
	if (ftruncate(f->meta_fd, (off_t)size))
		return -errno;
	f->size = size;
	return 0;
}

ssize_t file_peek(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	size_t at = 0;

	if (off > INT64_MAX || len > INT64_MAX - off)
		return 0;
	while (at < len) {
		ssize_t n = pread(f->meta_fd, (uint8_t *)buf + at, len - at, (off_t)(off + at));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		at += (size_t)n;
	}
	return (ssize_t)at;
}

/* ---- transfers; home loop ---- */

struct host_file *file_of(const struct blk_req *r)
{
	return r->file;
}

bool file_retry(struct blk_req *r, int res)
{
	return (res == -EAGAIN || res == -EINTR) && r->tries++ < TRIES_MAX;
}

int file_at_end(struct blk_req *r)
{
	struct stat st;

	/* Cut off while we run. What lies in the block where it ends now reads as zeroes, what is beyond is gone. */
	if (fstat(file_of(r)->fd, &st) || !st.st_size || r->left > TAIL_BLOCK - r->pos % TAIL_BLOCK ||
		r->pos / TAIL_BLOCK > (uint64_t)(st.st_size - 1) / TAIL_BLOCK)
		return -EIO;
	for (unsigned i = 0; i < r->cnt; i++)
		memset(r->iov[i].iov_base, 0, r->iov[i].iov_len);
	return 0;
}

static void advance(struct blk_req *r, size_t n)
{
	r->pos += n;
	r->left -= n;
	r->tries = 0;
	while (n && n >= r->iov->iov_len) {
		n -= r->iov->iov_len;
		r->iov++;
		r->cnt--;
	}
	if (n) {
		r->iov->iov_base = (uint8_t *)r->iov->iov_base + n;
		r->iov->iov_len -= n;
	}
}

static void transfer_done(struct loop_op *op, int res);

static void transfer(struct blk_req *r)
{
	struct host_file *f = file_of(r);

	r->io = (struct loop_op){ .kind = r->op == BLK_READ ? OP_READV : OP_WRITEV, .fd = f->fd,
		.off = r->pos, .iov = r->iov, .cnt = r->cnt, .done = transfer_done };
	loop_submit(f->home, &r->io);
}

static void transfer_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);
	int err = 0;

	if (res > 0) {
		advance(r, MIN((uint64_t)res, r->left));
	} else if (res < 0 && !file_retry(r, res)) {
		return r->step(r, res);
	} else if (res == 0) {
		err = r->op == BLK_READ ? file_at_end(r) : -EIO;
		return r->step(r, err);
	}
	if (!r->left)
		return r->step(r, 0);
	transfer(r);
}

static ssize_t read_now(struct host_file *f, const struct blk_req *r)
{
	ssize_t n = preadv2(f->fd, r->iov, (int)r->cnt, (off_t)r->pos, f->inline_flags);

	if (n < 0 && errno == EOPNOTSUPP)
		f->inline_read = false; /* this file system has no RWF_NOWAIT */
	return n;
}

/* How often this thread went to sleep by itself. */
static long waits(void)
{
	struct rusage u;

	return getrusage(RUSAGE_THREAD, &u) ? 0 : u.ru_nvcsw;
}

static ssize_t write_and_watch(struct host_file *f, const struct blk_req *r, uint64_t began)
{
	long before = f->suspect ? waits() : 0;
	ssize_t n = pwritev2(f->fd, r->iov, (int)r->cnt, (off_t)r->pos, 0);
	uint64_t now = loop_now(), took = now - began;

	if (took >= SLOW_NS) {
		if (before && waits() != before) {
			f->write_pause = now + took * f->wait_times;
			f->wait_times = MIN(f->wait_times * 2, WAIT_TIMES);
		}
		f->suspect = SUSPECT_WRITES;
	} else if (f->suspect) {
		f->suspect--;
	} else {
		f->wait_times = 1;
	}
	return n;
}

static ssize_t write_now(struct host_file *f, const struct blk_req *r)
{
	uint64_t now;
	ssize_t n;

	if (f->in_memory || f->write_flags) {
		n = pwritev2(f->fd, r->iov, (int)r->cnt, (off_t)r->pos, f->write_flags);
		if (n >= 0 || errno != EOPNOTSUPP || f->in_memory)
			return n;
		f->write_flags = 0;
	}
	now = loop_now();
	if ((r->pos | r->left) % WRITE_PAGE || now < f->write_pause)
		return -1;
	return write_and_watch(f, r, now);
}

/* Some or all of it at once on this thread. True: all of it is done. */
static bool transfer_inline(struct host_file *f, struct blk_req *r)
{
	ssize_t n = r->op == BLK_READ ? read_now(f, r) : write_now(f, r);

	if (n <= 0)
		return false;           /* the ring will say why */
	advance(r, (size_t)n);
	return !r->left;
}

static void transfer_start(struct host_file *f, struct blk_req *r)
{
	bool try = r->op == BLK_READ ? f->inline_read : f->inline_write;

	if (!r->left || (try && r->left <= INLINE_MAX && transfer_inline(f, r)))
		r->step(r, 0);
	else if (bounce_wanted(f, r))
		bounce_submit(f, r);
	else
		transfer(r);
}

/* ---- flush ---- */

static void sync_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);

	if (res < 0 && file_retry(r, res))
		return file_sync(file_of(r), r);
	r->step(r, res < 0 ? res : 0);
}

void file_sync(struct host_file *f, struct blk_req *r)
{
	r->file = f;
	r->io = (struct loop_op){ .kind = OP_FSYNC, .fd = f->fd, .done = sync_done };
	loop_submit(f->home, &r->io);
}

/* ---- discard and zeroes ---- */

static bool unsupported(int res)
{
	return res == -EOPNOTSUPP || res == -ENOSYS || res == -ENOTTY || res == -ENODEV;
}

static void range_submit(struct host_file *f, struct blk_req *r, int mode, void (*done)(struct loop_op *, int))
{
	r->io = (struct loop_op){ .kind = OP_FALLOCATE, .fd = f->fd, .mode = mode | FALLOC_FL_KEEP_SIZE,
		.off = r->pos, .len = r->left, .done = done };
	loop_submit(f->home, &r->io);
}

static void discard(struct host_file *f, struct blk_req *r);

static void discard_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);
	struct host_file *f = file_of(r);

	if (res < 0 && file_retry(r, res))
		return discard(f, r);
	if (res < 0 && unsupported(res)) {
		f->no_discard = true;
		res = -EOPNOTSUPP;
	}
	r->step(r, res < 0 ? res : 0);
}

static int discard_blockdev(struct loop_op *op)
{
	uint64_t range[2] = { op->off, op->len };

	return ioctl(op->fd, BLKDISCARD, range) ? -errno : 0;
}

static void discard(struct host_file *f, struct blk_req *r)
{
	if (f->no_discard)
		return r->step(r, -EOPNOTSUPP);
	if (!f->blockdev)
		return range_submit(f, r, FALLOC_FL_PUNCH_HOLE, discard_done);
	r->io = (struct loop_op){ .kind = OP_WORK, .fd = f->fd, .off = r->pos, .len = r->left,
		.work = discard_blockdev, .done = discard_done };
	loop_submit(f->home, &r->io);
}

static void zero(struct host_file *f, struct blk_req *r);
static void zero_write(struct host_file *f, struct blk_req *r);

static void zero_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);
	struct host_file *f = file_of(r);

	if (res < 0 && file_retry(r, res))
		return zero(f, r);
	if (res < 0 && unsupported(res)) {      /* remember, and take the next way */
		if (op->mode & FALLOC_FL_PUNCH_HOLE)
			f->no_punch = true;
		else
			f->no_zero_range = true;
		return zero(f, r);
	}
	if (res == -EINVAL)     /* a block device takes whole logical blocks only */
		return zero_write(f, r);
	r->step(r, res < 0 ? res : 0);
}

static void zero_write_done(struct loop_op *op, int res)
{
	struct blk_req *r = container_of(op, struct blk_req, io);

	if (res > 0) {
		uint64_t n = MIN((uint64_t)res, r->left);

		r->pos += n;
		r->left -= n;
		r->tries = 0;
	} else if (!file_retry(r, res)) {
		return r->step(r, res ? res : -EIO);
	}
	if (!r->left)
		return r->step(r, 0);
	zero_write(file_of(r), r);
}

/* The last way: write zeroes, a megabyte at a time. */
static void zero_write(struct host_file *f, struct blk_req *r)
{
	static const struct iovec many[ZERO_IOVS] = { [0 ... ZERO_IOVS - 1] = { zeroes, ZERO_CHUNK } };
	bool whole = r->left >= ZERO_CHUNK;

	if ((r->pos | r->left) % f->align)      /* O_DIRECT would refuse it; the guest can write its own */
		return r->step(r, -EOPNOTSUPP);
	r->one = (struct iovec){ zeroes, MIN(r->left, ZERO_CHUNK) };
	r->io = (struct loop_op){ .kind = OP_WRITEV, .fd = f->fd, .off = r->pos,
		.iov = whole ? many : &r->one,
		.cnt = whole ? (unsigned)MIN(r->left / ZERO_CHUNK, ZERO_IOVS) : 1,
		.done = zero_write_done };
	loop_submit(f->home, &r->io);
}

static void zero(struct host_file *f, struct blk_req *r)
{
	if (r->unmap && !f->no_punch)
		range_submit(f, r, FALLOC_FL_PUNCH_HOLE, zero_done);
	else if (!f->no_zero_range)
		range_submit(f, r, FALLOC_FL_ZERO_RANGE, zero_done);
	else
		zero_write(f, r);
}

void file_submit(struct host_file *f, struct blk_req *r)
{
	r->tries = 0;
	r->file = f;
	switch (r->op) {
	case BLK_READ:
	case BLK_WRITE:
		return transfer_start(f, r);
	case BLK_FLUSH:
		return file_sync(f, r);
	case BLK_DISCARD:
		return discard(f, r);
	case BLK_ZERO:
		return zero(f, r);
	}
}
