#include <errno.h>
#include <linux/virtio_mmio.h>
#include <stdlib.h>
#include "transport.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * virtio over MMIO (virtio 1.2, 4.2.2), version 2. Registers are 4 bytes wide; the configuration space from
 * 0x100 on takes any width. Doorbells are bound to KVM by the value written, one eventfd a queue.
 */

#define VENDOR 0x4d4d56         /* "VMM" */

struct mmio {
	struct vm *vm;
	struct virtio *v;
	struct bus_region region;
	struct irq irq;
	/* under v->lock */
	uint32_t queue_sel, features_sel, driver_features_sel;
};

static void raise_irq(struct virtio *v, uint32_t bit)
{
	struct mmio *m = v->port_priv;

	atomic_fetch_or(&v->isr, bit);
	irq_pulse(&m->irq);
}

static void mmio_queue_irq(struct virtio *v, unsigned qi)
{
	(void)qi;
	raise_irq(v, VIRTIO_MMIO_INT_VRING);
}

static void mmio_config_irq(struct virtio *v)
{
	raise_irq(v, VIRTIO_MMIO_INT_CONFIG);
}

static uint32_t reg_read(struct mmio *m, uint64_t off)
{
	struct virtio *v = m->v;
	const struct virtq_cfg *q;

	switch (off) {
	case VIRTIO_MMIO_MAGIC_VALUE:
		return 0x74726976;
	case VIRTIO_MMIO_VERSION:
		return 2;
	case VIRTIO_MMIO_DEVICE_ID:
		return v->ops->id;
	case VIRTIO_MMIO_VENDOR_ID:
		return VENDOR;
	case VIRTIO_MMIO_DEVICE_FEATURES:
		return virtio_features(v, m->features_sel);
	case VIRTIO_MMIO_QUEUE_NUM_MAX:
		q = virtio_queue(v, m->queue_sel);
		return q ? q->max : 0;
	case VIRTIO_MMIO_QUEUE_READY:
		q = virtio_queue(v, m->queue_sel);
		return q ? q->ready : 0;
	case VIRTIO_MMIO_INTERRUPT_STATUS:
		return v->isr;
	case VIRTIO_MMIO_STATUS:
		return virtio_status(v);
	case VIRTIO_MMIO_CONFIG_GENERATION:
		return virtio_config_generation(v);
	case VIRTIO_MMIO_SHM_LEN_LOW:   /* 4.2.2: no such region reads as length and base of all ones */
	case VIRTIO_MMIO_SHM_LEN_HIGH:
	case VIRTIO_MMIO_SHM_BASE_LOW:
	case VIRTIO_MMIO_SHM_BASE_HIGH:
		return UINT32_MAX;
	default:
		v->ignored++;
		return 0;
	}
}

static void set_half(gpa_t *addr, bool high, uint32_t val)
{
	*addr = high ? (uint32_t)*addr | (gpa_t)val << 32 : (*addr & ~0xffffffffull) | val;
}

static void queue_write(struct mmio *m, uint64_t off, uint32_t val)
{
	struct virtq_cfg *q = virtio_queue_edit(m->v, m->queue_sel);

	if (!q)
		return;
	switch (off) {
	case VIRTIO_MMIO_QUEUE_NUM:
		q->size = val > UINT16_MAX ? 0 : val;   /* 0 is refused at the start, as is what is too large */
		break;
	case VIRTIO_MMIO_QUEUE_READY:
		q->ready = val & 1;
		break;
	case VIRTIO_MMIO_QUEUE_DESC_LOW:
	case VIRTIO_MMIO_QUEUE_DESC_HIGH:
		set_half(&q->desc, off == VIRTIO_MMIO_QUEUE_DESC_HIGH, val);
		break;
	case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
	case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
		set_half(&q->avail, off == VIRTIO_MMIO_QUEUE_AVAIL_HIGH, val);
		break;
	case VIRTIO_MMIO_QUEUE_USED_LOW:
	case VIRTIO_MMIO_QUEUE_USED_HIGH:
		set_half(&q->used, off == VIRTIO_MMIO_QUEUE_USED_HIGH, val);
		break;
	default:
		m->v->ignored++;
	}
}

