#include "vmm/pci.h"
#include <assert.h>
#include <errno.h>
#include <linux/pci_regs.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. Configuration space is plain bytes with a mask of those a guest may change; CF8/CFC and ECAM
 * both end in config_read() and config_write(), under the bus's lock. After a write to a command register or
 * a BAR, settle() brings the bus in line: first every region that is no longer where its BAR says is taken
 * off, then every BAR that is decoded, lies in a window of ours, misses RAM and collides with nobody is put
 * on. One that does not is simply absent until the guest writes something better.
 *
 * INTx may be driven by any thread, so it does not touch cfg[]: what the device drives and whether the guest
 * disabled it are two atomics, and a lock of its own, never held over a wait, keeps line changes in order.
 */

#define SLOTS        32
#define BRIDGE_ID    0x0008     /* "generic PCIe host bridge" of vendor 0x1b36: needs no driver */
#define BRIDGE_VENDOR 0x1b36
#define FIRST_GSI    16
#define PAGE         4096u

#define COMMAND_BITS (PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY | \
	PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE)

struct pci_bus {
	/* const after pci_bus_new() */
	struct pci_layout layout;
	struct bus *pio, *mmio;
	struct irqchip *irqs;
	const struct gmem *mem;
	struct bus_region address, data, ecam;

	pthread_mutex_t lock;           /* guards all below, and cfg[] and BARs of the devices */
	struct pci_device *dev[SLOTS];
	struct pci_device bridge;
	uint32_t selected;              /* CF8 */
	uint64_t next_mmio, next_mmio64, next_io;       /* placing BARs */

	pthread_mutex_t line_lock;      /* guards the order of INTx changes */
};

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t get32(const uint8_t *p)
{
	return get16(p) | (uint32_t)get16(p + 2) << 16;
}

static void put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)v;
	p[1] = v >> 8;
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, (uint16_t)v);
	put16(p + 2, v >> 16);
}

unsigned pci_intx_gsi(unsigned slot, unsigned pin)
{
	return FIRST_GSI + (slot + pin - 1) % 4;
}

/* ---- INTx: any thread ---- */

static void settle_line(struct pci_device *d)
{
	if (!d->intx)
		return;
	pthread_mutex_lock(&d->bus->line_lock);
	irq_set(&d->line, d->intx_high && !d->intx_off);
	pthread_mutex_unlock(&d->bus->line_lock);
}

void pci_intx(struct pci_device *d, bool high)
{
	d->intx_high = high;
	settle_line(d);
}

/* ---- BARs: under the lock ---- */

static uint64_t bar_address(const struct pci_device *d, unsigned i)
{
	const uint8_t *p = &d->cfg[PCI_BASE_ADDRESS_0 + 4 * i];
	uint64_t addr = get32(p);

	if (d->bar[i].io)
		return addr & PCI_BASE_ADDRESS_IO_MASK & UINT32_MAX;
	addr &= (uint32_t)PCI_BASE_ADDRESS_MEM_MASK;
	return d->bar[i].wide ? addr | (uint64_t)get32(p + 4) << 32 : addr;
}

static bool within(uint64_t addr, uint64_t size, uint64_t lo, uint64_t end)
{
	return addr >= lo && addr < end && size <= end - addr;
}

static bool hits_ram(const struct gmem *m, uint64_t addr, uint64_t size)
{
	for (unsigned i = 0; i < m->nr; i++) {
		const struct gmem_region *r = &m->region[i];

		if (addr < r->base ? r->base - addr < size : addr - r->base < r->size)
			return true;
	}
	return false;
}

/* True if the BAR is decoded, at a place a BAR may have. */
static bool bar_wanted(const struct pci_device *d, unsigned i)
{
	const struct pci_layout *l = &d->bus->layout;
	const struct pci_bar *bar = &d->bar[i];
	uint16_t command = get16(&d->cfg[PCI_COMMAND]);
	uint64_t addr;

	if (!bar->size || !(command & (bar->io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY)))
		return false;
	addr = bar_address(d, i);
	if (bar->io)
		return within(addr, bar->size, l->io, l->io_end + 1ull);
	return (within(addr, bar->size, l->mmio, l->mmio_end) ||
		within(addr, bar->size, l->mmio64, l->mmio64_end)) &&
		!hits_ram(d->bus->mem, addr, bar->size);
}

static struct bus *bar_bus(const struct pci_device *d, unsigned i)
{
	return d->bar[i].io ? d->bus->pio : d->bus->mmio;
}

static void unmap_bar(struct pci_device *d, unsigned i)
{
	bus_del(bar_bus(d, i), &d->bar[i].region);
	d->bar[i].mapped = false;
	if (d->bar_moved)
		d->bar_moved(d, i, false);
}

