/* The devices of a PC at fixed ports, through the bus. */
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "machine.h"
#include "unit.h"
#include "vmm/facts.h"

static struct test_machine m;
static struct error err;

static void add(int (*make)(struct vm *, struct error *))
{
	ck_assert_msg(make(&m.vm, &err) == 0, "%s", err.msg);
}

static int i8042_full(struct vm *vm, struct error *e)
{
	return i8042_new(vm, false, e);
}

/* ---- reset and power ---- */

START_TEST(test_i8042_answers_a_probe_and_resets_on_0xfe)
{
	machine_init(&m);
	add(i8042_full);
	ck_assert_uint_eq(inb(&m, 0x64) & 0x01, 0);
	outb(&m, 0x64, 0xaa);
	ck_assert_uint_eq(inb(&m, 0x64) & 0x01, 1);
	ck_assert_uint_eq(inb(&m, 0x60), 0x55);
	ck_assert_uint_eq(inb(&m, 0x64) & 0x01, 0);
	outb(&m, 0x64, 0x60);
	outb(&m, 0x60, 0x47);
	outb(&m, 0x64, 0x20);
	ck_assert_uint_eq(inb(&m, 0x60), 0x47);
	outb(&m, 0x64, 0xd0);
	ck_assert_uint_eq(inb(&m, 0x60) & 0x03, 0x03);
	outb(&m, 0x64, 0xd1);
	outb(&m, 0x60, 0xdf);
	outb(&m, 0x60, 0xff);           /* to the keyboard that is not there */
	ck_assert_uint_eq(inb(&m, 0x64) & 0x01, 0);
	ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
	outb(&m, 0x64, 0xfe);
	ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
	machine_reset(&m);
	outb(&m, 0x64, 0xd1);
	outb(&m, 0x60, 0xfe);           /* output port, reset line low */
	ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
	machine_done(&m);
}
END_TEST

START_TEST(test_i8042_of_microvm_only_resets)
{
	machine_init(&m);
	ck_assert_int_eq(i8042_new(&m.vm, true, &err), 0);
	ck_assert_uint_eq(inb(&m, 0x64), 0);
	ck_assert_uint_eq(inb(&m, 0x60), 0xff);
	outb(&m, 0x64, 0xaa);
	ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
	outb(&m, 0x64, 0xfe);
	ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
	machine_done(&m);
}
END_TEST

START_TEST(test_reset_ports_act_on_the_rise_of_their_bit)
{
	static const struct {
		uint16_t port;
		uint8_t idle, fire;
	} t[] = { { 0xcf9, 0x02, 0x06 }, { 0x92, 0x02, 0x03 } };

	for (unsigned i = 0; i < 2; i++) {
		machine_init(&m);
		add(reset_control_new);
		add(port92_new);
		outb(&m, t[i].port, t[i].idle);
		ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
		ck_assert_uint_eq(inb(&m, t[i].port), t[i].idle);
		outb(&m, t[i].port, t[i].fire);
		ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
		m.vm.stop.cause = STOP_NONE;
		outb(&m, t[i].port, t[i].fire);
		ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
		machine_reset(&m);
		outb(&m, t[i].port, t[i].fire);
		ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
		machine_done(&m);
	}
}
END_TEST

static uint64_t config_address;

static uint64_t config_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return config_address;
}

static void config_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)dev, (void)off, (void)size;
	config_address = val;
}

START_TEST(test_reset_control_shares_its_ports_with_pci)
{
	static const struct bus_ops ops = { config_read, config_write, 4, 4 };
	struct bus_region bridge = { .name = "bridge", .base = 0xcf8, .size = 4, .ops = &ops };

	machine_init(&m);
	ck_assert_int_eq(bus_add(&m.vm.pio, &bridge, &err), 0);
	add(reset_control_new);
	out_size(&m, 0xcf8, 4, 0x80001234);
	ck_assert_uint_eq(in_size(&m, 0xcf8, 4), 0x80001234);
	outb(&m, 0xcf9, 0x02);
	ck_assert_uint_eq(inb(&m, 0xcf9), 0x02);
	outb(&m, 0xcf8, 0x06);
	out_size(&m, 0xcf9, 2, 0x0606);
	ck_assert_uint_eq(in_size(&m, 0xcf8, 2), 0xffff);
	ck_assert_uint_eq(in_size(&m, 0xcf8, 4), 0x80001234);
	ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
	outb(&m, 0xcf9, 0x06);
	ck_assert_int_eq(m.vm.stop.cause, STOP_RESET);
	machine_done(&m);
}
END_TEST

