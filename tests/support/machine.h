#ifndef MACHINE_H
#define MACHINE_H
/*
 * A machine for device tests: buses, interrupt lines and RAM without KVM, and a real I/O loop. What devices
 * ask of the VM is found in vm.stop, vm.panic_ns and vm.panic_how.
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/vm.h"

struct test_machine {
	struct vm_config cfg;
	struct vm vm;
};

static inline void machine_init(struct test_machine *m)
{
	static const struct gmem_region ram[] = { { .base = 0, .size = 32 << 20 },
		{ .base = 1ull << 32, .size = 1 << 20 } };
	struct error err;

	memset(m, 0, sizeof(*m));
	m->cfg.cpus = 3;
	m->vm.cfg = &m->cfg;
	m->vm.vm_fd = m->vm.kvm_fd = -1;
	m->vm.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&m->vm.stop_lock, NULL);
	bus_init(&m->vm.pio);
	bus_init(&m->vm.mmio);
	ck_assert_int_eq(irqchip_init(&m->vm.irqs, -1, &err), 0);
	ck_assert_int_eq(gmem_init(&m->vm.mem, ram, 2, false, &err), 0);
	m->vm.io = loop_new("io/0", LOOP_AUTO, 0, &err);
	ck_assert_ptr_nonnull(m->vm.io);
}

static inline void machine_done(struct test_machine *m)
{
	for (struct vm_device *d = m->vm.devices, *next; d; d = next) {
		next = d->next;
		if (d->free)
			d->free(d->dev);
		free(d);
	}
	loop_free(m->vm.io);
	for (unsigned i = 0; i < IRQ_LINES; i++)        /* nobody left a line up */
		ck_assert_uint_eq(m->vm.irqs.line_high[i], 0);
	ck_assert_uint_eq(m->vm.pio.nr + m->vm.mmio.nr, 0);
	irqchip_done(&m->vm.irqs);
	gmem_done(&m->vm.mem);
	bus_done(&m->vm.pio);
	bus_done(&m->vm.mmio);
	close(m->vm.wake_fd);
}

/* What vm_reset() does to the devices. */
static inline void machine_reset(struct test_machine *m)
{
	for (struct vm_device *d = m->vm.devices; d; d = d->next)
		if (d->reset)
			d->reset(d->dev);
	m->vm.stop = (struct vm_stop){ .cause = STOP_NONE };
	m->vm.panic_ns = 0;
	m->vm.panic_how = NULL;
}

static inline uint64_t in_size(struct test_machine *m, uint16_t port, unsigned size)
{
	uint64_t val;

	bus_read(&m->vm.pio, port, size, &val);
	return val;
}

static inline uint8_t inb(struct test_machine *m, uint16_t port)
{
	return (uint8_t)in_size(m, port, 1);
}

static inline void out_size(struct test_machine *m, uint16_t port, unsigned size, uint64_t val)
{
	bus_write(&m->vm.pio, port, size, val);
}

static inline void outb(struct test_machine *m, uint16_t port, uint8_t val)
{
	out_size(m, port, 1, val);
}

static inline bool line_is_high(struct test_machine *m, unsigned line)
{
	bool high;

	pthread_mutex_lock(&m->vm.irqs.lock);
	high = m->vm.irqs.line_high[line];
	pthread_mutex_unlock(&m->vm.irqs.lock);
	return high;
}
#endif
