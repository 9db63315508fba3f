/* A hostile qcow2 file: looked at, read, written, given back; nothing may crash, hang or take much memory. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "block/format.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PLACES 24
#define CHUNK  5000u

static uint8_t buf[2u << 20];

static uint64_t place(const struct image *i, unsigned n)
{
	uint64_t size = image_size(i);
	uint64_t at = n < 12 ? (uint64_t)n * image_cluster(i) + n % 3 * 700 : size / PLACES * n;

	return size > CHUNK ? MIN(at, size - CHUNK) : 0;
}

static void look(struct image *i)
{
	uint64_t len = MIN(CHUNK, image_size(i));
	struct image_status s;

	for (unsigned n = 0; n < PLACES && len; n++) {
		image_status(i, place(i, n), len, &s);
		image_read(i, buf, len, place(i, n));
	}
}

static void change(struct image *i)
{
	uint64_t len = MIN(CHUNK, image_size(i)), cluster = image_cluster(i);

	for (unsigned n = 0; n < PLACES && len; n++) {
		uint64_t at = place(i, n), whole = at & ~(cluster - 1);

		if (n % 4 == 0)
			image_write(i, buf, len, at);
		else if (n % 4 == 1)
			image_zero(i, whole, MIN(2 * cluster, image_size(i) - whole), n & 4);
		else if (n % 4 == 2)
			image_write_compressed(i, buf, whole);
		else
			image_discard(i, whole, MIN(cluster, image_size(i) - whole));
		if (n % 8 == 7)
			image_flush(i);
	}
	look(i);
}

static void try(const uint8_t *data, size_t size, bool readonly, bool repair)
{
	static int fd = -1;
	struct image_how how = { .format = "qcow2", .readonly = readonly, .repair = repair, .alone = true };
	struct image *i;
	struct facts *f;
	struct error err;

	if (fd < 0) {
		fd = memfd_create("input", MFD_CLOEXEC);
		log_set_level(LOG_ERROR);
	}
	how.fd = dup(fd);
	if (ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size || how.fd < 0)
		abort();
	if (image_open(&i, "input", &how, &err))
		return;
	i->unsafe = true;
	f = facts_new();
	image_describe(i, f);
	facts_free(f);
	look(i);
	if (!readonly)
		change(i);
	image_close(i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	try(data, size, true, false);
	try(data, size, false, false);
	try(data, size, false, true);
	return 0;
}
