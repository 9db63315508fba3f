/*
 * "blocks=N" blocks of 32 KiB to the first port of a virtio console: "block 0000\n", then lines of 63 points.
 * Words "pci", "msix", "line". 32-bit, Multiboot 1.
 */
#include "virtio.h"

#define BLOCK 32768

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	static uint8_t block[BLOCK];
	const char *cmdline = (const char *)(uintptr_t)read32(bx + 16);
	const struct buffer b = { block, sizeof(block), false };
	unsigned long n = option(cmdline, "blocks=", 1);
	struct driver d;

	(void)ax, (void)si;
	CHECK(word(cmdline, "pci") ? driver_find_pci(&d, VIRTIO_CONSOLE) : driver_find_mmio(&d, VIRTIO_CONSOLE));
	d.queue = 1;                    /* virtio 1.2, 5.3.2: transmitq of port 0 */
	driver_start(&d, cmdline);
	for (unsigned i = 0; i < sizeof(block); i++)
		block[i] = i % 64 == 63 ? '\n' : '.';
	memcpy(block, "block 0000\n", 11);
	for (unsigned long i = 0; i < n; i++) {
		for (unsigned k = 0; k < 4; k++)
			block[9 - k] = "0123456789abcdef"[i >> 4 * k & 15];
		driver_run(&d, &b, 1);
	}
	say("ok\n");
	return 0;
}
