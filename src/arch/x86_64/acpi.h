#ifndef ARCH_X86_64_ACPI_H
#define ARCH_X86_64_ACPI_H
/* Between acpi.c, dsdt.c and mptable.c. */
#include <stdbool.h>
struct aml;
struct vm;

#define PORT_RTC         0x70
#define PORT_PVPANIC     0x505
#define PORT_FW_CFG      0x510
#define VIRTIO_MMIO_SIZE 0x1000
#define VIRTIO_MMIO_LEVEL false         /* their interrupts are edges: one eventfd write */

/* dsdt.c: the definition block behind its header. */
void dsdt_write(struct aml *a, struct vm *vm);
#endif
