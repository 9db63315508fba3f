/*
 * ACPI tables (ACPI 6.5, 5.2), made from what is on the buses: RSDP, RSDT, XSDT, FADT, FACS, MADT, DSDT and,
 * with PCI, MCFG (PCI firmware spec 3.3, 4.1.2). The RSDP is first, where kernels also find it by scanning.
 */
#include "acpi.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "aml.h"
#include "boot.h"
#include "layout.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

struct acpi_header {
	char signature[4];
	uint32_t length;
	uint8_t revision, checksum;
	char oem_id[6], oem_table_id[8];
	uint32_t oem_revision;
	char creator_id[4];
	uint32_t creator_revision;
} __attribute__((packed));

struct gas {
	uint8_t space, bits, offset, access;
	uint64_t addr;
} __attribute__((packed));

struct fadt {
	struct acpi_header h;
	uint32_t facs, dsdt;
	uint8_t reserved0, profile;
	uint16_t sci;
	uint32_t smi_cmd;
	uint8_t acpi_enable, acpi_disable, s4bios, pstate;
	uint32_t pm1a_evt, pm1b_evt, pm1a_cnt, pm1b_cnt, pm2_cnt, pm_tmr, gpe0, gpe1;
	uint8_t pm1_evt_len, pm1_cnt_len, pm2_cnt_len, pm_tmr_len, gpe0_len, gpe1_len, gpe1_base, cst;
	uint16_t lvl2_latency, lvl3_latency, flush_size, flush_stride;
	uint8_t duty_offset, duty_width, day_alarm, month_alarm, century;
	uint16_t boot_arch;
	uint8_t reserved1;
	uint32_t flags;
	struct gas reset;
	uint8_t reset_value;
	uint16_t arm_boot_arch;
	uint8_t minor;
	uint64_t x_facs, x_dsdt;
	struct gas x_pm1a_evt, x_pm1b_evt, x_pm1a_cnt, x_pm1b_cnt, x_pm2_cnt, x_pm_tmr, x_gpe0, x_gpe1;
	struct gas sleep_control, sleep_status;
	uint64_t hypervisor;
} __attribute__((packed));
_Static_assert(sizeof(struct fadt) == 276, "FADT of ACPI 6.x");

enum {
	FADT_WBINVD = 1 << 0,
	FADT_PROC_C1 = 1 << 2,
	FADT_SLP_BUTTON = 1 << 5,       /* set: there is no fixed sleep button */
	FADT_FIX_RTC = 1 << 6,          /* set: no RTC wake status in fixed registers */
	FADT_TMR_32 = 1 << 8,
	FADT_RESET = 1 << 10,
	BOOT_LEGACY = 1 << 0,
	BOOT_NO_VGA = 1 << 2,
	BOOT_NO_ASPM = 1 << 4,
	BOOT_NO_RTC = 1 << 5,
};
#define NO_C2 101       /* a latency this long says: there is no such state */
#define NO_C3 1001
#define RTC_CENTURY 0x32

struct facs {
	char signature[4];
	uint32_t length, hardware, waking, lock, flags;
	uint64_t x_waking;
	uint8_t version, reserved[31];
} __attribute__((packed));

struct rsdp {
	char signature[8];
	uint8_t checksum;
	char oem_id[6];
	uint8_t revision;
	uint32_t rsdt, length;
	uint64_t xsdt;
	uint8_t x_checksum, reserved[3];
} __attribute__((packed));

static uint8_t checksum(const void *p, unsigned len)
{
	uint8_t sum = 0;

	for (unsigned i = 0; i < len; i++)
		sum += ((const uint8_t *)p)[i];
	return -sum;
}

static void set_header(struct acpi_header *h, const char *signature, uint8_t revision, uint32_t len)
{
	*h = (struct acpi_header){ .length = len, .revision = revision, .oem_revision = 1,
		.creator_revision = 1 };
	memcpy(h->signature, signature, 4);
	memcpy(h->oem_id, "VMM   ", 6);
	memcpy(h->oem_table_id, "VMM     ", 8);
	memcpy(h->creator_id, "VMM ", 4);
}

/* The table starts with a header; its length and checksum are filled in here. */
static gpa_t put_table(struct area *a, void *table, const char *signature, uint8_t revision, uint32_t len)
{
	struct acpi_header *h = table;

	set_header(h, signature, revision, len);
	h->checksum = checksum(table, len);
	return area_put(a, table, len, 16);
}