static void map_bar(struct pci_device *d, unsigned i)
{
	d->bar[i].region.base = bar_address(d, i);
	if (bus_add(bar_bus(d, i), &d->bar[i].region, NULL))
		return;
	d->bar[i].mapped = true;
	if (d->bar_moved)
		d->bar_moved(d, i, true);
}

static void settle(struct pci_bus *b)
{
	for (unsigned s = 0; s < SLOTS * PCI_BARS; s++) {
		struct pci_device *d = b->dev[s / PCI_BARS];
		unsigned i = s % PCI_BARS;

		if (d && d->bar[i].mapped &&
			(!bar_wanted(d, i) || bar_address(d, i) != d->bar[i].region.base))
			unmap_bar(d, i);
	}
	for (unsigned s = 0; s < SLOTS * PCI_BARS; s++) {
		struct pci_device *d = b->dev[s / PCI_BARS];

		if (d && !d->bar[s % PCI_BARS].mapped && bar_wanted(d, s % PCI_BARS))
			map_bar(d, s % PCI_BARS);
	}
}

/* ---- configuration space: vCPU threads, under the lock ---- */

static bool config_ok(const struct pci_device *d, unsigned off, unsigned size)
{
	return d && off < PCI_CFG_SIZE && size <= PCI_CFG_SIZE - off;
}

static uint64_t config_read(struct pci_device *d, unsigned off, unsigned size)
{
	uint64_t val = 0;

	if (!config_ok(d, off, size))
		return UINT64_MAX;
	if (d->config_reading)
		d->config_reading(d, off, size);
	for (unsigned i = 0; i < size; i++) {
		uint8_t byte = d->cfg[off + i];

		if (off + i == PCI_STATUS && d->intx_high)
			byte |= PCI_STATUS_INTERRUPT;
		val |= (uint64_t)byte << 8 * i;
	}
	return val;
}

static bool touches(unsigned off, unsigned size, unsigned first, unsigned last)
{
	return off <= last && off + size > first;
}

static void config_write(struct pci_device *d, unsigned off, unsigned size, uint64_t val)
{
	if (!config_ok(d, off, size))
		return;
	for (unsigned i = 0; i < size; i++) {
		uint8_t mask = d->writable[off + i], byte = (uint8_t)(val >> 8 * i);

		d->cfg[off + i] = (d->cfg[off + i] & ~mask) | (byte & mask);
	}
	if (touches(off, size, PCI_COMMAND, PCI_COMMAND + 1)) {
		d->intx_off = get16(&d->cfg[PCI_COMMAND]) & PCI_COMMAND_INTX_DISABLE;
		settle_line(d);
		settle(d->bus);
	} else if (touches(off, size, PCI_BASE_ADDRESS_0, PCI_BASE_ADDRESS_5 + 3)) {
		settle(d->bus);
	}
	if (d->config_written)
		d->config_written(d, off, size);
}

/* The device that CF8 selects (PCI 3.0, 3.2.2.3.2), or NULL. */
static struct pci_device *selected(const struct pci_bus *b)
{
	uint32_t a = b->selected;

	if (!(a & 0x80000000) || (a >> 16 & 0xff) || (a >> 8 & 7))
		return NULL;
	return b->dev[a >> 11 & 31];
}

/* Only whole words reach CONFIG_ADDRESS; bytes and halves belong to whoever shares the ports. */
static uint64_t address_read(void *dev, uint64_t off, unsigned size)
{
	struct pci_bus *b = dev;

	(void)off;
	(void)size;
	return b->selected;
}

static void address_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct pci_bus *b = dev;

	(void)off;
	(void)size;
	b->selected = (uint32_t)val & 0x80fffffc;
}

static uint64_t data_read(void *dev, uint64_t off, unsigned size)
{
	struct pci_bus *b = dev;

	return config_read(selected(b), (b->selected & 0xfc) + (unsigned)off, size);
}

static void data_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct pci_bus *b = dev;

	config_write(selected(b), (b->selected & 0xfc) + (unsigned)off, size, val);
}

/* ECAM: bus 0 only, so bits 19:15 are the slot and 14:12 the function; NULL: nobody there. */
static struct pci_device *ecam_device(const struct pci_bus *b, uint64_t off)
{
	return off >> 12 & 7 ? NULL : b->dev[off >> 15 & 31];
}

static uint64_t ecam_read(void *dev, uint64_t off, unsigned size)
{
	return config_read(ecam_device(dev, off), off & 0xfff, size);
}

static void ecam_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	config_write(ecam_device(dev, off), off & 0xfff, size, val);
}

