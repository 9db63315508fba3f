#ifndef VMM_VIRTIO_H
#define VMM_VIRTIO_H
/*
 * The virtio core (virtio 1.2, 2 and 3): status machine, features, queues, configuration space. Devices
 * and transports are two const tables that never touch each other.
 *
 * To add a device: one file src/devices/virtio/foo.c with a struct that embeds a struct virtio, one const
 * struct virtio_ops and one const struct device_class (vmm/vm.h); one line in src/devices/table.c; one in
 * src/devices/virtio/meson.build. The class's create() reads its options, fills the struct with virtio_init()
 * and virtio_add_queue(), and hands it to vm_add_virtio(). From then on the core calls the ops, all on the
 * home loop:
 *
 *      start    the driver said DRIVER_OK; v->vq[i] is live, or NULL where the driver has no such queue
 *      notify   buffers were added to a queue; also called once after start for rings filled before it
 *      stop     the driver resets, or the machine does; after it the rings are gone
 *
 * Between start and stop the device pops chains, works, pushes them back; the core publishes what was pushed
 * and raises at most one interrupt a queue at the end of the loop's turn. A ring that breaks the rules is
 * found by virtq_pop(), which breaks the device: DEVICE_NEEDS_RESET, pops fail, pushes are swallowed. A device
 * does the same with virtio_break() for a request that its own rules forbid. Requests in flight then simply
 * finish; the driver's reset calls stop.
 *
 * A device that stops popping before the ring is empty (no room, nothing to deliver) must come back by
 * itself: it is not told again about buffers it already could have had.
 */
#include <pthread.h>
#include <stdatomic.h>
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/virtq.h"
struct error;
struct facts;
struct virtio;

#define VIRTIO_QUEUES      34   /* most queues of one device: console with 16 ports */
#define VIRTIO_CONFIG_SIZE 256

/* One const table per device class. */
struct virtio_ops {
	const char *name;               /* "blk": for logs and the result file */
	uint16_t id;                    /* virtio 1.2, 5 */

	/* Home loop only; start, stop and notify may be NULL. */
	/*
	 * DRIVER_OK: v->vq[] of ready queues are live. 0, or -errno with everything undone: the device is
	 * broken until the driver resets it, and stop is not called.
	 */
	int  (*start)(struct virtio *v);
	/* On return no guest byte is referenced and nothing is in flight. */
	void (*stop)(struct virtio *v);
	void (*notify)(struct virtio *v, struct virtq *q);      /* the driver made buffers available */
	/*
	 * The driver wrote size (1, 2, 4 or 8) bytes at off, wholly within config_len; started or not.
	 * Nothing is stored: the device does that with virtio_config_set(). NULL: nothing is writable.
	 */
	void (*config_write)(struct virtio *v, unsigned off, unsigned size, uint64_t val);

	/* Main thread, no vCPU runs; for the result file; optional. */
	void (*facts)(struct virtio *v, struct facts *f);
	/* Main thread, device stopped, the process about to end: let go of other processes, write out what is only in memory; optional. */
	void (*finish)(struct virtio *v);
	/* Main thread, device stopped, after finish or not. Frees the struct the virtio is embedded in. */
	void (*free)(struct virtio *v);
};

/* One const table per transport: mmio.c, pci.c. */
struct virtio_transport_ops {
	void (*queue_irq)(struct virtio *v, unsigned qi);       /* any thread */
	void (*config_irq)(struct virtio *v);                   /* any thread */
	/* Main thread, device stopped: back to power-on; off the bus. */
	void (*reset)(struct virtio *v);
	void (*free)(struct virtio *v);
};

/* A queue's doorbell: an eventfd that KVM, or virtio_kick(), writes to. */
struct virtio_bell {
	struct loop_event event;
	struct virtio *v;
};

struct virtio {
	/* const after build */
	const struct virtio_ops *ops;
	const struct virtio_transport_ops *port;
	void *port_priv;
	const struct gmem *mem;
	struct loop *home;      /* NULL before vm_add_virtio(): the common one */
	uint64_t features;      /* offered; the core adds VERSION_1, INDIRECT_DESC, EVENT_IDX */
	unsigned nr_queues;
	uint16_t queue_size[VIRTIO_QUEUES];     /* maximum of each */
	unsigned config_len;
	char name[24];                          /* "blk0", "net0" */

