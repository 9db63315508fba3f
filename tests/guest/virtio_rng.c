/* Random bytes from virtio-rng; words "pci", "msix", "line". 32-bit, Multiboot 1. */
#include "virtio.h"

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	static uint8_t one[64], two[64];
	const char *cmdline = (const char *)(uintptr_t)read32(bx + 16);
	const struct buffer first = { one, sizeof(one), true }, second = { two, sizeof(two), true };
	unsigned differ = 0;
	struct driver d;

	(void)ax, (void)si;
	CHECK(word(cmdline, "pci") ? driver_find_pci(&d, VIRTIO_RNG) : driver_find_mmio(&d, VIRTIO_RNG));
	driver_start(&d, cmdline);
	CHECK(driver_run(&d, &first, 1) == sizeof(one));
	CHECK(driver_run(&d, &second, 1) == sizeof(two));
	for (unsigned i = 0; i < sizeof(one); i++)
		differ += one[i] != two[i];
	CHECK(differ > 32);
	CHECK(!d.sleeps || irq_count == 2);
	say("ok\n");
	return 0;
}
