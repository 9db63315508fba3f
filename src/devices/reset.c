/* Ports that reset or power off the machine: 0xcf9 (also ACPI's reset register), 0x92, and 0x8900. */
#include <errno.h>
#include <stdlib.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "vmm/error.h"

#define CF9_RESET      0x04             /* its rise resets the CPU */
#define CF9_SYSTEM     0x02
#define PORT92_RESET   0x01             /* its rise resets */
#define PORT92_A20     0x02

struct reset_port {
	struct pc_device pc;
	uint8_t val;
};

static uint64_t port_read(void *dev, uint64_t off, unsigned size)
{
	struct reset_port *p = dev;

	(void)off, (void)size;
	return p->val;
}

static void cf9_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct reset_port *p = dev;

	(void)off, (void)size;
	if (val & ~p->val & CF9_RESET)
		vm_request_stop(p->pc.vm, STOP_RESET, 0, "guest reset (port 0xcf9)");
	p->val = val & (CF9_RESET | CF9_SYSTEM);
}

/*
 * On a PC 0xcf9 lies inside PCI's CONFIG_ADDRESS, 0xcf8 to 0xcfb, which decodes dwords only (PCI 3.0,
 * 3.2.2.3.2). There the host bridge's region moves to a bus behind ours: the byte is ours, all else goes on.
 */
#define CONFIG_ADDRESS 0xcf8

struct shared_reset {
	struct reset_port port;
	struct bus behind;
};

static bool is_reset_byte(uint64_t off, unsigned size)
{
	return size == 1 && CONFIG_ADDRESS + off == RESET_PORT;
}

static uint64_t shared_read(void *dev, uint64_t off, unsigned size)
{
	struct shared_reset *s = dev;
	uint64_t val;

	if (!is_reset_byte(off, size)) {
		bus_read(&s->behind, CONFIG_ADDRESS + off, size, &val);
		return val;
	}
	pthread_mutex_lock(&s->port.pc.lock);
	val = port_read(&s->port, 0, 1);
	pthread_mutex_unlock(&s->port.pc.lock);
	return val;
}

static void shared_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct shared_reset *s = dev;

	if (!is_reset_byte(off, size)) {
		bus_write(&s->behind, CONFIG_ADDRESS + off, size, val);
		return;
	}
	pthread_mutex_lock(&s->port.pc.lock);
	cf9_write(&s->port, 0, 1, val);
	pthread_mutex_unlock(&s->port.pc.lock);
}

static void shared_done(void *dev)
{
	struct shared_reset *s = dev;

	while (s->behind.nr)
		bus_del(&s->behind, s->behind.region[0]);
	bus_done(&s->behind);
}

static void zero_reset(void *dev)
{
	((struct reset_port *)dev)->val = 0;
}

static void port92_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct reset_port *p = dev;

	(void)off, (void)size;
	if (val & ~p->val & PORT92_RESET)
		vm_request_stop(p->pc.vm, STOP_RESET, 0, "guest reset (port 0x92)");
	p->val = val & (PORT92_RESET | PORT92_A20);
}

static void port92_reset(void *dev)
{
	((struct reset_port *)dev)->val = PORT92_A20;
}

/* Bochs's, and older QEMU's: the bytes of "Shutdown", one after the other, power off. */
static void shutdown_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	static const char word[8] = { 'S', 'h', 'u', 't', 'd', 'o', 'w', 'n' };
	struct reset_port *p = dev;

	(void)off, (void)size;
	p->val = val == (uint8_t)word[p->val] ? p->val + 1 : val == 'S';
	if (p->val < sizeof(word))
		return;
	p->val = 0;
	vm_request_stop(p->pc.vm, STOP_POWEROFF, 0, "guest powered off (port 0x8900)");
}

static const struct bus_ops cf9_ops = { port_read, cf9_write, 1, 1 };
static const struct bus_ops port92_ops = { port_read, port92_write, 1, 1 };
static const struct bus_ops shutdown_ops = { NULL, shutdown_write, 1, 1 };

static const struct pc_class cf9_class = {
	.name = "reset-control", .range = { { RESET_PORT, 1, &cf9_ops } }, .reset = zero_reset
};
static const struct bus_ops shared_ops = { shared_read, shared_write, 1, 4 };
static const struct pc_class shared_class = {
	.name = "reset-control",
	.range = { { CONFIG_ADDRESS, 4, &shared_ops } },
	.lockless = true,
	.reset = zero_reset,
	.done = shared_done,
};
static const struct pc_class port92_class = {
	.name = "port92", .range = { { 0x92, 1, &port92_ops } }, .reset = port92_reset
};
static const struct pc_class shutdown_class = {
	.name = "shutdown-port", .range = { { 0x8900, 1, &shutdown_ops } }, .reset = zero_reset
};

static int add(struct vm *vm, const struct pc_class *class, struct error *err)
{
	struct reset_port *p = calloc(1, sizeof(*p));

	if (!p)
		return error_set(err, ENOMEM, "no memory for %s", class->name);
	return pc_device_add(vm, &p->pc, class, 0, err);
}

/* The host bridge's CONFIG_ADDRESS, NULL on a machine without PCI. */
static struct bus_region *find_bridge(struct vm *vm)
{
	for (unsigned i = 0; i < vm->pio.nr; i++)
		if (vm->pio.region[i]->base == CONFIG_ADDRESS)
			return vm->pio.region[i];
	return NULL;
}

int reset_control_new(struct vm *vm, struct error *err)
{
	struct bus_region *bridge = find_bridge(vm);
	struct shared_reset *s;

	if (!bridge)
		return add(vm, &cf9_class, err);
	s = calloc(1, sizeof(*s));
	if (!s)
		return error_set(err, ENOMEM, "no memory for %s", shared_class.name);
	bus_init(&s->behind);
	bus_del(&vm->pio, bridge);
	bus_add(&s->behind, bridge, NULL);      /* an empty bus takes any region that was on another */
	return pc_device_add(vm, &s->port.pc, &shared_class, 0, err);
}

int port92_new(struct vm *vm, struct error *err)
{
	return add(vm, &port92_class, err);
}

int shutdown_port_new(struct vm *vm, struct error *err)
{
	return add(vm, &shutdown_class, err);
}
