/* The 16550A through the bus, its host end on a socket pair. */
#include <fcntl.h>
#include <linux/serial_reg.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
#include "devices/pc.h"
#include "machine.h"
#include "unit.h"
#include "vmm/chardev.h"

#define COM1 0x3f8
#define LINE 4
#define WAIT_NS 20000000000ull

static struct test_machine m;
static struct error err;
static int host;                /* the other end of the cable */

static void start(void)
{
	char spec[16];
	int fd[2];

	machine_init(&m);
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
	host = fd[0];
	snprintf(spec, sizeof(spec), "fd:%d", fd[1]);
	ck_assert_msg(chardev_open(&m.vm.serial[0], spec, "serial0", m.vm.io, &err) == 0, "%s", err.msg);
	ck_assert_int_eq(serial_new(&m.vm, 0, &err), 0);
}

static void stop(void)
{
	machine_done(&m);
	close(host);
}

static uint8_t rd(unsigned reg)
{
	return inb(&m, COM1 + reg);
}

static void wr(unsigned reg, unsigned val)
{
	outb(&m, COM1 + reg, (uint8_t)val);
}

/* Spin until the condition holds; fails after WAIT_NS. */
#define WAIT_FOR(cond)                                                                             \
	do {                                                                                       \
		uint64_t end_ = loop_now() + WAIT_NS;                                              \
		while (!(cond)) {                                                                  \
			ck_assert_uint_lt(loop_now(), end_);                                       \
			sched_yield();                                                             \
		}                                                                                  \
	} while (0)

static void type(const char *text)
{
	ck_assert_int_eq(write(host, text, strlen(text)), (ssize_t)strlen(text));
}

static void expect_output(const char *text)
{
	char buf[256];
	size_t n = 0, len = strlen(text);

	while (n < len) {
		struct pollfd p = { host, POLLIN, 0 };
		ssize_t r;

		ck_assert_int_eq(poll(&p, 1, 20000), 1);
		r = read(host, buf + n, len - n);
		ck_assert_int_gt(r, 0);
		n += (size_t)r;
	}
	ck_assert_int_eq(memcmp(buf, text, len), 0);
}

START_TEST(test_serial_looks_like_a_16550a)
{
	start();
	ck_assert_uint_eq(rd(UART_LSR), UART_LSR_THRE | UART_LSR_TEMT);
	wr(UART_IER, 0xff);
	ck_assert_uint_eq(rd(UART_IER), 0x0f);
	wr(UART_IER, 0);
	wr(UART_SCR, 0x5a);
	ck_assert_uint_eq(rd(UART_SCR), 0x5a);
	ck_assert_uint_eq(rd(UART_IIR), UART_IIR_NO_INT);
	wr(UART_FCR, UART_FCR_ENABLE_FIFO);
	ck_assert_uint_eq(rd(UART_IIR), 0xc0 | UART_IIR_NO_INT);
	wr(UART_FCR, UART_FCR_ENABLE_FIFO | 0x20);      /* not a 16750 */
	ck_assert_uint_eq(rd(UART_IIR) & 0x20, 0);
	ck_assert_uint_eq(rd(UART_MSR), UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS);
	stop();
}
END_TEST

START_TEST(test_serial_divisor_is_behind_dlab)
{
	start();
	wr(UART_LCR, UART_LCR_DLAB | 3);
	wr(UART_DLL, 0x34);
	wr(UART_DLM, 0x12);
	ck_assert_uint_eq(rd(UART_DLL), 0x34);
	ck_assert_uint_eq(rd(UART_DLM), 0x12);
	wr(UART_LCR, 3);
	ck_assert_uint_eq(rd(UART_IER), 0);
	ck_assert_uint_eq(rd(UART_LCR), 3);
	wr(UART_TX, 'x');
	expect_output("x");             /* the divisor bytes did not go out */
	stop();
}
END_TEST

