#ifndef RT_H
#define RT_H
/* What a payload can use: ports, a serial line, checks, and a way out. No libraries, no SSE. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COM1       0x3f8
#define COM2       0x2f8
#define DEBUG_EXIT 0xf4

static inline void outb(uint16_t port, uint8_t v)
{
	__asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}
static inline void outw(uint16_t port, uint16_t v)
{
	__asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port));
}
static inline void outl(uint16_t port, uint32_t v)
{
	__asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port));
}
static inline uint8_t inb(uint16_t port)
{
	uint8_t v;

	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline uint16_t inw(uint16_t port)
{
	uint16_t v;

	__asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline uint32_t inl(uint16_t port)
{
	uint32_t v;

	__asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

static inline uint32_t read32(uintptr_t addr)
{
	return *(volatile uint32_t *)addr;
}
static inline void write32(uintptr_t addr, uint32_t v)
{
	*(volatile uint32_t *)addr = v;
}
static inline void barrier(void)
{
	__asm__ volatile("" : : : "memory");
}

/* rt.c */
void say(const char *s);                        /* to COM1 */
void say_hex(const char *what, uint64_t v);     /* "what 0x…\n" */
bool same(const char *a, const char *b);
bool starts(const char *s, const char *prefix);
/* The value of "key=" in a command line, as a number; none if it is not there. */
unsigned long option(const char *cmdline, const char *key, unsigned long none);
bool word(const char *cmdline, const char *w);  /* is w one of its words? */
void *memset(void *p, int c, size_t n);
void *memcpy(void *d, const void *s, size_t n);
__attribute__((noreturn)) void leave(uint8_t status);
__attribute__((noreturn)) void failed(const char *what, int line);

/* Says what did not hold and ends with status 1. */
#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond))                                                                       \
			failed(#cond, __LINE__);                                                   \
	} while (0)

/* irq.c: one interrupt vector each, 32-bit payloads only. */
void irq_install(uint8_t vector, void (*handler)(void));        /* handler runs inside the interrupt */
extern volatile unsigned irq_count;

/* Each payload's: what the boot protocol left in (r)ax, (r)bx and (r)si. */
int payload(unsigned long ax, unsigned long bx, unsigned long si);

/* info.c: the command line and map by any of the protocols, checked on the way. */
struct boot_facts {
	const char *cmdline;
	unsigned nr_modules;
	struct {
		const char *start, *args;
		uint32_t len;
	} module[32];
	uint64_t ram;                   /* bytes, as the map has them */
	unsigned regions;
	uintptr_t rsdp;                 /* 0: not told */
};
void facts_multiboot1(struct boot_facts *f, uintptr_t info);
void facts_multiboot2(struct boot_facts *f, uintptr_t info);
void facts_pvh(struct boot_facts *f, uintptr_t info);
void facts_linux(struct boot_facts *f, uintptr_t zero_page);
/* cmdline starts "test=1"; ram=MIB, modules=N in it are true; the RSDP is one; then status 0. */
void facts_check(const struct boot_facts *f);
#endif
