/*
 * First registers, by boot protocol. The tables they point to (GDT, page tables, boot information) are
 * written by boot.c at the addresses of layout.h.
 *
 *   LINUX64      Linux Documentation/arch/x86/boot.rst, 64-bit boot protocol
 *   LINUX32      the same, 32-bit boot protocol
 *   PVH          Xen docs/misc/pvh.pandoc, x86/HVM direct boot ABI
 *   MULTIBOOT1   Multiboot 0.6.96, 3.2;  MULTIBOOT2  Multiboot 2.0, 3.3
 *   FLAT*        loader.h; flat32 and flat64 find the PVH start info in (r)bx
 */
#include <errno.h>
#include "cpu.h"
#include "layout.h"
#include "vmm/error.h"
#include "vmm/loader.h"

#define SEL_CODE 0x10
#define SEL_DATA 0x18
#define SEL_TSS  0x20

#define MULTIBOOT1_MAGIC 0x2badb002u
#define MULTIBOOT2_MAGIC 0x36d76289u

static void flat_segments(struct kvm_sregs *s, bool wide)
{
	const struct kvm_segment data = { .limit = 0xffffffff, .selector = SEL_DATA, .type = 3,
		.present = 1, .db = 1, .s = 1, .g = 1 };

	s->cs = (struct kvm_segment){ .limit = 0xffffffff, .selector = SEL_CODE, .type = 11,
		.present = 1, .db = !wide, .s = 1, .l = wide, .g = 1 };
	s->ds = s->es = s->fs = s->gs = s->ss = data;
	s->tr = (struct kvm_segment){ .limit = 0x67, .selector = SEL_TSS, .type = 11, .present = 1 };
	s->gdt = (struct kvm_dtable){ .base = BOOT_GDT, .limit = 5 * 8 - 1 };
	s->idt = (struct kvm_dtable){ 0 };
	s->cr0 = CR0_PE | CR0_ET | CR0_NE;
	if (wide) {
		s->cr0 |= CR0_PG | CR0_MP;
		s->cr3 = BOOT_PAGE_TABLES;
		s->cr4 = CR4_PAE;
		s->efer |= EFER_LME | EFER_LMA;
	}
}

static int real_mode(const struct boot_image *b, struct kvm_regs *r, struct kvm_sregs *s,
	struct error *err)
{
	if (b->entry >= 0x100000)
		return error_set(err, EINVAL,
			"a 16-bit kernel starts below 1 MiB, and this one was placed at 0x%llx",
			(unsigned long long)b->entry);
	s->cs.selector = b->entry >> 4;
	s->cs.base = (uint64_t)s->cs.selector << 4;
	s->ds.selector = s->es.selector = s->cs.selector;
	s->ds.base = s->es.base = s->cs.base;
	s->ss.selector = 0;
	s->ss.base = 0;
	r->rip = b->entry & 15;
	return 0;
}

int cpu_first_registers(const struct boot_image *b, struct kvm_regs *r, struct kvm_sregs *s,
	struct error *err)
{
	bool wide = b->protocol == BOOT_LINUX64 || b->protocol == BOOT_FLAT64;

	*r = (struct kvm_regs){ .rip = b->entry, .rsp = BOOT_STACK, .rflags = RFLAGS_FIXED };
	if (b->protocol == BOOT_FLAT16)
		return real_mode(b, r, s, err);
	if (b->entry >= HIGH_RAM_BASE)
		return error_set(err, EINVAL, "the kernel's entry 0x%llx lies above 4 GiB",
			(unsigned long long)b->entry);
	flat_segments(s, wide);
	switch (b->protocol) {
	case BOOT_LINUX64:
	case BOOT_LINUX32:
		r->rsi = BOOT_ZERO_PAGE;
		break;
	case BOOT_PVH:
	case BOOT_FLAT32:
	case BOOT_FLAT64:
		r->rbx = BOOT_PVH_INFO;
		break;
	case BOOT_MULTIBOOT1:
		r->rax = MULTIBOOT1_MAGIC;
		r->rbx = BOOT_MULTIBOOT;
		break;
	case BOOT_MULTIBOOT2:
		r->rax = MULTIBOOT2_MAGIC;
		r->rbx = BOOT_MULTIBOOT;
		break;
	case BOOT_FLAT16:
		break;
	}
	return 0;
}
