/* msix: the table door, masks, pending bits. Messages are counted where they would leave for KVM. */
#include <linux/pci_regs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include "pci_fixture.h"
#include "unit.h"

#define VECTORS 5
#define FLAGS   (cap + PCI_MSIX_FLAGS)
#define ENABLE  PCI_MSIX_FLAGS_ENABLE
#define MASKALL PCI_MSIX_FLAGS_MASKALL
#define PBA     2048

void __wrap_irq_pulse(struct irq *i);

static struct pci_device dev;
static struct msix *msix;
static unsigned cap;
static uint64_t bar;
static _Atomic unsigned pulses;
static _Atomic uint32_t last_gsi;

void __wrap_irq_pulse(struct irq *i)
{
	last_gsi = i->gsi;
	pulses++;
}

static void config_written(struct pci_device *d, unsigned off, unsigned size)
{
	(void)d;
	(void)off;
	(void)size;
	msix_config_written(msix);
}

static void begin(void)
{
	pci_begin();
	dev = (struct pci_device){ .name = "toy", .vendor = 1, .device = 2,
		.config_written = config_written };
	ck_assert_msg(!msix_new(&msix, &dev, 1, VECTORS, &irqs, &pci_err), "%s", pci_err.msg);
	ck_assert_int_eq(pci_add(pci, &dev, &pci_err), 0);
	cap = cfg_read(1, PCI_CAPABILITY_LIST, 1);
	bar = cfg_read(1, PCI_BASE_ADDRESS_1, 4) & ~15u;
	pulses = 0;
}

static void end(void)
{
	pci_del(&dev);
	msix_free(msix);
	pci_end();
}

static void set_entry(unsigned i, uint32_t data, uint32_t control)
{
	bus_write(&mmio, bar + 16 * i, 4, 0xfee00000);
	bus_write(&mmio, bar + 16 * i + 4, 4, 0);
	bus_write(&mmio, bar + 16 * i + 8, 4, data);
	bus_write(&mmio, bar + 16 * i + 12, 4, control);
}

START_TEST(test_capability_describes_table_and_pending_bits)
{
	begin();
	ck_assert_uint_eq(cfg_read(1, cap, 1), PCI_CAP_ID_MSIX);
	ck_assert_uint_eq(cfg_read(1, FLAGS, 2), VECTORS - 1);
	ck_assert_uint_eq(cfg_read(1, cap + PCI_MSIX_TABLE, 4), 1);
	ck_assert_uint_eq(cfg_read(1, cap + PCI_MSIX_PBA, 4), PBA | 1);
	for (unsigned i = 0; i < VECTORS; i++)
		ck_assert_uint_eq(load(&mmio, bar + 16 * i + 12, 4), 1);        /* masked at power-on */
	cfg_write(1, FLAGS, 2, 0xffff);
	ck_assert_uint_eq(cfg_read(1, FLAGS, 2), ENABLE | MASKALL | (VECTORS - 1));
	end();
}
END_TEST

START_TEST(test_unmasked_vector_sends_its_message)
{
	begin();
	set_entry(2, 0x41, 0);
	msix_fire(msix, 2);
	ck_assert_uint_eq(pulses, 0);           /* not enabled: INTx is in charge */
	cfg_write(1, FLAGS, 2, ENABLE);
	ck_assert(msix_enabled(msix));
	ck_assert_uint_eq(pulses, 0);
	msix_fire(msix, 2);
	ck_assert_uint_eq(pulses, 1);
	ck_assert_uint_eq(irqs.msi[last_gsi - IRQ_LINES].data, 0x41);
	ck_assert_uint_eq(irqs.msi[last_gsi - IRQ_LINES].addr, 0xfee00000);
	end();
}
END_TEST

START_TEST(test_masked_vector_is_pending_and_fires_once_when_unmasked)
{
	begin();
	cfg_write(1, FLAGS, 2, ENABLE);
	set_entry(3, 0x42, 1);
	msix_fire(msix, 3);
	msix_fire(msix, 3);
	ck_assert_uint_eq(pulses, 0);
	ck_assert_uint_eq(load(&mmio, bar + PBA, 8), 8);
	ck_assert_uint_eq(load(&mmio, bar + PBA, 4), 8);
	ck_assert_uint_eq(load(&mmio, bar + PBA + 4, 4), 0);
	bus_write(&mmio, bar + 16 * 3 + 12, 4, 0);
	ck_assert_uint_eq(pulses, 1);
	ck_assert_uint_eq(load(&mmio, bar + PBA, 8), 0);
	/* the same with the function's mask */
	cfg_write(1, FLAGS, 2, ENABLE | MASKALL);
	msix_fire(msix, 3);
	ck_assert_uint_eq(pulses, 1);
	cfg_write(1, FLAGS, 2, ENABLE);
	ck_assert_uint_eq(pulses, 2);
	end();
}
END_TEST

