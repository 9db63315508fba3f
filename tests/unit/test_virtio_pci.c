/* virtio-pci: the four structures, the window in configuration space, MSI-X and INTx, doorbells that follow the BAR. */
#include <linux/pci_regs.h>
#include <linux/virtio_pci.h>
#include <stdlib.h>
#include <string.h>
#include "devices/virtio/transport.h"
#include "mock_driver.h"
#include "unit.h"
#include "vmm/error.h"
#include "vmm/pci.h"

#define ECAM   0xe0000000ull
#define QUEUES 3
#define RUNS   15

void __wrap_irq_pulse(struct irq *i);
static _Atomic unsigned pulses;

void __wrap_irq_pulse(struct irq *i)
{
	(void)i;
	pulses++;
}

static void echo_notify(struct virtio *v, struct virtq *q)
{
	VIRTQ_CHAIN(c);

	ON_LOOP(v->home);
	while (virtq_pop(q, &c) > 0)
		virtq_push(q, c.head, (uint32_t)iov_zero(&c.in, c.in.len));
}

static void echo_free(struct virtio *v)
{
	free(v);
}

static const struct virtio_ops echo_ops = { .name = "echo", .id = 42, .notify = echo_notify,
	.free = echo_free };

static struct mock *m;
static struct vm *vm;
static struct virtio *v;
static uint64_t bar;
static unsigned caps[6];        /* offset of each type; 0 is MSI-X */

static uint64_t load(uint64_t addr, unsigned size)
{
	uint64_t val;

	bus_read(&vm->mmio, addr, size, &val);
	return val;
}

static void store(uint64_t addr, unsigned size, uint64_t val)
{
	bus_write(&vm->mmio, addr, size, val);
}

static uint32_t cfg(unsigned off, unsigned size)
{
	return (uint32_t)load(ECAM + 0x8000 + off, size);
}

static void set_cfg(unsigned off, unsigned size, uint32_t val)
{
	store(ECAM + 0x8000 + off, size, val);
}

static void find_caps(void)
{
	memset(caps, 0, sizeof(caps));
	for (unsigned at = cfg(PCI_CAPABILITY_LIST, 1); at; at = cfg(at + 1, 1)) {
		if (cfg(at, 1) == PCI_CAP_ID_MSIX)
			caps[0] = at;
		else
			caps[cfg(at + 3, 1)] = at;
	}
	bar = cfg(PCI_BASE_ADDRESS_0, 4) & ~15u;
}

static void begin(void)
{
	static const struct pci_layout layout = { .ecam = ECAM, .mmio = 0xc0000000,
		.mmio_end = 0xd0000000, .mmio64 = 1ull << 33, .mmio64_end = 1ull << 34, .io = 0xc000,
		.io_end = 0xffff };
	uint8_t config[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };

	m = mock_new(LOOP_AUTO);
	vm = mock_vm(m);
	ck_assert_int_eq(pci_bus_new(&vm->pci, &layout, &vm->pio, &vm->mmio, &vm->irqs, &vm->mem, NULL), 0);
	v = calloc(1, sizeof(*v));
	virtio_init(v, &echo_ops, 0, sizeof(config));
	for (unsigned i = 0; i < QUEUES; i++)
		virtio_add_queue(v, 64);
	virtio_config_set(v, 0, config, sizeof(config));
	ck_assert_int_eq(virtio_pci_new(vm, v, NULL), 0);
	vm->virtio[vm->nr_virtio++] = v;
	find_caps();
	pulses = 0;
}

static void end(void)
{
	virtio_free(v);
	vm->nr_virtio = 0;
	pci_bus_free(vm->pci);
	vm->pci = NULL;
	mock_free(m);
}

