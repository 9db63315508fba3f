/*
 * A VHDX image, of which the input is what counts: header, region table, metadata table and values, BAT. They are put where
 * they belong in a file of holes, with checksums that hold.
 */
#include "../support/crc32c.h"
#include "image_door.h"

#define MIB (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct {
	uint64_t at;
	size_t len;             /* of the input */
	size_t sum;             /* bytes its checksum is over */
} parts[] = {
	{ 64 << 10, 80, 4096 },
	{ 192 << 10, 128, 65536 },
	{ 2 * MIB, 256, 0 },
	{ 2 * MIB + 65536, 64, 0 },
	{ 3 * MIB, 4096, 0 },
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t buf[65536];
	int fd = door_file("vhdxfile", 8);

	log_set_level(LOG_ERROR);
	if (ftruncate(fd, 8 * MIB))
		abort();
	for (unsigned k = 0; k < ARRAY_LEN(parts) && size; k++) {
		size_t n = MIN(size, parts[k].len), all = MAX(n, parts[k].sum);

		memset(buf, 0, sizeof(buf));
		memcpy(buf, data, n);
		if (parts[k].sum)
			vhdx_checksum(buf, all);
		if (pwrite(fd, buf, all, (off_t)parts[k].at) != (ssize_t)all)
			abort();
		data += n;
		size -= n;
	}
	door_try("vhdx", fd, NULL);
	return 0;
}
