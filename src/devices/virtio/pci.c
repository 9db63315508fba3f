#include "vmm/pci.h"
#include <endian.h>
#include <errno.h>
#include <linux/pci_regs.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "transport.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * virtio over PCI (virtio 1.2, 4.1), modern only. BAR 0 holds the four structures, a page each; BAR 1 the
 * MSI-X table. Doorbells are two-byte writes to an address per queue and are bound to KVM wherever BAR 0
 * is at the moment. The configuration access capability is a third way to BAR 0 (4.1.4.9).
 *
 * Locks: configuration accesses hold the bus's lock and may then take v->lock (that third way); nothing that
 * holds v->lock asks for the bus's.
 */

#define VENDOR       0x1af4
#define DEVICE_BASE  0x1040
#define BAR          0
#define BAR_SIZE     0x4000
#define MSIX_BAR     1
#define COMMON       0x0000
#define ISR          0x1000
#define CONFIG       0x2000
#define NOTIFY       0x3000
#define COMMON_SIZE  0x38       /* up to and with queue_device */
#define NOTIFY_STEP  4
#define ISR_QUEUE    1u
#define ISR_CONFIG   2u

struct port {
	struct vm *vm;
	struct virtio *v;
	struct pci_device dev;
	struct msix *msix;
	unsigned window;                /* the configuration access capability */
	/* under v->lock */
	uint32_t features_sel, driver_features_sel;
	uint16_t queue_sel;
	/* any thread */
	_Atomic uint16_t config_vector, vector[VIRTIO_QUEUES];
};

/* ---- interrupts: any thread ---- */

static void raise_irq(struct port *p, uint32_t bit, uint16_t vector)
{
	if (msix_enabled(p->msix)) {
		msix_fire(p->msix, vector);     /* NO_VECTOR is out of range */
		return;
	}
	atomic_fetch_or(&p->v->isr, bit);
	pci_intx(&p->dev, true);
}

static void port_queue_irq(struct virtio *v, unsigned qi)
{
	struct port *p = v->port_priv;

	raise_irq(p, ISR_QUEUE, p->vector[qi]);
}

static void port_config_irq(struct virtio *v)
{
	struct port *p = v->port_priv;

	raise_irq(p, ISR_CONFIG, p->config_vector);
}

/* 4.1.4.5: reading clears and lowers the line. A bit set between the two raises it again: never lost. */
static uint32_t isr_read(struct port *p)
{
	uint32_t isr = atomic_exchange(&p->v->isr, 0);

	pci_intx(&p->dev, false);
	if (p->v->isr)
		pci_intx(&p->dev, true);
	return isr;
}

/* ---- BAR 0: vCPU threads, under v->lock ---- */

static uint32_t address_word(const struct virtq_cfg *q, unsigned off)
{
	gpa_t addr = off < VIRTIO_PCI_COMMON_Q_AVAILLO ? q->desc
		: off < VIRTIO_PCI_COMMON_Q_USEDLO    ? q->avail
						      : q->used;

	return (uint32_t)(off & 4 ? addr >> 32 : addr);
}

/* The aligned word of the common structure that off lies in. */
static uint32_t common_word(struct port *p, unsigned off)
{
	struct virtio *v = p->v;
	const struct virtq_cfg *q;

	switch (off) {
	case VIRTIO_PCI_COMMON_DFSELECT:
		return p->features_sel;
	case VIRTIO_PCI_COMMON_DF:
		return virtio_features(v, p->features_sel);
	case VIRTIO_PCI_COMMON_GFSELECT:
		return p->driver_features_sel;
	case VIRTIO_PCI_COMMON_GF:
		return virtio_accepted(v, p->driver_features_sel);
	case VIRTIO_PCI_COMMON_MSIX:
		return p->config_vector | v->nr_queues << 16;
	case VIRTIO_PCI_COMMON_STATUS:
		return virtio_status(v) | (virtio_config_generation(v) & 0xff) << 8 |
			(uint32_t)p->queue_sel << 16;
	default:
		break;
	}
	q = virtio_queue(v, p->queue_sel);
	if (off == VIRTIO_PCI_COMMON_Q_SIZE)
		return q ? q->size | (uint32_t)p->vector[p->queue_sel] << 16
			 : (uint32_t)VIRTIO_MSI_NO_VECTOR << 16;
	if (off == VIRTIO_PCI_COMMON_Q_ENABLE)
		return q ? q->ready | (uint32_t)p->queue_sel << 16 : 0;
	return q ? address_word(q, off) : 0;
}

