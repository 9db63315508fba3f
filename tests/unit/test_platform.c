/* Both machines on the real /dev/kvm, without a vCPU: what is there, and what a reset undoes. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "arch/x86_64/layout.h"
#include "unit.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/vm.h"

static struct error err;
static struct vm_config cfg;
static struct vm vm;

static void open_machine(enum machine machine)
{
	struct gmem_region layout[GMEM_REGIONS];

	cfg.restart_on_reboot = true;
	cfg.machine = machine;
	cfg.mem = 16 << 20;
	cfg.cpus = 1;
	vm = (struct vm){ .cfg = &cfg, .stop_lock = PTHREAD_MUTEX_INITIALIZER, .wake_fd = -1 };
	vm.kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm.kvm_fd < 0) {
		puts("skipped: /dev/kvm cannot be opened");
		exit(77);
	}
	vm.vm_fd = ioctl(vm.kvm_fd, KVM_CREATE_VM, 0);
	ck_assert_int_ge(vm.vm_fd, 0);
	bus_init(&vm.pio);
	bus_init(&vm.mmio);
	vm.io = loop_new("io/0", LOOP_AUTO, 0, &err);
	ck_assert_ptr_nonnull(vm.io);
	ck_assert_int_eq(gmem_init(&vm.mem, layout, arch_ram_layout(cfg.mem, layout, GMEM_REGIONS),
		false, &err), 0);
	ck_assert_msg(arch_vm_init(&vm, &err) == 0, "%s", err.msg);
	ck_assert_msg(arch_platform(&vm, &err) == 0, "%s", err.msg);
}

static void close_machine(void)
{
	for (struct vm_device *d = vm.devices, *next; d; d = next) {
		next = d->next;
		d->free(d->dev);
		free(d);
	}
	arch_vm_free(&vm);
	loop_free(vm.io);
	ck_assert_uint_eq(vm.pio.nr + vm.mmio.nr, 0);
	gmem_done(&vm.mem);
	bus_done(&vm.pio);
	bus_done(&vm.mmio);
	close(vm.vm_fd);
	close(vm.kvm_fd);
}

/* Requests pending at both 8259s, slave above master. */
static unsigned pic_requests(void)
{
	unsigned irr = 0;

	for (unsigned i = 0; i < 2; i++) {
		struct kvm_irqchip chip = { .chip_id = i };

		ck_assert_int_eq(ioctl(vm.vm_fd, KVM_GET_IRQCHIP, &chip), 0);
		irr |= (unsigned)chip.chip.pic.irr << 8 * i;
	}
	return irr;
}

static void out(uint16_t port, unsigned size, uint32_t val)
{
	bus_write(&vm.pio, port, size, val);
}

static bool is_there(uint16_t port, unsigned size)
{
	uint64_t val;

	return bus_read(&vm.pio, port, size, &val);
}

START_TEST(test_pc_has_its_fixed_devices)
{
	static const struct {
		uint16_t port;
		uint8_t size;
		bool there;
	} t[] = { { 0x3f8, 1, true }, { 0x2f8, 1, false }, { 0x71, 1, true }, { 0x64, 1, true },
		{ 0x60, 1, true }, { 0x92, 1, true }, { 0x80, 1, true }, { 0xcf9, 1, true },
		{ 0xcf8, 4, true }, { 0xcfc, 4, true }, { 0x505, 1, true }, { 0x511, 1, true },
		{ 0x604, 2, true }, { 0x608, 4, true }, { 0xe9, 1, false }, { 0xf4, 4, false },
		{ 0xe0, 4, false } };

	open_machine(MACHINE_PC);
	for (size_t i = 0; i < ARRAY_LEN(t); i++)
		ck_assert_msg(is_there(t[i].port, t[i].size) == t[i].there, "port %#x", t[i].port);
	ck_assert_ptr_nonnull(vm.pci);
	close_machine();
}
END_TEST

START_TEST(test_pc_has_what_was_asked_for)
{
	cfg = (struct vm_config){ .serial = { NULL, "null" }, .debugcon = "null", .debug_exit = true,
		.debug_exit_port = 0xf4, .testdev = true };
	open_machine(MACHINE_PC);
	ck_assert(is_there(0x2f8, 1) && !is_there(0x3e8, 1));
	ck_assert(is_there(0xe9, 1) && is_there(0xf4, 4) && is_there(0xe0, 4));
	ck_assert_ptr_nonnull(vm.serial[1]);
	close_machine();
	ck_assert_ptr_null(vm.serial[1]);
	cfg = (struct vm_config){ 0 };
}
END_TEST

