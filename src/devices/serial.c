/*
 * 16550A UART (National Semiconductor PC16550D).
 *
 * How this works. Sending takes no time: a byte written to the transmitter is with the character device when
 * the write returns, so the line status always says "empty". There are no timers: the time-out interrupt of the
 * FIFO is there as soon as it holds less than its trigger level, which a driver handles like data.
 *
 * Receiving is flow-controlled, so that a script piped into the port arrives whole: the character device asks
 * room(), and as long as the guest does not listen, bytes from the host count as still on the wire. Drivers
 * clear the FIFO and read the data register to get rid of noise while they start; that must not cost input.
 * A guest listens when it has enabled the receive interrupt, or when it reads the line status again and
 * again without sending: a driver that waits for the transmitter reads it once or twice, since it is always empty.
 *
 * The interrupt is a level from us (KVM_IRQ_LINE), although ISA interrupts are edge-triggered at the PIC and
 * the IOAPIC: the UART's pin stays high while a cause is pending, and only its rise makes an edge. That is what
 * Linux's 8250 driver counts on (it serves all causes until IIR says none, the pin then is low, and the next
 * cause makes a new edge), COM1 and COM3 share the line, and a guest that programs the IOAPIC for level gets that
 * too. An irqfd pulse would be delivered by a kernel worker some time later; KVM_IRQ_LINE is pending before
 * the guest's next instruction, and costs a system call only when the pin changes.
 *
 * No function of the character device is called under the lock: it has a lock of its own, and calls back.
 */
#include <errno.h>
#include <linux/serial_reg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "devices/pc.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/irq.h"
#include "vmm/panic.h"

#define FIFO_SIZE    16
#define LSR_ERRORS   (UART_LSR_OE | UART_LSR_PE | UART_LSR_FE | UART_LSR_BI)
#define LSR_SENT     (UART_LSR_THRE | UART_LSR_TEMT)
#define MSR_LINES    (UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS)
#define IIR_TIMEOUT  0x0c
#define IIR_FIFO     0xc0
#define DIVISOR_9600 12
#define POLLS        16         /* line status reads in a row that show a guest waiting for input */

struct serial {
	struct pc_device pc;
	/* const after build */
	char name[16];
	unsigned index;
	struct chardev *host;
	struct chardev_user user;
	struct panic_watch panic;
	struct irq irq;
	/* under pc.lock */
	uint8_t ier, fcr, lcr, mcr, lsr, msr, scratch;
	uint16_t divisor;
	bool sent;              /* the "transmitter empty" interrupt is pending */
	bool starved;           /* room() said 0: chardev_more() when that changes */
	bool polled;            /* the guest listens by polling */
	bool held_break;        /* came before the guest listened: it waits as bytes do */
	unsigned polls;         /* line status reads since the last byte sent */
	bool high;              /* what we last drove the interrupt pin to */
	uint8_t fifo[FIFO_SIZE];
	unsigned head, count;
	uint64_t overruns;
};

static unsigned capacity(const struct serial *s)
{
	return s->fcr & UART_FCR_ENABLE_FIFO ? FIFO_SIZE : 1;
}

static unsigned trigger_level(const struct serial *s)
{
	static const uint8_t level[] = { 1, 4, 8, 14 };

	return s->fcr & UART_FCR_ENABLE_FIFO ? level[s->fcr >> 6] : 1;
}

static bool in_loop(const struct serial *s)
{
	return s->mcr & UART_MCR_LOOP;
}

static bool listens(const struct serial *s)
{
	return (s->ier & UART_IER_RDI) || s->polled || in_loop(s);
}

/* Bytes that may come from the host now. */
static unsigned room(const struct serial *s)
{
	return listens(s) && !in_loop(s) && s->count < capacity(s) ? capacity(s) - s->count : 0;
}

/* The cause of highest priority (PC16550D, table IV). */
static uint8_t cause(const struct serial *s)
{
	if ((s->ier & UART_IER_RLSI) && (s->lsr & LSR_ERRORS))
		return UART_IIR_RLSI;
	if ((s->ier & UART_IER_RDI) && s->count)
		return s->count >= trigger_level(s) ? UART_IIR_RDI : IIR_TIMEOUT;
	if ((s->ier & UART_IER_THRI) && s->sent)
		return UART_IIR_THRI;
	if ((s->ier & UART_IER_MSI) && (s->msr & UART_MSR_ANY_DELTA))
		return UART_IIR_MSI;
	return UART_IIR_NO_INT;
}

static void update_irq(struct serial *s)
{
	bool high = cause(s) != UART_IIR_NO_INT;

	if (high == s->high)
		return;
	s->high = high;
	irq_set(&s->irq, high);
}

static void receive(struct serial *s, uint8_t byte, unsigned limit)
{
	if (s->count >= limit) {
		s->lsr |= UART_LSR_OE;
		s->overruns++;
		return;
	}
	s->fifo[(s->head + s->count++) % FIFO_SIZE] = byte;
}

