/*
 * MC146818 real-time clock and CMOS RAM, ports 0x70 and 0x71.
 *
 * How this works. Nothing ticks. The guest's time is the host's UTC plus an offset; the ten time registers are
 * made when they are read, and decoded into a new offset when they are written (or when SET is cleared). The
 * flags of register C are computed from what lies between the last look and now. A timer runs only while an
 * interrupt is enabled and none is pending: the guest has to read register C before the next can come, so
 * an idle guest, and one that does not listen, cost no wakeup.
 *
 *      B enables, C has no IRQF  --arm-->  timer set on the loop  --fires-->  catch_up(): IRQF, pin high
 *             ^                                                                       |
 *             +-----------------------  guest reads C: pin low  <---------------------+
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/irq.h"

#define NS           1000000000ll
#define DAY          86400ll
#define HZ_BASE      32768ll
#define UPDATE_NS    244000ll           /* UIP is set this long before a second ends (MC146818A, table 6) */

enum { SECOND, SECOND_ALARM, MINUTE, MINUTE_ALARM, HOUR, HOUR_ALARM, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR,
	REG_A, REG_B, REG_C, REG_D, CENTURY = 0x32 };

#define A_UIP        0x80
#define A_STOPPED    0x60               /* both bits: the divider is held in reset */
#define A_DEFAULT    0x26               /* 32.768 kHz, 1,024 Hz */
#define B_SET        0x80
#define B_PIE        0x40
#define B_AIE        0x20
#define B_UIE        0x10
#define B_BINARY     0x04
#define B_24H        0x02
#define C_IRQF       0x80
#define C_PF         0x40
#define C_AF         0x20
#define C_UF         0x10
#define EVENTS       (C_PF | C_AF | C_UF)       /* the same bits as their enables in B */
#define NEVER        INT64_MAX

/* What the guest may set; nanoseconds since 1970 of the last still fit 64 bits. */
#define FIRST_YEAR   1970ll
#define LAST_YEAR    2199ll

struct rtc {
	struct pc_device pc;
	struct irq irq;
	struct loop_task rearm;
	/* under pc.lock */
	uint8_t index, cmos[128];
	int64_t offset;                 /* guest time minus host UTC, seconds */
	int64_t seen;                   /* guest time, ns: events up to here are in register C */
	uint64_t interrupts;
	bool closing;
	/* home loop only */
	struct loop_timer timer;
};

/* Days since 1970-01-01 of a Gregorian date, not before 1970. March is the first month here. */
static int64_t days_of(int64_t year, unsigned month, unsigned day)
{
	int64_t y = month <= 2 ? year - 1 : year;
	unsigned m = (month + 9) % 12;

	/* 719468 days from 0000-03-01 to 1970-01-01 */
	return 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719468;
}

static void date_of(int64_t days, int64_t *year, unsigned *month, unsigned *day)
{
	int64_t y = (days + 719468) * 400 / 146097;

	/* The estimate is at most a year off. */
	while (days_of(y + 1, 3, 1) <= days)
		y++;
	while (days_of(y, 3, 1) > days)
		y--;
	days -= days_of(y, 3, 1);
	*month = (5 * days + 2) / 153;
	*day = days - (153 * *month + 2) / 5 + 1;
	*month = *month < 10 ? *month + 3 : *month - 9;
	*year = *month <= 2 ? y + 1 : y;
}

static int64_t guest_ns(const struct rtc *r)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return ((int64_t)ts.tv_sec + r->offset) * NS + ts.tv_nsec;
}

static uint8_t to_reg(const struct rtc *r, unsigned v)
{
	return r->cmos[REG_B] & B_BINARY ? v : (v / 10 % 10) << 4 | v % 10;
}

static unsigned from_reg(const struct rtc *r, uint8_t v)
{
	return r->cmos[REG_B] & B_BINARY ? v : (v >> 4) * 10u + (v & 0x0f);
}

static uint8_t hour_to_reg(const struct rtc *r, unsigned hour)
{
	if (r->cmos[REG_B] & B_24H)
		return to_reg(r, hour);
	return to_reg(r, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? 0x80 : 0);
}

static unsigned hour_from_reg(const struct rtc *r, uint8_t v)
{
	if (r->cmos[REG_B] & B_24H)
		return from_reg(r, v);
	return from_reg(r, v & 0x7f) % 12 + (v & 0x80 ? 12 : 0);
}

