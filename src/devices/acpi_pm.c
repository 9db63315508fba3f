/*
 * ACPI fixed hardware (ACPI 6.4, 4.8.3): PM1 event and control blocks and the power-management timer, as one
 * range of 12 ports. There is no SMI_CMD, so the machine is in ACPI mode from the start.
 *
 *      0 PM1_STS   2 PM1_EN   4 PM1_CNT   6 -   8 PM_TMR
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/irq.h"
#include "vmm/log.h"

#define PWRBTN         0x0100           /* the same bit in PM1_STS and PM1_EN */
#define GBL            0x0020           /* global lock and RTC: can be enabled, never happen */
#define RTC            0x0400
#define CNT_SCI_EN     0x0001
#define CNT_SLP_TYP(c) ((c) >> 10 & 7)
#define CNT_SLP_EN     0x2000
#define CNT_KEPT       0x1c02           /* SLP_TYP and BM_RLD read back; SLP_EN and GBL_RLS are write-only */
#define TIMER_HZ       3579545ull

struct acpi_pm {
	struct pc_device pc;
	struct irq sci;
	/* under pc.lock */
	uint16_t sts, en, cnt;
	uint64_t buttons;
	struct log_limit limit;
};

/* 32 bits wide (TMR_VAL_EXT). Its carry interrupt (TMR_STS) is not there: it would wake an idle host. */
static uint32_t timer_now(void)
{
	uint64_t ns = loop_now();

	return ns / 1000000000 * TIMER_HZ + ns % 1000000000 * TIMER_HZ / 1000000000;
}

static void update_sci(struct acpi_pm *p)
{
	irq_set(&p->sci, p->sts & p->en);
}

static uint64_t pm_read(void *dev, uint64_t off, unsigned size)
{
	struct acpi_pm *p = dev;
	uint8_t image[16] = { 0 };
	uint32_t timer = timer_now();
	uint64_t val = 0;

	memcpy(image + 0, &p->sts, 2);
	memcpy(image + 2, &p->en, 2);
	memcpy(image + 4, &p->cnt, 2);
	memcpy(image + 8, &timer, 4);
	memcpy(&val, image + off, size);        /* the bus keeps off + size within the 12 ports */
	return val;
}

/* The high byte of PM1_CNT was written, with SLP_EN. */
static void enter_sleep(struct acpi_pm *p)
{
	unsigned type = CNT_SLP_TYP(p->cnt);

	if (type == SLP_TYP_S5)
		vm_request_stop(p->pc.vm, STOP_POWEROFF, 0, "guest powered off (ACPI S5)");
	else
		log_guest(&p->limit, "acpi: the guest asked for a sleep state that is not offered (type %u)",
			type);
}

static void write_byte(struct acpi_pm *p, unsigned off, uint8_t val)
{
	switch (off) {
	case 0:
	case 1:
		p->sts &= ~(val << 8 * off);
		break;
	case 2:
		p->en = (p->en & 0xff00) | (val & GBL);         /* TMR_EN: its event does not exist */
		break;
	case 3:
		p->en = (p->en & 0x00ff) | (val << 8 & (PWRBTN | RTC));
		break;
	case 4:
		p->cnt = (p->cnt & 0xff00) | (val & CNT_KEPT & 0xff) | CNT_SCI_EN;
		break;
	case 5:
		p->cnt = (p->cnt & 0x00ff) | (val << 8 & CNT_KEPT);
		if (val << 8 & CNT_SLP_EN)
			enter_sleep(p);
		break;
	}                               /* the timer is read-only */
}

static void pm_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct acpi_pm *p = dev;

	for (unsigned i = 0; i < size; i++)
		write_byte(p, off + i, val >> 8 * i);
	update_sci(p);
}

bool acpi_pm_power_button(struct acpi_pm *p)
{
	bool heard;

	pthread_mutex_lock(&p->pc.lock);
	p->sts |= PWRBTN;
	p->buttons++;
	heard = p->en & PWRBTN;
	update_sci(p);
	pthread_mutex_unlock(&p->pc.lock);
	return heard;
}

static void pm_reset(void *dev)
{
	struct acpi_pm *p = dev;

	pthread_mutex_lock(&p->pc.lock);
	p->sts = p->en = 0;
	p->cnt = CNT_SCI_EN;
	update_sci(p);
	pthread_mutex_unlock(&p->pc.lock);
}

static void pm_describe(void *dev, struct facts *f)
{
	struct acpi_pm *p = dev;

	facts_u64(f, "power_button", p->buttons);
	facts_bool(f, "power_button_enabled", p->en & PWRBTN);
}

static void pm_done(void *dev)
{
	struct acpi_pm *p = dev;

	irq_done(&p->sci);
}

static const struct bus_ops pm_ops = { pm_read, pm_write, 1, 4 };
static const struct pc_class pm_class = {
	.name = "acpi-pm",
	.range = { { PM1_EVT_PORT, 12, &pm_ops } },
	.reset = pm_reset,
	.describe = pm_describe,
	.done = pm_done,
};

int acpi_pm_new(struct acpi_pm **ret, struct vm *vm, struct error *err)
{
	auto_free struct acpi_pm *p = calloc(1, sizeof(*p));
	struct acpi_pm *made;
	int r;

	if (!p)
		return error_set(err, ENOMEM, "no memory for the ACPI registers");
	r = irq_line_init(&p->sci, &vm->irqs, IRQ_SCI, true, err);
	if (r)
		return r;
	made = TAKE_PTR(p);
	r = pc_device_add(vm, &made->pc, &pm_class, 0, err);
	if (!r)
		*ret = made;
	return r;
}
