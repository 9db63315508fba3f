#ifndef MOCK_DRIVER_H
#define MOCK_DRIVER_H
/*
 * The driver side of a virtio device, for unit tests: a machine without KVM (RAM, buses, an interrupt chip
 * and a real loop), one device on virtio-mmio, and what a well-behaved driver does with it. Whatever goes
 * wrong on the driver's side fails the test on the spot; nothing waits longer than MOCK_DEADLINE_MS.
 *
 *      struct mock *m = mock_new(LOOP_EPOLL);
 *      mock_create(m, &rng_class, "");                 or: vm_add_virtio(mock_vm(m), &my->v, NULL)
 *      mock_init(m, ~0ull);                            reset … DRIVER_OK, every queue set up
 *      struct mock_buf in = { mock_alloc(m, 64), 64 };
 *      ck_assert_uint_eq(mock_request(m, 0, NULL, 0, &in, 1), 64);
 *      mock_free(m);
 */
#include <stdbool.h>
#include <stdint.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include "vmm/virtio.h"
#include "vmm/vm.h"

#define MOCK_RAM         (16ull << 20)
#define MOCK_HOLE        (MOCK_RAM + 0x1000)    /* an address that is not RAM */
#define MOCK_DEADLINE_MS 60000

struct mock;

/* A piece of guest RAM, from mock_alloc() or made up. */
struct mock_buf {
	gpa_t at;
	uint32_t len;
};

struct mock *mock_new(enum loop_engine engine);
void mock_free(struct mock *m);                 /* the device with it */
struct vm *mock_vm(struct mock *m);
/* Create a device through its class, as the command line does; the test's to assert on: 0 or -errno. */
int mock_try_create(struct mock *m, const struct device_class *c, const char *args, struct error *err);
struct virtio *mock_create(struct mock *m, const struct device_class *c, const char *args);
struct virtio *mock_device(struct mock *m);     /* the first device of the machine */

/* Guest RAM: zeroed, aligned to 4 KiB if that large, else to 64 bytes. */
gpa_t mock_alloc(struct mock *m, uint32_t len);
void *mock_at(struct mock *m, gpa_t gpa, uint32_t len);

/* Registers (VIRTIO_MMIO_*) and configuration space. */
uint32_t mock_read(struct mock *m, unsigned reg);
void mock_write(struct mock *m, unsigned reg, uint32_t val);
uint64_t mock_config(struct mock *m, unsigned off, unsigned size);
void mock_config_write(struct mock *m, unsigned off, unsigned size, uint64_t val);
uint64_t mock_offered(struct mock *m);
uint8_t mock_status(struct mock *m);

/* Reset, accept what is both offered and wanted, set up all queues. What was accepted. */
uint64_t mock_setup(struct mock *m, uint64_t want);
uint64_t mock_init(struct mock *m, uint64_t want);      /* the same, and DRIVER_OK */
void mock_reset(struct mock *m);

/* The rings, to do mischief with. */
struct vring *mock_ring(struct mock *m, unsigned qi);

/* Make a chain available, readable buffers first; its head. Asserts that there is room. */
uint16_t mock_add(struct mock *m, unsigned qi, const struct mock_buf *out, unsigned nr_out,
	const struct mock_buf *in, unsigned nr_in);
void mock_offer(struct mock *m, unsigned qi, uint16_t head);   /* make any head available */
void mock_indirect(struct mock *m, bool on);            /* later mock_add()s use an indirect table */
void mock_kick(struct mock *m, unsigned qi);            /* unconditionally */

/* The next used chain, if there is one by now: its head and the bytes written. */
bool mock_used(struct mock *m, unsigned qi, uint16_t *head, uint32_t *written);
/* Wait for it by interrupt. False: the device needs a reset. */
bool mock_wait(struct mock *m, unsigned qi, uint16_t *head, uint32_t *written);
/* add, kick, wait; the bytes written. Asserts that this very chain came back. */
uint32_t mock_request(struct mock *m, unsigned qi, const struct mock_buf *out, unsigned nr_out,
	const struct mock_buf *in, unsigned nr_in);

void mock_wait_config(struct mock *m);          /* for a configuration interrupt */
void mock_wait_broken(struct mock *m);          /* for DEVICE_NEEDS_RESET */
void mock_settle(struct mock *m);               /* until the loop is through with all that was kicked before */
#endif
