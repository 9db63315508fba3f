/* error, opts, gmem, iov, bus, irq, facts: what everything else stands on. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "unit.h"
#include "vmm/bus.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/gmem.h"
#include "vmm/iov.h"
#include "vmm/irq.h"
#include "vmm/opts.h"

static struct error err;

START_TEST(test_error_prefix_keeps_message)
{
	ck_assert_int_eq(error_set(&err, ENOENT, "no %s", "file"), -ENOENT);
	error_prefix(&err, "disk '%s': ", "a");
	ck_assert_str_eq(err.msg, "disk 'a': no file");
	ck_assert_int_eq(error_errno(NULL, EIO, "x"), -EIO);
}
END_TEST

START_TEST(test_parse_size_units_and_overflow)
{
	static const struct {
		const char *s;
		int r;
		uint64_t v;
	} t[] = { { "512", 0, 512 }, { "4K", 0, 4096 }, { "4k", 0, 4096 }, { "2MiB", 0, 2 << 20 },
		{ "1GB", 0, 1 << 30 }, { "0x10", 0, 16 }, { "1T", 0, 1ull << 40 }, { "", -EINVAL, 0 },
		{ "-1", -EINVAL, 0 }, { "K", -EINVAL, 0 }, { "1X", -EINVAL, 0 },
		{ "99999999999999999999", -EINVAL, 0 }, { "18446744073709551615K", -EINVAL, 0 },
		{ "16777216T", -EINVAL, 0 }, { "1Kx", -EINVAL, 0 } };

	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		uint64_t v = 0;

		ck_assert_msg(parse_size(t[i].s, &v) == t[i].r && (t[i].r || v == t[i].v), "%s", t[i].s);
	}
}
END_TEST

START_TEST(test_parse_seconds)
{
	uint64_t ns;

	ck_assert(!parse_seconds("30", &ns) && ns == 30000000000ull);
	ck_assert(!parse_seconds("1.5", &ns) && ns == 1500000000ull);
	ck_assert(!parse_seconds("500ms", &ns) && ns == 500000000ull);
	ck_assert(!parse_seconds("20us", &ns) && ns == 20000ull);
	ck_assert(!parse_seconds("5m", &ns) && ns == 300000000000ull);
	ck_assert(!parse_seconds("1h", &ns) && ns == 3600000000000ull);
	ck_assert(parse_seconds("", &ns) && parse_seconds("-1", &ns) && parse_seconds("1x", &ns));
	ck_assert(parse_seconds("inf", &ns) && parse_seconds("1e300h", &ns));
}
END_TEST

START_TEST(test_opts_refuse_unknown_key_by_name)
{
	struct opts *o;
	uint64_t v = 7;
	static const char *const many[] = { "a_long_name_of_a_key_1", "a_long_name_of_a_key_2", "a_long_name_of_a_key_3",
		"a_long_name_of_a_key_4", "a_long_name_of_a_key_5", "a_long_name_of_a_key_6", "a_long_name_of_a_key_7",
		"a_long_name_of_a_key_8", "a_long_name_of_a_key_9", "a_long_name_of_a_key_10", "a_long_name_of_a_key_11",
		"a_long_name_of_a_key_12", "a_long_name_of_a_key_13", "queues" };
	bool b = false;

	ck_assert_int_eq(opts_parse(&o, "--disk", "a,,b.img,ro,queues=4,fwd=1,fwd=2,typo=1", "file", &err), 0);
	ck_assert_str_eq(opts_str(o, "file"), "a,b.img");
	ck_assert(!opts_bool(o, "ro", &b, &err) && b);
	ck_assert(!opts_u64(o, "queues", 1, 8, &v, &err) && v == 4);
	ck_assert_str_eq(opts_nth(o, "fwd", 1), "2");
	ck_assert_ptr_null(opts_nth(o, "fwd", 2));
	ck_assert_int_eq(opts_u64(o, "queues", 5, 8, &v, &err), -EINVAL);
	ck_assert_str_eq(err.msg, "--disk: queues=4: must be 5 to 8");
	ck_assert_int_eq(opts_end(o, &err), -EINVAL);
	ck_assert_str_eq(err.msg, "--disk: unknown key 'typo': accepted are file, ro, queues or fwd");
	opts_free(o);
	ck_assert_int_eq(opts_parse(&o, "--disk", "queus=1", NULL, &err), 0);
	for (unsigned i = 0; i < ARRAY_LEN(many); i++)
		opts_str(o, many[i]);
	ck_assert_int_eq(opts_end(o, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.msg, "unknown key 'queus' (queues?): accepted are a_long_name_of_a_key_1, "));
	ck_assert_str_eq(err.msg + strlen(err.msg) - 11, "key_12, ...");
	opts_free(o);
}
END_TEST

START_TEST(test_gmem_at_refuses_gaps_wrap_and_straddle)
{
	struct gmem m;
	const struct gmem_region l[] = { { .base = 0, .size = 1 << 20 }, { .base = 1ull << 32, .size = 1 << 20 } };

	ck_assert_int_eq(gmem_init(&m, l, 2, false, &err), 0);
	ck_assert_uint_eq(gmem_total(&m), 2 << 20);
	ck_assert_ptr_nonnull(gmem_at(&m, 0xfffff, 1));
	ck_assert_ptr_null(gmem_at(&m, 0xfffff, 2));
	ck_assert_ptr_null(gmem_at(&m, 1 << 20, 0));
	ck_assert_ptr_null(gmem_at(&m, UINT64_MAX, 2));
	ck_assert_ptr_null(gmem_at(&m, 0, UINT64_MAX));
	ck_assert_ptr_nonnull(gmem_at(&m, 1ull << 32, 1 << 20));
	ck_assert_int_eq(gmem_write(&m, 0x1000, "x", 1), 0);
	ck_assert_int_eq(*(char *)gmem_at(&m, 0x1000, 1), 'x');
	ck_assert_int_eq(gmem_clear(&m, &err), 0);
	ck_assert_int_eq(*(char *)gmem_at(&m, 0x1000, 1), 0);
	ck_assert_int_lt(ftruncate(m.fd, 0), 0);
	gmem_done(&m);
}
END_TEST

START_TEST(test_iov_cursor)
{
	char a[4] = "abcd", b[3] = "efg", out[8] = "";
	struct iovec iov[] = { { a, 4 }, { b, 3 } }, ex[2];
	struct iov_view v = { iov, 2, 0, 7 }, tail, head;

	tail = iov_take_back(&v, 2);
	head = iov_take(&v, 3);
	ck_assert_uint_eq(v.len, 2);
	ck_assert_uint_eq(iov_export(&v, ex, 2), 2);
	ck_assert_uint_eq(iov_export(&v, ex, 1), 0);
	ck_assert_uint_eq(iov_read(&v, out, 9), 2);
	ck_assert_int_eq(memcmp(out, "de", 2), 0);
	ck_assert_uint_eq(iov_read(&head, out, 9), 3);
	ck_assert_int_eq(memcmp(out, "abc", 3), 0);
	ck_assert_uint_eq(iov_write(&tail, "XYZ", 3), 2);
	ck_assert_int_eq(memcmp(b, "eXY", 3), 0);
}
END_TEST

static uint64_t last;
static uint64_t reg_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)size;
	return 0x1122334455667700 + off;
}
static void reg_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)dev, (void)off, (void)size;
	last = val;
}

/* Row 27: widths a device does not take and accesses across its end never reach it. */
START_TEST(test_row27_bus_stops_straddles_widths_and_gaps)
{
	static const struct bus_ops ops = { reg_read, reg_write, 1, 4 };
	struct bus_region a = { .name = "a", .base = 0x10, .size = 8, .ops = &ops },
			  b = { .name = "b", .base = 0x18, .size = 8, .ops = &ops },
			  bad = { .name = "bad", .base = 0x17, .size = 2, .ops = &ops },
			  wrap = { .name = "wrap", .base = UINT64_MAX, .size = 2, .ops = &ops };
	struct bus bus;
	uint64_t v;

	bus_init(&bus);
	ck_assert_int_eq(bus_add(&bus, &b, &err), 0);
	ck_assert_int_eq(bus_add(&bus, &a, &err), 0);
	ck_assert_int_eq(bus_add(&bus, &bad, &err), -EBUSY);
	ck_assert_int_eq(bus_add(&bus, &wrap, &err), -EINVAL);
	ck_assert(bus_read(&bus, 0x11, 1, &v) && v == 0x01);
	ck_assert(bus_read(&bus, 0x18, 4, &v) && v == 0x55667700);
	ck_assert(!bus_read(&bus, 0x16, 4, &v) && v == 0xffffffff);
	ck_assert(!bus_read(&bus, 0x10, 8, &v) && v == UINT64_MAX);
	ck_assert(!bus_read(&bus, 0x0f, 1, &v) && v == 0xff);
	ck_assert(!bus_read(&bus, 0x20, 2, &v) && v == 0xffff);
	ck_assert(bus_write(&bus, 0x10, 1, 0x1234) && last == 0x34);
	bus_del(&bus, &a);
	bus_del(&bus, &a);
	ck_assert(!bus_write(&bus, 0x10, 1, 0));
	bus_done(&bus);
}
END_TEST