static struct gas io_register(uint16_t port, uint8_t bytes)
{
	return (struct gas){ .space = 1, .bits = bytes * 8, .access = bytes == 4 ? 3 : bytes, .addr = port };
}

static void fadt_power(struct fadt *f, struct vm *vm)
{
	if (boot_has_port(vm, PM1_CNT_PORT)) {
		f->sci = IRQ_SCI;
		f->pm1a_evt = PM1_EVT_PORT;
		f->pm1a_cnt = PM1_CNT_PORT;
		f->pm1_evt_len = 4;
		f->pm1_cnt_len = 2;
		f->x_pm1a_evt = io_register(PM1_EVT_PORT, 4);
		f->x_pm1a_evt.access = 2;
		f->x_pm1a_cnt = io_register(PM1_CNT_PORT, 2);
	}
	if (boot_has_port(vm, PM_TMR_PORT)) {
		f->pm_tmr = PM_TMR_PORT;
		f->pm_tmr_len = 4;
		f->x_pm_tmr = io_register(PM_TMR_PORT, 4);
		f->flags |= FADT_TMR_32;
	}
	if (boot_has_port(vm, RESET_PORT)) {
		f->reset = io_register(RESET_PORT, 1);
		f->reset_value = RESET_VALUE;
		f->flags |= FADT_RESET;
	}
}

static gpa_t put_fadt(struct area *a, struct vm *vm, gpa_t facs, gpa_t dsdt)
{
	struct fadt f = { .facs = facs, .dsdt = dsdt, .x_facs = 0, .x_dsdt = dsdt, .profile = 1,
		.lvl2_latency = NO_C2, .lvl3_latency = NO_C3, .minor = 5,
		.boot_arch = BOOT_LEGACY | BOOT_NO_VGA | BOOT_NO_ASPM,
		.flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC };

	if (boot_has_port(vm, PORT_RTC))
		f.century = RTC_CENTURY;
	else
		f.boot_arch |= BOOT_NO_RTC;
	memcpy(&f.hypervisor, "VMM\0\0\0\0", 8);
	fadt_power(&f, vm);
	return put_table(a, &f, "FACP", 6, sizeof(f));
}

/* MADT entries (5.2.12). */
struct madt_lapic {
	uint8_t type, len, uid, id;
	uint32_t flags;
} __attribute__((packed));
struct madt_x2apic {
	uint8_t type, len;
	uint16_t reserved;
	uint32_t id, flags, uid;
} __attribute__((packed));
struct madt_ioapic {
	uint8_t type, len, id, reserved;
	uint32_t addr, gsi_base;
} __attribute__((packed));
struct madt_override {
	uint8_t type, len, bus, source;
	uint32_t gsi;
	uint16_t flags;
} __attribute__((packed));
struct madt_nmi {
	uint8_t type, len, uid;
	uint16_t flags;
	uint8_t lint;
} __attribute__((packed));
struct madt_x2apic_nmi {
	uint8_t type, len;
	uint16_t flags;
	uint32_t uid;
	uint8_t lint, reserved[3];
} __attribute__((packed));

#define XAPIC_MAX 255           /* ids from here on take x2APIC entries */
#define INTI_LEVEL_HIGH 0xd

static void append(uint8_t *buf, uint32_t *len, const void *p, uint32_t n)
{
	memcpy(buf + *len, p, n);
	*len += n;
}

static void madt_cpus(uint8_t *t, uint32_t *len, unsigned cpus)
{
	for (unsigned i = 0; i < cpus; i++) {
		struct madt_lapic l = { 0, sizeof(l), i, i, 1 };
		struct madt_x2apic x = { 9, sizeof(x), 0, i, 1, i };

		if (i < XAPIC_MAX)
			append(t, len, &l, sizeof(l));
		else
			append(t, len, &x, sizeof(x));
	}
}