START_TEST(test_reset_masks_and_forgets)
{
	begin();
	cfg_write(1, FLAGS, 2, ENABLE);
	set_entry(0, 0x42, 1);
	msix_fire(msix, 0);
	msix_reset(msix);
	pci_reset(pci);
	ck_assert(!msix_enabled(msix));
	ck_assert_uint_eq(cfg_read(1, FLAGS, 2), VECTORS - 1);
	cfg_write(1, FLAGS, 2, ENABLE);
	bus_write(&mmio, bar + 12, 4, 0);
	ck_assert_uint_eq(pulses, 0);
	ck_assert_uint_eq(load(&mmio, bar + 8, 4), 0);
	end();
}
END_TEST

START_TEST(test_row28_access_beyond_the_entries_is_ignored)
{
	begin();
	cfg_write(1, FLAGS, 2, ENABLE);
	for (uint64_t off = 16 * VECTORS; off < PBA; off += 4) {
		ck_assert_uint_eq(load(&mmio, bar + off, 4), 0xffffffff);
		bus_write(&mmio, bar + off, 4, 0x12345678);
	}
	for (uint64_t off = PBA; off < 4096; off += 8) {
		bus_write(&mmio, bar + off, 8, ~0ull);
		ck_assert_uint_eq(load(&mmio, bar + off, 8), off == PBA ? 0 : ~0ull);
	}
	ck_assert_uint_eq(load(&mmio, bar + 4096, 4), 0xffffffff);
	end();
}
END_TEST

START_TEST(test_row28_narrow_and_unaligned_accesses_are_ignored)
{
	begin();
	set_entry(0, 0x42, 1);
	for (unsigned size = 1; size <= 2; size++) {
		bus_write(&mmio, bar + 8, size, 0xff);
		ck_assert_uint_eq(load(&mmio, bar + 8, size), size == 1 ? 0xff : 0xffff);
	}
	bus_write(&mmio, bar + 6, 4, 0);
	bus_write(&mmio, bar + 4, 8, 0);
	ck_assert_uint_eq(load(&mmio, bar + 4, 8), ~0ull);
	ck_assert_uint_eq(load(&mmio, bar + 8, 4), 0x42);
	bus_write(&mmio, bar + 8, 8, 0x43);             /* data and control in one aligned write */
	ck_assert_uint_eq(load(&mmio, bar + 8, 8), 0x43);
	end();
}
END_TEST

START_TEST(test_row28_vector_out_of_range_fires_nothing)
{
	begin();
	cfg_write(1, FLAGS, 2, ENABLE);
	for (unsigned i = 0; i < VECTORS; i++)
		set_entry(i, 0x50 + i, 0);
	msix_fire(msix, VECTORS);
	msix_fire(msix, 0xffff);
	msix_fire(msix, 0xffffffff);
	ck_assert_uint_eq(pulses, 0);
	ck_assert_uint_eq(load(&mmio, bar + PBA, 8), 0);
	end();
}
END_TEST

#define FIRES 200000

static void *fire_many(void *arg)
{
	for (unsigned i = 0; i < FIRES; i++)
		msix_fire(msix, 1);
	return arg;
}

START_TEST(test_fire_against_mask_and_unmask_never_strands_a_message)
{
	pthread_t t;

	begin();
	cfg_write(1, FLAGS, 2, ENABLE);
	set_entry(1, 0x42, 0);
	ck_assert_int_eq(pthread_create(&t, NULL, fire_many, NULL), 0);
	for (unsigned i = 0; i < 20000; i++)
		bus_write(&mmio, bar + 16 + 12, 4, i & 1);
	pthread_join(t, NULL);
	bus_write(&mmio, bar + 16 + 12, 4, 0);
	ck_assert_uint_eq(load(&mmio, bar + PBA, 8), 0);
	ck_assert_uint_ge(pulses, 1);
	ck_assert_uint_le(pulses, FIRES);
	end();
}
END_TEST

START_TEST(test_vectors_are_given_back)
{
	for (unsigned i = 0; i < 3 * IRQ_MSIS / VECTORS; i++) {
		begin();
		end();
	}
	begin();
	ck_assert_uint_lt(irqs.nr_msis, 2 * VECTORS + 16);
	for (unsigned i = VECTORS; i < irqs.nr_msis; i++)
		ck_assert(!irqs.msi[i].used);
	end();
}
END_TEST

UNIT_MAIN("msix", test_capability_describes_table_and_pending_bits,
	test_unmasked_vector_sends_its_message,
	test_masked_vector_is_pending_and_fires_once_when_unmasked, test_reset_masks_and_forgets,
	test_row28_access_beyond_the_entries_is_ignored,
	test_row28_narrow_and_unaligned_accesses_are_ignored,
	test_row28_vector_out_of_range_fires_nothing,
	test_fire_against_mask_and_unmask_never_strands_a_message, test_vectors_are_given_back)
