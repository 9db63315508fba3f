/* A VDI image of any bytes: opened, read, checked, mended, changed. */
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/image.h"
#include "vmm/log.h"

#define SPOTS 12
#define CLUSTER_MOST (64u << 10)        /* larger ones take long to copy */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct image *open_bytes(const uint8_t *data, size_t size, bool readonly, bool repair)
{
	struct image_how how = { .format = "vdi", .readonly = readonly, .repair = repair };
	struct image *i = NULL;
	struct error err;

	how.fd = memfd_create("vdi", MFD_CLOEXEC);
	if (how.fd <= 0 || write(how.fd, data, size) != (ssize_t)size)
		return NULL;
	return image_open(&i, "image", &how, &err) ? NULL : i;
}

static uint64_t spot(const struct image *i, unsigned k, size_t len)
{
	uint64_t last = image_size(i) - len;

	return k < 3 ? k * 4096 % (last + 1) : k == 3 ? last : k * 0x9e3779b97f4a7c15ull % (last + 1);
}

static void try_reads(struct image *i)
{
	static uint8_t buf[5000];
	size_t len = image_size(i) < sizeof(buf) ? (size_t)image_size(i) : sizeof(buf);
	struct image_status s;

	for (unsigned k = 0; k < SPOTS; k++) {
		image_read(i, buf, len, spot(i, k, len));
		image_status(i, spot(i, k, len), len, &s);
	}
}

static void try_changes(struct image *i)
{
	static uint8_t buf[5000], back[5000];
	size_t len = image_size(i) < sizeof(buf) ? (size_t)image_size(i) : sizeof(buf);

	for (unsigned k = 0; k < SPOTS; k++) {
		uint64_t off = spot(i, k, len);

		memset(buf, (int)k + 1, len);
		if (!image_write(i, buf, len, off) && (image_read(i, back, len, off) || memcmp(buf, back, len)))
			__builtin_trap();
		if (k % 3 == 0)
			image_discard(i, off & ~4095ull, len);
		if (k % 4 == 0)
			image_zero(i, off, len, true);
		if (k % 5 == 0)
			image_flush(i);
	}
	if (image_cluster(i) <= CLUSTER_MOST)
		image_resize(i, image_size(i) + (2u << 20), PREALLOC_OFF, false, NULL);
	try_reads(i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct image *i = open_bytes(data, size, true, false);
	struct image_check c = { 0 };

	log_set_level(LOG_ERROR);
	if (i) {
		try_reads(i);
		image_check(i, REPAIR_NONE, &c, NULL);
		image_close(i);
	}
	i = open_bytes(data, size, false, false);
	if (i) {
		try_changes(i);
		image_close(i);
	}
	i = open_bytes(data, size, false, true);
	if (i) {
		memset(&c, 0, sizeof(c));
		image_check(i, REPAIR_ALL, &c, NULL);
		if (c.fixed_corruptions == c.corruptions && !c.errors) {
			memset(&c, 0, sizeof(c));
			if (!image_check(i, REPAIR_NONE, &c, NULL) && c.corruptions)
				__builtin_trap();       /* what was mended stays mended */
			try_changes(i);
		}
		image_close(i);
	}
	return 0;
}
