/*
 * A polling driver; with MSI-X or the device's IOAPIC line one that sleeps: finds the device by its id, negotiates VERSION_1 and what was asked for, and
 * runs one chain at a time through one queue.
 */
#include "virtio.h"

#define MMIO_BASE  0xd0000000
#define MMIO_SLOTS 32
#define ECAM       0xe0000000
#define LAPIC      0xfee00000
#define IOAPIC     0xfec00000
#define MMIO_GSI   16           /* of the first slot; eight lines, in turn */

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { DESC_NEXT = 1, DESC_WRITE = 2 };

static struct {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
} desc[QUEUE_SIZE] __attribute__((aligned(16)));
static volatile uint16_t avail[3 + QUEUE_SIZE] __attribute__((aligned(2)));
static volatile struct {
	uint16_t flags, idx;
	struct {
		uint32_t id, len;
	} ring[QUEUE_SIZE];
	uint16_t event;
} used __attribute__((aligned(4)));

bool driver_find_mmio(struct driver *d, uint32_t id)
{
	for (unsigned i = 0; i < MMIO_SLOTS; i++) {
		uintptr_t r = MMIO_BASE + i * 0x1000;

		if (read32(r) != 0x74726976 || read32(r + 8) != id)
			continue;
		CHECK(read32(r + 4) == 2);
		*d = (struct driver){ .mmio = r, .config = r + 0x100, .gsi = MMIO_GSI + i % 8 };
		return true;
	}
	return false;
}

static uintptr_t config_space(uint32_t slot)
{
	return ECAM + (slot << 15);
}

static uintptr_t bar(uint32_t slot, uint8_t n)
{
	return read32(config_space(slot) + 0x10 + 4 * n) & ~15u;
}

/* virtio 1.2, 4.1.4: vendor capabilities name the structures. */
static void read_caps(struct driver *d)
{
	uintptr_t cfg = config_space(d->slot);

	for (uint8_t at = *(volatile uint8_t *)(cfg + 0x34); at; at = *(volatile uint8_t *)(cfg + at + 1)) {
		uint32_t head = read32(cfg + at);
		uintptr_t where = bar(d->slot, read32(cfg + at + 4) & 0xff) + read32(cfg + at + 8);

		if ((head & 0xff) != 9)
			continue;
		switch (head >> 24) {
		case 1:
			d->common = where;
			break;
		case 2:
			d->notify = where;
			d->notify_step = read32(cfg + at + 16);
			break;
		case 3:
			d->isr = where;
			break;
		case 4:
			d->config = where;
			break;
		}
	}
}

bool driver_find_pci(struct driver *d, uint32_t id)
{
	for (uint32_t slot = 0; slot < 32; slot++) {
		uintptr_t cfg = config_space(slot);

		if (read32(cfg) != (0x1af4 | (0x1040 + id) << 16))
			continue;
		*d = (struct driver){ .pci = true, .slot = slot, .gsi = read32(cfg + 0x3c) & 0xff };
		write32(cfg + 4, 0x406);        /* memory, bus master, no INTx */
		read_caps(d);
		CHECK(d->common && d->notify && d->isr);
		return true;
	}
	return false;
}

static void set_status(struct driver *d, uint8_t status)
{
	if (d->pci)
		*(volatile uint8_t *)(d->common + 0x14) = status;
	else
		write32(d->mmio + 0x70, status);
}

static uint8_t get_status(struct driver *d)
{
	return d->pci ? *(volatile uint8_t *)(d->common + 0x14) : read32(d->mmio + 0x70);
}

