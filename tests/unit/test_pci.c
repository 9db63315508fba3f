/* pci: configuration space both ways, BARs wherever a guest puts them, INTx. */
#include <linux/pci_regs.h>
#include <string.h>
#include "pci_fixture.h"
#include "unit.h"

/* BAR 0: 4 KiB MMIO. BAR 1: 64-bit, 64 KiB, prefetchable. BAR 3: 256 ports. */
struct toy {
	struct pci_device d;
	unsigned maps, unmaps, writes;
};

static uint64_t toy_read(void *dev, uint64_t off, unsigned size)
{
	struct toy *t = dev;

	(void)size;
	return t->d.slot << 16 | (off & 0xffff);
}

static void toy_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct toy *t = dev;

	(void)off;
	(void)size;
	(void)val;
	t->writes++;
}

static const struct bus_ops toy_ops = { toy_read, toy_write, 1, 8 };

static void toy_moved(struct pci_device *d, unsigned bar, bool mapped)
{
	struct toy *t = (struct toy *)d;

	ck_assert_uint_lt(bar, PCI_BARS);
	t->maps += mapped;
	t->unmaps += !mapped;
}

static struct toy toys[40];

static struct toy *add_toy(unsigned i)
{
	struct toy *t = &toys[i];
	struct bus_region r = { .name = "toy", .ops = &toy_ops, .dev = t };

	memset(t, 0, sizeof(*t));
	t->d = (struct pci_device){ .name = "toy", .vendor = 0x1234, .device = 0x5678, .sub_vendor = 1,
		.sub_device = 2, .class_code = 0x0a0b0c, .revision = 7, .intx = true,
		.bar = { { .size = 0x1000, .region = r },
			{ .size = 0x10000, .wide = true, .prefetch = true, .region = r },
			{ .size = 0 }, { .size = 256, .io = true, .region = r } },
		.bar_moved = toy_moved };
	ck_assert_msg(!pci_add(pci, &t->d, &pci_err), "%s", pci_err.msg);
	return t;
}

static uint64_t bar64(unsigned slot, unsigned i)
{
	return (cfg_read(slot, 0x10 + 4 * i, 4) & ~15u) | (uint64_t)cfg_read(slot, 0x14 + 4 * i, 4) << 32;
}

START_TEST(test_header_reads_the_same_by_cf8_and_ecam)
{
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	ck_assert_uint_eq(t->d.slot, 1);
	ck_assert_uint_eq(pci_slots_used(pci), 3);
	ck_assert_uint_eq(cfg_read(0, 0, 4), 0x00081b36);
	ck_assert_uint_eq(cfg_read(0, 8, 4) >> 8, 0x060000);
	ck_assert_uint_eq(cfg_read(1, 0, 4), 0x56781234);
	ck_assert_uint_eq(cfg_read(1, 8, 4), 0x0a0b0c07);
	ck_assert_uint_eq(cfg_read(1, 0x2c, 4), 0x00020001);
	ck_assert_uint_eq(cfg_read(1, 0x3d, 1), 1);
	ck_assert_uint_eq(cfg_read(1, 0x3c, 1), pci_intx_gsi(1, 1));
	for (unsigned reg = 0; reg < 256; reg += 4) {
		bus_write(&pio, 0xcf8, 4, 0x80000000 | 1 << 11 | reg);
		ck_assert_uint_eq(load(&pio, 0xcfc, 4), cfg_read(1, reg, 4));
		ck_assert_uint_eq(load(&pio, 0xcfe, 2), cfg_read(1, reg + 2, 2));
		ck_assert_uint_eq(load(&pio, 0xcfd, 1), cfg_read(1, reg + 1, 1));
	}
	pci_del(&t->d);
	ck_assert_uint_eq(pci_slots_used(pci), 1);
	pci_end();
}
END_TEST

START_TEST(test_type_1_probe_of_the_address_port)
{
	pci_begin();
	bus_write(&pio, 0xcfb, 1, 1);
	bus_write(&pio, 0xcf8, 4, 0x80000000);
	ck_assert_uint_eq(load(&pio, 0xcf8, 4), 0x80000000);
	ck_assert_uint_eq(load(&pio, 0xcfc, 2), 0x1b36);
	bus_write(&pio, 0xcf8, 4, 0);
	ck_assert_uint_eq(load(&pio, 0xcfc, 4), 0xffffffff);    /* not enabled */
	pci_end();
}
END_TEST