static void reg_write(struct mmio *m, uint64_t off, uint32_t val)
{
	struct virtio *v = m->v;

	switch (off) {
	case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
		m->features_sel = val;
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES_SEL:
		m->driver_features_sel = val;
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES:
		virtio_ack_features(v, m->driver_features_sel, val);
		break;
	case VIRTIO_MMIO_QUEUE_SEL:
		m->queue_sel = val;
		break;
	case VIRTIO_MMIO_QUEUE_NOTIFY:
		virtio_kick(v, val);
		break;
	case VIRTIO_MMIO_INTERRUPT_ACK:
		atomic_fetch_and(&v->isr, ~val);
		break;
	case VIRTIO_MMIO_STATUS:
		virtio_set_status(v, (uint8_t)val);
		break;
	case VIRTIO_MMIO_SHM_SEL:
		break;
	default:
		queue_write(m, off, val);
	}
}

static uint64_t mmio_read(void *dev, uint64_t off, unsigned size)
{
	struct mmio *m = dev;

	if (off >= VIRTIO_MMIO_CONFIG)
		return virtio_config_read(m->v, (uint32_t)(off - VIRTIO_MMIO_CONFIG), size);
	if (size == 4 && !(off & 3))
		return reg_read(m, off);
	m->v->ignored++;
	return UINT64_MAX;
}

static void mmio_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct mmio *m = dev;

	if (off >= VIRTIO_MMIO_CONFIG)
		virtio_config_write(m->v, (uint32_t)(off - VIRTIO_MMIO_CONFIG), size, val);
	else if (size == 4 && !(off & 3))
		reg_write(m, off, (uint32_t)val);
	else
		m->v->ignored++;
}

static const struct bus_ops mmio_bus_ops = { mmio_read, mmio_write, 1, 8 };

static void mmio_reset(struct virtio *v)
{
	struct mmio *m = v->port_priv;

	m->queue_sel = m->features_sel = m->driver_features_sel = 0;
}

static void bind_bells(struct mmio *m, bool on)
{
	for (unsigned i = 0; i < m->v->nr_queues; i++)
		virtio_bell_bind(m->vm, m->v, i, m->region.base + VIRTIO_MMIO_QUEUE_NOTIFY, 4, true, on);
}

static void mmio_free(struct virtio *v)
{
	struct mmio *m = v->port_priv;

	bus_del(&m->vm->mmio, &m->region);
	bind_bells(m, false);
	irq_done(&m->irq);
	free(m);
}

static const struct virtio_transport_ops mmio_ops = {
	.queue_irq = mmio_queue_irq,
	.config_irq = mmio_config_irq,
	.reset = mmio_reset,
	.free = mmio_free,
};

int virtio_mmio_new(struct vm *vm, struct virtio *v, gpa_t base, unsigned gsi, struct error *err)
{
	auto_free struct mmio *m = calloc(1, sizeof(*m));
	int r;

	if (!m)
		return error_errno(err, ENOMEM, "virtio-mmio");
	m->vm = vm;
	m->v = v;
	m->region = (struct bus_region){ .name = v->name, .base = base, .size = VIRTIO_MMIO_SIZE,
		.ops = &mmio_bus_ops, .dev = m, .lock = &v->lock };
	r = irq_line_init(&m->irq, &vm->irqs, gsi, false, err);
	if (r)
		return r;
	r = virtio_attach(v, &vm->mem, v->home ? v->home : vm->io, &mmio_ops, m, err);
	if (r)
		goto no_irq;
	r = bus_add(&vm->mmio, &m->region, err);
	if (r)
		goto detach;
	bind_bells(m, true);
	m = NULL;       /* the device's now */
	return 0;
detach:
	virtio_detach(v);
no_irq:
	irq_done(&m->irq);
	return r;
}

int virtio_mmio_irq_fd(const struct virtio *v)
{
	const struct mmio *m = v->port_priv;

	return m->irq.efd;
}