static void out_text(uint16_t port, const char *s)
{
	while (*s)
		outb(&m, port, (uint8_t)*s++);
}

START_TEST(test_shutdown_string_must_be_whole)
{
	machine_init(&m);
	add(shutdown_port_new);
	out_text(0x8900, "Shutdow");
	out_text(0x8900, "m");
	out_text(0x8900, "n");
	out_text(0x8900, "hutdown");
	ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
	out_text(0x8900, "ShutShutdown");
	ck_assert_int_eq(m.vm.stop.cause, STOP_POWEROFF);
	machine_done(&m);
}
END_TEST

START_TEST(test_acpi_s5_by_every_width_powers_off)
{
	struct acpi_pm *pm;

	for (unsigned way = 0; way < 3; way++) {
		machine_init(&m);
		ck_assert_int_eq(acpi_pm_new(&pm, &m.vm, &err), 0);
		ck_assert_uint_eq(in_size(&m, PM1_CNT_PORT, 2) & 1, 1);
		out_size(&m, PM1_CNT_PORT, 2, 0x2000 | 1 << 10);        /* a type that is not offered */
		ck_assert_int_eq(m.vm.stop.cause, STOP_NONE);
		out_size(&m, PM1_CNT_PORT, 2, 0);
		ck_assert_uint_eq(in_size(&m, PM1_CNT_PORT, 2), 1);
		if (way == 0)
			out_size(&m, PM1_CNT_PORT, 2, 0x2000);
		else if (way == 1)
			out_size(&m, PM1_CNT_PORT, 4, 0x2001);
		else
			outb(&m, PM1_CNT_PORT + 1, 0x20);
		ck_assert_int_eq(m.vm.stop.cause, STOP_POWEROFF);
		ck_assert_uint_eq(in_size(&m, PM1_CNT_PORT, 2) & 0x2000, 0);
		machine_done(&m);
	}
}
END_TEST

START_TEST(test_power_button_raises_sci_only_if_enabled)
{
	struct acpi_pm *pm;

	machine_init(&m);
	ck_assert_int_eq(acpi_pm_new(&pm, &m.vm, &err), 0);
	ck_assert(!acpi_pm_power_button(pm));
	ck_assert(!line_is_high(&m, IRQ_SCI));
	out_size(&m, PM1_EVT_PORT + 2, 2, 0x0100);
	ck_assert(line_is_high(&m, IRQ_SCI));
	ck_assert_uint_eq(in_size(&m, PM1_EVT_PORT, 2), 0x0100);
	out_size(&m, PM1_EVT_PORT, 2, 0x0100);
	ck_assert(!line_is_high(&m, IRQ_SCI));
	ck_assert_uint_eq(in_size(&m, PM1_EVT_PORT, 4), 0x01000000);
	ck_assert(acpi_pm_power_button(pm));
	ck_assert(line_is_high(&m, IRQ_SCI));
	machine_reset(&m);
	ck_assert(!line_is_high(&m, IRQ_SCI));
	machine_done(&m);
}
END_TEST

START_TEST(test_pm_timer_runs_at_3579545_hz)
{
	struct acpi_pm *pm;
	uint64_t t0, t1;
	uint32_t a, b;

	machine_init(&m);
	ck_assert_int_eq(acpi_pm_new(&pm, &m.vm, &err), 0);
	t0 = loop_now();
	a = (uint32_t)in_size(&m, PM_TMR_PORT, 4);
	do
		b = (uint32_t)in_size(&m, PM_TMR_PORT, 4);
	while (b - a < 3580);           /* one millisecond */
	t1 = loop_now();
	ck_assert_uint_ge(t1 - t0, 999000);
	ck_assert_uint_eq(in_size(&m, PM_TMR_PORT + 2, 4), 0xffffffff);
	machine_done(&m);
}
END_TEST

