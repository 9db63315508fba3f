#ifndef X86_MACHINE_H
#define X86_MACHINE_H
/* A machine put together by hand, as far as boot information needs one: RAM, ports, a PCI bus, no KVM. */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include "arch/x86_64/boot.h"
#include "arch/x86_64/layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/pci.h"

static struct error err;
static struct vm_config cfg;
static struct vm vm;
static struct boot_image image;

static uint64_t no_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return 0;
}
static void no_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)dev, (void)off, (void)size, (void)val;
}
static const struct bus_ops no_ops = { no_read, no_write, 1, 4 };
static struct bus_region ports[] = { { .name = "com1", .base = 0x3f8, .size = 8 },
	{ .name = "rtc", .base = 0x70, .size = 2 }, { .name = "acpi", .base = PM1_EVT_PORT, .size = 12 },
	{ .name = "reset", .base = RESET_PORT, .size = 1 }, { .name = "pvpanic", .base = 0x505, .size = 1 },
	{ .name = "fw_cfg", .base = 0x510, .size = 2 } };

static void make(enum machine machine, uint64_t mem, unsigned cpus, unsigned nr_virtio)
{
	const struct pci_layout l = { PCI_ECAM_BASE, PCI_MMIO_BASE, PCI_MMIO_END, 1ull << 36, 1ull << 38,
		PCI_IO_BASE, PCI_IO_END };
	struct gmem_region layout[2];

	cfg = (struct vm_config){ .machine = machine, .mem = mem, .cpus = cpus };
	vm = (struct vm){ .cfg = &cfg, .nr_virtio = nr_virtio };
	image = (struct boot_image){ .protocol = BOOT_LINUX64, .entry = 0x100000, .cmdline = "test=1" };
	bus_init(&vm.pio);
	bus_init(&vm.mmio);
	ck_assert_int_eq(irqchip_init(&vm.irqs, -1, &err), 0);
	ck_assert_int_eq(gmem_init(&vm.mem, layout, arch_ram_layout(mem, layout, 2), false, &err), 0);
	if (machine == MACHINE_PC)
		ck_assert_int_eq(pci_bus_new(&vm.pci, &l, &vm.pio, &vm.mmio, &vm.irqs, &vm.mem, &err), 0);
	for (size_t i = 0; i < ARRAY_LEN(ports); i++) {
		ports[i].ops = &no_ops;
		if (vm.pci && ports[i].base == RESET_PORT)
			continue;       /* there it lies within PCI's CONFIG_ADDRESS */
		ck_assert_int_eq(bus_add(&vm.pio, &ports[i], &err), 0);
	}
}

static void done(void)
{
	for (size_t i = 0; i < ARRAY_LEN(ports); i++)
		bus_del(&vm.pio, &ports[i]);
	if (vm.pci)
		pci_bus_free(vm.pci);
	gmem_done(&vm.mem);
	irqchip_done(&vm.irqs);
	bus_done(&vm.pio);
	bus_done(&vm.mmio);
}

static void setup(void)
{
	ck_assert_msg(arch_boot_setup(&vm, &image, &err) == 0, "%s", err.msg);
}

static uint64_t rd(gpa_t gpa, unsigned size)
{
	uint64_t v = 0;

	ck_assert_int_eq(gmem_read(&vm.mem, gpa, &v, size), 0);
	return v;
}

/* The table with this signature, by the XSDT; 0 if there is none. */
static gpa_t find_table(const char *signature)
{
	gpa_t xsdt = rd(ACPI_BASE + 24, 8);
	unsigned n = (rd(xsdt + 4, 4) - 36) / 8;

	for (unsigned i = 0; i < n; i++) {
		gpa_t t = rd(xsdt + 36 + 8 * i, 8);

		if (!memcmp(gmem_at(&vm.mem, t, 4), signature, 4))
			return t;
	}
	return 0;
}
#endif
