/*
 * The MultiProcessor table (MP specification 1.4, 4) for kernels without ACPI: CPUs, buses, the IOAPIC and
 * how interrupts are wired. The floating pointer lies at the start of the extended BIOS data area, whose
 * segment is at 0x40e. APIC ids have eight bits here: CPUs beyond are known to ACPI alone.
 */
#include "acpi.h"
#include <string.h>
#include "boot.h"
#include "layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/irq.h"

#define EBDA_SEGMENT_AT 0x40e
#define MP_CPUS_MAX     254
#define LAPIC_VERSION   0x14
#define IOAPIC_VERSION  0x11
#define ALL_LAPICS      0xff

enum { MP_CPU = 0, MP_BUS = 1, MP_IOAPIC = 2, MP_IO_INT = 3, MP_LOCAL_INT = 4 };
enum { INT_INT = 0, INT_NMI = 1, INT_EXT = 3 };
enum { CPU_ENABLED = 1, CPU_FIRST = 2 };
enum { POLARITY_HIGH_LEVEL = 0xd, POLARITY_LOW_LEVEL = 0xf };

struct mp_pointer {
	char signature[4];
	uint32_t table;
	uint8_t length, revision, checksum, features[5];
} __attribute__((packed));

struct mp_header {
	char signature[4];
	uint16_t length;
	uint8_t revision, checksum;
	char oem_id[8], product_id[12];
	uint32_t oem_table;
	uint16_t oem_size, entries;
	uint32_t lapic;
	uint16_t ext_length;
	uint8_t ext_checksum, reserved;
} __attribute__((packed));

struct mp_cpu {
	uint8_t type, id, version, flags;
	uint32_t signature, features, reserved[2];
} __attribute__((packed));

struct mp_bus {
	uint8_t type, id;
	char name[6];
} __attribute__((packed));

struct mp_ioapic {
	uint8_t type, id, version, flags;
	uint32_t addr;
} __attribute__((packed));

struct mp_int {
	uint8_t type, kind;
	uint16_t flags;
	uint8_t bus, source, target, pin;
} __attribute__((packed));

/* Entries follow the header without gaps; the count grows with them. */
struct mp {
	struct area *area;
	uint16_t entries;
};

static void put_entry(struct mp *t, const void *e, unsigned len)
{
	area_put(t->area, e, len, 1);
	t->entries++;
}

static void put_int(struct mp *t, uint8_t kind, uint16_t flags, uint8_t bus, uint8_t source, uint8_t pin)
{
	const struct mp_int e = { MP_IO_INT, kind, flags, bus, source, 0, pin };

	put_entry(t, &e, sizeof(e));
}

static void put_cpus(struct mp *t, unsigned cpus)
{
	for (unsigned i = 0; i < MIN(cpus, (unsigned)MP_CPUS_MAX); i++) {
		const struct mp_cpu e = { MP_CPU, i, LAPIC_VERSION, CPU_ENABLED | (i ? 0 : CPU_FIRST), 0x600,
			0x201, { 0 } };         /* FPU and APIC: the least a CPU here has */

		put_entry(t, &e, sizeof(e));
	}
}

static void put_buses(struct mp *t, bool pci, uint8_t isa)
{
	const struct mp_bus p = { MP_BUS, 0, "PCI   " }, i = { MP_BUS, isa, "ISA   " };
	const struct mp_ioapic io = { MP_IOAPIC, 0, IOAPIC_VERSION, 1, IOAPIC_BASE };

	if (pci)
		put_entry(t, &p, sizeof(p));
	put_entry(t, &i, sizeof(i));
	put_entry(t, &io, sizeof(io));
}

/* ISA line 0 comes in at pin 2, where the cascade is not; virtio-mmio's lines count as ISA's. */
static void put_isa_ints(struct mp *t, uint8_t isa, unsigned lines)
{
	for (unsigned i = 0; i < lines; i++)
		if (i != 2)
			put_int(t, INT_INT, i == IRQ_SCI ? POLARITY_HIGH_LEVEL : 0, isa, i, i ? i : 2);
}

/* MP 1.4, D.3: a PCI source is slot and pin. */
static void put_pci_ints(struct mp *t, const struct pci_bus *bus)
{
	uint32_t used = pci_slots_used(bus) & ~1u;

	for (unsigned i = 0; i < 4 * 32; i++)
		if (used >> i / 4 & 1)
			put_int(t, INT_INT, POLARITY_LOW_LEVEL, 0, i, pci_intx_gsi(i / 4, i % 4 + 1));
}

static void put_local_ints(struct mp *t, uint8_t isa)
{
	const struct mp_int ext = { MP_LOCAL_INT, INT_EXT, 0, isa, 0, ALL_LAPICS, 0 };
	const struct mp_int nmi = { MP_LOCAL_INT, INT_NMI, 0, isa, 0, ALL_LAPICS, 1 };

	put_entry(t, &ext, sizeof(ext));
	put_entry(t, &nmi, sizeof(nmi));
}

static uint8_t checksum(const uint8_t *p, unsigned len)
{
	uint8_t sum = 0;

	while (len--)
		sum += *p++;
	return -sum;
}

/* Header and checksum, once all entries are in place. */
static void finish(struct mp *t, gpa_t at)
{
	uint16_t len = t->area->at - at;
	uint8_t *host = gmem_at(t->area->mem, at, len);
	struct mp_header h = { .length = len, .revision = 4, .entries = t->entries, .lapic = LAPIC_BASE };

	memcpy(h.signature, "PCMP", 4);
	memcpy(h.oem_id, "VMM     ", 8);
	memcpy(h.product_id, "VMM         ", 12);
	memcpy(host, &h, sizeof(h));
	h.checksum = checksum(host, len);
	memcpy(host, &h, sizeof(h));
}

static int put_pointer(const struct gmem *mem, gpa_t table)
{
	struct mp_pointer p = { .table = table, .length = 1, .revision = 4 };
	const uint16_t segment = EBDA >> 4;
	int r;

	memcpy(p.signature, "_MP_", 4);
	p.checksum = checksum((const uint8_t *)&p, sizeof(p));
	r = gmem_write(mem, EBDA, &p, sizeof(p));
	return r ? r : gmem_write(mem, EBDA_SEGMENT_AT, &segment, sizeof(segment));
}

int mptable_build(struct vm *vm, struct area *a)
{
	struct mp t = { .area = a };
	uint8_t isa = vm->pci ? 1 : 0;
	gpa_t at = area_put(a, NULL, sizeof(struct mp_header), 16);

	put_cpus(&t, vm->cfg->cpus);
	put_buses(&t, vm->pci, isa);
	put_isa_ints(&t, isa, vm->pci ? 16 : IRQ_LINES);
	if (vm->pci)
		put_pci_ints(&t, vm->pci);
	put_local_ints(&t, isa);
	if (area_result(a))
		return area_result(a);
	finish(&t, at);
	return put_pointer(&vm->mem, at);
}