START_TEST(test_bars_are_placed_decoded_and_sized)
{
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	ck_assert_uint_eq(t->maps, 3);
	ck_assert_uint_eq(cfg_read(1, PCI_COMMAND, 2), PCI_COMMAND_IO | PCI_COMMAND_MEMORY);
	ck_assert_uint_eq(cfg_read(1, 0x10, 4), MMIO);
	ck_assert_uint_eq(cfg_read(1, 0x14, 4), (MMIO + 0x10000) | 0xc);
	ck_assert_uint_eq(cfg_read(1, 0x1c, 4), IO_FIRST | 1);
	ck_assert_uint_eq(load(&mmio, MMIO + 8, 4), 0x10008);
	ck_assert_uint_eq(load(&mmio, bar64(1, 1) + 0xfff8, 8), 0x1fff8);
	ck_assert_uint_eq(load(&pio, IO_FIRST + 255, 1), 255);
	for (unsigned i = 0; i < 6; i++)
		cfg_write(1, 0x10 + 4 * i, 4, 0xffffffff);
	ck_assert_uint_eq(cfg_read(1, 0x10, 4), 0xfffff000);
	ck_assert_uint_eq(cfg_read(1, 0x14, 4), 0xffff000c);
	ck_assert_uint_eq(cfg_read(1, 0x18, 4), 0xffffffff);
	ck_assert_uint_eq(cfg_read(1, 0x1c, 4), 0xffffff01);
	ck_assert_uint_eq(cfg_read(1, 0x20, 4), 0);
	ck_assert_uint_eq(t->unmaps, 3);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_bar_moves_where_the_guest_writes_it)
{
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	cfg_write(1, 0x10, 4, 0xc1234000);
	ck_assert_uint_eq(load(&mmio, 0xc1234004, 4), 0x10004);
	ck_assert_uint_eq(load(&mmio, MMIO, 4), 0xffffffff);
	cfg_write(1, 0x18, 4, 2);       /* the 64-bit one, half by half: nowhere in between is fine too */
	cfg_write(1, 0x14, 4, 0x40000);
	ck_assert_uint_eq(load(&mmio, MMIO64 + 0x40010, 4), 0x10010);
	cfg_write(1, 0x1c, 4, 0xd000);
	ck_assert_uint_eq(load(&pio, 0xd005, 1), 5);
	/* byte by byte */
	cfg_write(1, 0x13, 1, 0xc7);
	ck_assert_uint_eq(load(&mmio, 0xc7234000, 4), 0x10000);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_row29_bar_onto_ram_lapic_or_the_top_is_off_the_bus)
{
	static const uint32_t bad[] = { 0, 0x1000, 0xc8000000, 0xc80ff000, 0xfee00000, 0xfec00000,
		0xfffff000, 0xfffffff0, 0xd0000000, 0xe0000000, 0xbffff000 };
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cfg_write(1, 0x10, 4, bad[i]);
		ck_assert(!t->d.bar[0].mapped);
		ck_assert_uint_eq(cfg_read(1, 0, 4), 0x56781234);
		cfg_write(1, 0x10, 4, 0xc0000000 + 0x1000 * (uint32_t)i);
		ck_assert(t->d.bar[0].mapped);
	}
	cfg_write(1, 0x14, 4, 0xffff0000);
	cfg_write(1, 0x18, 4, 0xffffffff);
	ck_assert(!t->d.bar[1].mapped);
	cfg_write(1, 0x1c, 4, 0xcf00);
	ck_assert(t->d.bar[3].mapped);
	cfg_write(1, 0x1c, 4, 0x0c00);
	ck_assert(!t->d.bar[3].mapped);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_row29_bar_onto_another_bar_is_off_until_that_one_leaves)
{
	struct toy *a, *b;
	uint32_t home;

	pci_begin();
	a = add_toy(0);
	b = add_toy(1);
	home = cfg_read(2, 0x10, 4);
	cfg_write(2, 0x10, 4, cfg_read(1, 0x10, 4));
	ck_assert(!b->d.bar[0].mapped);
	ck_assert_uint_eq(load(&mmio, cfg_read(1, 0x10, 4), 4), 0x10000);       /* the first keeps it */
	cfg_write(1, 0x10, 4, home);
	ck_assert(a->d.bar[0].mapped && b->d.bar[0].mapped);
	ck_assert_uint_eq(load(&mmio, MMIO, 4), 0x20000);
	ck_assert_uint_eq(load(&mmio, home, 4), 0x10000);
	/* the two BARs of one device */
	cfg_write(2, 0x14, 4, MMIO & ~0xffffull);
	ck_assert(!b->d.bar[1].mapped);
	pci_del(&a->d);
	pci_del(&b->d);
	pci_end();
}
END_TEST