static bool stopped(const struct rtc *r)
{
	return (r->cmos[REG_B] & B_SET) || (r->cmos[REG_A] & A_STOPPED) == A_STOPPED;
}

/* The time registers from the clock, unless the guest has stopped it. */
static void encode(struct rtc *r)
{
	int64_t secs = guest_ns(r) / NS, year, days = secs / DAY;
	unsigned month, day, tod = secs % DAY;

	if (stopped(r))
		return;
	date_of(days, &year, &month, &day);
	r->cmos[SECOND] = to_reg(r, tod % 60);
	r->cmos[MINUTE] = to_reg(r, tod / 60 % 60);
	r->cmos[HOUR] = hour_to_reg(r, tod / 3600);
	r->cmos[WEEKDAY] = to_reg(r, (days + 4) % 7 + 1);       /* 1970-01-01 was a Thursday: 5 */
	r->cmos[DAY_OF_MONTH] = to_reg(r, day);
	r->cmos[MONTH] = to_reg(r, month);
	r->cmos[YEAR] = to_reg(r, year % 100);
	r->cmos[CENTURY] = to_reg(r, year / 100);
}

/* The clock from the time registers, whatever they hold: odd values only make an odd, bounded time. */
static void decode(struct rtc *r)
{
	unsigned century = from_reg(r, r->cmos[CENTURY]), month = from_reg(r, r->cmos[MONTH]);
	int64_t year = century * 100ll + from_reg(r, r->cmos[YEAR]), secs;
	struct timespec ts;

	year = MIN(MAX(year, FIRST_YEAR), LAST_YEAR);
	if (month < 1 || month > 12)
		month = 1;
	secs = days_of(year, month, 1) * DAY + (int64_t)from_reg(r, r->cmos[DAY_OF_MONTH]) * DAY - DAY +
	       hour_from_reg(r, r->cmos[HOUR]) * 3600ll + from_reg(r, r->cmos[MINUTE]) * 60ll +
	       from_reg(r, r->cmos[SECOND]);
	if (secs < 0)
		secs = 0;
	clock_gettime(CLOCK_REALTIME, &ts);
	r->offset = secs - ts.tv_sec;
	r->seen = guest_ns(r);
}

/*
 * First second after `after` that the alarm registers match, NEVER if none. A register of 0xc0 or more
 * matches anything (MC146818A, alarm). Jumps over hours and minutes that cannot match: at most 60 minutes of
 * a first hour, 24 hours, 60 minutes and 60 seconds.
 */
#define ALARM_STEPS 264

static int64_t next_alarm(const struct rtc *r, int64_t after)
{
	uint8_t h = r->cmos[HOUR_ALARM], m = r->cmos[MINUTE_ALARM], s = r->cmos[SECOND_ALARM];
	unsigned hour = hour_from_reg(r, h), minute = from_reg(r, m), second = from_reg(r, s);
	int64_t t = after + 1;

	for (unsigned i = 0; i < ALARM_STEPS; i++) {
		unsigned tod = t % DAY;

		if (h < 0xc0 && tod / 3600 != hour)
			t += 3600 - t % 3600;
		else if (m < 0xc0 && tod / 60 % 60 != minute)
			t += 60 - t % 60;
		else if (s < 0xc0 && tod % 60 != second)
			t++;
		else
			return t;
	}
	return NEVER;
}

/* log2 of the periodic interrupt's length in 32,768ths of a second (MC146818A, table 5); -1: none. */
static int period_shift(const struct rtc *r)
{
	unsigned rate = r->cmos[REG_A] & 0x0f;

	if (!rate || (r->cmos[REG_A] & A_STOPPED) == A_STOPPED)
		return -1;
	return rate <= 2 ? (int)rate + 6 : (int)rate - 1;
}

static int64_t ticks_of(int64_t ns)
{
	return ns / NS * HZ_BASE + ns % NS * HZ_BASE / NS;
}

