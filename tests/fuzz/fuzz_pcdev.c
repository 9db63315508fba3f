/*
 * The devices of a PC at fixed ports (row 34). Input: a stream of 6-byte operations
 *
 *      place   index into ports[], or from 0xc0 on: store `value` at guest RAM (place - 0xc0) * 4
 *      how     bits 0-1 width (1, 2, 4, 4), bit 7 read, bits 2-5 offset from the port
 *      value   32 bits, little-endian
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include "devices/pc.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define RAM_SIZE (1u << 20)
#define OPS_MAX  4096u

static const uint16_t ports[] = { 0x3f8, 0x2f8, 0x70, 0x71, 0x60, 0x64, 0x92, 0xcf8, 0x80, 0x505, 0xf4,
	0x8900, 0x510, 0x511, 0x514, 0x518, 0x600, 0x604, 0x608, 0xe0, 0x2000 };

static struct vm_config cfg = { .cpus = 2, .debug_exit_port = 0xf4 };
static struct vm vm = { .cfg = &cfg, .kvm_fd = -1, .vm_fd = -1, .stop_lock = PTHREAD_MUTEX_INITIALIZER };

static void must(int r)
{
	if (r)
		abort();
}

static void build(void)
{
	static const struct gmem_region ram = { .base = 0, .size = RAM_SIZE };
	struct acpi_pm *pm;

	vm.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	bus_init(&vm.pio);
	bus_init(&vm.mmio);
	must(irqchip_init(&vm.irqs, -1, NULL));
	must(gmem_init(&vm.mem, &ram, 1, false, NULL));
	vm.io = loop_new("io/0", LOOP_AUTO, 0, NULL);
	must(!vm.io);
	must(serial_new(&vm, 0, NULL));
	must(serial_new(&vm, 1, NULL));
	must(rtc_new(&vm, NULL));
	must(i8042_new(&vm, false, NULL));
	must(port92_new(&vm, NULL));
	must(reset_control_new(&vm, NULL));
	must(post_new(&vm, NULL));
	must(pvpanic_new(&vm, NULL));
	must(debug_exit_new(&vm, NULL));
	must(shutdown_port_new(&vm, NULL));
	must(fw_cfg_new(&vm, NULL));
	must(pc_testdev_new(&vm, NULL));
	must(acpi_pm_new(&pm, &vm, NULL));
	vm.boot.cmdline = "console=ttyS0";
	vm.boot.initrd = 0x8000;
	vm.boot.initrd_len = 0x100;
}

static void operate(const uint8_t *op)
{
	unsigned size = 1u << MIN(op[1] & 3, 2);
	uint32_t val;
	uint64_t got;

	memcpy(&val, op + 2, sizeof(val));
	if (op[0] >= 0xc0) {
		gmem_write(&vm.mem, (op[0] - 0xc0) * 4u, &val, sizeof(val));
	} else {
		uint64_t port = ports[op[0] % ARRAY_LEN(ports)] + (op[1] >> 2 & 15);

		if (op[1] & 0x80)
			bus_read(&vm.pio, port, size, &got);
		else
			bus_write(&vm.pio, port, size, val);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint64_t lsr;

	if (!vm.io)
		build();
	for (size_t i = 0; i < OPS_MAX && size - i * 6 >= 6; i++)
		operate(data + i * 6);
	vm.stop = (struct vm_stop){ .cause = STOP_NONE };
	for (struct vm_device *d = vm.devices; d; d = d->next)
		if (d->reset)
			d->reset(d->dev);
	/* Whatever was done, a reset machine's UART is empty and its lines are low. */
	bus_read(&vm.pio, 0x3fd, 1, &lsr);
	for (unsigned i = 0; i < IRQ_LINES; i++)
		must(vm.irqs.line_high[i] != 0);
	must(lsr != 0x60);
	return 0;
}