START_TEST(test_serial_transmit_interrupt_rises_once_and_iir_clears_it)
{
	start();
	wr(UART_IER, UART_IER_THRI);
	ck_assert(line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, UART_IIR_THRI);
	ck_assert(!line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, UART_IIR_NO_INT);
	wr(UART_TX, 'a');
	ck_assert(line_is_high(&m, LINE));
	wr(UART_TX, 'b');
	ck_assert(line_is_high(&m, LINE));
	wr(UART_IER, 0);
	ck_assert(!line_is_high(&m, LINE));
	wr(UART_IER, UART_IER_THRI);    /* enabling it raises it anew */
	ck_assert(line_is_high(&m, LINE));
	expect_output("ab");
	stop();
}
END_TEST

START_TEST(test_serial_input_respects_the_trigger_level)
{
	start();
	wr(UART_FCR, UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_14);
	wr(UART_IER, UART_IER_RDI);
	type("abc");
	WAIT_FOR(rd(UART_LSR) & UART_LSR_DR);
	ck_assert(line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, 0x0c);
	for (const char *p = "abc"; *p; p++) {
		WAIT_FOR(rd(UART_LSR) & UART_LSR_DR);
		ck_assert_uint_eq(rd(UART_RX), (uint8_t)*p);
	}
	ck_assert(!line_is_high(&m, LINE));
	type("0123456789abcd");
	WAIT_FOR((rd(UART_IIR) & 0x0f) == UART_IIR_RDI);
	stop();
}
END_TEST

START_TEST(test_serial_loses_no_input_however_slowly_it_is_read)
{
	static const char text[] = "the quick brown fox jumps over the lazy dog, more than once a line";

	for (unsigned fcr = 0; fcr < 2; fcr++) {
		start();
		wr(UART_FCR, fcr);
		type(text);
		for (unsigned i = 0; text[i]; i++) {
			uint8_t lsr = 0;

			WAIT_FOR((lsr = rd(UART_LSR)) & UART_LSR_DR);
			ck_assert_uint_eq(lsr & UART_LSR_OE, 0);
			ck_assert_uint_eq(rd(UART_RX), (uint8_t)text[i]);
		}
		ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_DR, 0);
		stop();
	}
}
END_TEST

/* What Linux's 8250 driver does before it listens: probing, FIFO clearing, reading the registers empty. */
START_TEST(test_serial_start_of_a_driver_costs_no_input)
{
	static const char text[] = "a script for the shell\n";
	struct loop_stats a, b;

	start();
	type(text);
	loop_get_stats(m.vm.io, &a);
	do {                            /* the loop has had its chance to deliver too early */
		rd(UART_MSR);
		loop_get_stats(m.vm.io, &b);
		chardev_more(m.vm.serial[0]);
	} while (b.turns < a.turns + 5);
	for (unsigned i = 0; i < 50; i++) {     /* boot messages */
		rd(UART_LSR);
		wr(UART_TX, '.');
		rd(UART_LSR);
	}
	for (unsigned i = 0; i < 3; i++) {
		wr(UART_FCR, UART_FCR_ENABLE_FIFO);
		wr(UART_FCR, UART_FCR_ENABLE_FIFO | UART_FCR_CLEAR_RCVR | UART_FCR_CLEAR_XMIT);
		wr(UART_FCR, 0);
		ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_DR, 0);
		ck_assert_uint_eq(rd(UART_RX), 0);
	}
	wr(UART_IER, UART_IER_RLSI | UART_IER_RDI);
	WAIT_FOR(line_is_high(&m, LINE));       /* one byte is in before the FIFO is on */
	wr(UART_FCR, UART_FCR_ENABLE_FIFO);
	wr(UART_FCR, UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_8);
	for (unsigned i = 0; text[i]; i++) {
		WAIT_FOR(line_is_high(&m, LINE));
		if (i == 3) {                   /* a console message in between */
			wr(UART_IER, 0);
			ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_DR, 0);
			wr(UART_TX, 'm');
			wr(UART_IER, UART_IER_RLSI | UART_IER_RDI);
		}
		ck_assert_uint_eq(rd(UART_RX), (uint8_t)text[i]);
	}
	stop();
}
END_TEST

