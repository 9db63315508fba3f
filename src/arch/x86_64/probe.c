/*
 * How this works. A guest of one page counts down between two port writes, and the host times it: once in
 * ring 0 and once in ring 3 (IOPL 3, so that it may use ports). Then ring 0 tries an instruction that
 * every Linux kernel uses and that some software KVMs cannot emulate. The state is set up from outside;
 * there is no GDT, no IDT and no irqchip: any fault is a shutdown exit.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define PROBE_RAM   0x10000u
#define PML4        0x1000u
#define PDPT        0x2000u
#define PD          0x3000u
#define SCRATCH     0x4000u
#define CODE        0x5000u
#define RING0_COUNT 60000u
#define RING3_COUNT 4000000u

extern const char probe_count[], probe_count_end[], probe_insn[], probe_insn_end[];
__asm__(".pushsection .rodata\n"
	"probe_count:\n"
	"	out %al, $0x80\n"
	"1:	dec %rcx\n"
	"	jnz 1b\n"
	"	out %al, $0x80\n"
	"probe_count_end:\n"
	"probe_insn:\n"
	"	lock cmpxchg16b (%rdi)\n"
	"	out %al, $0x80\n"
	"probe_insn_end:\n"
	".popsection\n");

struct probe_vm {
	int vm, cpu;
	uint8_t *ram;
	struct kvm_run *run;
	size_t run_size;
};

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static int set_state(struct probe_vm *p, bool user, uint64_t count)
{
	struct kvm_regs r = { .rip = CODE, .rcx = count, .rdi = SCRATCH, .rsp = SCRATCH + 0x800,
		.rflags = user ? 0x3002 : 0x2 };
	struct kvm_sregs s;
	struct kvm_segment seg = { .limit = 0xffffffff, .type = 3, .present = 1, .s = 1, .g = 1, .db = 1,
		.dpl = user ? 3 : 0, .selector = user ? 0x1b : 0x10 };

	if (ioctl(p->cpu, KVM_GET_SREGS, &s))
		return -errno;
	s.ds = s.es = s.fs = s.gs = s.ss = seg;
	seg.type = 11;
	seg.l = 1;
	seg.db = 0;
	seg.selector = user ? 0x23 : 0x08;
	s.cs = seg;
	s.cr3 = PML4;
	s.cr4 = 0x20;                   /* PAE */
	s.cr0 = 0x80000011;             /* PG, ET, PE */
	s.efer = 0x500;                 /* LME, LMA */
	if (ioctl(p->cpu, KVM_SET_SREGS, &s) || ioctl(p->cpu, KVM_SET_REGS, &r))
		return -errno;
	return 0;
}

/* Run to the next exit; 0 if it was the port write expected. */
static int to_port(struct probe_vm *p)
{
	while (ioctl(p->cpu, KVM_RUN, 0))
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	return p->run->exit_reason == KVM_EXIT_IO && p->run->io.port == 0x80 ? 0 : -EIO;
}

/* Instructions a second of the counting loop, or 0 where it did not run. */
static double rate(struct probe_vm *p, bool user, uint64_t count)
{
	double start;

	memcpy(p->ram + CODE, probe_count, (size_t)(probe_count_end - probe_count));
	if (set_state(p, user, count) || to_port(p))
		return 0;
	start = now();
	if (to_port(p))
		return 0;
	return 2.0 * (double)count / (now() - start);
}

static int build(struct probe_vm *p, int kvm_fd)
{
	struct kvm_userspace_memory_region slot = { .memory_size = PROBE_RAM };
	int size = ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	uint64_t entry;

	p->ram = mmap(NULL, PROBE_RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	p->vm = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if (p->ram == MAP_FAILED || p->vm < 0 || size < 0)
		return -errno;
	entry = PDPT | 7;               /* present, writable, user */
	memcpy(p->ram + PML4, &entry, 8);
	entry = PD | 7;
	memcpy(p->ram + PDPT, &entry, 8);
	entry = 0x87;                   /* and 2 MiB */
	memcpy(p->ram + PD, &entry, 8);
	slot.userspace_addr = (uintptr_t)p->ram;
	if (ioctl(p->vm, KVM_SET_USER_MEMORY_REGION, &slot))
		return -errno;
	p->cpu = ioctl(p->vm, KVM_CREATE_VCPU, 0);
	if (p->cpu < 0)
		return -errno;
	p->run_size = (size_t)size;
	p->run = mmap(NULL, p->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, p->cpu, 0);
	return p->run == MAP_FAILED ? -errno : 0;
}

int arch_probe(int kvm_fd, struct arch_probe *out, struct error *err)
{
	struct probe_vm p = { .vm = -1, .cpu = -1, .ram = MAP_FAILED, .run = MAP_FAILED };
	int r = build(&p, kvm_fd);

	*out = (struct arch_probe){ 0 };
	if (r) {
		error_errno(err, -r, "cannot build the probe guest");
	} else {
		out->ring0_per_second = rate(&p, false, RING0_COUNT);
		out->ring3_per_second = rate(&p, true, RING3_COUNT);
		memcpy(p.ram + CODE, probe_insn, (size_t)(probe_insn_end - probe_insn));
		out->ring0_complete = !set_state(&p, false, 0) && !to_port(&p);
	}
	if (p.run != MAP_FAILED)
		munmap(p.run, p.run_size);
	if (p.cpu >= 0)
		close(p.cpu);
	if (p.vm >= 0)
		close(p.vm);
	if (p.ram != MAP_FAILED)
		munmap(p.ram, PROBE_RAM);
	return r;
}
