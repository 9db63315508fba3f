/* Raw images: clones that share or copy what is there, and what a log says put into them. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "block/writelog.h"
#include "replay.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define CHUNK (1u << 20)

static uint8_t chunk[CHUNK];

int raw_size(int fd, uint64_t *size, struct error *err)
{
	off_t end = lseek(fd, 0, SEEK_END);

	if (end < 0)
		return error_errno(err, errno, "cannot find out its size");
	*size = (uint64_t)end & ~511ull;
	return 0;
}

/* ---- pieces ---- */

static int read_at(int fd, size_t len, uint64_t off, struct error *err)
{
	size_t got = 0;

	while (got < len) {
		ssize_t n = pread(fd, chunk + got, len - got, (off_t)(off + got));

		if (n < 0 && errno != EINTR)
			return error_errno(err, errno, "cannot read");
		if (n == 0)
			return error_set(err, EIO, "a file became shorter meanwhile");
		got += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

static int write_at(int fd, size_t len, uint64_t off, struct error *err)
{
	size_t put = 0;

	while (put < len) {
		ssize_t n = pwrite(fd, chunk + put, len - put, (off_t)(off + put));

		if (n < 0 && errno != EINTR)
			return error_errno(err, errno, "cannot write an image");
		put += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

static bool all_zero(size_t len)
{
	return !chunk[0] && !memcmp(chunk, chunk + 1, len - 1);
}

static int zero_at(int fd, uint64_t off, uint64_t len, struct error *err)
{
	if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len))
		return 0;
	if (errno != EOPNOTSUPP)
		return error_errno(err, errno, "cannot write an image");
	memset(chunk, 0, MIN(len, CHUNK));
	while (len) {
		size_t n = MIN(len, CHUNK);
		int r = write_at(fd, n, off, err);

		if (r)
			return r;
		off += n;
		len -= n;
	}
	return 0;
}

/* ---- clones ---- */

/* fresh: to is a hole there, so zeroes need not be written. */
static int copy(int from, uint64_t at, int to, uint64_t off, uint64_t len, bool fresh, struct error *err)
{
	while (len) {
		size_t n = MIN(len, CHUNK);
		int r = read_at(from, n, at, err);

		if (!r && !all_zero(n))
			r = write_at(to, n, off, err);
		else if (!r && !fresh)
			r = zero_at(to, off, n, err);
		if (r)
			return r;
		at += n;
		off += n;
		len -= n;
	}
	return 0;
}

/* In the kernel where it can; what it does not do is copied here. */
static int copy_range(int from, int to, uint64_t off, uint64_t len, struct error *err)
{
	while (len) {
		loff_t in = (loff_t)off, out = (loff_t)off;
		ssize_t n = copy_file_range(from, &in, to, &out, MIN(len, 1u << 30), 0);

		if (n <= 0)
			return copy(from, off, to, off, len, true, err);
		off += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

static int copy_data(int from, int to, uint64_t size, struct error *err)
{
	off_t at = 0, end;

	for (; (uint64_t)at < size; at = end) {
		int r;

		at = lseek(from, at, SEEK_DATA);
		if (at < 0)
			return errno == ENXIO ? 0 : error_errno(err, errno, "cannot look for data");
		end = lseek(from, at, SEEK_HOLE);
		if (end < 0)
			return error_errno(err, errno, "cannot look for data");
		if ((uint64_t)at >= size)
			break;
		r = copy_range(from, to, (uint64_t)at, MIN((uint64_t)end, size) - (uint64_t)at, err);
		if (r)
			return r;
	}
	return 0;
}

int raw_clone(int from, int to, uint64_t size, struct error *err)
{
	uint64_t have = 0;
	struct stat st;
	int r = 0;

	if (from >= 0)
		r = raw_size(from, &have, err);
	if (r)
		return r;
	if (from >= 0 && (fstat(from, &st) || !S_ISREG(st.st_mode)))
		r = copy(from, 0, to, 0, MIN(have, size), true, err);
	else if (from >= 0 && ioctl(to, FICLONE, from))
		r = copy_data(from, to, MIN(have, size), err);
	if (!r && ftruncate(to, (off_t)size))
		r = error_errno(err, errno, "cannot make an image of %llu bytes", (unsigned long long)size);
	return r;
}

/* ---- entries ---- */

int raw_apply(int fd, const struct replay_log *l, const struct replay_entry *e, uint64_t skip, uint64_t len,
	struct error *err)
{
	if (!len)
		return 0;
	if (e->flags & WRITELOG_DISCARD)
		return zero_at(fd, e->off + skip, len, err);
	return copy(l->fd, e->data + skip, fd, e->off + skip, len, false, err);
}