/* ---- debug ---- */

START_TEST(test_debug_exit_raw_and_qemu)
{
	static const struct {
		enum debug_exit_mode mode;
		unsigned size;
		uint64_t out, value;
	} t[] = {
		{ DEBUG_EXIT_RAW, 1, 0, 0 },
		{ DEBUG_EXIT_RAW, 4, 0x12345678, 0x12345678 },
		{ DEBUG_EXIT_QEMU, 1, 0x10, 0x21 },
		{ DEBUG_EXIT_QEMU, 2, 0x8000, 0x10001 },
		{ DEBUG_EXIT_QEMU, 4, 0xffffffff, 0x1ffffffff },
	};

	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		machine_init(&m);
		m.cfg.debug_exit_port = 0xf4;
		m.cfg.debug_exit_mode = t[i].mode;
		add(debug_exit_new);
		out_size(&m, 0xf4, t[i].size, t[i].out);
		ck_assert_int_eq(m.vm.stop.cause, STOP_VALUE);
		ck_assert_uint_eq(m.vm.stop.guest_value, t[i].value);
		machine_done(&m);
	}
}
END_TEST

START_TEST(test_debug_exit_on_a_taken_port_names_the_option)
{
	machine_init(&m);
	m.cfg.debug_exit_port = 0x7e;
	add(post_new);
	ck_assert_int_lt(debug_exit_new(&m.vm, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.msg, "--debug-exit"));
	ck_assert_ptr_nonnull(strstr(err.msg, "post"));
	machine_done(&m);
}
END_TEST

START_TEST(test_pvpanic_stops_for_panicked_only)
{
	machine_init(&m);
	add(pvpanic_new);
	ck_assert_uint_eq(inb(&m, 0x505), 0x03);
	outb(&m, 0x505, 0x02);
	ck_assert_uint_eq(m.vm.panic_ns, 0);
	outb(&m, 0x505, 0x01);
	ck_assert_uint_ne(m.vm.panic_ns, 0);
	ck_assert_str_eq(m.vm.panic_how, "pvpanic");
	machine_done(&m);
}
END_TEST

/* What a device says of itself, as JSON; free() it. */
static char *describe(const char *name)
{
	struct facts *f = facts_new();
	char *text;

	for (struct vm_device *d = m.vm.devices; d; d = d->next)
		if (!strcmp(d->name, name))
			d->describe(d->dev, f);
	text = facts_text(f);
	facts_free(f);
	return text;
}

START_TEST(test_post_keeps_the_last_eight_codes)
{
	char *text;

	machine_init(&m);
	add(post_new);
	text = describe("post");
	ck_assert_ptr_nonnull(strstr(text, "\"\""));
	free(text);
	for (unsigned i = 0; i < 1000; i++)
		outb(&m, 0x80, (uint8_t)i);
	ck_assert_uint_eq(inb(&m, 0x80), 999 & 0xff);
	text = describe("post");
	ck_assert_ptr_nonnull(strstr(text, "1000"));
	ck_assert_ptr_nonnull(strstr(text, "e0 e1 e2 e3 e4 e5 e6 e7"));
	free(text);
	machine_done(&m);
}
END_TEST

/* ---- pc-testdev ---- */

