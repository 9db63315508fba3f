/* Interrupts for 32-bit payloads: one gate at a time, the PICs moved to 0x20 and masked. */
#include "rt.h"

struct gate {
	uint16_t low, selector;
	uint8_t zero, type;
	uint16_t high;
} __attribute__((packed));

static struct gate idt[256] __attribute__((aligned(8)));
static void (*on_irq)(void);
volatile unsigned irq_count;

/*
 * Registers are kept; the way back is not iret, which software KVM does not interpret in protected mode: the
 * frame (eip, cs, eflags) is turned into eflags and a return address, both above the stack pointer, so that
 * the next interrupt may come in between.
 */
void irq_entry(void);
__asm__("irq_entry:\n"
	"	pushal\n"
	"	cld\n"
	"	call irq_handle\n"
	"	popal\n"
	"	push %eax\n"
	"	mov 4(%esp), %eax\n"
	"	xchg 12(%esp), %eax\n"
	"	mov %eax, 8(%esp)\n"
	"	pop %eax\n"
	"	add $4, %esp\n"
	"	popfl\n"
	"	ret\n");

void irq_handle(void);
void irq_handle(void)
{
	irq_count++;
	on_irq();
}

static void init_pics(void)
{
	outb(0x20, 0x11);
	outb(0x21, 0x20);
	outb(0x21, 0x04);
	outb(0x21, 0x01);
	outb(0x21, 0xff);
	outb(0xa0, 0x11);
	outb(0xa1, 0x28);
	outb(0xa1, 0x02);
	outb(0xa1, 0x01);
	outb(0xa1, 0xff);
}

void irq_install(uint8_t vector, void (*handler)(void))
{
	const struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) idtr = { sizeof(idt) - 1, (uint32_t)(uintptr_t)idt };
	uint32_t at = (uint32_t)(uintptr_t)irq_entry;
	uint16_t cs;

	__asm__("mov %%cs, %0" : "=r"(cs));
	idt[vector] = (struct gate){ at & 0xffff, cs, 0, 0x8e, at >> 16 };
	on_irq = handler;
	init_pics();
	__asm__ volatile("lidt %0" : : "m"(idtr));
}