/* The driver sees a break with the NUL that comes with it (PC16550D, 8.5). */
static void deliver_break(struct serial *s)
{
	s->held_break = !listens(s);
	if (s->held_break)
		return;
	receive(s, 0, FIFO_SIZE);
	s->lsr |= UART_LSR_BI;
}

static uint8_t take(struct serial *s)
{
	uint8_t byte = s->fifo[s->head];

	if (!s->count || !listens(s))
		return 0;
	s->head = (s->head + 1) % FIFO_SIZE;
	s->count--;
	return byte;
}

/* In loop-back the modem lines follow the control register; else a cable is always plugged in. */
static void update_modem(struct serial *s)
{
	uint8_t now = MSR_LINES, changed;

	if (in_loop(s))
		now = (s->mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) |
		      (s->mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
		      (s->mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) |
		      (s->mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0);
	changed = (now ^ s->msr) & 0xf0;
	if (changed & UART_MSR_RI && now & UART_MSR_RI)
		changed &= ~UART_MSR_RI;        /* TERI: the trailing edge only */
	s->msr = now | (s->msr & UART_MSR_ANY_DELTA) | changed >> 4;
}

/*
 * Switching the FIFO on or off empties it, too, by the book (8.4). Bytes from the host stay: it is as if they had
 * come just after. Linux enables the receive interrupt before it switches the FIFO on.
 */
static void write_fcr(struct serial *s, uint8_t val)
{
	if ((val & UART_FCR_CLEAR_RCVR) && listens(s))
		s->count = 0;
	if (val & UART_FCR_CLEAR_XMIT)
		s->sent = true;
	s->fcr = val & (UART_FCR_ENABLE_FIFO | UART_FCR_TRIGGER_MASK);
}

static void write_ier(struct serial *s, uint8_t val)
{
	/* The transmitter is empty: enabling that interrupt raises it at once. */
	if (val & ~s->ier & UART_IER_THRI)
		s->sent = true;
	s->ier = val & 0x0f;
	if (val & UART_IER_RDI)
		s->polled = false;
	if (s->held_break)
		deliver_break(s);
}

/* True if the byte goes out to the host. */
static bool write_data(struct serial *s, uint8_t val)
{
	s->sent = true;
	s->polls = 0;
	if (in_loop(s))
		receive(s, val, capacity(s));
	return !in_loop(s);
}

/* True once if the character device waits for room that is there now. */
static bool has_fed(struct serial *s)
{
	bool more = s->starved && room(s);

	if (more)
		s->starved = false;
	return more;
}

static void serial_write(void *dev, uint64_t off, unsigned size, uint64_t val64)
{
	struct serial *s = dev;
	uint8_t val = val64;
	bool out = false, more;

	(void)size;
	pthread_mutex_lock(&s->pc.lock);
	switch (off) {
	case UART_TX:
		if (s->lcr & UART_LCR_DLAB)
			s->divisor = (s->divisor & 0xff00) | val;
		else
			out = write_data(s, val);
		break;
	case UART_IER:
		if (s->lcr & UART_LCR_DLAB)
			s->divisor = (s->divisor & 0x00ff) | val << 8;
		else
			write_ier(s, val);
		break;
	case UART_FCR:
		write_fcr(s, val);
		break;
	case UART_LCR:
		s->lcr = val;
		break;
	case UART_MCR:
		s->mcr = val & 0x1f;
		update_modem(s);
		break;
	case UART_SCR:
		s->scratch = val;
		break;
	}                               /* LSR and MSR are read-only */
	update_irq(s);
	more = has_fed(s);
	pthread_mutex_unlock(&s->pc.lock);
	if (s->host && out)
		chardev_write(s->host, &val, 1);
	if (s->host && more)
		chardev_more(s->host);
}

static uint8_t read_line_status(struct serial *s)
{
	uint8_t val;

	if (!listens(s) && ++s->polls >= POLLS)
		s->polled = true;
	if (s->held_break)
		deliver_break(s);
	val = s->lsr | LSR_SENT | (s->count && listens(s) ? UART_LSR_DR : 0);
	s->lsr = 0;
	return val;
}

static uint8_t read_register(struct serial *s, unsigned off)
{
	uint8_t val;

	switch (off) {
	case UART_RX:
		return s->lcr & UART_LCR_DLAB ? (uint8_t)s->divisor : take(s);
	case UART_IER:
		return s->lcr & UART_LCR_DLAB ? s->divisor >> 8 : s->ier;
	case UART_IIR:
		val = cause(s);
		if (val == UART_IIR_THRI)
			s->sent = false;
		return val | (s->fcr & UART_FCR_ENABLE_FIFO ? IIR_FIFO : 0);
	case UART_LCR:
		return s->lcr;
	case UART_MCR:
		return s->mcr;
	case UART_LSR:
		return read_line_status(s);
	case UART_MSR:
		val = s->msr;
		s->msr &= ~UART_MSR_ANY_DELTA;
		return val;
	case UART_SCR:
		return s->scratch;
	}
	return 0xff;
}

static uint64_t serial_read(void *dev, uint64_t off, unsigned size)
{
	struct serial *s = dev;
	uint8_t val;
	bool more;

	(void)size;
	pthread_mutex_lock(&s->pc.lock);
	val = read_register(s, off);
	update_irq(s);
	more = has_fed(s);
	pthread_mutex_unlock(&s->pc.lock);
	if (s->host && more)
		chardev_more(s->host);
	return val;
}

/* home loop only */

static size_t serial_room(struct chardev_user *u)
{
	struct serial *s = container_of(u, struct serial, user);
	size_t n;

	pthread_mutex_lock(&s->pc.lock);
	n = room(s);
	s->starved = !n;
	pthread_mutex_unlock(&s->pc.lock);
	return n;
}

static void serial_input(struct chardev_user *u, const uint8_t *buf, size_t len)
{
	struct serial *s = container_of(u, struct serial, user);

	pthread_mutex_lock(&s->pc.lock);
	for (size_t i = 0; i < len; i++)        /* the guest may have switched the FIFO off since room() */
		receive(s, buf[i], FIFO_SIZE);
	update_irq(s);
	pthread_mutex_unlock(&s->pc.lock);
}

/* Any thread. */
static void receive_break(struct serial *s)
{
	pthread_mutex_lock(&s->pc.lock);
	deliver_break(s);
	update_irq(s);
	pthread_mutex_unlock(&s->pc.lock);
}

/* main thread */

static void serial_reset(void *dev)
{
	struct serial *s = dev;
	bool more;

	pthread_mutex_lock(&s->pc.lock);
	s->ier = s->fcr = s->lcr = s->scratch = s->lsr = 0;
	s->mcr = UART_MCR_OUT2;
	s->msr = MSR_LINES;
	s->divisor = DIVISOR_9600;
	s->sent = false;
	s->head = s->count = s->polls = 0;
	s->polled = s->held_break = false;
	update_irq(s);
	more = has_fed(s);
	pthread_mutex_unlock(&s->pc.lock);
	panic_watch_reset(&s->panic);
	if (s->host && more)
		chardev_more(s->host);
}

static void serial_describe(void *dev, struct facts *f)
{
	struct serial *s = dev;

	if (s->host)
		chardev_describe(s->host, f);
	facts_u64(f, "overruns", s->overruns);
}

static void serial_done(void *dev)
{
	struct serial *s = dev;

	chardev_free(s->host);
	s->pc.vm->serial[s->index] = NULL;
	irq_done(&s->irq);
	panic_watch_done(&s->panic);
}

static const struct bus_ops serial_ops = { serial_read, serial_write, 1, 1 };

#define SERIAL_CLASS(label)                                                                        \
	{                                                                                          \
		.name = label, .range = { { 0, 8, &serial_ops } }, .lockless = true,               \
		.reset = serial_reset, .describe = serial_describe, .done = serial_done,           \
	}

static const struct pc_class serial_class[VM_SERIALS] = {
	SERIAL_CLASS("serial0"),
	SERIAL_CLASS("serial1"),
	SERIAL_CLASS("serial2"),
	SERIAL_CLASS("serial3"),
};

void serial_break(struct vm *vm, unsigned n)
{
	for (struct vm_device *d = vm->devices; d; d = d->next)
		if (d->name == serial_class[n].name)
			receive_break(d->dev);
}

int serial_new(struct vm *vm, unsigned n, struct error *err)
{
	static const struct {
		uint16_t port;
		uint8_t line;
	} com[VM_SERIALS] = { { 0x3f8, 4 }, { 0x2f8, 3 }, { 0x3e8, 4 }, { 0x2e8, 3 } };
	struct serial *s = calloc(1, sizeof(*s));
	int r;

	if (!s)
		return error_set(err, ENOMEM, "no memory for a serial port");
	s->index = n;
	s->host = vm->serial[n];
	r = irq_line_init(&s->irq, &vm->irqs, com[n].line, true, err);
	if (r) {
		free(s);
		return r;
	}
	panic_watch_init(&s->panic, vm, serial_class[n].name);
	s->user = (struct chardev_user){ .room = serial_room, .input = serial_input };
	r = pc_device_add(vm, &s->pc, &serial_class[n], com[n].port, err);
	if (r || !s->host)
		return r;
	if (!vm->cfg->ignore_panic)
		chardev_tap(s->host, panic_watch_feed, &s->panic);
	chardev_attach(s->host, &s->user);      /* the loop may call at once */
	return 0;
}
