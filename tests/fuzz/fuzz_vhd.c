/* A VHD image of any bytes: opened and read. Checksums are made right first, or nothing would get past them. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/image.h"
#include "vmm/log.h"

#define SPOTS 16

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void sum_up(uint8_t *p, size_t n, size_t at)
{
	uint32_t sum = 0;

	for (size_t k = 0; k < n; k++)
		sum += k < at || k >= at + 4 ? p[k] : 0;
	for (unsigned k = 0; k < 4; k++)
		p[at + k] = (uint8_t)(~sum >> (24 - 8 * k));
}

static void try_bytes(const uint8_t *data, size_t size)
{
	static uint8_t buf[70000];
	struct image_how how = { .format = "vhd", .readonly = true };
	struct image_status s;
	struct image *i;
	struct error err;

	how.fd = memfd_create("vhd", MFD_CLOEXEC);
	if (how.fd <= 0 || write(how.fd, data, size) != (ssize_t)size || image_open(&i, "image", &how, &err))
		return;
	for (unsigned k = 0; k < SPOTS; k++) {
		size_t len = image_size(i) < sizeof(buf) ? (size_t)image_size(i) : sizeof(buf);
		uint64_t last = image_size(i) - len, off = k < 8 ? k * 8192ull : k == 8 ? last : k * 0x9e3779b97f4a7c15ull;

		off %= last + 1;
		image_read(i, buf, len, off);
		if (!image_status(i, off, len, &s) && (!s.len || s.len > len))
			__builtin_trap();
	}
	image_close(i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size + 1);

	log_set_level(LOG_ERROR);
	try_bytes(data, size);
	if (copy && size >= 2048) {
		memcpy(copy, data, size);
		sum_up(copy, 512, 64);
		sum_up(copy + 512, 1024, 36);
		sum_up(copy + size - 512, 512, 64);
		try_bytes(copy, size);
	}
	free(copy);
	return 0;
}
