/* vCPUs: how one is made, started, asked whether it is dead, and what it may leave KVM_RUN for. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include "cpu.h"
#include "cpuid.h"
#include "layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/vcpu.h"

#define MSR_MISC_ENABLE   0x1a0u
#define MISC_ENABLE_FAST_STRING 1u
#define MSR_MTRR_DEF_TYPE 0x2ffu
#define MSR_AMD_HWCR      0xc0010015u
#define HWCR_TSC_FREQ_SEL (1u << 24)    /* the TSC counts at the P0 frequency: Linux complains without */
#define MTRR_ON_WRITEBACK (1u << 11 | 6)

#define LAPIC_LVT_LINT0   0x350
#define LAPIC_LVT_LINT1   0x360
#define LVT_NMI           0x400u
#define LVT_EXTINT        0x700u

unsigned arch_ram_layout(uint64_t bytes, struct gmem_region *out, unsigned max)
{
	uint64_t low = MIN(bytes, LOW_RAM_END);

	if (!max || !low)
		return 0;
	out[0] = (struct gmem_region){ .base = 0, .size = low };
	if (low == bytes || max < 2)
		return 1;
	out[1] = (struct gmem_region){ .base = HIGH_RAM_BASE, .size = bytes - low };
	return 2;
}

static bool vm_has(struct vcpu *c, int cap)
{
	return ioctl(c->vm->vm_fd, KVM_CHECK_EXTENSION, cap) > 0;
}

static void enable(struct vcpu *c, uint32_t cap, uint64_t arg)
{
	struct kvm_enable_cap e = { .cap = cap, .args = { arg } };

	ioctl(c->vm->vm_fd, KVM_ENABLE_CAP, &e);
}

/*
 * What the whole VM asks of KVM's vCPUs, each optional: MSRs that KVM does not know come to us (values it
 * refuses for MSRs it does know stay a fault in the guest), an instruction it cannot emulate comes
 * with its bytes, and APIC ids have 32 bits where there are that many. Every vCPU asks before it touches
 * its LAPIC: that is idempotent, and needs nobody to be first.
 */
