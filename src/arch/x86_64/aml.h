#ifndef ARCH_X86_64_AML_H
#define ARCH_X86_64_AML_H
/*
 * A writer of ACPI machine language (ACPI 6.5, 20): just the terms our tables use, appended to a buffer.
 * Terms with a body are opened and closed; their length is filled in on close. Too long a table marks the
 * writer as full, and nothing more is written.
 */
#include <stdbool.h>
#include <stdint.h>

#define AML_MAX 65536

struct aml {
	uint8_t *buf;                   /* AML_MAX bytes */
	unsigned len;
	bool full;
};

/* Bodies: the value returned is given back to aml_close(). */
unsigned aml_scope(struct aml *a, const char *name);            /* "\\_SB_" */
unsigned aml_device(struct aml *a, const char *name);           /* four characters */
unsigned aml_package(struct aml *a, uint8_t elements);
unsigned aml_resources(struct aml *a);                          /* ResourceTemplate: a buffer */
void aml_close(struct aml *a, unsigned body);
void aml_close_resources(struct aml *a, unsigned body);

void aml_name(struct aml *a, const char *name);                 /* Name (name, …): a term follows */
void aml_int(struct aml *a, uint64_t v);
void aml_string(struct aml *a, const char *s);
void aml_eisaid(struct aml *a, const char *id);                 /* "PNP0A08" */

/* Resource descriptors (ACPI 6.5, 6.4). */
struct aml_window {
	uint64_t min, max;              /* inclusive */
};
void aml_res_io(struct aml *a, uint16_t base, uint8_t len);
void aml_res_irq(struct aml *a, unsigned line);                 /* ISA: edge, high, exclusive */
void aml_res_interrupt(struct aml *a, uint32_t gsi, bool level);        /* active high, shared */
void aml_res_memory(struct aml *a, uint32_t base, uint32_t len);
void aml_res_bus(struct aml *a, struct aml_window w);
void aml_res_io_window(struct aml *a, struct aml_window w);
void aml_res_memory_window(struct aml *a, struct aml_window w);
void aml_res_memory64_window(struct aml *a, struct aml_window w);
#endif