static uint64_t common_read(struct port *p, unsigned off, unsigned size)
{
	if (off % size || off + size > COMMON_SIZE) {
		p->v->ignored++;
		return UINT64_MAX;
	}
	if (size == 8)
		return common_word(p, off) | (uint64_t)common_word(p, off + 4) << 32;
	return common_word(p, off & ~3u) >> (off & 3) * 8;
}

static uint16_t checked_vector(const struct port *p, uint64_t val)
{
	return val < p->v->nr_queues + 1 ? (uint16_t)val : VIRTIO_MSI_NO_VECTOR;
}

static void address_write(struct virtq_cfg *q, unsigned off, uint32_t val)
{
	gpa_t *addr = off < VIRTIO_PCI_COMMON_Q_AVAILLO ? &q->desc
		: off < VIRTIO_PCI_COMMON_Q_USEDLO     ? &q->avail
						       : &q->used;

	*addr = off & 4 ? (uint32_t)*addr | (gpa_t)val << 32 : (*addr & ~0xffffffffull) | val;
}

static void queue_write(struct port *p, unsigned off, unsigned size, uint64_t val)
{
	struct virtq_cfg *q;

	if (off == VIRTIO_PCI_COMMON_Q_MSIX && size == 2 && virtio_queue(p->v, p->queue_sel)) {
		p->vector[p->queue_sel] = checked_vector(p, val);
		return;
	}
	q = virtio_queue_edit(p->v, p->queue_sel);
	if (!q)
		return;
	if (off == VIRTIO_PCI_COMMON_Q_SIZE && size == 2)
		q->size = (uint16_t)val;
	else if (off == VIRTIO_PCI_COMMON_Q_ENABLE && size == 2 && val == 1)
		q->ready = true;        /* 4.1.4.3.2: nobody may write 0 */
	else if (off >= VIRTIO_PCI_COMMON_Q_DESCLO && size == 4)
		address_write(q, off, (uint32_t)val);
	else
		p->v->ignored++;
}

static void status_write(struct port *p, uint8_t status)
{
	virtio_set_status(p->v, status);
	if (status)
		return;
	pci_intx(&p->dev, false);
	p->config_vector = VIRTIO_MSI_NO_VECTOR;
	for (unsigned i = 0; i < VIRTIO_QUEUES; i++)
		p->vector[i] = VIRTIO_MSI_NO_VECTOR;
}

/* 4.1.3.1: each field in its own width; 64-bit fields also in halves. */
static void common_write(struct port *p, unsigned off, unsigned size, uint64_t val)
{
	if (off % size || off + size > COMMON_SIZE) {
		p->v->ignored++;
	} else if (size == 8) {
		common_write(p, off, 4, (uint32_t)val);
		common_write(p, off + 4, 4, val >> 32);
	} else if (off == VIRTIO_PCI_COMMON_DFSELECT && size == 4) {
		p->features_sel = (uint32_t)val;
	} else if (off == VIRTIO_PCI_COMMON_GFSELECT && size == 4) {
		p->driver_features_sel = (uint32_t)val;
	} else if (off == VIRTIO_PCI_COMMON_GF && size == 4) {
		virtio_ack_features(p->v, p->driver_features_sel, (uint32_t)val);
	} else if (off == VIRTIO_PCI_COMMON_MSIX && size == 2) {
		p->config_vector = checked_vector(p, val);
	} else if (off == VIRTIO_PCI_COMMON_STATUS && size == 1) {
		status_write(p, (uint8_t)val);
	} else if (off == VIRTIO_PCI_COMMON_Q_SELECT && size == 2) {
		p->queue_sel = (uint16_t)val;
	} else if (off >= VIRTIO_PCI_COMMON_Q_SIZE) {
		queue_write(p, off, size, val);
	} else {
		p->v->ignored++;
	}
}