static const struct bus_ops address_ops = { address_read, address_write, 4, 4 };
static const struct bus_ops data_ops = { data_read, data_write, 1, 4 };
static const struct bus_ops ecam_ops = { ecam_read, ecam_write, 1, 4 };

/* ---- building: main thread ---- */

/* Space for a BAR: below 4 GiB where it fits, for those who reach no further. */
static int place_bar(struct pci_bus *b, const struct pci_bar *bar, uint64_t *addr)
{
	uint64_t *next[] = { bar->io ? &b->next_io : &b->next_mmio, &b->next_mmio64 };
	uint64_t end[] = { bar->io ? b->layout.io_end + 1ull : b->layout.mmio_end, b->layout.mmio64_end };
	uint64_t align = bar->io ? bar->size : MAX(bar->size, PAGE);

	for (unsigned i = 0; i < (bar->wide ? 2 : 1); i++) {
		uint64_t at = (*next[i] + align - 1) & ~(align - 1);

		if (at < *next[i] || !within(at, bar->size, *next[i], end[i]))
			continue;
		*next[i] = at + bar->size;
		*addr = at;
		return 0;
	}
	return -ENOSPC;
}

static int add_bar(struct pci_bus *b, struct pci_device *d, unsigned i, struct error *err)
{
	struct pci_bar *bar = &d->bar[i];
	uint8_t *reg = &d->cfg[PCI_BASE_ADDRESS_0 + 4 * i];
	uint8_t *mask = &d->writable[PCI_BASE_ADDRESS_0 + 4 * i];
	uint64_t addr, bits = ~(bar->size - 1);
	uint32_t kind;

	assert(!(bar->size & (bar->size - 1)) && bar->size >= (bar->io ? 4 : 16));
	if (place_bar(b, bar, &addr))
		return error_set(err, ENOSPC, "%s: no room for a BAR of %#llx bytes", d->name,
			(unsigned long long)bar->size);
	bar->region.size = bar->size;
	bar->mapped = false;
	kind = bar->io ? PCI_BASE_ADDRESS_SPACE_IO
		       : (bar->wide ? PCI_BASE_ADDRESS_MEM_TYPE_64 : 0) |
				(bar->prefetch ? PCI_BASE_ADDRESS_MEM_PREFETCH : 0);
	put32(reg, (uint32_t)addr | kind);
	put32(mask, (uint32_t)bits & ~(bar->io ? 3u : 15u));
	if (bar->wide) {
		put32(reg + 4, addr >> 32);
		put32(mask + 4, bits >> 32);
	}
	d->cfg[PCI_COMMAND] |= bar->io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY;
	return 0;
}

static void fill_header(struct pci_device *d)
{
	put16(&d->cfg[PCI_VENDOR_ID], d->vendor);
	put16(&d->cfg[PCI_DEVICE_ID], d->device);
	put16(&d->writable[PCI_COMMAND], COMMAND_BITS);
	d->cfg[PCI_REVISION_ID] = d->revision;
	d->cfg[PCI_CLASS_PROG] = (uint8_t)d->class_code;
	put16(&d->cfg[PCI_CLASS_DEVICE], d->class_code >> 8);
	d->writable[PCI_CACHE_LINE_SIZE] = 0xff;
	put16(&d->cfg[PCI_SUBSYSTEM_VENDOR_ID], d->sub_vendor);
	put16(&d->cfg[PCI_SUBSYSTEM_ID], d->sub_device);
	if (!d->intx)
		return;
	d->cfg[PCI_INTERRUPT_PIN] = 1;
	d->cfg[PCI_INTERRUPT_LINE] = (uint8_t)pci_intx_gsi(d->slot, 1);
	d->writable[PCI_INTERRUPT_LINE] = 0xff;
}

int pci_add(struct pci_bus *b, struct pci_device *d, struct error *err)
{
	unsigned slot = 0;
	int r;

	while (slot < SLOTS && b->dev[slot])
		slot++;
	if (slot == SLOTS)
		return error_set(err, ENOSPC, "%s: all %d PCI slots are taken", d->name, SLOTS);
	d->bus = b;
	d->slot = slot;
	fill_header(d);
	for (unsigned i = 0; i < PCI_BARS; i++) {
		r = d->bar[i].size ? add_bar(b, d, i, err) : 0;
		if (r)
			return r;
	}
	r = d->intx ? irq_line_init(&d->line, b->irqs, pci_intx_gsi(slot, 1), true, err) : 0;
	if (r)
		return r;
	memcpy(d->built, d->cfg, sizeof(d->built));
	pthread_mutex_lock(&b->lock);
	b->dev[slot] = d;
	settle(b);
	pthread_mutex_unlock(&b->lock);
	return 0;
}

