/* What a vCPU looked like when it could not go on. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/ioctl.h>
#include "cpu.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/vcpu.h"

#define INSN_MAX 15     /* longest x86 instruction: Intel SDM 2A, 2.3.11 */

/* Bytes at a linear address as the guest's own page tables have it, up to where they end. */
static unsigned read_linear(struct vcpu *c, uint64_t addr, uint8_t *buf, unsigned max)
{
	unsigned n = 0;

	while (n < max) {
		struct kvm_translation t = { .linear_address = addr + n };
		unsigned part = MIN(max - n, 0x1000 - (unsigned)((addr + n) & 0xfff));

		if (ioctl(c->fd, KVM_TRANSLATE, &t) || !t.valid ||
			gmem_read(&c->vm->mem, t.physical_address, buf + n, part))
			break;
		n += part;
	}
	return n;
}

/* KVM 5.15 and later: the bytes come with the exit, where the guest's memory may since have changed. */
static unsigned bytes_of_exit(const struct kvm_run *run, uint8_t *buf, unsigned max)
{
	unsigned n;

	if (run->exit_reason != KVM_EXIT_INTERNAL_ERROR ||
		run->emulation_failure.suberror != KVM_INTERNAL_ERROR_EMULATION ||
		run->emulation_failure.ndata < 1 ||
		!(run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
		return 0;
	n = MIN(MIN(run->emulation_failure.insn_size, INSN_MAX), max);
	memcpy(buf, run->emulation_failure.insn_bytes, n);
	return n;
}

unsigned arch_vcpu_insn(struct vcpu *c, uint8_t *buf, unsigned max, uint64_t *rip)
{
	struct kvm_regs r;
	struct kvm_sregs s;
	unsigned n;

	*rip = 0;
	if (ioctl(c->fd, KVM_GET_REGS, &r) || ioctl(c->fd, KVM_GET_SREGS, &s))
		return 0;
	*rip = r.rip;
	n = bytes_of_exit(c->run, buf, max);
	if (n)
		return n;
	return read_linear(c, r.rip + (s.cs.l ? 0 : s.cs.base), buf, MIN(max, INSN_MAX));
}

static void dump_segment(FILE *out, const char *name, const struct kvm_segment *s)
{
	fprintf(out, "  %-3s %04x base %016" PRIx64 " limit %08x type %x s%u dpl%u p%u db%u l%u g%u%s\n",
		name, s->selector, (uint64_t)s->base, s->limit, s->type, s->s, s->dpl, s->present, s->db,
		s->l, s->g, s->unusable ? " unusable" : "");
}

static const char *mode_name(const struct kvm_sregs *s, const struct kvm_regs *r)
{
	if (!(s->cr0 & CR0_PE))
		return "16-bit real mode";
	if (r->rflags & 1u << 17)
		return "virtual-8086 mode";
	if (s->efer & EFER_LMA)
		return s->cs.l ? "64-bit mode" : "compatibility mode";
	return s->cs.db ? "32-bit protected mode" : "16-bit protected mode";
}

static void dump_insn(struct vcpu *c, FILE *out)
{
	uint8_t insn[INSN_MAX];
	uint64_t rip;
	unsigned n = arch_vcpu_insn(c, insn, sizeof(insn), &rip);

	fprintf(out, "  code");
	for (unsigned i = 0; i < n; i++)
		fprintf(out, " %02x", insn[i]);
	fprintf(out, "%s\n", n ? "" : " (rip is not mapped to RAM)");
}

void arch_vcpu_dump(struct vcpu *c, FILE *out)
{
	struct kvm_regs r;
	struct kvm_sregs s;

	if (ioctl(c->fd, KVM_GET_REGS, &r) || ioctl(c->fd, KVM_GET_SREGS, &s)) {
		fprintf(out, "  registers cannot be read: %s\n", strerror(errno));
		return;
	}
	fprintf(out, "  %s, privilege level %u\n", mode_name(&s, &r), s.ss.dpl);
	fprintf(out, "  rip %016llx rsp %016llx rflags %08llx\n", r.rip, r.rsp, r.rflags);
	fprintf(out, "  rax %016llx rbx %016llx rcx %016llx rdx %016llx\n", r.rax, r.rbx, r.rcx, r.rdx);
	fprintf(out, "  rsi %016llx rdi %016llx rbp %016llx r8  %016llx\n", r.rsi, r.rdi, r.rbp, r.r8);
	fprintf(out, "  r9  %016llx r10 %016llx r11 %016llx r12 %016llx\n", r.r9, r.r10, r.r11, r.r12);
	fprintf(out, "  r13 %016llx r14 %016llx r15 %016llx\n", r.r13, r.r14, r.r15);
	fprintf(out, "  cr0 %08llx cr2 %016llx cr3 %016llx cr4 %08llx efer %04llx\n", s.cr0, s.cr2, s.cr3,
		s.cr4, s.efer);
	dump_segment(out, "cs", &s.cs);
	dump_segment(out, "ds", &s.ds);
	dump_segment(out, "es", &s.es);
	dump_segment(out, "fs", &s.fs);
	dump_segment(out, "gs", &s.gs);
	dump_segment(out, "ss", &s.ss);
	dump_segment(out, "tr", &s.tr);
	dump_segment(out, "ldt", &s.ldt);
	fprintf(out, "  gdt %016llx limit %04x  idt %016llx limit %04x\n", s.gdt.base, s.gdt.limit,
		s.idt.base, s.idt.limit);
	dump_insn(c, out);
}
