#ifndef ARCH_X86_64_CPU_H
#define ARCH_X86_64_CPU_H
/* What a vCPU carries for src/arch/x86_64 alone; its own thread only. */
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
struct boot_image;
struct error;
struct vcpu;

#define CR0_PE (1u << 0)
#define CR0_MP (1u << 1)
#define CR0_ET (1u << 4)
#define CR0_NE (1u << 5)
#define CR0_PG (1u << 31)
#define CR4_PAE (1u << 5)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define RFLAGS_FIXED 0x2u       /* bit 1 always reads 1 */
#define RFLAGS_IF (1u << 9)

/* The state after power-on, as KVM made it and arch_vcpu_init() amended it. */
struct vcpu_arch {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_xsave *xsave;        /* NULL, and has_xcrs false: KVM keeps no such state */
	bool has_xcrs;
	struct kvm_msrs *msrs;
	bool started;                   /* the guest may have changed all this */
};

/* state.c. 0, or -errno with words. */
int cpu_state_save(struct vcpu *c, struct error *err);
int cpu_state_restore(struct vcpu *c, struct error *err);
/* One MSR; false where KVM knows no such register or refuses the value. */
bool cpu_msr_write(struct vcpu *c, uint32_t index, uint64_t value);
bool cpu_msr_read(struct vcpu *c, uint32_t index, uint64_t *value);

/* entry.c: first registers of the vCPU that starts the kernel, changed in place; -EINVAL with words. */
int cpu_first_registers(const struct boot_image *b, struct kvm_regs *r, struct kvm_sregs *s,
	struct error *err);
#endif