static gpa_t put_madt(struct area *a, unsigned cpus)
{
	struct {
		struct acpi_header h;
		uint32_t lapic, flags;
	} __attribute__((packed)) head = { .lapic = LAPIC_BASE, .flags = 1 };   /* PCs have two PICs */
	const struct madt_ioapic io = { 1, sizeof(io), 0, 0, IOAPIC_BASE, 0 };
	const struct madt_override timer = { 2, sizeof(timer), 0, 0, 2, 0 };
	const struct madt_override sci = { 2, sizeof(sci), 0, IRQ_SCI, IRQ_SCI, INTI_LEVEL_HIGH };
	const struct madt_nmi nmi = { 4, sizeof(nmi), 0xff, 0, 1 };
	const struct madt_x2apic_nmi x2nmi = { 10, sizeof(x2nmi), 0, UINT32_MAX, 1, { 0 } };
	auto_free uint8_t *t = calloc(1, 256 + cpus * sizeof(struct madt_x2apic));
	uint32_t len = 0;

	if (!t) {
		a->failed = true;
		error_set(a->err, ENOMEM, "out of memory");
		return 0;
	}
	append(t, &len, &head, sizeof(head));
	madt_cpus(t, &len, cpus);
	append(t, &len, &io, sizeof(io));
	append(t, &len, &timer, sizeof(timer));
	append(t, &len, &sci, sizeof(sci));
	append(t, &len, &nmi, sizeof(nmi));
	if (cpus > XAPIC_MAX)
		append(t, &len, &x2nmi, sizeof(x2nmi));
	return put_table(a, t, "APIC", 5, len);
}

static gpa_t put_mcfg(struct area *a, const struct pci_layout *l)
{
	struct {
		struct acpi_header h;
		uint64_t reserved0, base;
		uint16_t segment;
		uint8_t first_bus, last_bus;
		uint32_t reserved1;
	} __attribute__((packed)) t = { .base = l->ecam };

	return put_table(a, &t, "MCFG", 1, sizeof(t));
}

static gpa_t put_dsdt(struct area *a, struct vm *vm)
{
	auto_free uint8_t *buf = malloc(AML_MAX);       /* little of it is touched */
	struct aml aml = { .buf = buf, .len = sizeof(struct acpi_header) };

	if (buf) {
		memset(buf, 0, sizeof(struct acpi_header));
		dsdt_write(&aml, vm);
	}
	if (!buf || aml.full) {
		a->failed = true;
		error_set(a->err, buf ? ENOSPC : ENOMEM, "the machine has too many devices to describe");
		return 0;
	}
	return put_table(a, buf, "DSDT", 2, aml.len);
}

/* RSDT has 32 bits an entry, XSDT 64. */
static void put_roots(struct area *a, struct rsdp *r, const gpa_t *tables, unsigned n)
{
	struct {
		struct acpi_header h;
		uint32_t entry[4];
	} __attribute__((packed)) rsdt;
	struct {
		struct acpi_header h;
		uint64_t entry[4];
	} __attribute__((packed)) xsdt;

	for (unsigned i = 0; i < n; i++) {
		rsdt.entry[i] = tables[i];
		xsdt.entry[i] = tables[i];
	}
	r->rsdt = put_table(a, &rsdt, "RSDT", 1, sizeof(rsdt.h) + n * 4);
	r->xsdt = put_table(a, &xsdt, "XSDT", 1, sizeof(xsdt.h) + n * 8);
}

int acpi_build(struct vm *vm, struct area *a)
{
	struct rsdp r = { .revision = 2, .length = sizeof(r) };
	struct facs facs = { .length = sizeof(facs), .version = 2 };
	gpa_t at = area_put(a, NULL, sizeof(r), 16), facs_at, tables[4];
	unsigned n = 0;

	memcpy(facs.signature, "FACS", 4);
	facs_at = area_put(a, &facs, sizeof(facs), 64);
	tables[n++] = put_fadt(a, vm, facs_at, put_dsdt(a, vm));
	tables[n++] = put_madt(a, vm->cfg->cpus);
	if (vm->pci)
		tables[n++] = put_mcfg(a, pci_bus_layout(vm->pci));
	put_roots(a, &r, tables, n);
	if (area_result(a))
		return area_result(a);
	memcpy(r.signature, "RSD PTR ", 8);
	memcpy(r.oem_id, "VMM   ", 6);
	r.checksum = checksum(&r, 20);
	r.x_checksum = checksum(&r, sizeof(r));
	return gmem_write(&vm->mem, at, &r, sizeof(r));
}