START_TEST(test_row29_decode_off_takes_bars_off_and_on_again)
{
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	cfg_write(1, PCI_COMMAND, 2, PCI_COMMAND_IO);
	ck_assert(!t->d.bar[0].mapped && !t->d.bar[1].mapped && t->d.bar[3].mapped);
	cfg_write(1, 0x10, 4, 0xffffffff);
	cfg_write(1, 0x10, 4, 0xc2000000);
	ck_assert(!t->d.bar[0].mapped);
	cfg_write(1, PCI_COMMAND, 2, 0xffff);
	ck_assert_uint_eq(cfg_read(1, PCI_COMMAND, 2), 0x0547);
	ck_assert_uint_eq(load(&mmio, 0xc2000000, 4), 0x10000);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_row30_absent_functions_and_the_end_of_the_space_read_all_ones)
{
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	for (uint64_t off = 0; off < 1 << 20; off += 0x1000) {
		bool here = !(off & 0x7000) && off >> 15 <= 1;

		ck_assert_uint_eq(load(&mmio, ECAM + off, 4) != 0xffffffff, here);
		bus_write(&mmio, ECAM + off + 4, 4, 0);
	}
	ck_assert_uint_eq(load(&mmio, ECAM + 0x8ffe, 4), 0xffffffff);
	ck_assert_uint_eq(load(&mmio, ECAM + 0x8fff, 2), 0xffff);
	ck_assert_uint_eq(load(&mmio, ECAM + (1 << 20) - 2, 4), 0xffffffff);
	ck_assert_uint_eq(load(&mmio, ECAM, 8), ~0ull);
	for (uint32_t a = 0x80000000; a < 0x81000000; a += 0x100) {
		bus_write(&pio, 0xcf8, 4, a);
		if (a != 0x80000000 && a != 0x80000800)
			ck_assert_uint_eq(load(&pio, 0xcfc, 4), 0xffffffff);
	}
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_row30_capability_list_ends)
{
	uint8_t body[20] = { 0 };
	struct toy *t;
	unsigned at, n = 0;
	int last = 0;

	pci_begin();
	t = add_toy(0);
	while (last >= 0 && n < 100) {
		last = pci_add_cap(&t->d, PCI_CAP_ID_VNDR, body, sizeof(body));
		n += last >= 0;
	}
	ck_assert_uint_eq(n, (256 - 64) / 20);
	ck_assert(cfg_read(1, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST);
	for (unsigned off = 0x34; off < 256; off++)
		cfg_write(1, off, 1, 0x34);     /* make it loop, if it can be */
	for (at = cfg_read(1, 0x34, 1); at; at = cfg_read(1, at + 1, 1), n--)
		ck_assert_uint_eq(cfg_read(1, at, 1), PCI_CAP_ID_VNDR);
	ck_assert_uint_eq(n, 0);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_intx_follows_device_and_disable_bit_and_shows_in_status)
{
	struct toy *a, *b;
	unsigned gsi = pci_intx_gsi(1, 1);

	pci_begin();
	a = add_toy(0);
	b = add_toy(1);
	ck_assert_uint_ne(gsi, pci_intx_gsi(2, 1));
	pci_intx(&a->d, true);
	pci_intx(&a->d, true);
	ck_assert_uint_eq(irqs.line_high[gsi], 1);
	ck_assert(cfg_read(1, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);
	cfg_write(1, PCI_COMMAND, 2, PCI_COMMAND_INTX_DISABLE);
	ck_assert_uint_eq(irqs.line_high[gsi], 0);
	ck_assert(cfg_read(1, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);
	cfg_write(1, PCI_COMMAND, 2, 0);
	ck_assert_uint_eq(irqs.line_high[gsi], 1);
	pci_intx(&a->d, false);
	ck_assert_uint_eq(irqs.line_high[gsi], 0);
	pci_intx(&b->d, true);
	pci_del(&b->d);
	ck_assert_uint_eq(irqs.line_high[pci_intx_gsi(2, 1)], 0);
	pci_del(&a->d);
	pci_end();
}
END_TEST

START_TEST(test_reset_brings_back_what_was_built)
{
	uint8_t before[256], after[256];
	struct toy *t;

	pci_begin();
	t = add_toy(0);
	for (unsigned i = 0; i < 256; i++)
		before[i] = (uint8_t)cfg_read(1, i, 1);
	for (unsigned i = 0; i < 256; i++)
		cfg_write(1, i, 1, 0xff);
	pci_intx(&t->d, true);
	pci_reset(pci);
	for (unsigned i = 0; i < 256; i++)
		after[i] = (uint8_t)cfg_read(1, i, 1);
	ck_assert_mem_eq(before, after, 256);
	ck_assert_uint_eq(load(&mmio, MMIO, 4), 0x10000);
	ck_assert_uint_eq(irqs.line_high[pci_intx_gsi(1, 1)], 0);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_devices_past_the_last_slot_are_refused)
{
	struct toy *t;

	pci_begin();
	for (unsigned i = 0; i < 31; i++)
		add_toy(i);
	t = &toys[31];
	t->d = (struct pci_device){ .name = "one-too-many" };
	ck_assert_int_lt(pci_add(pci, &t->d, &pci_err), 0);
	ck_assert_ptr_nonnull(strstr(pci_err.msg, "one-too-many"));
	for (unsigned i = 0; i < 31; i++)
		pci_del(&toys[i].d);
	pci_end();
}
END_TEST

START_TEST(test_bar_too_large_for_the_window_is_refused)
{
	struct toy *t = &toys[0];

	pci_begin();
	t->d = (struct pci_device){ .name = "huge", .bar = { { .size = 1u << 30,
		.region = { .name = "huge", .ops = &toy_ops, .dev = t } } } };
	ck_assert_int_lt(pci_add(pci, &t->d, &pci_err), 0);
	t->d = (struct pci_device){ .name = "huge", .bar = { { .size = 1u << 30, .wide = true,
		.region = { .name = "huge", .ops = &toy_ops, .dev = t } } } };
	ck_assert_int_eq(pci_add(pci, &t->d, &pci_err), 0);
	ck_assert_uint_eq(bar64(1, 0), MMIO64);
	pci_del(&t->d);
	pci_end();
}
END_TEST

START_TEST(test_row29_random_config_writes_harm_nobody)
{
	struct toy *t[3];

	pci_begin();
	for (unsigned i = 0; i < 3; i++)
		t[i] = add_toy(i);
	srandom(29);
	for (unsigned i = 0; i < 100000; i++) {
		unsigned slot = random() % 5, size = 1u << random() % 3;
		uint32_t val = random() & 1 ? (uint32_t)random() << 1
					    : 0xc0000000 + (uint32_t)(random() % 64) * 0x1000;

		cfg_write(slot, random() % 0x48, size, val);
		load(&mmio, 0xc0000000 + random() % 0x40000, size);
	}
	/* whatever is on the bus lies in a window and off RAM */
	for (unsigned i = 0; i < mmio.nr; i++) {
		const struct bus_region *r = mmio.region[i];

		if (r->base != ECAM)
			ck_assert((r->base >= MMIO && r->base + r->size <= MMIO_END &&
				(r->base + r->size <= 0xc8000000 || r->base >= 0xc8100000)) ||
				(r->base >= MMIO64 && r->base + r->size <= MMIO64_END));
	}
	for (unsigned i = 0; i < 3; i++)
		pci_del(&t[i]->d);
	pci_end();
}
END_TEST

UNIT_MAIN("pci", test_header_reads_the_same_by_cf8_and_ecam, test_type_1_probe_of_the_address_port,
	test_bars_are_placed_decoded_and_sized, test_bar_moves_where_the_guest_writes_it,
	test_row29_bar_onto_ram_lapic_or_the_top_is_off_the_bus,
	test_row29_bar_onto_another_bar_is_off_until_that_one_leaves,
	test_row29_decode_off_takes_bars_off_and_on_again,
	test_row30_absent_functions_and_the_end_of_the_space_read_all_ones,
	test_row30_capability_list_ends,
	test_intx_follows_device_and_disable_bit_and_shows_in_status,
	test_reset_brings_back_what_was_built, test_devices_past_the_last_slot_are_refused,
	test_bar_too_large_for_the_window_is_refused, test_row29_random_config_writes_harm_nobody)
