/*
 * Sectors of a disk of at least 64 KiB: the first must begin with "vmm disk"; the second is written, flushed and
 * read back; past the end is an error. Words "pci", "msix", "line"; "noflush": the write is not flushed; "triple",
 * "hang": how it ends. 32-bit, Multiboot 1.
 */
#include "virtio.h"

enum { BLK_IN = 0, BLK_OUT = 1, BLK_FLUSH = 4 };
enum { BLK_F_FLUSH = 9 };
enum { STATUS_OK = 0, STATUS_IOERR = 1 };

static uint8_t request(struct driver *d, uint32_t type, uint64_t sector, void *data)
{
	static struct {
		uint32_t type, reserved;
		uint64_t sector;
	} head;
	static uint8_t status;
	const struct buffer b[] = { { &head, 16, false }, { data, 512, type == BLK_IN }, { &status, 1, true } };
	const struct buffer flush[] = { b[0], b[2] };

	head.type = type;
	head.sector = sector;
	status = 0xff;
	if (data)
		driver_run(d, b, 3);
	else
		driver_run(d, flush, 2);
	return *(volatile uint8_t *)&status;
}

static void triple_fault(void)
{
	static const struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) none;

	__asm__ volatile("lidt %0\n\tint3" : : "m"(none));
}

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	static uint8_t buf[512];
	const char *cmdline = (const char *)(uintptr_t)read32(bx + 16);
	struct driver d;
	uint32_t sectors;

	(void)ax, (void)si;
	CHECK(word(cmdline, "pci") ? driver_find_pci(&d, VIRTIO_BLK) : driver_find_mmio(&d, VIRTIO_BLK));
	d.features = 1u << BLK_F_FLUSH;         /* else the device flushes every write */
	driver_start(&d, cmdline);
	sectors = read32(d.config);
	CHECK(sectors >= 128);
	CHECK(request(&d, BLK_IN, 0, buf) == STATUS_OK && starts((char *)buf, "vmm disk"));
	for (unsigned i = 0; i < sizeof(buf); i++)
		buf[i] = i * 7;
	CHECK(request(&d, BLK_OUT, 1, buf) == STATUS_OK);
	if (!word(cmdline, "noflush"))
		CHECK(request(&d, BLK_FLUSH, 0, NULL) == STATUS_OK);
	memset(buf, 0, sizeof(buf));
	CHECK(request(&d, BLK_IN, 1, buf) == STATUS_OK);
	for (unsigned i = 0; i < sizeof(buf); i++)
		CHECK(buf[i] == (uint8_t)(i * 7));
	CHECK(request(&d, BLK_IN, sectors, buf) == STATUS_IOERR);
	CHECK(request(&d, BLK_OUT, ~0ull, buf) == STATUS_IOERR);
	CHECK(!d.sleeps || irq_count == d.avail);
	say("ok\n");
	if (word(cmdline, "triple"))
		triple_fault();
	while (word(cmdline, "hang"))
		__asm__ volatile("pause");
	return 0;
}