static uint64_t bar_read(void *dev, uint64_t off, unsigned size)
{
	struct port *p = dev;

	if (off < ISR)
		return common_read(p, (unsigned)off, size);
	if (off == ISR)
		return isr_read(p);
	if (off >= CONFIG && off < NOTIFY)
		return virtio_config_read(p->v, (uint32_t)off - CONFIG, size);
	p->v->ignored++;
	return off >= NOTIFY && off < BAR_SIZE ? 0 : UINT64_MAX;
}

static void bar_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct port *p = dev;

	if (off < ISR)
		common_write(p, (unsigned)off, size, val);
	else if (off >= CONFIG && off < NOTIFY)
		virtio_config_write(p->v, (uint32_t)off - CONFIG, size, val);
	else if (off >= NOTIFY && off < BAR_SIZE && (off - NOTIFY) % NOTIFY_STEP == 0)
		virtio_kick(p->v, (uint32_t)(off - NOTIFY) / NOTIFY_STEP);
	else
		p->v->ignored++;
}

static const struct bus_ops bar_ops = { bar_read, bar_write, 1, 8 };

/* ---- configuration space: vCPU threads, under the bus's lock ---- */

static uint32_t cfg32(const struct port *p, size_t field)
{
	uint32_t val;

	memcpy(&val, &p->dev.cfg[p->window + field], sizeof(val));
	return le32toh(val);
}

/* Where the window points: false unless it is an aligned access of 1, 2 or 4 bytes wholly in BAR 0. */
static bool window_at(const struct port *p, uint32_t *off, unsigned *size)
{
	uint32_t len = cfg32(p, offsetof(struct virtio_pci_cap, length));

	*off = cfg32(p, offsetof(struct virtio_pci_cap, offset));
	*size = len;
	return p->dev.cfg[p->window + offsetof(struct virtio_pci_cap, bar)] == BAR &&
		(len == 1 || len == 2 || len == 4) && !(*off % len) && *off < BAR_SIZE &&
		len <= BAR_SIZE - *off;
}

static bool on_window(const struct port *p, unsigned off, unsigned size)
{
	unsigned data = p->window + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data);

	return off < data + 4 && off + size > data;
}

static void port_config_reading(struct pci_device *d, unsigned off, unsigned size)
{
	struct port *p = container_of(d, struct port, dev);
	uint32_t at, val;
	unsigned len;

	if (!on_window(p, off, size) || !window_at(p, &at, &len))
		return;
	pthread_mutex_lock(&p->v->lock);
	val = htole32((uint32_t)bar_read(p, at, len));
	pthread_mutex_unlock(&p->v->lock);
	memcpy(&d->cfg[p->window + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data)], &val, len);
}

static void port_config_written(struct pci_device *d, unsigned off, unsigned size)
{
	struct port *p = container_of(d, struct port, dev);
	unsigned len;
	uint32_t at, val;

	msix_config_written(p->msix);
	if (!on_window(p, off, size) || !window_at(p, &at, &len))
		return;
	val = cfg32(p, offsetof(struct virtio_pci_cfg_cap, pci_cfg_data));
	pthread_mutex_lock(&p->v->lock);
	bar_write(p, at, len, len == 4 ? val : val & ((1u << 8 * len) - 1));
	pthread_mutex_unlock(&p->v->lock);
}

static void port_bar_moved(struct pci_device *d, unsigned bar, bool mapped)
{
	struct port *p = container_of(d, struct port, dev);

	if (bar != BAR)
		return;
	for (unsigned i = 0; i < p->v->nr_queues; i++)
		virtio_bell_bind(p->vm, p->v, i, d->bar[BAR].region.base + NOTIFY + i * NOTIFY_STEP, 2,
			false, mapped);
}

/* ---- building: main thread ---- */

static void port_reset(struct virtio *v)
{
	struct port *p = v->port_priv;

	p->features_sel = p->driver_features_sel = 0;
	p->queue_sel = 0;
	msix_reset(p->msix);
	status_write(p, 0);
}

static void port_free(struct virtio *v)
{
	struct port *p = v->port_priv;

	pci_del(&p->dev);
	msix_free(p->msix);
	free(p);
}

static const struct virtio_transport_ops port_ops = {
	.queue_irq = port_queue_irq,
	.config_irq = port_config_irq,
	.reset = port_reset,
	.free = port_free,
};