/* Queue 0 with one chain of 16 bytes of room; DRIVER_OK. */
static gpa_t start(void)
{
	gpa_t ring = mock_alloc(m, 0x3000), buf = mock_alloc(m, 64);
	struct vring_desc *d = mock_at(m, ring, 16);

	*d = (struct vring_desc){ buf, 16, VRING_DESC_F_WRITE, 0 };
	store(bar + VIRTIO_PCI_COMMON_GFSELECT, 4, 1);
	store(bar + VIRTIO_PCI_COMMON_GF, 4, 1);
	store(bar + VIRTIO_PCI_COMMON_STATUS, 1, 11);
	store(bar + VIRTIO_PCI_COMMON_Q_SELECT, 2, 0);
	store(bar + VIRTIO_PCI_COMMON_Q_SIZE, 2, 16);
	store(bar + VIRTIO_PCI_COMMON_Q_DESCLO, 8, ring);
	store(bar + VIRTIO_PCI_COMMON_Q_AVAILLO, 4, ring + 0x1000);
	store(bar + VIRTIO_PCI_COMMON_Q_USEDLO, 4, ring + 0x2000);
	store(bar + VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1);
	store(bar + VIRTIO_PCI_COMMON_STATUS, 1, RUNS);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), RUNS);
	return ring;
}

/* Offer the chain once more, ring the doorbell at addr, wait until it is used. */
static void request(gpa_t ring, uint64_t doorbell)
{
	struct vring_avail *a = mock_at(m, ring + 0x1000, 64);
	struct vring_used *u = mock_at(m, ring + 0x2000, 256);

	__atomic_store_n(&a->idx, (uint16_t)(a->idx + 1), __ATOMIC_SEQ_CST);
	store(doorbell, 2, 0);
	mock_settle(m);
	ck_assert_uint_eq(__atomic_load_n(&u->idx, __ATOMIC_ACQUIRE), a->idx);
}

START_TEST(test_identity_and_capabilities)
{
	begin();
	ck_assert_uint_eq(cfg(0, 4), 0x106a1af4);
	ck_assert_uint_eq(cfg(PCI_REVISION_ID, 1), 1);
	for (unsigned i = 0; i < 6; i++)
		ck_assert_uint_ne(caps[i], 0);
	ck_assert_uint_eq(cfg(caps[VIRTIO_PCI_CAP_NOTIFY_CFG] + 16, 4), 4);
	ck_assert_uint_eq(cfg(caps[0] + PCI_MSIX_FLAGS, 2), QUEUES);
	ck_assert_uint_eq(cfg(caps[VIRTIO_PCI_CAP_DEVICE_CFG] + 12, 4), 8);
	ck_assert_uint_eq(load(bar + cfg(caps[VIRTIO_PCI_CAP_DEVICE_CFG] + 8, 4), 8), 0x0807060504030201);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_NUMQ, 2), QUEUES);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_SIZE, 2), 64);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_MSIX, 2), 0xffff);
	end();
}
END_TEST

START_TEST(test_request_with_intx_and_isr_read_to_clear)
{
	gpa_t ring;
	unsigned gsi = pci_intx_gsi(1, 1);

	begin();
	ring = start();
	request(ring, bar + 0x3000);
	ck_assert_uint_eq(vm->irqs.line_high[gsi], 1);
	ck_assert_uint_eq(load(bar + 0x1000, 1), 1);
	ck_assert_uint_eq(vm->irqs.line_high[gsi], 0);
	ck_assert_uint_eq(load(bar + 0x1000, 1), 0);
	request(ring, bar + 0x3000);
	ck_assert_uint_eq(vm->irqs.line_high[gsi], 1);
	store(bar + VIRTIO_PCI_COMMON_STATUS, 1, 0);
	ck_assert_uint_eq(vm->irqs.line_high[gsi], 0);
	ck_assert_uint_eq(pulses, 0);
	end();
}
END_TEST

