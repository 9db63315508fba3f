#ifndef GUEST_VIRTIO_H
#define GUEST_VIRTIO_H
/* The driver side of one queue of a device (virtio 1.2), over MMIO or PCI. 32-bit payloads. */
#include "rt.h"

#define QUEUE_SIZE 8
#define VIRTIO_NET 1
#define VIRTIO_BLK 2
#define VIRTIO_CONSOLE 3
#define VIRTIO_RNG 4
#define MSIX_VECTOR 0x40
#define LINE_VECTOR 0x41

struct driver {
	bool pci;
	uintptr_t mmio;                 /* MMIO: the registers */
	uint32_t slot;                  /* PCI: configuration space and structures */
	uintptr_t common, notify, isr, config;
	uint32_t notify_step;
	uint16_t queue;                 /* 0 unless set before the start */
	uint32_t features;              /* bits 0 to 31, the same; what the device has of them after it */
	uint32_t gsi;                   /* its IOAPIC line */
	bool msix, sleeps;
	uint16_t avail, used;
};

struct buffer {
	void *at;
	uint32_t len;
	bool write;                     /* the device writes it */
};

bool driver_find_mmio(struct driver *d, uint32_t id);
bool driver_find_pci(struct driver *d, uint32_t id);
/* Reset to DRIVER_OK. Words of the command line: "msix", "line" (INTx or the MMIO line): sleep for interrupts. */
void driver_start(struct driver *d, const char *cmdline);
uint32_t driver_run(struct driver *d, const struct buffer *b, unsigned n);      /* bytes the device wrote */
#endif
