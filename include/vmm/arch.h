#ifndef VMM_ARCH_H
#define VMM_ARCH_H
/*
 * What src/arch/<cpu>/ implements, exactly this; meson picks one directory, and there is no #ifdef on the
 * CPU elsewhere.
 */
#include <stddef.h>
#include <stdio.h>
#include "vmm/gmem.h"
#include "vmm/pci.h"
#include "vmm/vm.h"
struct call_rule;
struct kvm_run;
struct vcpu;

/* cpu.c. RAM around the MMIO holes; returns the number of regions. */
unsigned arch_ram_layout(uint64_t bytes, struct gmem_region *out, unsigned max);

/* Check a --cpu value, "host,-cx16,+x": 0, or -EINVAL with the names that come near. Main thread. */
int arch_cpu_parse(const char *spec, struct error *err);

/*
 * probe.c: what kind of KVM this is, measured by a guest of a few instructions. Rates are instructions a
 * second, 0 where the guest did not run. ring0_complete: ring 0 runs an instruction that stock kernels need
 * and some software KVMs lack. Main thread; 0 or -errno.
 */
struct arch_probe {
	double ring0_per_second, ring3_per_second;
	bool ring0_complete;
};
int arch_probe(int kvm_fd, struct arch_probe *out, struct error *err);

/* filter.c: the n calls a running VM, or an image tool, may make (src/filter.h), ioctl first; audit_arch: AUDIT_ARCH_*. */
const struct call_rule *arch_call_rules(bool tool, unsigned *n, uint32_t *audit_arch);

/* platform.c; main thread. */
int  arch_vm_init(struct vm *vm, struct error *err);            /* after KVM_CREATE_VM: irqchip, PIT, TSS; allocates vm->platform */
int  arch_platform(struct vm *vm, struct error *err);           /* PCI host, serial ports, RTC, reset, …: the fixed devices */
void arch_vm_free(struct vm *vm);
int  arch_vm_reset(struct vm *vm, struct error *err);           /* irqchip and PIT back to power-on */
bool arch_power_button(struct vm *vm);                          /* ACPI power button; false: the guest does not listen */
void arch_serial_break(struct vm *vm);                          /* any thread: the first serial port receives a break */
/* Place of the n-th virtio-mmio device; -ENOSPC past the last. */
int  arch_virtio_mmio_slot(unsigned n, gpa_t *base, unsigned *gsi);

/* boot.c; main thread. Zero page, PVH or Multiboot information, e820, page tables, ACPI, MP table. */
int  arch_boot_setup(struct vm *vm, const struct boot_image *b, struct error *err);

/* cpu.c; on the vCPU's own thread. */
int  arch_vcpu_init(struct vcpu *c, struct error *err);         /* CPUID, MSRs, LAPIC; remembers the power-on state; allocates c->arch */
int  arch_vcpu_boot(struct vcpu *c, const struct boot_image *b, struct error *err);     /* power-on state, then first registers */
void arch_vcpu_free(struct vcpu *c);
int  arch_vcpu_exit(struct vcpu *c, struct kvm_run *run);       /* exits vcpu/exit.c does not know: 0 handled, -ENOSYS not */
bool arch_vcpu_dead(struct vcpu *c);                            /* halted with interrupts off, or waiting for a SIPI */
void arch_vcpu_dump(struct vcpu *c, FILE *out);                 /* registers, instruction bytes */
/* The instruction bytes KVM could not run (or those at RIP); returns their number. */
unsigned arch_vcpu_insn(struct vcpu *c, uint8_t *buf, unsigned max, uint64_t *rip);
#endif
