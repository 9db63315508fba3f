#include "file.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

static const char *kind_name(mode_t mode)
{
	if (S_ISDIR(mode))
		return "a directory";
	if (S_ISFIFO(mode))
		return "a pipe";
	if (S_ISBLK(mode) || S_ISCHR(mode))
		return "a device";
	return "no regular file";
}

int boot_file_open(struct boot_file *f, const char *what, const char *path, struct error *err)
{
	auto_close int fd = -1;
	struct stat st;

	/* Non-blocking: opening a pipe must not wait for its writer. */
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return error_errno(err, errno, "cannot open %s '%s'", what, path);
	if (fstat(fd, &st))
		return error_errno(err, errno, "cannot examine %s '%s'", what, path);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s '%s' is %s: give a regular file", what, path,
			kind_name(st.st_mode));
	if (!st.st_size)
		return error_set(err, EINVAL, "%s '%s' is empty (0 bytes)", what, path);
	f->fd = TAKE_FD(fd);
	f->size = (uint64_t)st.st_size;
	return 0;
}

void boot_file_close(struct boot_file *f)
{
	if (f->fd >= 0)
		close(f->fd);
	f->fd = -1;
}

int boot_file_pread(int fd, uint64_t off, void *dst, size_t len)
{
	uint8_t *p = dst;

	while (len) {
		ssize_t n = pread(fd, p, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			return -ENODATA;
		p += n;
		off += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}
