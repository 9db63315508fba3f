#include "aml.h"
#include <ctype.h>
#include <string.h>

/* ACPI 6.5, 20.2 and 20.3 */
enum {
	OP_NAME = 0x08,
	OP_BYTE = 0x0a,
	OP_WORD = 0x0b,
	OP_DWORD = 0x0c,
	OP_STRING = 0x0d,
	OP_QWORD = 0x0e,
	OP_SCOPE = 0x10,
	OP_BUFFER = 0x11,
	OP_PACKAGE = 0x12,
	OP_EXT = 0x5b,
	OP_DEVICE = 0x82,
};

static void put(struct aml *a, const void *p, unsigned len)
{
	if (a->full || len > AML_MAX - a->len) {
		a->full = true;
		return;
	}
	memcpy(a->buf + a->len, p, len);
	a->len += len;
}

static void put8(struct aml *a, uint8_t v)
{
	put(a, &v, 1);
}

static void put16(struct aml *a, uint16_t v)
{
	put(a, &v, 2);
}

static void put32(struct aml *a, uint32_t v)
{
	put(a, &v, 4);
}

static void put64(struct aml *a, uint64_t v)
{
	put(a, &v, 8);
}

/* PkgLength (20.2.4) in its three-byte form, whatever it will be: 20 bits are enough for AML_MAX. */
static unsigned open_body(struct aml *a)
{
	unsigned at = a->len;

	put(a, "\0\0\0", 3);
	return at;
}

void aml_close(struct aml *a, unsigned at)
{
	unsigned len = a->len - at;

	if (a->full)
		return;
	a->buf[at] = 0x80 | (len & 0xf);
	a->buf[at + 1] = len >> 4;
	a->buf[at + 2] = len >> 12;
}

static void put_name(struct aml *a, const char *name)
{
	put(a, name, strlen(name));
}

unsigned aml_scope(struct aml *a, const char *name)
{
	unsigned at;

	put8(a, OP_SCOPE);
	at = open_body(a);
	put_name(a, name);
	return at;
}

unsigned aml_device(struct aml *a, const char *name)
{
	unsigned at;

	put8(a, OP_EXT);
	put8(a, OP_DEVICE);
	at = open_body(a);
	put_name(a, name);
	return at;
}

unsigned aml_package(struct aml *a, uint8_t elements)
{
	unsigned at;

	put8(a, OP_PACKAGE);
	at = open_body(a);
	put8(a, elements);
	return at;
}

void aml_name(struct aml *a, const char *name)
{
	put8(a, OP_NAME);
	put_name(a, name);
}

void aml_int(struct aml *a, uint64_t v)
{
	if (v <= 1) {
		put8(a, v);             /* ZeroOp, OneOp */
	} else if (v <= UINT8_MAX) {
		put8(a, OP_BYTE);
		put8(a, v);
	} else if (v <= UINT16_MAX) {
		put8(a, OP_WORD);
		put16(a, v);
	} else if (v <= UINT32_MAX) {
		put8(a, OP_DWORD);
		put32(a, v);
	} else {
		put8(a, OP_QWORD);
		put64(a, v);
	}
}

void aml_string(struct aml *a, const char *s)
{
	put8(a, OP_STRING);
	put(a, s, strlen(s) + 1);
}

static unsigned hex_digit(char c)
{
	return isdigit((unsigned char)c) ? c - '0' : c - 'A' + 10;
}

/* Three letters of five bits, four hex digits; big-endian inside (19.3.4). */
void aml_eisaid(struct aml *a, const char *id)
{
	uint32_t v = (id[0] - 0x40u) << 26 | (id[1] - 0x40u) << 21 | (id[2] - 0x40u) << 16;

	for (unsigned i = 0; i < 4; i++)
		v |= hex_digit(id[3 + i]) << (12 - 4 * i);
	put8(a, OP_DWORD);
	put32(a, __builtin_bswap32(v));
}

/* BufferOp PkgLength BufferSize bytes: the size as a word constant, filled in on close. */
unsigned aml_resources(struct aml *a)
{
	unsigned at;

	put8(a, OP_BUFFER);
	at = open_body(a);
	put8(a, OP_WORD);
	put16(a, 0);
	return at;
}

void aml_close_resources(struct aml *a, unsigned at)
{
	uint16_t size;

	put8(a, 0x79);          /* end tag, no checksum */
	put8(a, 0);
	if (a->full)
		return;
	size = a->len - at - 6;
	memcpy(a->buf + at + 4, &size, sizeof(size));
	aml_close(a, at);
}

void aml_res_io(struct aml *a, uint16_t base, uint8_t len)
{
	put8(a, 0x47);
	put8(a, 1);             /* 16-bit decode */
	put16(a, base);
	put16(a, base);
	put8(a, 1);             /* alignment */
	put8(a, len);
}

void aml_res_irq(struct aml *a, unsigned line)
{
	put8(a, 0x22);
	put16(a, 1u << line);
}

void aml_res_interrupt(struct aml *a, uint32_t gsi, bool level)
{
	put8(a, 0x89);
	put16(a, 6);
	put8(a, 1 | (level ? 0 : 2) | 8);       /* consumer; trigger; shared */
	put8(a, 1);
	put32(a, gsi);
}

void aml_res_memory(struct aml *a, uint32_t base, uint32_t len)
{
	put8(a, 0x86);
	put16(a, 9);
	put8(a, 1);             /* writable */
	put32(a, base);
	put32(a, len);
}

/* Address space descriptors (6.4.3.5): producer, positive decode, both ends fixed. */
#define WINDOW_FIXED 0x0c
enum { SPACE_MEMORY = 0, SPACE_IO = 1, SPACE_BUS = 2 };
#define IO_ENTIRE_RANGE 3
#define MEMORY_WRITABLE 1

static void word_window(struct aml *a, uint8_t space, uint8_t flags, struct aml_window w)
{
	put8(a, 0x88);
	put16(a, 0x0d);
	put8(a, space);
	put8(a, WINDOW_FIXED);
	put8(a, flags);
	put16(a, 0);            /* granularity */
	put16(a, w.min);
	put16(a, w.max);
	put16(a, 0);            /* translation */
	put16(a, w.max - w.min + 1);
}

void aml_res_bus(struct aml *a, struct aml_window w)
{
	word_window(a, SPACE_BUS, 0, w);
}

void aml_res_io_window(struct aml *a, struct aml_window w)
{
	word_window(a, SPACE_IO, IO_ENTIRE_RANGE, w);
}

void aml_res_memory_window(struct aml *a, struct aml_window w)
{
	put8(a, 0x87);
	put16(a, 0x17);
	put8(a, SPACE_MEMORY);
	put8(a, WINDOW_FIXED);
	put8(a, MEMORY_WRITABLE);
	put32(a, 0);
	put32(a, w.min);
	put32(a, w.max);
	put32(a, 0);
	put32(a, w.max - w.min + 1);
}

void aml_res_memory64_window(struct aml *a, struct aml_window w)
{
	put8(a, 0x8a);
	put16(a, 0x2b);
	put8(a, SPACE_MEMORY);
	put8(a, WINDOW_FIXED);
	put8(a, MEMORY_WRITABLE);
	put64(a, 0);
	put64(a, w.min);
	put64(a, w.max);
	put64(a, 0);
	put64(a, w.max - w.min + 1);
}
