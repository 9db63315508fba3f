#ifndef CRC32C_H
#define CRC32C_H
/* CRC-32C bit by bit, and the checksum of a VHDX structure: at offset 4, counted as zero. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t crc32c_slow(const uint8_t *p, size_t n)
{
	uint32_t crc = 0xffffffff;

	while (n--) {
		crc ^= *p++;
		for (unsigned b = 0; b < 8; b++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
	}
	return ~crc;
}

static inline void vhdx_checksum(uint8_t *p, size_t n)
{
	uint32_t crc;

	memset(p + 4, 0, 4);
	crc = crc32c_slow(p, n);
	memcpy(p + 4, &crc, 4);
}
#endif
