#include <assert.h>
#include <errno.h>
#include <linux/pci_regs.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/pci.h"

/*
 * How this works. The guest's side (table, control register) runs under m->lock. The device's side,
 * msix_fire(), takes no lock, because the loop calls it while a vCPU may sit in a slow route change: it looks
 * at one word, live, which is true while the vector is enabled, unmasked and routed. If it is not, the
 * pending bit is set and live is looked at once more; whoever makes a vector live takes the pending bit after
 * that. One of the two sees the other, so a message is neither lost nor sent twice.
 */

#define ENTRY       PCI_MSIX_ENTRY_SIZE
#define MAX_VECTORS 2048u

struct vector {
	struct irq irq;
	uint32_t entry[ENTRY / 4];      /* address low, address high, data, control */
	_Atomic bool live, pending;
};

struct msix {
	/* const after msix_new() */
	struct pci_device *d;
	unsigned cap, nr;
	uint64_t pba;                   /* offset in the BAR */
	pthread_mutex_t lock;           /* guards entry[] and transitions of live */
	_Atomic bool enabled;
	bool masked;                    /* the function's mask bit; under lock */
	struct vector v[];
};

bool msix_enabled(const struct msix *m)
{
	return m->enabled;
}

void msix_fire(struct msix *m, unsigned vector)
{
	struct vector *v;

	if (vector >= m->nr || !m->enabled)
		return;
	v = &m->v[vector];
	if (!v->live) {
		v->pending = true;
		if (!v->live || !atomic_exchange(&v->pending, false))
			return;
	}
	irq_pulse(&v->irq);
}

/* Make live what should be, with the route the guest asks for. A route KVM refuses leaves it silent. */
static void settle(struct msix *m, struct vector *v)
{
	uint64_t addr = v->entry[0] | (uint64_t)v->entry[1] << 32;
	bool want = m->enabled && !m->masked && !(v->entry[3] & PCI_MSIX_ENTRY_CTRL_MASKBIT);

	if (!want || irq_msi_route(&v->irq, addr, v->entry[2])) {
		v->live = false;
		return;
	}
	v->live = true;
	if (atomic_exchange(&v->pending, false))
		irq_pulse(&v->irq);
}

static void settle_all(struct msix *m)
{
	for (unsigned i = 0; i < m->nr; i++)
		settle(m, &m->v[i]);
}

void msix_config_written(struct msix *m)
{
	uint16_t control = (uint16_t)(m->d->cfg[m->cap + PCI_MSIX_FLAGS] |
		m->d->cfg[m->cap + PCI_MSIX_FLAGS + 1] << 8);
	bool enabled = control & PCI_MSIX_FLAGS_ENABLE, masked = control & PCI_MSIX_FLAGS_MASKALL;

	pthread_mutex_lock(&m->lock);
	if (enabled != m->enabled || masked != m->masked) {
		m->enabled = enabled;
		m->masked = masked;
		settle_all(m);
	}
	pthread_mutex_unlock(&m->lock);
}

/* ---- the BAR: vCPU threads, under m->lock ---- */

static uint64_t pending_bits(const struct msix *m, uint64_t first)
{
	uint64_t bits = 0;

	for (unsigned i = 0; i < 64 && first + i < m->nr; i++)
		bits |= (uint64_t)m->v[first + i].pending << i;
	return bits;
}

static uint64_t bar_read(void *dev, uint64_t off, unsigned size)
{
	struct msix *m = dev;

	if (off % size)
		return UINT64_MAX;
	if (off < (uint64_t)ENTRY * m->nr) {
		const uint32_t *w = &m->v[off / ENTRY].entry[off % ENTRY / 4];

		return size == 8 ? w[0] | (uint64_t)w[1] << 32 : w[0];
	}
	if (off >= m->pba && off - m->pba < (m->nr + 63) / 64 * 8)
		return pending_bits(m, (off - m->pba) / 8 * 64) >> (off % 8 * 8);
	return UINT64_MAX;
}

static void bar_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct msix *m = dev;
	struct vector *v;

	if (off % size || off >= (uint64_t)ENTRY * m->nr)
		return;
	v = &m->v[off / ENTRY];
	for (unsigned i = 0; i < size / 4; i++) {
		unsigned word = off % ENTRY / 4 + i;

		v->entry[word] = (uint32_t)(val >> 32 * i);
		if (word == PCI_MSIX_ENTRY_VECTOR_CTRL / 4)
			v->entry[word] &= PCI_MSIX_ENTRY_CTRL_MASKBIT;
		if (word == 0)
			v->entry[word] &= ~3u;
	}
	settle(m, v);
}

static const struct bus_ops bar_ops = { bar_read, bar_write, 4, 8 };

/* ---- building ---- */

static void mask_all(struct msix *m)
{
	m->enabled = m->masked = false;
	for (unsigned i = 0; i < m->nr; i++) {
		memset(m->v[i].entry, 0, sizeof(m->v[i].entry));
		m->v[i].entry[3] = PCI_MSIX_ENTRY_CTRL_MASKBIT;
		m->v[i].live = m->v[i].pending = false;
	}
}

void msix_reset(struct msix *m)
{
	pthread_mutex_lock(&m->lock);
	mask_all(m);
	pthread_mutex_unlock(&m->lock);
}

void msix_free(struct msix *m)
{
	if (!m)
		return;
	for (unsigned i = 0; i < m->nr; i++)
		irq_done(&m->v[i].irq);
	pthread_mutex_destroy(&m->lock);
	free(m);
}

/* The capability, and in the BAR the table, then the pending bits. */
static int describe(struct msix *m, unsigned bar)
{
	uint32_t body[3] = { (m->nr - 1) << 16, bar, 0 };
	struct pci_bar *b = &m->d->bar[bar];
	int at;

	m->pba = 2048;
	while (m->pba < (uint64_t)ENTRY * m->nr)
		m->pba *= 2;
	body[2] = (uint32_t)m->pba | bar;
	*b = (struct pci_bar){ .size = 2 * m->pba,
		.region = { .name = m->d->name, .ops = &bar_ops, .dev = m, .lock = &m->lock } };
	at = pci_add_cap(m->d, PCI_CAP_ID_MSIX, body, sizeof(body));
	if (at < 0)
		return at;
	m->cap = (unsigned)at;
	m->d->writable[at + PCI_MSIX_FLAGS + 1] = (PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL) >> 8;
	return 0;
}

int msix_new(struct msix **ret, struct pci_device *d, unsigned bar, unsigned vectors,
	struct irqchip *irqs, struct error *err)
{
	struct msix *m;
	int r;

	assert(vectors && vectors <= MAX_VECTORS && bar < PCI_BARS);
	m = calloc(1, sizeof(*m) + vectors * sizeof(m->v[0]));
	if (!m)
		return error_errno(err, ENOMEM, "MSI-X");
	m->d = d;
	m->nr = vectors;
	pthread_mutex_init(&m->lock, NULL);
	mask_all(m);
	for (unsigned i = 0; i < vectors; i++) {
		r = irq_msi_init(&m->v[i].irq, irqs, err);
		if (r)
			goto fail;
	}
	r = describe(m, bar);
	if (r) {
		error_errno(err, -r, "%s: MSI-X capability", d->name);
		goto fail;
	}
	*ret = m;
	return 0;
fail:
	msix_free(m);
	return r;
}