/* VERSION_1 is bit 32. */
static void negotiate(struct driver *d)
{
	uintptr_t select = d->pci ? d->common + 0 : d->mmio + 0x14;
	uintptr_t offered = d->pci ? d->common + 4 : d->mmio + 0x10;
	uintptr_t select_back = d->pci ? d->common + 8 : d->mmio + 0x24;
	uintptr_t accepted = d->pci ? d->common + 12 : d->mmio + 0x20;

	set_status(d, 0);
	while (get_status(d))
		;
	set_status(d, ACKNOWLEDGE | DRIVER);
	write32(select, 1);
	CHECK(read32(offered) & 1);
	write32(select, 0);
	d->features &= read32(offered);
	write32(select_back, 0);
	write32(accepted, d->features);
	write32(select_back, 1);
	write32(accepted, 1);
	set_status(d, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	CHECK(get_status(d) & FEATURES_OK);
}

static void start_queue_mmio(struct driver *d)
{
	write32(d->mmio + 0x30, d->queue);
	CHECK(read32(d->mmio + 0x34) >= QUEUE_SIZE && !read32(d->mmio + 0x44));
	write32(d->mmio + 0x38, QUEUE_SIZE);
	write32(d->mmio + 0x80, (uintptr_t)desc);
	write32(d->mmio + 0x84, 0);
	write32(d->mmio + 0x90, (uintptr_t)avail);
	write32(d->mmio + 0x94, 0);
	write32(d->mmio + 0xa0, (uintptr_t)&used);
	write32(d->mmio + 0xa4, 0);
	write32(d->mmio + 0x44, 1);
}

static void write16(uintptr_t at, uint16_t v)
{
	*(volatile uint16_t *)at = v;
}

static uint16_t read16(uintptr_t at)
{
	return *(volatile uint16_t *)at;
}

static void start_queue_pci(struct driver *d)
{
	write16(d->common + 0x16, d->queue);
	CHECK(read16(d->common + 0x18) >= QUEUE_SIZE && !read16(d->common + 0x1c));
	write16(d->common + 0x18, QUEUE_SIZE);
	if (d->msix) {
		write16(d->common + 0x1a, 0);
		CHECK(read16(d->common + 0x1a) == 0);
	}
	write32(d->common + 0x20, (uintptr_t)desc);
	write32(d->common + 0x24, 0);
	write32(d->common + 0x28, (uintptr_t)avail);
	write32(d->common + 0x2c, 0);
	write32(d->common + 0x30, (uintptr_t)&used);
	write32(d->common + 0x34, 0);
	d->notify += d->notify_step * read16(d->common + 0x1e);
	write16(d->common + 0x1c, 1);
}

static void end_of_interrupt(void)
{
	write32(LAPIC + 0xb0, 0);
}

/* Vector 0 of the table to this CPU; the capability's enable bit. */
static void start_msix(struct driver *d)
{
	uintptr_t cfg = config_space(d->slot), table;
	uint8_t at = *(volatile uint8_t *)(cfg + 0x34);

	while (at && (read32(cfg + at) & 0xff) != 0x11)
		at = *(volatile uint8_t *)(cfg + at + 1);
	CHECK(at);
	table = bar(d->slot, read32(cfg + at + 4) & 7) + (read32(cfg + at + 4) & ~7u);
	irq_install(MSIX_VECTOR, end_of_interrupt);
	write32(LAPIC + 0xf0, 0x1ff);
	write16(cfg + at + 2, 0x8000);
	write32(table, LAPIC);
	write32(table + 4, 0);
	write32(table + 8, MSIX_VECTOR);
	write32(table + 12, 0);
	d->msix = true;
}

static struct driver *on_line;

static uint32_t read_isr(const struct driver *d)
{
	return d->pci ? *(volatile uint8_t *)d->isr : read32(d->mmio + 0x60);
}

/*
 * INTx goes down when the status is read, the MMIO line is an edge. An interrupt with nothing in the status is
 * not ours, as on any shared line: it does not count. (Software KVM delivers a level twice to a CPU in hlt.)
 */
static void line_interrupt(void)
{
	uint32_t isr = read_isr(on_line);

	CHECK(isr <= 1);
	if (!on_line->pci)
		write32(on_line->mmio + 0x64, isr);
	if (isr)
		CHECK(read_isr(on_line) == 0);
	else
		irq_count--;
	end_of_interrupt();
}

/* IOAPIC redirection entry of the device's line, to this CPU: INTx is a level. */
static void start_line(struct driver *d)
{
	CHECK(d->gsi >= 16 && d->gsi < 24);
	on_line = d;
	irq_install(LINE_VECTOR, line_interrupt);
	write32(LAPIC + 0xf0, 0x1ff);
	write32(IOAPIC, 0x10 + 2 * d->gsi + 1);
	write32(IOAPIC + 0x10, 0);
	write32(IOAPIC, 0x10 + 2 * d->gsi);
	write32(IOAPIC + 0x10, (d->pci ? 0x8000 : 0) | LINE_VECTOR);
	if (d->pci)
		write32(config_space(d->slot) + 4, 0x006);
}

void driver_start(struct driver *d, const char *cmdline)
{
	memset((void *)&used, 0, sizeof(used));
	memset((void *)avail, 0, sizeof(avail));
	negotiate(d);
	if (word(cmdline, "msix"))
		start_msix(d);
	else if (word(cmdline, "line"))
		start_line(d);
	d->sleeps = word(cmdline, "msix") || word(cmdline, "line");
	if (d->pci)
		start_queue_pci(d);
	else
		start_queue_mmio(d);
	set_status(d, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

uint32_t driver_run(struct driver *d, const struct buffer *b, unsigned n)
{
	unsigned before = irq_count;

	for (unsigned i = 0; i < n; i++) {
		desc[i].addr = (uintptr_t)b[i].at;
		desc[i].len = b[i].len;
		desc[i].flags = (b[i].write ? DESC_WRITE : 0) | (i + 1 < n ? DESC_NEXT : 0);
		desc[i].next = i + 1;
	}
	avail[0] = d->sleeps ? 0 : 1;     /* VIRTQ_AVAIL_F_NO_INTERRUPT */
	avail[2 + d->avail % QUEUE_SIZE] = 0;
	barrier();
	avail[1] = ++d->avail;
	__asm__ volatile("lock; addl $0, (%%esp)" : : : "memory");
	if (d->pci)
		write16(d->notify, d->queue);
	else
		write32(d->mmio + 0x50, d->queue);
	while (d->sleeps && irq_count == before)
		__asm__ volatile("sti; hlt; cli");
	while (used.idx != d->avail)
		__asm__ volatile("pause");
	CHECK(used.ring[d->used % QUEUE_SIZE].id == 0);
	return used.ring[d->used++ % QUEUE_SIZE].len;
}