START_TEST(test_request_with_msix)
{
	uint64_t table;
	gpa_t ring;

	begin();
	table = cfg(PCI_BASE_ADDRESS_1, 4) & ~15u;
	for (unsigned i = 0; i <= QUEUES; i++) {
		store(table + 16 * i, 8, 0xfee00000);
		store(table + 16 * i + 8, 8, 0x40 + i);
	}
	set_cfg(caps[0] + PCI_MSIX_FLAGS, 2, PCI_MSIX_FLAGS_ENABLE);
	store(bar + VIRTIO_PCI_COMMON_Q_SELECT, 2, 0);
	store(bar + VIRTIO_PCI_COMMON_Q_MSIX, 2, 1);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_MSIX, 2), 1);
	ring = start();
	request(ring, bar + 0x3000);
	ck_assert_uint_eq(pulses, 1);
	ck_assert_uint_eq(load(bar + 0x1000, 1), 0);
	ck_assert_uint_eq(vm->irqs.line_high[pci_intx_gsi(1, 1)], 0);
	end();
}
END_TEST

START_TEST(test_row28_vector_beyond_the_table_reads_no_vector)
{
	begin();
	for (uint32_t vec = QUEUES + 1; vec < 0x10000; vec = vec * 2 + 1) {
		store(bar + VIRTIO_PCI_COMMON_MSIX, 2, vec);
		ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_MSIX, 2), 0xffff);
		store(bar + VIRTIO_PCI_COMMON_Q_MSIX, 2, vec);
		ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_MSIX, 2), 0xffff);
	}
	store(bar + VIRTIO_PCI_COMMON_MSIX, 2, QUEUES);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_MSIX, 2), QUEUES);
	end();
}
END_TEST

START_TEST(test_row22_queue_select_out_of_range)
{
	begin();
	store(bar + VIRTIO_PCI_COMMON_Q_SELECT, 2, 65535);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_SIZE, 2), 0);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_MSIX, 2), 0xffff);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_NOFF, 2), 0);
	for (unsigned off = VIRTIO_PCI_COMMON_Q_SIZE; off < 0x38; off += 2) {
		store(bar + off, 2, 0xffff);
		store(bar + (off & ~3u), 4, 0xffffffff);
	}
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_Q_DESCLO, 8), 0);
	request(start(), bar + 0x3000);
	end();
}
END_TEST

START_TEST(test_row20_doorbells_of_absent_queues_are_ignored)
{
	begin();
	request(start(), bar + 0x3000);
	for (unsigned off = 0x3000 + 4; off < 0x4000; off += 2)
		store(bar + off, 2, 0xffff);
	mock_settle(m);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), RUNS);
	end();
}
END_TEST

START_TEST(test_row29_device_works_on_after_its_bar_moved)
{
	gpa_t ring;

	begin();
	ring = start();
	request(ring, bar + 0x3000);
	set_cfg(PCI_BASE_ADDRESS_0, 4, 0xffffffff);
	set_cfg(PCI_BASE_ADDRESS_0, 4, 0xc5550000);
	ck_assert_uint_eq(load(bar, 4), 0xffffffff);
	bar = 0xc5550000;
	request(ring, bar + 0x3000);
	end();
}
END_TEST

static uint32_t window_read(uint8_t bar_index, uint32_t off, uint32_t len)
{
	unsigned w = caps[VIRTIO_PCI_CAP_PCI_CFG];

	set_cfg(w + 4, 1, bar_index);
	set_cfg(w + 8, 4, off);
	set_cfg(w + 12, 4, len);
	return cfg(w + 16, 4);
}

START_TEST(test_row31_window_reaches_all_of_bar_0)
{
	unsigned w;

	begin();
	w = caps[VIRTIO_PCI_CAP_PCI_CFG];
	ck_assert_uint_eq(window_read(0, VIRTIO_PCI_COMMON_NUMQ, 2) & 0xffff, QUEUES);
	ck_assert_uint_eq(window_read(0, 0x2000, 4), 0x04030201);
	window_read(0, VIRTIO_PCI_COMMON_STATUS, 1);
	set_cfg(w + 16, 1, 3);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), 3);
	window_read(0, VIRTIO_PCI_COMMON_STATUS, 1);
	set_cfg(w + 16, 4, 0xffffff00);         /* a reset, through the window, under the bus's lock */
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), 0);
	end();
}
END_TEST