void pci_del(struct pci_device *d)
{
	struct pci_bus *b = d->bus;

	pthread_mutex_lock(&b->lock);
	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (d->bar[i].mapped)
			unmap_bar(d, i);
	}
	b->dev[d->slot] = NULL;
	pthread_mutex_unlock(&b->lock);
	irq_done(&d->line);
}

int pci_add_cap(struct pci_device *d, uint8_t id, const void *body, unsigned len)
{
	unsigned at = d->cap_end ? (d->cap_end + 3u) & ~3u : PCI_STD_HEADER_SIZEOF;
	unsigned link = PCI_CAPABILITY_LIST;

	assert(len >= 2);
	if (len > 256 - at)
		return -ENOSPC;
	while (d->cfg[link])
		link = d->cfg[link] + PCI_CAP_LIST_NEXT;
	d->cfg[link] = (uint8_t)at;
	memcpy(&d->cfg[at], body, len);
	d->cfg[at + PCI_CAP_LIST_ID] = id;
	d->cfg[at + PCI_CAP_LIST_NEXT] = 0;
	d->cfg[PCI_STATUS] |= PCI_STATUS_CAP_LIST;
	d->cap_end = (uint16_t)(at + len);
	memcpy(d->built, d->cfg, sizeof(d->built));
	return (int)at;
}

const struct pci_layout *pci_bus_layout(const struct pci_bus *b)
{
	return &b->layout;
}

unsigned pci_slots_used(const struct pci_bus *b)
{
	unsigned used = 0;

	for (unsigned i = 0; i < SLOTS; i++)
		used |= b->dev[i] ? 1u << i : 0;
	return used;
}

void pci_reset(struct pci_bus *b)
{
	pthread_mutex_lock(&b->lock);
	b->selected = 0;
	for (unsigned s = 0; s < SLOTS; s++) {
		struct pci_device *d = b->dev[s];

		if (!d)
			continue;
		for (unsigned i = 0; i < PCI_CFG_SIZE; i++) {
			uint8_t was = i < sizeof(d->built) ? d->built[i] : 0;

			d->cfg[i] = (d->cfg[i] & ~d->writable[i]) | (was & d->writable[i]);
		}
		d->intx_off = false;
		d->intx_high = false;
		settle_line(d);
	}
	settle(b);
	pthread_mutex_unlock(&b->lock);
}

static int add_regions(struct pci_bus *b, struct error *err)
{
	int r = bus_add(b->pio, &b->address, err);

	if (r)
		return r;
	r = bus_add(b->pio, &b->data, err);
	if (r)
		goto no_data;
	r = bus_add(b->mmio, &b->ecam, err);
	if (!r)
		return 0;
	bus_del(b->pio, &b->data);
no_data:
	bus_del(b->pio, &b->address);
	return r;
}

int pci_bus_new(struct pci_bus **ret, const struct pci_layout *l, struct bus *pio, struct bus *mmio,
	struct irqchip *irqs, const struct gmem *mem, struct error *err)
{
	auto_free struct pci_bus *b = calloc(1, sizeof(*b));
	int r;

	if (!b)
		return error_errno(err, ENOMEM, "PCI");
	b->layout = *l;
	b->pio = pio;
	b->mmio = mmio;
	b->irqs = irqs;
	b->mem = mem;
	b->next_mmio = l->mmio;
	b->next_mmio64 = l->mmio64;
	b->next_io = l->io;
	b->address = (struct bus_region){ "pci-address", 0xcf8, 4, &address_ops, b, &b->lock };
	b->data = (struct bus_region){ "pci-data", 0xcfc, 4, &data_ops, b, &b->lock };
	b->ecam = (struct bus_region){ "pci-ecam", l->ecam, 1u << 20, &ecam_ops, b, &b->lock };
	pthread_mutex_init(&b->lock, NULL);
	pthread_mutex_init(&b->line_lock, NULL);
	b->bridge = (struct pci_device){ .name = "pci-bridge", .vendor = BRIDGE_VENDOR,
		.device = BRIDGE_ID, .class_code = 0x060000 };
	r = pci_add(b, &b->bridge, err);
	if (!r)
		r = add_regions(b, err);
	if (!r)
		*ret = TAKE_PTR(b);
	return r;
}

void pci_bus_free(struct pci_bus *b)
{
	if (!b)
		return;
	bus_del(b->mmio, &b->ecam);
	bus_del(b->pio, &b->data);
	bus_del(b->pio, &b->address);
	pthread_mutex_destroy(&b->line_lock);
	pthread_mutex_destroy(&b->lock);
	free(b);
}