	/* transport half: v->lock, held over loop_call() by vCPU and main threads, never taken by a loop */
	pthread_mutex_t lock;
	uint8_t status;
	uint64_t acked;                         /* const while DRIVER_OK: a device may read it */
	struct virtq_cfg cfg[VIRTIO_QUEUES];    /* const while DRIVER_OK */
	uint64_t ignored;                       /* guest accesses that had no effect */

	/* device half: home loop only */
	bool listening;                         /* bells are on the loop; from the first start on */
	bool running;                           /* between start and stop; also read under lock */
	struct virtq *vq[VIRTIO_QUEUES];        /* NULL: not set up by the driver */
	struct virtq *rings;                    /* what vq[] points into */
	struct virtio_bell bell[VIRTIO_QUEUES]; /* event.fd valid after build */
	struct loop_task flush;
	struct loop_poll poll;

	/* both halves */
	_Atomic uint8_t config[VIRTIO_CONFIG_SIZE];
	_Atomic uint32_t config_gen;            /* odd while the device writes config[] */
	_Atomic uint32_t isr;                   /* bit 0: a queue, bit 1: configuration */
	_Atomic bool broken;                    /* DEVICE_NEEDS_RESET */
	_Atomic bool flushing;                  /* flush is on its way to the end of a turn */
	_Atomic uint64_t driver_ok_ns;          /* CLOCK_MONOTONIC of the first DRIVER_OK, 0: never */
	_Atomic uint64_t kicks, irqs;           /* doorbells the loop took, interrupts raised */
	struct log_limit limit;
};

/*
 * For devices, main thread, while the VM is built. virtio_init() fills the struct that the device
 * embeds; then virtio_add_queue() once per queue; then vm_add_virtio() of vm.h puts it on the machine.
 */
void virtio_init(struct virtio *v, const struct virtio_ops *ops, uint64_t features,
	unsigned config_len);
/* The new queue's index. max_size: a power of two up to VIRTQ_MAX. */
unsigned virtio_add_queue(struct virtio *v, uint16_t max_size);

/* For devices, home loop (or main while the VM is built). */
bool virtio_has(const struct virtio *v, unsigned feature_bit);          /* offered and accepted */
/* Store into the configuration space: a new generation, but no interrupt. */
void virtio_config_set(struct virtio *v, unsigned off, const void *src, unsigned len);
void virtio_config_changed(struct virtio *v);           /* tell a started driver to read it again */
__attribute__((format(printf, 2, 3)))
void virtio_break(struct virtio *v, const char *fmt, ...);              /* NEEDS_RESET, rate-limited log */

/* For the machine: bind to memory and loop, make the eventfds. Main thread. On failure nothing is kept. */
int  virtio_attach(struct virtio *v, const struct gmem *mem, struct loop *home,
	const struct virtio_transport_ops *port, void *port_priv, struct error *err);
void virtio_detach(struct virtio *v);           /* main thread: undoes virtio_attach() before the VM ran */
void virtio_reset(struct virtio *v);            /* main thread, no vCPU runs */
void virtio_settle(struct virtio *v);           /* same: the device has looked at all its driver made available */
void virtio_free(struct virtio *v);             /* main thread; stops it, then port->free, then ops->free */
/* Main thread, no vCPU runs: the facts all devices have, and ops->facts. */
void virtio_describe(struct virtio *v, struct facts *f);

/*
 * For transports, under v->lock, on vCPU threads. Every index, offset and width is the guest's word and is
 * checked here; what has no effect is counted in v->ignored.
 */
const struct virtq_cfg *virtio_queue(struct virtio *v, uint32_t sel);   /* NULL if no such queue */
struct virtq_cfg *virtio_queue_edit(struct virtio *v, uint32_t sel);    /* also NULL from DRIVER_OK to reset */
uint32_t virtio_features(struct virtio *v, uint32_t sel);               /* offered; 32 bits at sel * 32 */
uint32_t virtio_accepted(struct virtio *v, uint32_t sel);               /* what the driver wrote */
void virtio_ack_features(struct virtio *v, uint32_t sel, uint32_t bits);
uint8_t virtio_status(struct virtio *v);
void virtio_set_status(struct virtio *v, uint8_t status);               /* may loop_call() start or stop */
uint32_t virtio_config_generation(struct virtio *v);
uint64_t virtio_config_read(struct virtio *v, uint32_t off, unsigned size); /* bytes past the end: 0 */
void virtio_config_write(struct virtio *v, uint32_t off, unsigned size, uint64_t val); /* may loop_call() */
void virtio_kick(struct virtio *v, uint32_t qi);                        /* doorbell that came by exit */
#endif
