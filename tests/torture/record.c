#include "record.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

struct record *records;
unsigned nr_records;
static unsigned room;
static bool recording;
unsigned fail_at, calls_made;
int fail_with;
bool make_trouble;

int __real_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __real_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_fill(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_hole(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __real_meta_sync(const struct host_file *f);
int __real_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_fill(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_hole(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len);
int __wrap_meta_sync(const struct host_file *f);
int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
ssize_t __real_pread64(int fd, void *buf, size_t len, off64_t off);
ssize_t __real_pwrite64(int fd, const void *buf, size_t len, off64_t off);
ssize_t __wrap_pread64(int fd, void *buf, size_t len, off64_t off);
ssize_t __wrap_pwrite64(int fd, const void *buf, size_t len, off64_t off);

void record_start(void)
{
	recording = true;
}

void record_stop(void)
{
	recording = false;
}

void record_clear(void)
{
	while (nr_records)
		free(records[--nr_records].data);
}

static void keep(int kind, const void *data, uint64_t off, uint64_t len)
{
	struct record *r;

	if (!recording)
		return;
	if (nr_records == room) {
		room = room ? room * 2 : 1024;
		records = reallocarray(records, room, sizeof(*records));
		if (!records)
			abort();
	}
	r = &records[nr_records++];
	*r = (struct record){ .kind = kind, .off = off, .len = len, .data = data ? malloc(len) : NULL };
	if (data)
		memcpy(r->data, data, len);
}

static bool fails(void)
{
	return ++calls_made == fail_at;
}

int __wrap_meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off)
{
	if (fails())
		return fail_with;
	keep(REC_WRITE, buf, off, len);
	return __real_meta_write(f, buf, len, off);
}

int __wrap_meta_zero(const struct host_file *f, uint64_t off, uint64_t len)
{
	if (fails())
		return fail_with;
	keep(REC_ZERO, NULL, off, len);
	return __real_meta_zero(f, off, len);
}

int __wrap_meta_fill(const struct host_file *f, uint64_t off, uint64_t len)
{
	if (fails())
		return fail_with;
	keep(REC_ZERO, NULL, off, len);
	return __real_meta_fill(f, off, len);
}

int __wrap_meta_hole(const struct host_file *f, uint64_t off, uint64_t len)
{
	if (fails())
		return fail_with;
	keep(REC_PUNCH, NULL, off, len);
	return __real_meta_hole(f, off, len);
}

int __wrap_meta_punch(const struct host_file *f, uint64_t off, uint64_t len)
{
	if (fails())
		return fail_with;
	keep(REC_PUNCH, NULL, off, len);
	return __real_meta_punch(f, off, len);
}

int __wrap_meta_sync(const struct host_file *f)
{
	if (fails())
		return fail_with;
	keep(REC_BARRIER, NULL, 0, 0);
	return __real_meta_sync(f);
}

int __wrap_meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off)
{
	if (fails())
		return fail_with;
	return __real_meta_read(f, buf, len, off);
}

static bool trouble(size_t *len)
{
	static uint64_t n;

	if (!make_trouble)
		return false;
	n = n * 6364136223846793005ull + 1;
	if (n >> 62 == 0) {
		errno = EINTR;
		return true;
	}
	if (n >> 62 == 1 && *len > 1)
		*len = 1 + (size_t)(n >> 32) % *len;
	return false;
}

ssize_t __wrap_pread64(int fd, void *buf, size_t len, off64_t off)
{
	return trouble(&len) ? -1 : __real_pread64(fd, buf, len, off);
}

ssize_t __wrap_pwrite64(int fd, const void *buf, size_t len, off64_t off)
{
	return trouble(&len) ? -1 : __real_pwrite64(fd, buf, len, off);
}