START_TEST(test_testdev_echo_lines_and_memory)
{
	uint64_t val;
	uint8_t *page;

	machine_init(&m);
	add(pc_testdev_new);
	out_size(&m, 0xe0, 4, 0x11223344);
	out_size(&m, 0xe1, 1, 0xaa);
	ck_assert_uint_eq(in_size(&m, 0xe0, 4), 0x1122aa44);
	ck_assert_uint_eq(in_size(&m, 0xe2, 2), 0x1122);
	out_size(&m, 0xe6, 2, 0xbeef);
	ck_assert_uint_eq(in_size(&m, 0xe4, 4), 0xbeef0000);
	page = gmem_at(&m.vm.mem, 0x5000, 4096);
	page[7] = 42;
	out_size(&m, 0xe4, 4, 0x5123);
	ck_assert_uint_eq(page[7], 42);         /* flushed, not lost */
	out_size(&m, 0xe4, 4, 0xfffff000);      /* no RAM there */
	outb(&m, 0x2000 + 14, 1);
	ck_assert(line_is_high(&m, 14));
	outb(&m, 0x2000 + 14, 0);
	ck_assert(!line_is_high(&m, 14));
	outb(&m, 0x2000 + 23, 1);
	bus_write(&m.vm.mmio, TESTDEV_RAM + 0xfff8, 8, 0x1122334455667788);
	ck_assert(bus_read(&m.vm.mmio, TESTDEV_RAM + 0xfffc, 4, &val) && val == 0x11223344);
	ck_assert(!bus_read(&m.vm.mmio, TESTDEV_RAM + 0xfffc, 8, &val));
	machine_reset(&m);
	ck_assert(!line_is_high(&m, 23));
	ck_assert_uint_eq(in_size(&m, 0xe0, 4), 0);
	machine_done(&m);
}
END_TEST

/* ---- clock ---- */

static uint8_t cmos(uint8_t reg)
{
	outb(&m, 0x70, reg);
	return inb(&m, 0x71);
}

static void cmos_set(uint8_t reg, uint8_t val)
{
	outb(&m, 0x70, reg);
	outb(&m, 0x71, val);
}

static unsigned bcd(uint8_t v)
{
	return (v >> 4) * 10u + (v & 15);
}

START_TEST(test_rtc_tells_the_hosts_utc)
{
	struct tm tm;
	time_t now;

	machine_init(&m);
	add(rtc_new);
	do {                            /* the second must not change between the two readings */
		now = time(NULL);
		gmtime_r(&now, &tm);
		ck_assert_uint_eq(bcd(cmos(0x32)) * 100 + bcd(cmos(9)), (unsigned)tm.tm_year + 1900);
		ck_assert_uint_eq(bcd(cmos(8)), (unsigned)tm.tm_mon + 1);
		ck_assert_uint_eq(bcd(cmos(7)), (unsigned)tm.tm_mday);
		ck_assert_uint_eq(cmos(6), (unsigned)tm.tm_wday + 1);
		ck_assert_uint_eq(bcd(cmos(4)), (unsigned)tm.tm_hour);
	} while (time(NULL) != now);
	ck_assert_uint_eq(cmos(0x0d), 0x80);
	machine_done(&m);
}
END_TEST

static void set_clock(unsigned y, unsigned mo, unsigned d, unsigned h, unsigned mi, unsigned s)
{
	cmos_set(0x0b, 0x86);           /* SET, binary, 24 hours */
	cmos_set(0x32, y / 100);
	cmos_set(9, y % 100);
	cmos_set(8, mo);
	cmos_set(7, d);
	cmos_set(4, h);
	cmos_set(2, mi);
	cmos_set(0, s);
	cmos_set(0x0b, 0x06);
}

START_TEST(test_rtc_keeps_every_day_of_a_century)
{
	static const unsigned length[] = { 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31 };
	unsigned weekday = 5;           /* 1 January 1970 was a Thursday */

	machine_init(&m);
	add(rtc_new);
	for (unsigned y = 1970; y < 2110; y++) {
		bool leap = y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);

		for (unsigned mo = 1; mo <= 12; mo++) {
			unsigned days = length[mo - 1] + (leap && mo == 2);

			set_clock(y, mo, days, 12, 30, 0);
			ck_assert_uint_eq(cmos(7), days);
			ck_assert_uint_eq(cmos(8), mo);
			ck_assert_uint_eq(cmos(9), y % 100);
			ck_assert_uint_eq(cmos(0x32), y / 100);
			ck_assert_uint_eq(cmos(6), (weekday + days - 1 - 1) % 7 + 1);
			weekday = (weekday + days - 1) % 7 + 1;
			set_clock(y, mo, days + 1, 12, 30, 0);
			ck_assert_uint_eq(cmos(7), 1);
			ck_assert_uint_eq(cmos(8), mo % 12 + 1);
		}
	}
	machine_done(&m);
}
END_TEST

