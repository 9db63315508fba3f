#ifndef PCI_FIXTURE_H
#define PCI_FIXTURE_H
/* A PCI bus without a VM: two RAM regions, both buses, an interrupt chip that keeps its state to itself. */
#include <check.h>
#include <stdlib.h>
#include "vmm/bus.h"
#include "vmm/error.h"
#include "vmm/gmem.h"
#include "vmm/irq.h"
#include "vmm/pci.h"

#define ECAM       0xe0000000ull
#define MMIO       0xc0000000ull
#define MMIO_END   0xd0000000ull
#define MMIO64     0x200000000ull
#define MMIO64_END 0x300000000ull
#define IO_FIRST   0xc000
#define IO_LAST    0xffff

static struct bus pio, mmio;
static struct irqchip irqs;
static struct pci_bus *pci;
/* The second region lies in the windows' midst, as no machine of ours has it: RAM must win. */
static struct gmem pci_ram = { .nr = 2, .fd = -1,
	.region = { { 0, 0x100000, NULL }, { 0xc8000000, 0x100000, NULL } } };
static struct error pci_err;

static inline void pci_begin(void)
{
	static const struct pci_layout layout = { .ecam = ECAM, .mmio = MMIO, .mmio_end = MMIO_END,
		.mmio64 = MMIO64, .mmio64_end = MMIO64_END, .io = IO_FIRST, .io_end = IO_LAST };

	bus_init(&pio);
	bus_init(&mmio);
	ck_assert_int_eq(irqchip_init(&irqs, -1, &pci_err), 0);
	ck_assert_msg(!pci_bus_new(&pci, &layout, &pio, &mmio, &irqs, &pci_ram, &pci_err), "%s",
		pci_err.msg);
}

static inline void pci_end(void)
{
	pci_bus_free(pci);
	ck_assert_uint_eq(pio.nr, 0);
	ck_assert_uint_eq(mmio.nr, 0);
	irqchip_done(&irqs);
	bus_done(&pio);
	bus_done(&mmio);
}

static inline uint64_t load(struct bus *b, uint64_t addr, unsigned size)
{
	uint64_t val;

	bus_read(b, addr, size, &val);
	return val;
}

/* Configuration space of function 0 in a slot, by ECAM. */
static inline uint32_t cfg_read(unsigned slot, unsigned off, unsigned size)
{
	return (uint32_t)load(&mmio, ECAM + slot * 0x8000 + off, size);
}

static inline void cfg_write(unsigned slot, unsigned off, unsigned size, uint32_t val)
{
	bus_write(&mmio, ECAM + slot * 0x8000 + off, size, val);
}
#endif
