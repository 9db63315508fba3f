/* pci-testdev, as kernel unit tests drive it; no KVM, so every write comes by exit. */
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "machine.h"
#include "unit.h"
#include "vmm/pci.h"

#define SLOT 1

static struct test_machine m;
static struct error err;

static uint64_t cfg_read(unsigned off, unsigned size)
{
	uint64_t val;

	bus_read(&m.vm.mmio, PCI_ECAM_BASE + SLOT * 0x8000 + off, size, &val);
	return val;
}

static void cfg_write(unsigned off, unsigned size, uint64_t val)
{
	bus_write(&m.vm.mmio, PCI_ECAM_BASE + SLOT * 0x8000 + off, size, val);
}

static void start(void)
{
	static const struct pci_layout l = { .ecam = PCI_ECAM_BASE, .mmio = PCI_MMIO_BASE,
		.mmio_end = PCI_MMIO_END, .io = PCI_IO_BASE, .io_end = PCI_IO_END };

	machine_init(&m);
	ck_assert_int_eq(pci_bus_new(&m.vm.pci, &l, &m.vm.pio, &m.vm.mmio, &m.vm.irqs, &m.vm.mem, &err), 0);
	ck_assert_msg(pci_testdev_new(&m.vm, &err) == 0, "%s", err.msg);
	cfg_write(4, 2, 3);             /* memory and ports decode */
}

static void stop(void)
{
	struct vm_device *d = m.vm.devices;

	d->free(d->dev);                /* before its bus, as vm_free() has it */
	free(d);
	m.vm.devices = NULL;
	pci_bus_free(m.vm.pci);
	machine_done(&m);
}

/* One of the two windows; they speak the same protocol. */
struct window {
	struct bus *bus;
	uint64_t base;
};

static struct window window(bool ports)
{
	return ports ? (struct window){ &m.vm.pio, cfg_read(0x14, 4) & ~3ull }
		     : (struct window){ &m.vm.mmio, cfg_read(0x10, 4) & ~15ull };
}

static uint32_t rd(struct window w, unsigned off, unsigned size)
{
	uint64_t val;

	bus_read(w.bus, w.base + off, size, &val);
	return (uint32_t)val;
}

static void wr(struct window w, unsigned off, unsigned size, uint64_t val)
{
	bus_write(w.bus, w.base + off, size, val);
}

START_TEST(test_testdev_counts_the_writes_it_asked_for)
{
	static const char *const names[] = { "mmio-no-eventfd", "mmio-wildcard-eventfd",
		"mmio-datamatch-eventfd", "portio-no-eventfd", "portio-wildcard-eventfd",
		"portio-datamatch-eventfd" };

	start();
	ck_assert_uint_eq(cfg_read(0, 4), 0x00051b36);
	for (unsigned n = 0; n < 6; n++) {
		struct window w = window(n >= 3);
		bool wildcard = n % 3 == 1;
		uint32_t off;

		wr(w, 0, 1, n % 3);
		for (unsigned i = 0; i <= strlen(names[n]); i++)
			ck_assert_int_eq((char)rd(w, 16 + i, 1), names[n][i]);
		ck_assert_uint_eq(rd(w, 0, 1), n);
		ck_assert_uint_eq(rd(w, 1, 1), 1);
		off = rd(w, 4, 4);
		ck_assert_uint_eq(off, (n >= 3 ? 128 : 2048) + n);
		ck_assert_uint_eq(rd(w, 12, 4), 0);
		for (unsigned i = 0; i < 5; i++)
			wr(w, off, 1, rd(w, 8, 1));
		wr(w, off, 1, 0x55);
		wr(w, off + 1, 1, rd(w, 8, 1));
		ck_assert_uint_eq(rd(w, 12, 4), wildcard ? 6 : 5);
	}
	stop();
}
END_TEST

START_TEST(test_testdev_ends_a_test_on_reset_and_bad_numbers)
{
	struct window w;

	start();
	w = window(false);
	wr(w, 0, 1, 0);
	ck_assert_uint_eq(rd(w, 1, 1), 1);
	wr(w, 0, 1, 3);
	ck_assert_uint_eq(rd(w, 1, 1), 0);
	wr(w, 0, 1, 2);
	machine_reset(&m);
	ck_assert_uint_eq(rd(w, 1, 1), 0);
	wr(w, 2048, 1, 0xfa);
	stop();
}
END_TEST

START_TEST(test_row29_testdev_survives_moving_bars)
{
	struct window w;

	start();
	w = window(false);
	wr(w, 0, 1, 1);
	cfg_write(0x10, 4, PCI_MMIO_BASE + 0x100000);
	w = window(false);
	ck_assert_uint_eq(w.base, PCI_MMIO_BASE + 0x100000);
	wr(w, 2049, 1, 7);
	ck_assert_uint_eq(rd(w, 12, 4), 1);
	cfg_write(4, 2, 0);             /* decode off in the middle of a test */
	ck_assert_uint_eq(rd(w, 12, 4), 0xffffffff);
	cfg_write(4, 2, 2);
	ck_assert_uint_eq(rd(w, 12, 4), 1);
	stop();
}
END_TEST

START_TEST(test_row27_testdev_takes_every_width_and_offset)
{
	start();
	for (unsigned ports = 0; ports < 2; ports++) {
		struct window w = window(ports);

		for (unsigned test = 0; test < 4; test++) {
			wr(w, 0, 1, test);
			for (unsigned off = 0; off < 260; off++)
				for (unsigned size = 1; size <= 8; size *= 2) {
					rd(w, off, size);
					wr(w, off, size, 0x0101010101010101u * test);
				}
		}
	}
	stop();
}
END_TEST

UNIT_MAIN("pci_testdev", test_testdev_counts_the_writes_it_asked_for,
	test_testdev_ends_a_test_on_reset_and_bad_numbers, test_row29_testdev_survives_moving_bars,
	test_row27_testdev_takes_every_width_and_offset)
