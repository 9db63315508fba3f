/*
 * A qcow2 image with anything in it: opened read-only, checked, read; then mended, after which a check must find what
 * the repair said is left. Little memory, little time, whatever the header claims.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"
#include "vmm/log.h"

#define READ_MOST (4u << 20)
#define CHUNK     (64u << 10)
#define MEMORY    (64l << 10)           /* KiB */
#define SECONDS   2.0

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int image_fd(const uint8_t *data, size_t size)
{
	int fd = memfd_create("image", MFD_CLOEXEC);

	if (fd < 0 || write(fd, data, size) != (ssize_t)size)
		abort();
	return fd;
}

static struct image *try_open(int fd, bool repair)
{
	struct image_how how = { .format = "qcow2", .readonly = !repair, .share = !repair, .repair = repair, .alone = true,
		.fd = dup(fd) };
	struct image *i = NULL;

	return image_open(&i, "image", &how, NULL) ? NULL : i;
}

static void complain(struct image_check *c, const char *text)
{
	if (c->words > 1000 || !*text)
		abort();
}

static int check(struct image *i, enum image_repair repair, struct image_check *c)
{
	*c = (struct image_check){ .complain = complain };
	return image_check(i, repair, c, NULL);
}

static void read_all(struct image *i)
{
	static uint8_t buf[CHUNK];
	uint64_t end = MIN(image_size(i), READ_MOST);

	for (uint64_t at = 0; at < end; at += MIN(end - at, CHUNK))
		image_read(i, buf, MIN(end - at, CHUNK), at);
}

static void look(int fd)
{
	struct image *i = try_open(fd, false);
	struct image_snapshot *list;
	struct image_check c;
	unsigned n;

	if (!i)
		return;
	check(i, REPAIR_NONE, &c);
	read_all(i);
	if (!image_snapshots(i, &list, &n, NULL))
		free(list);
	image_close(i);
}

static void mend(int fd)
{
	struct image *i = try_open(fd, true);
	struct image_check c, again;
	int r;

	if (!i)
		return;
	r = check(i, REPAIR_ALL, &c);
	image_close(i);
	if (r)
		return;
	i = try_open(fd, false);
	if (!i)
		abort();        /* mended so that it cannot be opened */
	if (!check(i, REPAIR_NONE, &again) && again.corruptions > c.corruptions - c.fixed_corruptions)
		abort();
	read_all(i);
	image_close(i);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static long before;
	struct rusage u;
	double start = now();
	int fd = image_fd(data, size);

	log_set_level(LOG_ERROR);
	getrusage(RUSAGE_SELF, &u);
	before = before ? before : u.ru_maxrss;
	look(fd);
	mend(fd);
	close(fd);
	getrusage(RUSAGE_SELF, &u);
	if (!SANITIZED && (u.ru_maxrss - before > MEMORY || now() - start > SECONDS))
		abort();
	return 0;
}
