/* Starts a virtio NIC and keeps it until a 'q' comes through COM1. Words "pci", "msix". 32-bit, Multiboot 1. */
#include "virtio.h"

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	const char *cmdline = (const char *)(uintptr_t)read32(bx + 16);
	struct driver d;

	(void)ax, (void)si;
	CHECK(word(cmdline, "pci") ? driver_find_pci(&d, VIRTIO_NET) : driver_find_mmio(&d, VIRTIO_NET));
	driver_start(&d, cmdline);
	say("started\n");
	while (!(inb(COM1 + 5) & 1) || inb(COM1) != 'q')
		;
	return 0;
}