/* Bring register C up to now, and the pin with it. */
static void catch_up(struct rtc *r)
{
	int64_t now = guest_ns(r), was = r->seen;
	int shift = period_shift(r);
	uint8_t flags = 0;

	r->seen = now;
	if (now <= was)         /* the host's clock was set back */
		return;
	if (shift >= 0 && ticks_of(now) >> shift != ticks_of(was) >> shift)
		flags |= C_PF;
	if (!stopped(r) && now / NS != was / NS) {
		flags |= C_UF;
		if (next_alarm(r, was / NS) <= now / NS)
			flags |= C_AF;
	}
	r->cmos[REG_C] |= flags;
	if (!(r->cmos[REG_C] & C_IRQF) && (r->cmos[REG_C] & r->cmos[REG_B] & EVENTS)) {
		r->cmos[REG_C] |= C_IRQF;
		r->interrupts++;
		irq_set(&r->irq, true);
	}
}

/* Guest time of the next event that interrupts; NEVER while one is pending. */
static int64_t next_event(const struct rtc *r)
{
	int64_t best = NEVER, at;
	int shift = period_shift(r);

	if ((r->cmos[REG_C] & C_IRQF) || r->closing)
		return NEVER;
	if ((r->cmos[REG_B] & B_PIE) && shift >= 0) {
		int64_t tick = ((ticks_of(r->seen) >> shift) + 1) << shift;

		best = tick / HZ_BASE * NS + (tick % HZ_BASE * NS + HZ_BASE - 1) / HZ_BASE;
	}
	if (stopped(r))
		return best;
	if (r->cmos[REG_B] & B_UIE)
		best = MIN(best, (r->seen / NS + 1) * NS);
	if (r->cmos[REG_B] & B_AIE) {
		at = next_alarm(r, r->seen / NS);
		if (at != NEVER)
			best = MIN(best, at * NS);
	}
	return best;
}

/* home loop only */

static void rtc_rearm(struct loop_task *t)
{
	struct rtc *r = container_of(t, struct rtc, rearm);
	struct loop *home = r->pc.vm->io;
	int64_t at, now;

	pthread_mutex_lock(&r->pc.lock);
	catch_up(r);
	at = next_event(r);
	now = guest_ns(r);
	pthread_mutex_unlock(&r->pc.lock);
	if (at == NEVER)
		loop_del_timer(home, &r->timer);
	else
		loop_set_timer(home, &r->timer, loop_now() + (at > now ? at - now : 0));
}

static void rtc_fire(struct loop_timer *t)
{
	rtc_rearm(&container_of(t, struct rtc, timer)->rearm);
}

/* vCPU threads */

static uint64_t rtc_read(void *dev, uint64_t off, unsigned size)
{
	struct rtc *r = dev;
	uint8_t val;

	(void)size;
	if (off == 0)
		return 0xff;            /* the index is write-only */
	switch (r->index) {
	case REG_A:
		val = r->cmos[REG_A];
		if (!stopped(r) && guest_ns(r) % NS >= NS - UPDATE_NS)
			val |= A_UIP;
		return val;
	case REG_C:
		catch_up(r);
		val = r->cmos[REG_C];
		r->cmos[REG_C] = 0;
		if (val & C_IRQF) {
			irq_set(&r->irq, false);
			loop_post(r->pc.vm->io, &r->rearm);
		}
		return val;
	case SECOND:
	case MINUTE:
	case HOUR:
	case WEEKDAY:
	case DAY_OF_MONTH:
	case MONTH:
	case YEAR:
	case CENTURY:
		encode(r);
		break;
	}
	return r->cmos[r->index];
}

/* Registers A and B: while the clock is stopped, the time registers keep the time it stopped at. */
static void write_control(struct rtc *r, unsigned reg, uint8_t val)
{
	bool was;

	encode(r);
	was = stopped(r);
	r->cmos[reg] = val;
	if (was && !stopped(r))
		decode(r);
}

static void write_register(struct rtc *r, uint8_t val)
{
	switch (r->index) {
	case SECOND:
	case MINUTE:
	case HOUR:
	case WEEKDAY:
	case DAY_OF_MONTH:
	case MONTH:
	case YEAR:
	case CENTURY:
		encode(r);
		r->cmos[r->index] = val;
		if (!stopped(r))
			decode(r);
		break;
	case SECOND_ALARM:
	case MINUTE_ALARM:
	case HOUR_ALARM:
		r->cmos[r->index] = val;
		break;
	case REG_A:
		write_control(r, REG_A, val & ~A_UIP);
		break;
	case REG_B:
		write_control(r, REG_B, val);
		loop_post(r->pc.vm->io, &r->rearm);
		return;
	case REG_C:
	case REG_D:
		return;                 /* read-only */
	default:
		r->cmos[r->index] = val;
		return;
	}
	if (r->cmos[REG_B] & EVENTS)
		loop_post(r->pc.vm->io, &r->rearm);
}

