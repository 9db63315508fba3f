/* The two machines: what a PC has at fixed places, and the little of it that microvm keeps. */
#include <cpuid.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "vmm/arch.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/pci.h"

/* Two 8259s and the IOAPIC, by KVM's numbers. */
#define IRQCHIPS 3

#define MMIO64_SIZE  (16ull << 30)
#define MMIO64_ALIGN (1ull << 30)

struct platform {
	struct acpi_pm *pm;             /* NULL until arch_platform() */
	/* power-on state, for arch_vm_reset() */
	struct kvm_irqchip chip[IRQCHIPS];
	struct kvm_pit_state2 pit;
	bool has_pit;
};

static bool is_pc(const struct vm *vm)
{
	return vm->cfg->machine == MACHINE_PC;
}

static int create_pit(struct vm *vm, struct error *err)
{
	/* The dummy answers the speaker port 0x61 in the kernel: kernels calibrate the TSC through it. */
	struct kvm_pit_config cfg = { .flags = KVM_PIT_SPEAKER_DUMMY };

	if (ioctl(vm->vm_fd, KVM_CREATE_PIT2, &cfg))
		return error_errno(err, errno, "cannot create the interval timer (KVM_CREATE_PIT2)");
	if (vm->cfg->restart_on_reboot && ioctl(vm->vm_fd, KVM_GET_PIT2, &vm->platform->pit))
		return error_errno(err, errno, "cannot read the interval timer's state");
	vm->platform->has_pit = true;
	return 0;
}

static int create_irqchip(struct vm *vm, struct error *err)
{
	uint64_t identity_map = KVM_IDENTITY_MAP;

	/* Pages that VMX without unrestricted guest needs; other hosts take note of them only. */
	if (ioctl(vm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) ||
		ioctl(vm->vm_fd, KVM_SET_TSS_ADDR, (unsigned long)KVM_TSS_BASE))
		return error_errno(err, errno, "cannot place KVM's own pages");
	if (ioctl(vm->vm_fd, KVM_CREATE_IRQCHIP, 0))
		return error_errno(err, errno, "cannot create the interrupt controllers (KVM_CREATE_IRQCHIP)");
	for (unsigned i = 0; vm->cfg->restart_on_reboot && i < IRQCHIPS; i++) {
		vm->platform->chip[i].chip_id = i;
		if (ioctl(vm->vm_fd, KVM_GET_IRQCHIP, &vm->platform->chip[i]))
			return error_errno(err, errno, "cannot read the interrupt controllers' state");
	}
	return 0;
}

int arch_vm_init(struct vm *vm, struct error *err)
{
	struct platform *p = calloc(1, sizeof(*p));
	int r;

	if (!p)
		return error_set(err, ENOMEM, "out of memory");
	vm->platform = p;
	r = create_irqchip(vm, err);
	if (!r && is_pc(vm))
		r = create_pit(vm, err);
	return r ? r : irqchip_init(&vm->irqs, vm->vm_fd, err);
}

void arch_vm_free(struct vm *vm)
{
	if (!vm->platform)
		return;
	pci_bus_free(vm->pci);
	vm->pci = NULL;
	for (unsigned i = 0; i < VM_SERIALS; i++)
		chardev_free(vm->serial[i]);    /* opened, but its port was not made */
	irqchip_done(&vm->irqs);
	free(vm->platform);
	vm->platform = NULL;
}

int arch_vm_reset(struct vm *vm, struct error *err)
{
	struct platform *p = vm->platform;

	for (unsigned i = 0; i < IRQCHIPS; i++)
		if (ioctl(vm->vm_fd, KVM_SET_IRQCHIP, &p->chip[i]))
			return error_errno(err, errno, "cannot reset the interrupt controllers");
	if (p->has_pit && ioctl(vm->vm_fd, KVM_SET_PIT2, &p->pit))
		return error_errno(err, errno, "cannot reset the interval timer");
	return 0;
}

bool arch_power_button(struct vm *vm)
{
	return acpi_pm_power_button(vm->platform->pm);
}