START_TEST(test_serial_loopback_stays_inside)
{
	start();
	wr(UART_FCR, UART_FCR_ENABLE_FIFO);
	wr(UART_MCR, UART_MCR_LOOP | UART_MCR_RTS | UART_MCR_OUT2);
	ck_assert_uint_eq(rd(UART_MSR) & 0xf0, UART_MSR_CTS | UART_MSR_DCD);
	wr(UART_MCR, UART_MCR_LOOP | UART_MCR_DTR);
	ck_assert_uint_eq(rd(UART_MSR), UART_MSR_DSR | UART_MSR_DCTS | UART_MSR_DDSR | UART_MSR_DDCD);
	ck_assert_uint_eq(rd(UART_MSR), UART_MSR_DSR);
	wr(UART_TX, 'l');
	ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_DR, UART_LSR_DR);
	ck_assert_uint_eq(rd(UART_RX), 'l');
	type("host");
	wr(UART_MCR, UART_MCR_OUT2);
	for (const char *p = "host"; *p; p++) {
		WAIT_FOR(rd(UART_LSR) & UART_LSR_DR);
		ck_assert_uint_eq(rd(UART_RX), (uint8_t)*p);
	}
	wr(UART_TX, 'o');
	expect_output("o");
	stop();
}
END_TEST

START_TEST(test_serial_overrun_is_a_line_status_interrupt)
{
	start();
	wr(UART_IER, UART_IER_RLSI);
	wr(UART_MCR, UART_MCR_LOOP);
	wr(UART_TX, '1');
	ck_assert(!line_is_high(&m, LINE));
	wr(UART_TX, '2');
	ck_assert(line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, UART_IIR_RLSI);
	ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_OE, UART_LSR_OE);
	ck_assert(!line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_LSR) & UART_LSR_OE, 0);
	ck_assert_uint_eq(rd(UART_RX), '1');
	stop();
}
END_TEST

START_TEST(test_serial_modem_interrupt_is_cleared_by_msr)
{
	start();
	wr(UART_IER, UART_IER_MSI);
	wr(UART_MCR, UART_MCR_LOOP);
	ck_assert(line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, UART_IIR_MSI);
	rd(UART_MSR);
	ck_assert(!line_is_high(&m, LINE));
	stop();
}
END_TEST

START_TEST(test_serial_reset_drops_input_and_interrupts)
{
	start();
	type("x");
	WAIT_FOR(rd(UART_LSR) & UART_LSR_DR);
	wr(UART_IER, UART_IER_RDI | UART_IER_THRI);
	wr(UART_LCR, 0x83);
	ck_assert(line_is_high(&m, LINE));
	machine_reset(&m);
	ck_assert(!line_is_high(&m, LINE));
	ck_assert_uint_eq(rd(UART_LSR), UART_LSR_THRE | UART_LSR_TEMT);
	ck_assert_uint_eq(rd(UART_IER) | rd(UART_LCR), 0);
	type("y");
	WAIT_FOR(rd(UART_LSR) & UART_LSR_DR);
	ck_assert_uint_eq(rd(UART_RX), 'y');
	stop();
}
END_TEST

START_TEST(test_serial_break_is_a_nul_with_its_flag)
{
	start();
	wr(UART_FCR, UART_FCR_ENABLE_FIFO);
	wr(UART_IER, UART_IER_RLSI | UART_IER_RDI);
	serial_break(&m.vm, 1);         /* no such port */
	ck_assert(!line_is_high(&m, LINE));
	serial_break(&m.vm, 0);
	ck_assert_uint_eq(rd(UART_IIR) & 0x0f, UART_IIR_RLSI);
	ck_assert_uint_eq(rd(UART_LSR) & (UART_LSR_BI | UART_LSR_DR), UART_LSR_BI | UART_LSR_DR);
	ck_assert_uint_eq(rd(UART_RX), 0);
	ck_assert(!line_is_high(&m, LINE));
	stop();
}
END_TEST