START_TEST(test_row31_window_beyond_the_bar_is_ignored)
{
	static const uint32_t offs[] = { 0x4000, 0x3ffe, 0x3fff, 0x80000000, 0xfffffffc, 0xffffffff, 2, 1 };
	static const uint32_t lens[] = { 0, 3, 5, 8, 16, 0x80000000, 0xffffffff };
	unsigned w;

	begin();
	w = caps[VIRTIO_PCI_CAP_PCI_CFG];
	for (unsigned i = 0; i < sizeof(offs) / sizeof(offs[0]); i++) {
		window_read(0, offs[i], 4);
		set_cfg(w + 16, 4, 0x5a5a5a5a);
		ck_assert_uint_eq(cfg(w + 16, 4), 0x5a5a5a5a);  /* plain memory: nothing was read or written */
	}
	for (unsigned i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		window_read(0, 0, lens[i]);
		set_cfg(w + 16, 4, 0xa5a5a5a5);
		ck_assert_uint_eq(cfg(w + 16, 4), 0xa5a5a5a5);
	}
	for (unsigned b = 1; b < 256; b++) {
		window_read((uint8_t)b, 0, 4);
		set_cfg(w + 16, 4, 0xa5a5a5a5);
		ck_assert_uint_eq(cfg(w + 16, 4), 0xa5a5a5a5);
	}
	ck_assert_uint_eq(load(bar, 4), 0);
	end();
}
END_TEST

START_TEST(test_row26_27_odd_accesses_read_all_ones_or_stay_without_effect)
{
	begin();
	ck_assert_uint_eq(load(bar + 0x38, 4), 0xffffffff);
	ck_assert_uint_eq(load(bar + 0x36, 4), 0xffffffff);
	ck_assert_uint_eq(load(bar + 0xfff, 1), 0xff);
	ck_assert_uint_eq(load(bar + 0x2006, 8), 0x0807);
	ck_assert_uint_eq(load(bar + 0x2ff8, 8), 0);
	store(bar + VIRTIO_PCI_COMMON_STATUS, 4, 0x01010101);
	store(bar + VIRTIO_PCI_COMMON_STATUS, 2, 0x0101);
	store(bar + 0x1000, 4, 0xffffffff);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), 0);
	end();
}
END_TEST

START_TEST(test_machine_reset_brings_back_power_on)
{
	begin();
	request(start(), bar + 0x3000);
	store(bar + VIRTIO_PCI_COMMON_MSIX, 2, 1);
	set_cfg(caps[0] + PCI_MSIX_FLAGS, 2, PCI_MSIX_FLAGS_ENABLE);
	set_cfg(PCI_BASE_ADDRESS_0, 4, 0xc5550000);
	virtio_reset(v);
	pci_reset(vm->pci);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_STATUS, 1), 0);
	ck_assert_uint_eq(load(bar + VIRTIO_PCI_COMMON_MSIX, 2), 0xffff);
	ck_assert_uint_eq(vm->irqs.line_high[pci_intx_gsi(1, 1)], 0);
	request(start(), bar + 0x3000);
	ck_assert_uint_eq(load(bar + 0x1000, 1), 1);    /* INTx again */
	end();
}
END_TEST

UNIT_MAIN("virtio_pci", test_identity_and_capabilities, test_request_with_intx_and_isr_read_to_clear,
	test_request_with_msix, test_row28_vector_beyond_the_table_reads_no_vector,
	test_row22_queue_select_out_of_range, test_row20_doorbells_of_absent_queues_are_ignored,
	test_row29_device_works_on_after_its_bar_moved, test_row31_window_reaches_all_of_bar_0,
	test_row31_window_beyond_the_bar_is_ignored,
	test_row26_27_odd_accesses_read_all_ones_or_stay_without_effect,
	test_machine_reset_brings_back_power_on)
