/* Metadata straight from and to the host file, in place: any thread that may wait. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "format.h"

#define ZERO_CHUNK (64u << 10)

int meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	ssize_t n = file_peek(f, buf, len, off);

	if (n < 0)
		return (int)n;
	memset((uint8_t *)buf + n, 0, len - (size_t)n);
	return 0;
}

int meta_read_all(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	ssize_t n = file_peek(f, buf, len, off);

	return n < 0 ? (int)n : (size_t)n < len ? -EIO : 0;
}

int meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off)
{
	for (size_t at = 0; at < len;) {
		ssize_t n = pwrite(f->meta_fd, (const uint8_t *)buf + at, len - at, (off_t)(off + at));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		at += (size_t)n;
	}
	return 0;
}

static int allocate(const struct host_file *f, int mode, uint64_t off, uint64_t len)
{
	int r;

	do
		r = fallocate(f->meta_fd, mode, (off_t)off, (off_t)len) ? -errno : 0;
	while (r == -EINTR);
	return r;
}

static bool unsupported(int r)
{
	return r == -EOPNOTSUPP || r == -ENOSYS || r == -ENODEV || r == -EINVAL;
}

int meta_fill(const struct host_file *f, uint64_t off, uint64_t len)
{
	static const uint8_t zeroes[ZERO_CHUNK];
	int r = 0;

	while (!r && len) {
		size_t n = MIN(len, ZERO_CHUNK);

		r = meta_write(f, zeroes, n, off);
		off += n;
		len -= n;
	}
	return r;
}

int meta_zero(const struct host_file *f, uint64_t off, uint64_t len)
{
	int r = allocate(f, FALLOC_FL_ZERO_RANGE, off, len);

	return unsupported(r) ? meta_fill(f, off, len) : r;
}

int meta_hole(const struct host_file *f, uint64_t off, uint64_t len)
{
	return allocate(f, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, len);
}

int meta_sync(const struct host_file *f)
{
	int r;

	do
		r = fdatasync(f->meta_fd) ? -errno : 0;
	while (r == -EINTR);
	return r;
}

int meta_punch(const struct host_file *f, uint64_t off, uint64_t len)
{
	uint64_t range[2] = { off, len };
	int r;

	if (f->blockdev)
		r = ioctl(f->meta_fd, BLKDISCARD, range) ? -errno : 0;
	else
		r = meta_hole(f, off, len);
	return unsupported(r) || r == -ENOTTY ? 0 : r;
}