static void enable_vm_caps(struct vcpu *c)
{
	enable(c, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN);
	enable(c, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1);
	if (c->vm->cfg->cpus > 255)
		enable(c, KVM_CAP_X2APIC_API,
			KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
}

static int set_cpuid(struct vcpu *c, struct error *err)
{
	const struct kvm_cpuid2 *base = cpuid_supported(c->vm->kvm_fd, err);
	auto_free struct kvm_cpuid2 *t = NULL;
	int khz = ioctl(c->fd, KVM_GET_TSC_KHZ, 0);
	struct cpuid_request rq = { .spec = c->vm->cfg->cpu, .index = c->index,
		.cpus = c->vm->cfg->cpus, .tsc_khz = khz > 0 ? khz : 0,
		.tsc_deadline = vm_has(c, KVM_CAP_TSC_DEADLINE_TIMER) };

	if (!base)
		return -err->code;
	t = cpuid_build(base, &rq, err);
	if (!t)
		return -err->code;
	if (ioctl(c->fd, KVM_SET_CPUID2, t))
		return error_errno(err, errno, "KVM refuses the CPU features of vCPU %u", c->index);
	return 0;
}

/* What firmware would have done: caching on, fast string moves on. Optional registers, all of them. */
static void set_msrs(struct vcpu *c)
{
	uint64_t old = 0;

	if (cpu_msr_read(c, MSR_MISC_ENABLE, &old))
		cpu_msr_write(c, MSR_MISC_ENABLE, old | MISC_ENABLE_FAST_STRING);
	if (cpu_msr_read(c, MSR_AMD_HWCR, &old))
		cpu_msr_write(c, MSR_AMD_HWCR, old | HWCR_TSC_FREQ_SEL);
	cpu_msr_write(c, MSR_MTRR_DEF_TYPE, MTRR_ON_WRITEBACK);
}

static void set_lvt(struct kvm_lapic_state *l, unsigned reg, uint32_t mode)
{
	memcpy(l->regs + reg, &mode, sizeof(mode));
}

/* Virtual wire: the PIC's output is LINT0 of the first CPU, NMI is LINT1 of all (MP 1.4, 3.6.2.2). */
static int set_lapic(struct vcpu *c, struct error *err)
{
	struct kvm_lapic_state l;

	if (ioctl(c->fd, KVM_GET_LAPIC, &l))
		return error_errno(err, errno, "cannot read the local APIC of vCPU %u", c->index);
	if (c->index == 0)
		set_lvt(&l, LAPIC_LVT_LINT0, LVT_EXTINT);
	set_lvt(&l, LAPIC_LVT_LINT1, LVT_NMI);
	if (ioctl(c->fd, KVM_SET_LAPIC, &l))
		return error_errno(err, errno, "cannot set the local APIC of vCPU %u", c->index);
	return 0;
}

int arch_vcpu_init(struct vcpu *c, struct error *err)
{
	struct error own;
	int r;

	err = err ? err : &own;
	c->arch = calloc(1, sizeof(*c->arch));
	if (!c->arch)
		return error_set(err, ENOMEM, "out of memory");
	enable_vm_caps(c);
	r = set_cpuid(c, err);
	if (r)
		return r;
	set_msrs(c);
	r = set_lapic(c, err);
	if (r)
		return r;
	return cpu_state_save(c, err);
}

void arch_vcpu_free(struct vcpu *c)
{
	if (!c->arch)
		return;
	free(c->arch->msrs);
	free(c->arch->xsave);
	free(c->arch);
	c->arch = NULL;
}

/* The first vCPU starts the kernel; KVM holds the others until it sends them a start-up IPI. */
int arch_vcpu_boot(struct vcpu *c, const struct boot_image *b, struct error *err)
{
	struct kvm_regs regs = c->arch->regs;
	struct kvm_sregs sregs = c->arch->sregs;
	int r = c->arch->started ? cpu_state_restore(c, err) : 0;

	c->arch->started = true;
	if (r || c->index)
		return r;
	r = cpu_first_registers(b, &regs, &sregs, err);
	if (r)
		return r;
	if (ioctl(c->fd, KVM_SET_SREGS, &sregs) || ioctl(c->fd, KVM_SET_REGS, &regs))
		return error_errno(err, errno, "KVM refuses the kernel's first registers");
	return 0;
}

/* MSRs nobody knows: they read as zero and keep nothing. */
int arch_vcpu_exit(struct vcpu *c, struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_X86_RDMSR:
		run->msr.data = 0;
		break;
	case KVM_EXIT_X86_WRMSR:
		break;
	default:
		return -ENOSYS;
	}
	run->msr.error = 0;
	c->exits[EXIT_MSR]++;
	log_debug("vCPU %u: %s of unknown MSR 0x%x ignored", c->index,
		run->exit_reason == KVM_EXIT_X86_RDMSR ? "read" : "write", run->msr.index);
	return 0;
}

/* Nothing but another vCPU's IPI, or nothing at all, could make it run again. */
bool arch_vcpu_dead(struct vcpu *c)
{
	struct kvm_mp_state mp;
	struct kvm_vcpu_events e;
	struct kvm_regs r;

	if (ioctl(c->fd, KVM_GET_MP_STATE, &mp))
		return false;
	if (mp.mp_state == KVM_MP_STATE_UNINITIALIZED || mp.mp_state == KVM_MP_STATE_INIT_RECEIVED)
		return true;
	if (mp.mp_state != KVM_MP_STATE_HALTED)
		return false;
	if (ioctl(c->fd, KVM_GET_REGS, &r) || r.rflags & RFLAGS_IF)
		return false;
	return !ioctl(c->fd, KVM_GET_VCPU_EVENTS, &e) && !e.nmi.pending && !e.nmi.injected &&
		!e.exception.injected && !e.interrupt.injected && !e.smi.pending;
}
