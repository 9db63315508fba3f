#ifndef FOREIGN_IMAGE_H
#define FOREIGN_IMAGE_H
/* Images that qemu-img made, read by our formats, compared with the raw bytes they were made of. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include "block/format.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"

#define PIECE (1u << 20)

static struct error err;
static char dir[64];
static uint64_t seed = 88172645463325252ull;

static inline uint64_t rnd(uint64_t n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % n;
}

static inline const char *in_dir(const char *name)
{
	static char path[8][200];
	static unsigned n;

	n = (n + 1) % 8;
	snprintf(path[n], sizeof(path[n]), "%s/%s", dir, name);
	return path[n];
}

static inline void dir_make(void)
{
	strcpy(dir, "/tmp/vmm-image-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
}

static inline void dir_remove(void)
{
	char cmd[128];

	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	ck_assert_int_eq(system(cmd), 0);
}

/* Run a command in dir, silently. */
__attribute__((format(printf, 1, 2)))
static inline void run(const char *fmt, ...)
{
	char cmd[600];
	int n = snprintf(cmd, sizeof(cmd), "exec >/dev/null 2>&1; cd %s && ", dir);
	va_list ap;

	va_start(ap, fmt);
	ck_assert_int_lt(vsnprintf(cmd + n, sizeof(cmd) - (size_t)n, fmt, ap), (int)sizeof(cmd) - n);
	va_end(ap);
	ck_assert_msg(system(cmd) == 0, "%s", cmd);
}

static inline bool no_qemu(const char *test)
{
	bool none = system("qemu-img --version >/dev/null 2>&1");

	if (none)
		printf("SKIP %s: qemu-img is not installed\n", test);
	return none;
}

/* raw in dir: size bytes of which every 64 KiB, or part of it, is a hole, random bytes or much the same byte. */
static inline void make_raw(uint64_t size, unsigned pieces)
{
	int fd = open(in_dir("raw"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	static uint8_t buf[65536];

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	while (pieces--) {
		uint64_t off = rnd(size / 512) * 512, some = (1 + rnd(128)) * 512, len = MIN(some, size - off);

		memset(buf, (int)rnd(256), len);
		if (rnd(2))
			for (uint64_t k = 0; k < len; k++)
				buf[k] = (uint8_t)rnd(256);
		ck_assert_int_eq(pwrite(fd, buf, len, (off_t)off), (ssize_t)len);
	}
	/* the first and the last sector, always */
	memset(buf, 'x', 512);
	ck_assert_int_eq(pwrite(fd, buf, 512, 0), 512);
	ck_assert_int_eq(pwrite(fd, buf, 512, (off_t)size - 512), 512);
	close(fd);
}

static inline int open_image(struct image **i, const char *name, const char *format)
{
	const struct image_how how = { .format = format, .readonly = true };

	return image_open(i, in_dir(name), &how, &err);
}

/* One read as a guest's disk does it: nothing waits in place, tables are read by the caller. Counts the tables. */
static inline int read_nonblocking(struct image *i, uint8_t *buf, uint64_t len, uint64_t off, unsigned *tables)
{
	while (len) {
		struct image *owner;
		struct extent e;
		uint64_t n;
		int r;

		i->blocking = false;
		while ((r = image_map(i, off, len, &e, &owner)) == -EAGAIN) {
			struct table *t = i->want_table;
			ssize_t got = preadv(t->file->meta_fd, &t->iov, 1,
				(off_t)(t->off + (uint64_t)((uint8_t *)t->iov.iov_base - (uint8_t *)t->data)));

			ck_assert_int_eq(i->want, WANT_TABLE);
			(*tables)++;
			table_loaded(t, got < 0 ? -errno : (int)got);
		}
		i->blocking = true;
		if (r)
			return r;
		ck_assert(e.len >= 1 && e.len <= len);
		n = e.len;
		r = image_read(i, buf, n, off);
		if (r)
			return r;
		buf += n;
		off += n;
		len -= n;
	}
	return 0;
}

/* All data in pieces of odd sizes; tables not NULL: nonblocking. Where raw has a hole the image must have none but zeroes. */
static inline void compare(struct image *i, unsigned *tables)
{
	static uint8_t want[PIECE], got[PIECE];
	int fd = open(in_dir("raw"), O_RDONLY | O_CLOEXEC);
	uint64_t size = image_size(i), off = 0;
	struct stat st;

	ck_assert_int_eq(fstat(fd, &st), 0);
	ck_assert_uint_eq(size, (uint64_t)st.st_size);
	while (off < size) {
		uint64_t some = 1 + rnd(rnd(8) ? PIECE : 9000), n = MIN(some, size - off);
		off_t data = lseek(fd, (off_t)off, SEEK_DATA);
		struct image_status s;

		if (data < 0 || (uint64_t)data > off + PIECE) {
			ck_assert_int_eq(image_status(i, off, (data < 0 ? size : (uint64_t)data) - off, &s), 0);
			ck_assert_uint_ge(s.len, 1);
			if (s.kind == EXT_HOLE || s.kind == EXT_ZERO) {
				off += s.len;
				continue;
			}
		}
		ck_assert_int_eq(pread(fd, want, n, (off_t)off), (ssize_t)n);
		memset(got, 0xaa, n);
		ck_assert_int_eq(tables ? read_nonblocking(i, got, n, off, tables) : image_read(i, got, n, off), 0);
		ck_assert_msg(!memcmp(want, got, n), "%llu bytes at %llu differ", (unsigned long long)n,
			(unsigned long long)off);
		off += n;
		/* A long hole in raw that is none in a flat image: only a part of it is read. */
		if (data > 0 && (uint64_t)data > off + 2 * PIECE)
			off = (uint64_t)data - 1 - rnd(PIECE);
	}
	close(fd);
}

static inline void compare_file(const char *name, const char *format, unsigned *tables)
{
	struct image *i = NULL;

	ck_assert_msg(open_image(&i, name, format) == 0, "%s", err.msg);
	compare(i, tables);
	ck_assert_int_eq(image_close(i), 0);
}

/* Opens with these words in the error. */
static inline void refused(const char *name, const char *format, const char *words)
{
	struct image *i = NULL;
	int r = open_image(&i, name, format);

	ck_assert_msg(r < 0, "%s was opened; expected: %s", name, words);
	ck_assert_msg(strstr(err.msg, words) && !strchr(err.msg, '\n'), "'%s' does not say '%s'", err.msg, words);
}

/* Opens, but a read at off fails with EIO, again and again. */
static inline void eio(const char *name, const char *format, uint64_t off)
{
	struct image *i = NULL;
	uint8_t buf[512];

	ck_assert_msg(open_image(&i, name, format) == 0, "%s", err.msg);
	ck_assert_int_eq(image_read(i, buf, 512, off), -EIO);
	ck_assert_int_eq(image_read(i, buf, 512, off), -EIO);
	image_close(i);
}

static inline uint64_t get(const char *name, uint64_t off, unsigned size)
{
	int fd = open(in_dir(name), O_RDONLY | O_CLOEXEC);
	uint64_t v = 0;

	ck_assert_int_eq(pread(fd, &v, size, (off_t)off), (ssize_t)size);
	close(fd);
	return v;
}

static inline void put_bytes(const char *name, uint64_t off, const void *p, size_t n)
{
	int fd = open(in_dir(name), O_RDWR | O_CREAT | O_CLOEXEC, 0644);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(pwrite(fd, p, n, (off_t)off), (ssize_t)n);
	close(fd);
}

static inline void put(const char *name, uint64_t off, unsigned size, uint64_t val)
{
	put_bytes(name, off, &val, size);
}
#endif