START_TEST(test_rtc_twelve_hours_and_bcd)
{
	machine_init(&m);
	add(rtc_new);
	set_clock(2024, 2, 29, 0, 15, 0);
	cmos_set(0x0b, 0x00);           /* BCD, 12 hours */
	ck_assert_uint_eq(cmos(4), 0x12);
	ck_assert_uint_eq(cmos(7), 0x29);
	cmos_set(4, 0x91);              /* 11 p.m. */
	cmos_set(0x0b, 0x02);
	ck_assert_uint_eq(cmos(4), 0x23);
	cmos_set(0x0b, 0x00);
	cmos_set(4, 0x92);              /* 12 p.m. is noon */
	cmos_set(0x0b, 0x06);
	ck_assert_uint_eq(cmos(4), 12);
	machine_done(&m);
}
END_TEST

START_TEST(test_rtc_stands_still_while_set)
{
	machine_init(&m);
	add(rtc_new);
	set_clock(2024, 2, 29, 23, 59, 58);
	cmos_set(0x0b, 0x86);
	cmos_set(0, 77);
	ck_assert_uint_eq(cmos(0), 77);
	ck_assert_uint_eq(cmos(0x0a) & 0x80, 0);
	cmos_set(0x0b, 0x06);           /* 23:59:77 is 00:00:17 of the next day */
	ck_assert_uint_eq(cmos(7), 1);
	ck_assert_uint_eq(cmos(8), 3);
	ck_assert_uint_ge(cmos(0), 17);
	machine_reset(&m);              /* the battery keeps the time */
	ck_assert_uint_eq(bcd(cmos(9)), 24);
	machine_done(&m);
}
END_TEST

static void wait_for_line(unsigned line)
{
	uint64_t end = loop_now() + 20000000000ull;

	while (!line_is_high(&m, line)) {
		ck_assert_uint_lt(loop_now(), end);
		sched_yield();
	}
}

START_TEST(test_rtc_interrupts_until_c_is_read)
{
	static const struct {
		uint8_t enable, flag;
	} t[] = { { 0x40, 0x40 }, { 0x10, 0x10 }, { 0x20, 0x20 } };

	machine_init(&m);
	add(rtc_new);
	for (unsigned i = 0; i < 3; i++) {
		set_clock(2030, 1, 1, 23, 59, 59);
		cmos_set(1, 0xc0);      /* the alarm: any second of hour 0, minute 0 */
		cmos_set(3, 0);
		cmos_set(5, 0);
		cmos(0x0c);
		cmos_set(0x0b, 0x06 | t[i].enable);
		wait_for_line(IRQ_RTC);
		ck_assert_uint_eq(cmos(0x0c) & (0x80 | t[i].flag), 0x80u | t[i].flag);
		cmos_set(0x0b, 0x06);
		cmos(0x0c);
		ck_assert(!line_is_high(&m, IRQ_RTC));
	}
	machine_done(&m);
}
END_TEST

START_TEST(test_rtc_that_nobody_serves_costs_no_wakeups)
{
	struct loop_stats a, b;
	uint64_t until;

	machine_init(&m);
	add(rtc_new);
	cmos_set(0x0a, 0x23);           /* 8,192 Hz */
	cmos_set(0x0b, 0x42);
	wait_for_line(IRQ_RTC);
	loop_get_stats(m.vm.io, &a);
	until = loop_now() + 20000000;
	while (loop_now() < until)      /* 160 periods */
		sched_yield();
	loop_get_stats(m.vm.io, &b);
	ck_assert_uint_le(b.turns - a.turns, 3);
	ck_assert_uint_eq(cmos(0x0c) & 0xc0, 0xc0);
	machine_done(&m);
}
END_TEST

