#include "rt.h"

void *memset(void *p, int c, size_t n)
{
	for (size_t i = 0; i < n; i++)
		((volatile uint8_t *)p)[i] = c;
	return p;
}

void *memcpy(void *d, const void *s, size_t n)
{
	for (size_t i = 0; i < n; i++)
		((volatile uint8_t *)d)[i] = ((const uint8_t *)s)[i];
	return d;
}

/* The transmitter of a virtual port is always empty. */
void say(const char *s)
{
	while (*s)
		outb(COM1, *s++);
}

void say_hex(const char *what, uint64_t v)
{
	say(what);
	say(" 0x");
	for (int shift = 60; shift >= 0; shift -= 4)
		if (v >> shift || shift == 0)
			outb(COM1, "0123456789abcdef"[v >> shift & 15]);
	say("\n");
}

bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

bool starts(const char *s, const char *prefix)
{
	while (*prefix && *s == *prefix)
		s++, prefix++;
	return !*prefix;
}

bool word(const char *cmdline, const char *w)
{
	for (const char *s = cmdline; *s; s++) {
		const char *a = s, *b = w;

		if (s != cmdline && s[-1] != ' ')
			continue;
		while (*b && *a == *b)
			a++, b++;
		if (!*b && (!*a || *a == ' '))
			return true;
	}
	return false;
}

unsigned long option(const char *cmdline, const char *key, unsigned long none)
{
	unsigned long v = 0;

	for (const char *s = cmdline; *s; s++) {
		const char *k = key;

		if (s != cmdline && s[-1] != ' ')
			continue;
		for (const char *t = s; *t && *t == *k; t++, k++)
			;
		if (*k)
			continue;
		for (s += k - key; *s >= '0' && *s <= '9'; s++)
			v = v * 10 + (*s - '0');
		return v;
	}
	return none;
}

/* Where there is no debug-exit port the CPU stops for good. */
void leave(uint8_t status)
{
	outb(DEBUG_EXIT, status);
	for (;;)
		__asm__ volatile("cli; hlt");
}

void failed(const char *what, int line)
{
	say("failed: ");
	say(what);
	say_hex(" at line", line);
	leave(1);
}
