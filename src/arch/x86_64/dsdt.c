/* The DSDT: the devices a guest cannot find by itself, exactly those that are there. */
#include <stdio.h>
#include "aml.h"
#include "acpi.h"
#include "boot.h"
#include "layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"

/* A plain ISA device: id, ports, one interrupt line (none: -1). */
static void isa_device(struct aml *a, const char *name, const char *hid, unsigned uid, uint16_t port,
	uint8_t len, int line)
{
	unsigned dev = aml_device(a, name), res;

	aml_name(a, "_HID");
	if (hid[0] == 'P')
		aml_eisaid(a, hid);
	else
		aml_string(a, hid);
	aml_name(a, "_UID");
	aml_int(a, uid);
	aml_name(a, "_STA");
	aml_int(a, 0xf);
	aml_name(a, "_CRS");
	res = aml_resources(a);
	aml_res_io(a, port, len);
	if (line >= 0)
		aml_res_irq(a, line);
	aml_close_resources(a, res);
	aml_close(a, dev);
}

static void isa_devices(struct aml *a, struct vm *vm)
{
	static const struct {
		const char *name;
		uint16_t port;
		int line;
	} com[VM_SERIALS] = { { "COM1", 0x3f8, IRQ_COM1 }, { "COM2", 0x2f8, IRQ_COM2 },
		{ "COM3", 0x3e8, IRQ_COM1 }, { "COM4", 0x2e8, IRQ_COM2 } };

	for (unsigned i = 0; i < VM_SERIALS; i++)
		if (boot_has_port(vm, com[i].port))
			isa_device(a, com[i].name, "PNP0501", i + 1, com[i].port, 8, com[i].line);
	if (boot_has_port(vm, PORT_RTC))
		isa_device(a, "RTC_", "PNP0B00", 0, PORT_RTC, 2, IRQ_RTC);
	if (boot_has_port(vm, PORT_PVPANIC))
		isa_device(a, "PEVT", "QEMU0001", 0, PORT_PVPANIC, 1, -1);
	if (boot_has_port(vm, PORT_FW_CFG))
		isa_device(a, "FWCF", "QEMU0002", 0, PORT_FW_CFG, 12, -1);
}

/* _PRT (ACPI 6.5, 6.2.13): all functions of a slot, pin, no link device, global interrupt. */
static void pci_routing(struct aml *a, const struct pci_bus *bus)
{
	uint32_t used = pci_slots_used(bus) & ~1u;      /* the bridge has no pins */
	unsigned list, entry;

	aml_name(a, "_PRT");
	list = aml_package(a, 4 * __builtin_popcount(used));
	for (unsigned i = 0; i < 4 * 32; i++) {
		unsigned slot = i / 4, pin = i % 4;

		if (!(used >> slot & 1))
			continue;
		entry = aml_package(a, 4);
		aml_int(a, slot << 16 | 0xffff);
		aml_int(a, pin);
		aml_int(a, 0);
		aml_int(a, pci_intx_gsi(slot, pin + 1));
		aml_close(a, entry);
	}
	aml_close(a, list);
}

static void pci_windows(struct aml *a, const struct pci_layout *l)
{
	unsigned res;

	aml_name(a, "_CRS");
	res = aml_resources(a);
	aml_res_bus(a, (struct aml_window){ 0, 0 });
	aml_res_io(a, 0xcf8, 8);
	aml_res_io_window(a, (struct aml_window){ l->io, l->io_end });
	aml_res_memory_window(a, (struct aml_window){ l->mmio, l->mmio_end - 1 });
	if (l->mmio64 < l->mmio64_end)
		aml_res_memory64_window(a, (struct aml_window){ l->mmio64, l->mmio64_end - 1 });
	aml_close_resources(a, res);
}

static void pci_host(struct aml *a, const struct pci_bus *bus)
{
	const struct pci_layout *l = pci_bus_layout(bus);
	unsigned dev = aml_device(a, "PCI0"), res;

	aml_name(a, "_HID");
	aml_eisaid(a, "PNP0A08");
	aml_name(a, "_CID");
	aml_eisaid(a, "PNP0A03");
	aml_name(a, "_UID");
	aml_int(a, 0);
	aml_name(a, "_SEG");
	aml_int(a, 0);
	aml_name(a, "_BBN");
	aml_int(a, 0);
	pci_windows(a, l);
	pci_routing(a, bus);
	aml_close(a, dev);

	/* PCI firmware spec 3.3, 4.1.2: ECAM is also a motherboard resource. */
	dev = aml_device(a, "MB00");
	aml_name(a, "_HID");
	aml_eisaid(a, "PNP0C02");
	aml_name(a, "_UID");
	aml_int(a, 0);
	aml_name(a, "_CRS");
	res = aml_resources(a);
	aml_res_memory(a, l->ecam, 0x100000);
	aml_close_resources(a, res);
	aml_close(a, dev);
}

/* The id that Linux and the BSDs bind virtio-mmio to. */
static void virtio_mmio(struct aml *a, const struct vm *vm)
{
	for (unsigned i = 0; i < vm->nr_virtio && i < VIRTIO_MMIO_MAX; i++) {
		unsigned dev, res, gsi;
		char name[8];
		gpa_t base;

		if (arch_virtio_mmio_slot(i, &base, &gsi))
			return;
		snprintf(name, sizeof(name), "VR%02X", i & 0xff);
		dev = aml_device(a, name);
		aml_name(a, "_HID");
		aml_string(a, "LNRO0005");
		aml_name(a, "_UID");
		aml_int(a, i);
		aml_name(a, "_CCA");
		aml_int(a, 1);
		aml_name(a, "_CRS");
		res = aml_resources(a);
		aml_res_memory(a, base, VIRTIO_MMIO_SIZE);
		aml_res_interrupt(a, gsi, VIRTIO_MMIO_LEVEL);
		aml_close_resources(a, res);
		aml_close(a, dev);
	}
}

void dsdt_write(struct aml *a, struct vm *vm)
{
	unsigned body = aml_scope(a, "\\_SB_");

	if (vm->pci)
		pci_host(a, vm->pci);
	else
		virtio_mmio(a, vm);
	isa_devices(a, vm);
	aml_close(a, body);

	if (!boot_has_port(vm, PM1_CNT_PORT))
		return;
	aml_name(a, "_S5_");
	body = aml_package(a, 4);
	aml_int(a, SLP_TYP_S5);
	aml_int(a, SLP_TYP_S5);
	aml_int(a, 0);
	aml_int(a, 0);
	aml_close(a, body);
}