static void rtc_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct rtc *r = dev;

	(void)size;
	if (off == 0) {
		r->index = val & 0x7f;  /* bit 7 masks NMIs on a PC, there are none */
		return;
	}
	catch_up(r);
	write_register(r, val);
}

/* main thread */

static void put16(struct rtc *r, unsigned reg, uint64_t val)
{
	val = MIN(val, 0xffffu);
	r->cmos[reg] = (uint8_t)val;
	r->cmos[reg + 1] = val >> 8;
}

/* Memory sizes where PC firmware leaves them, for kernels that look here. */
static void fill_memory_sizes(struct rtc *r)
{
	const struct gmem *m = &r->pc.vm->mem;
	uint64_t low = 0, high = 0;

	for (unsigned i = 0; i < m->nr; i++) {
		if (m->region[i].base < HIGH_RAM_BASE)
			low += m->region[i].size;
		else
			high += m->region[i].size;
	}
	put16(r, 0x15, MIN(low >> 10, 640u));                   /* KiB below 640 KiB */
	put16(r, 0x17, low > 1 << 20 ? (low >> 10) - 1024 : 0); /* KiB above 1 MiB */
	put16(r, 0x30, low > 1 << 20 ? (low >> 10) - 1024 : 0);
	put16(r, 0x34, low > 16 << 20 ? (low - (16 << 20)) >> 16 : 0);  /* 64 KiB units above 16 MiB */
	high = MIN(high >> 16, 0xffffffu);                      /* 64 KiB units above 4 GiB */
	r->cmos[0x5b] = (uint8_t)high;
	r->cmos[0x5c] = (uint8_t)(high >> 8);
	r->cmos[0x5d] = high >> 16;
}

/* The battery keeps the offset; all else starts anew. */
static void rtc_reset(void *dev)
{
	struct rtc *r = dev;

	pthread_mutex_lock(&r->pc.lock);
	memset(r->cmos, 0, sizeof(r->cmos));
	r->index = 0;
	r->cmos[REG_A] = A_DEFAULT;
	r->cmos[REG_B] = B_24H;
	r->cmos[REG_D] = 0x80;          /* valid RAM and time */
	r->cmos[0x14] = 0x02;           /* equipment: an FPU */
	r->cmos[0x5f] = MIN(r->pc.vm->cfg->cpus - 1, 255u);
	fill_memory_sizes(r);
	r->seen = guest_ns(r);
	irq_set(&r->irq, false);
	pthread_mutex_unlock(&r->pc.lock);
	loop_post(r->pc.vm->io, &r->rearm);
}

static void rtc_describe(void *dev, struct facts *f)
{
	struct rtc *r = dev;

	facts_u64(f, "interrupts", r->interrupts);
}

/* On the home loop, after every task posted before. */
static void rtc_unhook(void *arg)
{
	struct rtc *r = arg;

	loop_del_timer(r->pc.vm->io, &r->timer);
}

static void rtc_done(void *dev)
{
	struct rtc *r = dev;

	pthread_mutex_lock(&r->pc.lock);
	r->closing = true;
	pthread_mutex_unlock(&r->pc.lock);
	loop_call(r->pc.vm->io, rtc_unhook, r);
	irq_done(&r->irq);
}

static const struct bus_ops rtc_ops = { rtc_read, rtc_write, 1, 1 };
static const struct pc_class rtc_class = {
	.name = "rtc",
	.range = { { 0x70, 2, &rtc_ops } },
	.reset = rtc_reset,
	.describe = rtc_describe,
	.done = rtc_done,
};

int rtc_new(struct vm *vm, struct error *err)
{
	auto_free struct rtc *r = calloc(1, sizeof(*r));
	int ret;

	if (!r)
		return error_set(err, ENOMEM, "no memory for the clock");
	r->rearm.fn = rtc_rearm;
	r->timer.fn = rtc_fire;
	ret = irq_line_init(&r->irq, &vm->irqs, IRQ_RTC, true, err);
	if (ret)
		return ret;
	return pc_device_add(vm, &TAKE_PTR(r)->pc, &rtc_class, 0, err);
}