START_TEST(test_microvm_has_no_legacy_devices)
{
	cfg = (struct vm_config){ .serial = { "null" }, .debug_exit = true, .debug_exit_port = 0xf4 };
	open_machine(MACHINE_MICROVM);
	ck_assert(is_there(0x3f8, 1) && is_there(0x604, 2) && is_there(0xcf9, 1));
	ck_assert(is_there(0x505, 1) && is_there(0xf4, 1) && is_there(0x64, 1));
	ck_assert(!is_there(0x71, 1) && !is_there(0x60, 1) && !is_there(0xcf8, 4));
	ck_assert(!is_there(0x511, 1) && !is_there(0x80, 1));
	ck_assert_ptr_null(vm.pci);
	close_machine();
	cfg = (struct vm_config){ 0 };
}
END_TEST

START_TEST(test_serial_and_clock_reach_the_pic_and_reset_clears_it)
{
	uint64_t end;

	open_machine(MACHINE_PC);
	ck_assert_uint_eq(pic_requests() & 1 << 4, 0);
	out(0x3f8 + UART_IER, 1, UART_IER_THRI);
	ck_assert_uint_ne(pic_requests() & 1 << 4, 0);
	out(0x70, 1, 0x0b);
	out(0x71, 1, 0x42);             /* periodic, 1,024 Hz */
	end = loop_now() + 20000000000ull;
	while (!(pic_requests() & 1 << 8))
		ck_assert_uint_lt(loop_now(), end);
	for (struct vm_device *d = vm.devices; d; d = d->next)
		if (d->reset)
			d->reset(d->dev);
	ck_assert_msg(arch_vm_reset(&vm, &err) == 0, "%s", err.msg);
	ck_assert_uint_eq(pic_requests() & (1 << 4 | 1 << 8), 0);
	close_machine();
}
END_TEST

START_TEST(test_reset_restores_the_pit)
{
	struct kvm_pit_state2 fresh, pit;

	open_machine(MACHINE_PC);
	ck_assert_int_eq(ioctl(vm.vm_fd, KVM_GET_PIT2, &fresh), 0);
	pit = fresh;
	pit.channels[2].mode = 3;
	pit.channels[2].count = 0x1234;
	ck_assert_int_eq(ioctl(vm.vm_fd, KVM_SET_PIT2, &pit), 0);
	ck_assert_int_eq(arch_vm_reset(&vm, &err), 0);
	ck_assert_int_eq(ioctl(vm.vm_fd, KVM_GET_PIT2, &pit), 0);
	ck_assert_uint_eq(pit.channels[2].mode, fresh.channels[2].mode);
	ck_assert_uint_eq(pit.channels[2].count, fresh.channels[2].count);
	close_machine();
}
END_TEST

START_TEST(test_power_button_needs_a_listener)
{
	open_machine(MACHINE_MICROVM);
	ck_assert(!arch_power_button(&vm));
	out(PM1_EVT_PORT + 2, 2, 0x0100);
	ck_assert(arch_power_button(&vm));
	ck_assert_uint_ne(pic_requests() & 1 << IRQ_SCI, 0);
	close_machine();
}
END_TEST

START_TEST(test_virtio_mmio_slots_are_apart_and_end)
{
	gpa_t base, last = 0;
	unsigned gsi, n;

	for (n = 0; !arch_virtio_mmio_slot(n, &base, &gsi); n++) {
		ck_assert_uint_ge(base, last + 0x1000);
		ck_assert(gsi >= IRQ_MMIO_FIRST && gsi < IRQ_LINES);
		last = base;
	}
	ck_assert_uint_eq(n, VIRTIO_MMIO_MAX);
}
END_TEST

UNIT_MAIN("platform", test_pc_has_its_fixed_devices, test_pc_has_what_was_asked_for,
	test_microvm_has_no_legacy_devices, test_serial_and_clock_reach_the_pic_and_reset_clears_it,
	test_reset_restores_the_pit, test_power_button_needs_a_listener,
	test_virtio_mmio_slots_are_apart_and_end)