static uint32_t class_of(uint16_t id)
{
	switch (id) {
	case VIRTIO_ID_NET:
		return 0x020000;
	case VIRTIO_ID_BLOCK:
		return 0x010000;
	case VIRTIO_ID_CONSOLE:
		return 0x078000;
	default:
		return 0x00ff00;        /* unclassified */
	}
}

static int add_cap(struct port *p, uint8_t type, uint32_t off, uint32_t len)
{
	struct virtio_pci_notify_cap c = {
		.cap = { .cap_len = sizeof(struct virtio_pci_cap), .cfg_type = type, .bar = BAR,
			.offset = htole32(off), .length = htole32(len) },
		.notify_off_multiplier = htole32(NOTIFY_STEP),
	};

	/* Two are longer by a word: the notify multiplier, the window's data. */
	if (type == VIRTIO_PCI_CAP_NOTIFY_CFG || type == VIRTIO_PCI_CAP_PCI_CFG)
		c.cap.cap_len = sizeof(c);
	if (type == VIRTIO_PCI_CAP_PCI_CFG)
		c.notify_off_multiplier = 0;
	return pci_add_cap(&p->dev, PCI_CAP_ID_VNDR, &c, c.cap.cap_len);
}

/* The window's bar, offset, length and data are the driver's to write. */
static void open_window(struct port *p)
{
	uint8_t *w = &p->dev.writable[p->window];

	w[offsetof(struct virtio_pci_cap, bar)] = 0xff;
	memset(w + offsetof(struct virtio_pci_cap, offset), 0xff, 12);
}

static int add_caps(struct port *p, struct error *err)
{
	const struct {
		uint8_t type;
		uint32_t off, len;
	} caps[] = {
		{ VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_SIZE },
		{ VIRTIO_PCI_CAP_ISR_CFG, ISR, 1 },
		{ VIRTIO_PCI_CAP_DEVICE_CFG, CONFIG, p->v->config_len },
		{ VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, p->v->nr_queues * NOTIFY_STEP },
		{ VIRTIO_PCI_CAP_PCI_CFG, 0, 0 },
	};
	int at = msix_new(&p->msix, &p->dev, MSIX_BAR, p->v->nr_queues + 1, &p->vm->irqs, err);

	if (at)
		return at;
	for (size_t i = 0; i < ARRAY_LEN(caps); i++) {
		if (caps[i].type == VIRTIO_PCI_CAP_DEVICE_CFG && !p->v->config_len)
			continue;       /* 4.1.4.6: only for devices that have one */
		at = add_cap(p, caps[i].type, caps[i].off, caps[i].len);
		if (at < 0)
			return error_errno(err, -at, "%s: capabilities", p->v->name);
	}
	p->window = (unsigned)at;
	open_window(p);
	return 0;
}

int virtio_pci_new(struct vm *vm, struct virtio *v, struct error *err)
{
	struct port *p = calloc(1, sizeof(*p));
	int r;

	if (!p)
		return error_errno(err, ENOMEM, "virtio-pci");
	p->vm = vm;
	p->v = v;
	p->config_vector = VIRTIO_MSI_NO_VECTOR;
	for (unsigned i = 0; i < VIRTIO_QUEUES; i++)
		p->vector[i] = VIRTIO_MSI_NO_VECTOR;
	p->dev = (struct pci_device){
		.name = v->name,
		.vendor = VENDOR,
		.device = DEVICE_BASE + v->ops->id,
		.sub_vendor = VENDOR,
		.sub_device = DEVICE_BASE + v->ops->id,
		.class_code = class_of(v->ops->id),
		.revision = 1,
		.intx = true,
		.bar[BAR] = { .size = BAR_SIZE,
			.region = { .name = v->name, .ops = &bar_ops, .dev = p, .lock = &v->lock } },
		.config_reading = port_config_reading,
		.config_written = port_config_written,
		.bar_moved = port_bar_moved,
	};
	r = virtio_attach(v, &vm->mem, v->home ? v->home : vm->io, &port_ops, p, err);
	if (r)
		goto no_device;
	r = add_caps(p, err);
	if (!r)
		r = pci_add(vm->pci, &p->dev, err);
	if (!r)
		return 0;
	msix_free(p->msix);
	virtio_detach(v);
no_device:
	free(p);
	return r;
}
