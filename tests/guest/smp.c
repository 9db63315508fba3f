/* Start the other CPUs by INIT and start-up IPIs: "cpus=N" of them in all must say so. 32-bit, Multiboot 1. */
#include "rt.h"

#define LAPIC      0xfee00000
#define LAPIC_ID   0x20
#define LAPIC_SVR  0xf0
#define LAPIC_ICR  0x300
#define INIT_OTHERS    0xc4500
#define STARTUP_OTHERS 0xc4600
#define TRAMPOLINE 0x50000
#define TURNS      200000       /* about two seconds where ring 0 is interpreted */

/* Real mode: count, set the bit of the APIC id (CPUID leaf 1), sleep. */
__asm__(".pushsection .rodata\n"
	".code16\n"
	"ap_code:\n"
	"	cli\n"
	"	mov %cs, %ax\n"
	"	mov %ax, %ds\n"
	"	mov $1, %eax\n"
	"	cpuid\n"
	"	shr $24, %ebx\n"
	"	lock btsl %ebx, 0x804\n"
	"	lock incl 0x800\n"
	"1:	hlt\n"
	"	jmp 1b\n"
	"ap_end:\n"
	".code32\n"
	".popsection\n");
extern const char ap_code[], ap_end[];

int payload(unsigned long ax, unsigned long bx, unsigned long si)
{
	unsigned long cpus = option((const char *)(uintptr_t)read32(bx + 16), "cpus=", 1);
	uint32_t turns = 0;

	(void)ax, (void)si;
	memcpy((void *)TRAMPOLINE, ap_code, ap_end - ap_code);
	write32(TRAMPOLINE + 0x800, 0);
	write32(TRAMPOLINE + 0x804, 0);
	write32(LAPIC + LAPIC_SVR, 0x1ff);
	write32(LAPIC + LAPIC_ICR, INIT_OTHERS);
	write32(LAPIC + LAPIC_ICR, STARTUP_OTHERS | TRAMPOLINE >> 12);
	write32(LAPIC + LAPIC_ICR, STARTUP_OTHERS | TRAMPOLINE >> 12);
	while (read32(TRAMPOLINE + 0x800) < cpus - 1 && turns++ < TURNS)
		__asm__ volatile("pause");
	say_hex("started", read32(TRAMPOLINE + 0x800));
	CHECK(read32(LAPIC + LAPIC_ID) >> 24 == 0);
	CHECK(read32(TRAMPOLINE + 0x800) == cpus - 1);
	CHECK(read32(TRAMPOLINE + 0x804) == (1u << cpus) - 2);
	return 0;
}