void arch_serial_break(struct vm *vm)
{
	serial_break(vm, 0);
}

int arch_virtio_mmio_slot(unsigned n, gpa_t *base, unsigned *gsi)
{
	if (n >= VIRTIO_MMIO_MAX)
		return -ENOSPC;
	*base = VIRTIO_MMIO_BASE + n * 0x1000ull;
	*gsi = IRQ_MMIO_FIRST + n % IRQ_MMIO_COUNT;
	return 0;
}

/* Bytes of guest-physical address space: what the host's CPUs have. */
static uint64_t physical_end(void)
{
	unsigned eax, ebx, ecx, edx;

	if (!__get_cpuid(0x80000008, &eax, &ebx, &ecx, &edx))
		return 1ull << 36;
	return 1ull << MIN(eax & 0xff, 52u);
}

/* The window for 64-bit BARs lies above RAM; it is empty where no address is left for it. */
static void place_mmio64(const struct gmem *m, struct pci_layout *l)
{
	const struct gmem_region *last = &m->region[m->nr - 1];
	uint64_t base = MAX(last->base + last->size, HIGH_RAM_BASE), end = physical_end();

	base = (base + MMIO64_ALIGN - 1) & ~(MMIO64_ALIGN - 1);
	l->mmio64 = MIN(base, end);
	l->mmio64_end = end - l->mmio64 < MMIO64_SIZE ? end : l->mmio64 + MMIO64_SIZE;
}

static int add_pci(struct vm *vm, struct error *err)
{
	struct pci_layout l = {
		.ecam = PCI_ECAM_BASE,
		.mmio = PCI_MMIO_BASE,
		.mmio_end = PCI_MMIO_END,
		.io = PCI_IO_BASE,
		.io_end = PCI_IO_END,
	};

	place_mmio64(&vm->mem, &l);
	return pci_bus_new(&vm->pci, &l, &vm->pio, &vm->mmio, &vm->irqs, &vm->mem, err);
}

static int add_serial(struct vm *vm, unsigned n, struct error *err)
{
	char name[16];
	int r = 0;

	snprintf(name, sizeof(name), "serial%u", n);
	if (vm->cfg->serial[n])
		r = chardev_open(&vm->serial[n], vm->cfg->serial[n], name, vm->io, err);
	if (r) {
		error_prefix(err, "--serial: ");
		return r;
	}
	return serial_new(vm, n, err);
}

/* What both machines have. */
static int add_common(struct vm *vm, struct error *err)
{
	int r;

	if ((r = acpi_pm_new(&vm->platform->pm, vm, err)) || (r = pvpanic_new(vm, err)))
		return r;
	if (vm->cfg->debug_exit && (r = debug_exit_new(vm, err)))
		return r;
	return reset_control_new(vm, err);
}

static int add_microvm(struct vm *vm, struct error *err)
{
	int r = 0;

	if (vm->cfg->serial[0])
		r = add_serial(vm, 0, err);
	return r ? r : i8042_new(vm, true, err);
}

static int add_pc(struct vm *vm, struct error *err)
{
	int r = add_pci(vm, err);

	for (unsigned i = 0; !r && i < VM_SERIALS; i++)
		if (i == 0 || vm->cfg->serial[i])
			r = add_serial(vm, i, err);
	if (r || (r = rtc_new(vm, err)) || (r = i8042_new(vm, false, err)) ||
		(r = port92_new(vm, err)) || (r = post_new(vm, err)) ||
		(r = shutdown_port_new(vm, err)) || (r = fw_cfg_new(vm, err)))
		return r;
	if (vm->cfg->debugcon && (r = debugcon_new(vm, vm->cfg->debugcon, err)))
		return r;
	if (vm->cfg->testdev && ((r = pc_testdev_new(vm, err)) || (r = pci_testdev_new(vm, err))))
		return r;
	return 0;
}

int arch_platform(struct vm *vm, struct error *err)
{
	int r = is_pc(vm) ? add_pc(vm, err) : add_microvm(vm, err);

	return r ? r : add_common(vm, err);
}
