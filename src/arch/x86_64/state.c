/*
 * The power-on state of a vCPU, taken once after it is made and put back at each machine reset.
 *
 * How this works
 *
 * KVM has no reset of a vCPU, so everything a guest can change is read back once while it is still
 * untouched. Which MSRs there are, KVM says itself. Left out are clocks that must go on (TSC and its
 * adjustment: writing them would set the vCPUs apart) and the Hyper-V block, which no guest of ours sees.
 * What older or stranger KVMs do not have is not there to be put back.
 */
#include "cpu.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

#define MSRS_MOST 2048          /* names KVM may list */

#define MSR_TSC        0x10u
#define MSR_TSC_ADJUST 0x3bu
#define MSR_HYPERV     0x40000000u
#define MSR_HYPERV_END 0x40000200u

/* struct kvm_msrs with room for its one entry. */
union one_msr {
	struct kvm_msrs m;
	uint8_t room[sizeof(struct kvm_msrs) + sizeof(struct kvm_msr_entry)];
};

bool cpu_msr_write(struct vcpu *c, uint32_t index, uint64_t value)
{
	union one_msr m = { .room = { 0 } };

	m.m.nmsrs = 1;
	m.m.entries[0] = (struct kvm_msr_entry){ .index = index, .data = value };
	return ioctl(c->fd, KVM_SET_MSRS, &m) == 1;
}

bool cpu_msr_read(struct vcpu *c, uint32_t index, uint64_t *value)
{
	union one_msr m = { .room = { 0 } };

	m.m.nmsrs = 1;
	m.m.entries[0].index = index;
	if (ioctl(c->fd, KVM_GET_MSRS, &m) != 1)
		return false;
	*value = m.m.entries[0].data;
	return true;
}

/* KVM's list, asked once a process; NULL where there is none. */
static const struct kvm_msr_list *msr_list(int kvm_fd)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;        /* guards cached */
	static struct kvm_msr_list *cached;
	struct kvm_msr_list *l;

	pthread_mutex_lock(&lock);
	if (!cached) {
		l = calloc(1, sizeof(*l) + MSRS_MOST * sizeof(l->indices[0]));
		if (l) {
			l->nmsrs = MSRS_MOST;
			if (!ioctl(kvm_fd, KVM_GET_MSR_INDEX_LIST, l))
				cached = TAKE_PTR(l);
			free(l);
		}
	}
	pthread_mutex_unlock(&lock);
	return cached;
}

static bool kept(uint32_t index)
{
	return index != MSR_TSC && index != MSR_TSC_ADJUST &&
		(index < MSR_HYPERV || index >= MSR_HYPERV_END);
}

/* KVM stops at the first MSR it will not read: leave that one out and go on behind it. */
static int save_msrs(struct vcpu *c, struct vcpu_arch *a)
{
	const struct kvm_msr_list *l = msr_list(c->vm->kvm_fd);
	unsigned n = l ? l->nmsrs : 0, want = 0, have = 0;
	auto_free struct kvm_msrs *part = NULL;

	a->msrs = calloc(1, sizeof(*a->msrs) + n * sizeof(a->msrs->entries[0]));
	part = calloc(1, sizeof(*part) + n * sizeof(part->entries[0]));
	if (!a->msrs || !part)
		return -ENOMEM;
	for (unsigned i = 0; i < n; i++)
		if (kept(l->indices[i]))
			a->msrs->entries[want++].index = l->indices[i];
	for (unsigned at = 0; at < want;) {
		int got;

		part->nmsrs = want - at;
		for (unsigned i = 0; i < part->nmsrs; i++)
			part->entries[i] = a->msrs->entries[at + i];
		got = ioctl(c->fd, KVM_GET_MSRS, part);
		got = MAX(got, 0);
		for (int i = 0; i < got; i++)
			a->msrs->entries[have++] = part->entries[i];
		at += got + 1;
	}
	a->msrs->nmsrs = have;
	return 0;
}

/* As above: some may be read and not written. */
static void restore_msrs(struct vcpu *c, const struct kvm_msrs *all)
{
	auto_free struct kvm_msrs *part = calloc(1, sizeof(*part) + all->nmsrs * sizeof(part->entries[0]));

	for (unsigned at = 0; part && at < all->nmsrs;) {
		int put;

		part->nmsrs = all->nmsrs - at;
		for (unsigned i = 0; i < part->nmsrs; i++)
			part->entries[i] = all->entries[at + i];
		put = ioctl(c->fd, KVM_SET_MSRS, part);
		at += MAX(put, 0) + 1;
	}
}

static void save_xsave(struct vcpu *c, struct vcpu_arch *a)
{
	int size = ioctl(c->vm->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	unsigned long get = size > 0 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE;

	a->xsave = calloc(1, MAX(size, (int)sizeof(*a->xsave)));
	if (a->xsave && ioctl(c->fd, get, a->xsave)) {
		free(a->xsave);
		a->xsave = NULL;
	}
}

int cpu_state_save(struct vcpu *c, struct error *err)
{
	struct vcpu_arch *a = c->arch;

	if (ioctl(c->fd, KVM_GET_REGS, &a->regs) || ioctl(c->fd, KVM_GET_SREGS, &a->sregs))
		return error_errno(err, errno, "cannot read the registers of vCPU %u", c->index);
	if (!c->vm->cfg->restart_on_reboot)
		return 0;       /* the rest, 0.3 ms of it, is for a reset alone */
	if (ioctl(c->fd, KVM_GET_LAPIC, &a->lapic) || ioctl(c->fd, KVM_GET_VCPU_EVENTS, &a->events) ||
		ioctl(c->fd, KVM_GET_MP_STATE, &a->mp))
		return error_errno(err, errno, "cannot read the registers of vCPU %u", c->index);
	if (ioctl(c->fd, KVM_GET_DEBUGREGS, &a->debugregs))
		a->debugregs = (struct kvm_debugregs){ .dr6 = 0xffff0ff0, .dr7 = 0x400 };
	a->has_xcrs = !ioctl(c->fd, KVM_GET_XCRS, &a->xcrs) && a->xcrs.nr_xcrs;
	save_xsave(c, a);
	if (save_msrs(c, a))
		return error_set(err, ENOMEM, "out of memory");
	a->events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
		KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
	return 0;
}

/* Special registers come first: they hold the LAPIC's mode and place. */
int cpu_state_restore(struct vcpu *c, struct error *err)
{
	struct vcpu_arch *a = c->arch;

	if (ioctl(c->fd, KVM_SET_MP_STATE, &a->mp) || ioctl(c->fd, KVM_SET_SREGS, &a->sregs))
		goto failed;
	restore_msrs(c, a->msrs);
	if (ioctl(c->fd, KVM_SET_LAPIC, &a->lapic) || ioctl(c->fd, KVM_SET_REGS, &a->regs))
		goto failed;
	if (ioctl(c->fd, KVM_SET_VCPU_EVENTS, &a->events)) {
		struct kvm_vcpu_events e = a->events;

		e.flags &= ~KVM_VCPUEVENT_VALID_SMM;    /* a KVM without system management mode */
		if (ioctl(c->fd, KVM_SET_VCPU_EVENTS, &e))
			goto failed;
	}
	ioctl(c->fd, KVM_SET_DEBUGREGS, &a->debugregs);
	if (a->has_xcrs)
		ioctl(c->fd, KVM_SET_XCRS, &a->xcrs);
	if (a->xsave)
		ioctl(c->fd, KVM_SET_XSAVE, a->xsave);
	return 0;
failed:
	return error_errno(err, errno, "cannot reset the registers of vCPU %u", c->index);
}