/* As bytes do: until the driver asks for an interrupt, or looks again and again. */
START_TEST(test_serial_break_waits_for_who_listens)
{
	unsigned looks = 0;

	start();
	serial_break(&m.vm, 0);
	wr(UART_IER, UART_IER_RDI);
	ck_assert_uint_eq(rd(UART_LSR) & (UART_LSR_BI | UART_LSR_DR), UART_LSR_BI | UART_LSR_DR);
	ck_assert_uint_eq(rd(UART_RX), 0);
	wr(UART_IER, 0);
	serial_break(&m.vm, 0);
	while (!(rd(UART_LSR) & UART_LSR_BI) && looks < 100)
		looks++;
	ck_assert_uint_lt(looks, 100);
	stop();
}
END_TEST

START_TEST(test_serial_sees_a_panic_pass)
{
	static const char text[] = "[    1.0] Kernel panic - not syncing: x\r\n";

	start();
	for (const char *p = text; *p; p++)
		wr(UART_TX, *p);
	ck_assert_uint_ne(m.vm.panic_ns, 0);
	ck_assert_str_eq(m.vm.panic_how, "serial0: Kernel panic - not syncing: x");
	expect_output(text);
	stop();
}
END_TEST

START_TEST(test_serial_without_a_host_end_swallows)
{
	machine_init(&m);
	ck_assert_int_eq(serial_new(&m.vm, 0, &err), 0);
	for (unsigned i = 0; i < 1000; i++)
		wr(UART_TX, i);
	ck_assert_uint_eq(rd(UART_LSR), UART_LSR_THRE | UART_LSR_TEMT);
	machine_done(&m);
}
END_TEST

START_TEST(test_serial_ports_share_lines_as_on_a_pc)
{
	machine_init(&m);
	for (unsigned i = 0; i < VM_SERIALS; i++)
		ck_assert_int_eq(serial_new(&m.vm, i, &err), 0);
	outb(&m, 0x3e8 + UART_IER, UART_IER_THRI);
	ck_assert(line_is_high(&m, 4));
	ck_assert(!line_is_high(&m, 3));
	outb(&m, 0x2f8 + UART_IER, UART_IER_THRI);
	ck_assert(line_is_high(&m, 3));
	machine_done(&m);
}
END_TEST

/* Row 56: the host end stalls; the guest's writes go on. */
START_TEST(test_row56_serial_never_waits_for_its_reader)
{
	start();
	for (unsigned i = 0; i < 3 << 20; i++)
		wr(UART_TX, 'z');
	ck_assert_uint_eq(rd(UART_LSR), UART_LSR_THRE | UART_LSR_TEMT);
	stop();
}
END_TEST

UNIT_MAIN("serial", test_serial_looks_like_a_16550a, test_serial_divisor_is_behind_dlab,
	test_serial_transmit_interrupt_rises_once_and_iir_clears_it,
	test_serial_input_respects_the_trigger_level,
	test_serial_loses_no_input_however_slowly_it_is_read,
	test_serial_start_of_a_driver_costs_no_input, test_serial_loopback_stays_inside,
	test_serial_overrun_is_a_line_status_interrupt, test_serial_modem_interrupt_is_cleared_by_msr,
	test_serial_reset_drops_input_and_interrupts, test_serial_sees_a_panic_pass,
	test_serial_break_is_a_nul_with_its_flag, test_serial_break_waits_for_who_listens,
	test_serial_without_a_host_end_swallows, test_serial_ports_share_lines_as_on_a_pc,
	test_row56_serial_never_waits_for_its_reader)