START_TEST(test_irq_level_line_is_wired_or)
{
	struct irqchip c;
	struct irq a, b, m;

	ck_assert_int_eq(irqchip_init(&c, -1, &err), 0);
	ck_assert_int_eq(irq_line_init(&a, &c, 16, true, &err), 0);
	ck_assert_int_eq(irq_line_init(&b, &c, 16, true, &err), 0);
	irq_set(&a, true);
	irq_set(&a, true);
	irq_set(&b, true);
	irq_set(&a, false);
	ck_assert_uint_eq(c.line_high[16], 1);
	irq_done(&b);
	ck_assert_uint_eq(c.line_high[16], 0);
	irq_done(&a);
	ck_assert_int_eq(irq_msi_init(&m, &c, &err), 0);
	ck_assert_uint_eq(m.gsi, IRQ_LINES);
	ck_assert_int_eq(irq_msi_route(&m, 0xfee00000, 0x41), 0);
	irq_done(&m);
	ck_assert(!c.msi[0].used);
	irqchip_done(&c);
}
END_TEST

START_TEST(test_facts_are_utf8_whatever_a_guest_says)
{
	static const struct {
		const char *given, *written;
	} t[] = { { "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80" },
		{ "\xff", "\\\\xff" }, { "\xe2\x82", "\\\\xe2\\\\x82" },
		{ "\xc0\x80", "\\\\xc0\\\\x80" },   /* longer than needed */
		{ "\xe0\x9f\xbf", "\\\\xe0\\\\x9f\\\\xbf" },
		{ "\xf0\x8f\xbf\xbf", "\\\\xf0\\\\x8f\\\\xbf\\\\xbf" },
		{ "\xed\xa0\x80", "\\\\xed\\\\xa0\\\\x80" },   /* half of a pair */
		{ "\xf4\x90\x80\x80", "\\\\xf4\\\\x90\\\\x80\\\\x80" },   /* past the last */
		{ "\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", "\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf" } };

	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		struct facts *f = facts_new();
		char *text;

		facts_str(f, "k", t[i].given);
		text = facts_text(f);
		ck_assert_msg(strstr(text, t[i].written) != NULL, "%zu: %s", i, text);
		free(text);
		facts_free(f);
	}
}
END_TEST

UNIT_MAIN("core", test_error_prefix_keeps_message, test_parse_size_units_and_overflow,
	test_parse_seconds, test_opts_refuse_unknown_key_by_name,
	test_gmem_at_refuses_gaps_wrap_and_straddle, test_iov_cursor,
	test_row27_bus_stops_straddles_widths_and_gaps, test_irq_level_line_is_wired_or,
	test_facts_are_utf8_whatever_a_guest_says)
