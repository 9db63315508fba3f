#include "vmm/irq.h"
#include <assert.h>
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

/* Hand KVM the whole table: lines to the PIC and IOAPIC, messages as the guest wrote them. Under the lock. */
static int push_routes(struct irqchip *c)
{
	auto_free struct kvm_irq_routing *t = NULL;
	unsigned n = 0;

	if (c->vm_fd < 0)
		return 0;
	t = calloc(1, sizeof(*t) + (2 * IRQ_LINES + c->nr_msis) * sizeof(t->entries[0]));
	if (!t)
		return -ENOMEM;
	for (unsigned i = 0; i < IRQ_LINES; i++) {
		struct kvm_irq_routing_entry *e;

		/* The PIT (line 0) is wired to IOAPIC pin 2; line 2 is the cascade. */
		if (i != 2) {
			e = &t->entries[n++];
			e->gsi = i;
			e->type = KVM_IRQ_ROUTING_IRQCHIP;
			e->u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
			e->u.irqchip.pin = i == 0 ? 2 : i;
		}
		if (i >= 16)
			continue;
		e = &t->entries[n++];
		e->gsi = i;
		e->type = KVM_IRQ_ROUTING_IRQCHIP;
		e->u.irqchip.irqchip = i < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
		e->u.irqchip.pin = i & 7;
	}
	for (unsigned i = 0; i < c->nr_msis; i++) {
		struct kvm_irq_routing_entry *e = &t->entries[n];

		if (!c->msi[i].used || !c->msi[i].addr)
			continue;
		e->gsi = IRQ_LINES + i;
		e->type = KVM_IRQ_ROUTING_MSI;
		e->u.msi.address_lo = (uint32_t)c->msi[i].addr;
		e->u.msi.address_hi = c->msi[i].addr >> 32;
		e->u.msi.data = c->msi[i].data;
		n++;
	}
	t->nr = n;
	return ioctl(c->vm_fd, KVM_SET_GSI_ROUTING, t) ? -errno : 0;
}

int irqchip_init(struct irqchip *c, int vm_fd, struct error *err)
{
	int r;

	*c = (struct irqchip){ .vm_fd = vm_fd };
	pthread_mutex_init(&c->lock, NULL);
	r = push_routes(c);
	return r ? error_errno(err, -r, "cannot set the interrupt routes") : 0;
}

void irqchip_done(struct irqchip *c)
{
	free(c->msi);
	pthread_mutex_destroy(&c->lock);
}

static int irqfd(struct irqchip *c, int efd, uint32_t gsi, uint32_t flags)
{
	struct kvm_irqfd f = { .fd = (uint32_t)efd, .gsi = gsi, .flags = flags };

	if (c->vm_fd < 0)
		return 0;
	return ioctl(c->vm_fd, KVM_IRQFD, &f) ? -errno : 0;
}

int irq_line_init(struct irq *i, struct irqchip *c, unsigned line, bool level, struct error *err)
{
	int r;

	assert(line < IRQ_LINES);
	*i = (struct irq){ .chip = c, .gsi = line, .efd = -1, .level = level, .routed = true };
	if (level)
		return 0;
	i->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (i->efd < 0)
		return error_errno(err, errno, "cannot create an eventfd");
	r = irqfd(c, i->efd, line, 0);
	if (r) {
		close(i->efd);
		*i = (struct irq){ 0 };
		return error_errno(err, -r, "cannot bind interrupt line %u", line);
	}
	return 0;
}

/* A free message, in a table that grows as they are asked for; IRQ_MSIS if there is none. Under the lock. */
static unsigned take_msi(struct irqchip *c)
{
	unsigned n = 0, more;
	struct irq_route *t;

	while (n < c->nr_msis && c->msi[n].used)
		n++;
	if (n == c->nr_msis) {
		more = MIN(MAX(2 * c->nr_msis, 16u), IRQ_MSIS);
		t = more > n ? realloc(c->msi, more * sizeof(*t)) : NULL;
		if (!t)
			return IRQ_MSIS;
		memset(t + n, 0, (more - n) * sizeof(*t));
		c->msi = t;
		c->nr_msis = more;
	}
	c->msi[n] = (struct irq_route){ .used = true };
	return n;
}

int irq_msi_init(struct irq *i, struct irqchip *c, struct error *err)
{
	unsigned n;

	*i = (struct irq){ .efd = -1 };
	pthread_mutex_lock(&c->lock);
	n = take_msi(c);
	pthread_mutex_unlock(&c->lock);
	if (n == IRQ_MSIS)
		return error_set(err, ENOSPC, "all %u message interrupts are taken", IRQ_MSIS);
	*i = (struct irq){ .chip = c, .gsi = IRQ_LINES + n };
	i->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (i->efd < 0) {
		int e = errno;

		irq_done(i);
		return error_errno(err, e, "cannot create an eventfd");
	}
	return 0;
}

int irq_msi_route(struct irq *i, uint64_t addr, uint32_t data)
{
	struct irqchip *c = i->chip;
	struct irq_route *r, was;
	int ret = 0;

	pthread_mutex_lock(&c->lock);
	r = &c->msi[i->gsi - IRQ_LINES];
	was = *r;
	if (was.addr != addr || was.data != data || !i->routed) {
		r->addr = addr;
		r->data = data;
		ret = push_routes(c);
		if (!ret && !i->routed)
			ret = irqfd(c, i->efd, i->gsi, 0);
		if (ret)
			*r = was;       /* a message KVM refuses: keep what worked */
		else
			i->routed = true;
	}
	pthread_mutex_unlock(&c->lock);
	return ret;
}

void irq_done(struct irq *i)
{
	struct irqchip *c = i->chip;

	if (!c)
		return;
	if (i->level)
		irq_set(i, false);
	if (i->efd >= 0) {
		if (i->routed)
			irqfd(c, i->efd, i->gsi, KVM_IRQFD_FLAG_DEASSIGN);
		close(i->efd);
	}
	if (i->gsi >= IRQ_LINES) {
		pthread_mutex_lock(&c->lock);
		c->msi[i->gsi - IRQ_LINES] = (struct irq_route){ 0 };
		pthread_mutex_unlock(&c->lock);
	}
	*i = (struct irq){ 0 };
}

void irq_set(struct irq *i, bool high)
{
	struct irqchip *c = i->chip;

	assert(i->level);
	pthread_mutex_lock(&c->lock);
	if (i->high != high) {
		uint32_t *n = &c->line_high[i->gsi];
		bool was = *n;

		i->high = high;
		*n += high ? 1 : -1;
		if (was != !!*n && c->vm_fd >= 0) {
			struct kvm_irq_level l = { .irq = i->gsi, .level = !!*n };

			ioctl(c->vm_fd, KVM_IRQ_LINE, &l);
		}
	}
	pthread_mutex_unlock(&c->lock);
}

void irq_pulse(struct irq *i)
{
	uint64_t one = 1;

	assert(!i->level);
	/* EAGAIN would mean 2^64 pulses nobody took: the interrupt is pending all the same. */
	if (write(i->efd, &one, sizeof(one)) < 0)
		return;
}