START_TEST(test_rtc_reports_memory)
{
	machine_init(&m);
	add(rtc_new);
	ck_assert_uint_eq(cmos(0x15) | cmos(0x16) << 8, 640);
	ck_assert_uint_eq(cmos(0x17) | cmos(0x18) << 8, 31 * 1024);
	ck_assert_uint_eq(cmos(0x30) | cmos(0x31) << 8, 31 * 1024);
	ck_assert_uint_eq(cmos(0x34) | cmos(0x35) << 8, 256);
	ck_assert_uint_eq(cmos(0x5b) | cmos(0x5c) << 8 | cmos(0x5d) << 16, 16);
	ck_assert_uint_eq(cmos(0x5f), 2);
	machine_done(&m);
}
END_TEST

/* ---- hostile ---- */

/* Row 34: all ports, all widths, several values: nothing falls over, nothing grows, the machine still answers. */
START_TEST(test_row34_sweep_of_all_ports_is_harmless)
{
	static const uint64_t vals[] = { 0, 0xffffffff, 0x5aa55aa5, 0x01010101 };
	struct acpi_pm *pm;

	machine_init(&m);
	m.cfg.debug_exit_port = 0xf4;
	add(i8042_full);
	add(port92_new);
	add(reset_control_new);
	add(rtc_new);
	add(post_new);
	add(shutdown_port_new);
	add(pvpanic_new);
	add(debug_exit_new);
	add(fw_cfg_new);
	add(pc_testdev_new);
	for (unsigned i = 0; i < VM_SERIALS; i++)
		ck_assert_int_eq(serial_new(&m.vm, i, &err), 0);
	ck_assert_int_eq(acpi_pm_new(&pm, &m.vm, &err), 0);
	for (unsigned v = 0; v < 4; v++)
		for (unsigned port = 0; port < 0x10000; port++)
			for (unsigned size = 1; size <= 4; size *= 2) {
				out_size(&m, (uint16_t)port, size, vals[v]);
				in_size(&m, (uint16_t)port, size);
			}
	for (unsigned reg = 0; reg < 256; reg++)        /* odd times, alarms and rates */
		for (unsigned v = 0; v < 256; v += 5) {
			cmos_set((uint8_t)reg, (uint8_t)v);
			for (unsigned t = 0; t < 14; t++)
				cmos((uint8_t)t);
		}
	machine_reset(&m);
	cmos_set(0x0b, 0x02);
	ck_assert_uint_eq(cmos(0x0d), 0x80);
	ck_assert_uint_eq(inb(&m, 0x3fd), 0x60);
	machine_done(&m);
}
END_TEST

UNIT_MAIN("pcdev", test_i8042_answers_a_probe_and_resets_on_0xfe, test_i8042_of_microvm_only_resets,
	test_reset_ports_act_on_the_rise_of_their_bit, test_reset_control_shares_its_ports_with_pci,
	test_shutdown_string_must_be_whole,
	test_acpi_s5_by_every_width_powers_off, test_power_button_raises_sci_only_if_enabled,
	test_pm_timer_runs_at_3579545_hz, test_debug_exit_raw_and_qemu,
	test_debug_exit_on_a_taken_port_names_the_option, test_pvpanic_stops_for_panicked_only,
	test_post_keeps_the_last_eight_codes, test_testdev_echo_lines_and_memory,
	test_rtc_tells_the_hosts_utc, test_rtc_keeps_every_day_of_a_century,
	test_rtc_twelve_hours_and_bcd, test_rtc_stands_still_while_set,
	test_rtc_interrupts_until_c_is_read, test_rtc_that_nobody_serves_costs_no_wakeups,
	test_rtc_reports_memory, test_row34_sweep_of_all_ports_is_harmless)
