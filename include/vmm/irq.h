#ifndef VMM_IRQ_H
#define VMM_IRQ_H
/*
 * Interrupts toward the guest through KVM's irqchip. A GSI below 24 is a line of the PIC and IOAPIC;
 * MSI GSIs are handed out above. A chip with vm_fd -1 (unit tests) keeps all the state and makes no KVM call.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
struct error;

#define IRQ_LINES 24
#define IRQ_MSIS  1024

struct irq_route {
	bool used;
	uint64_t addr;
	uint32_t data;
};

struct irqchip {
	int vm_fd;
	pthread_mutex_t lock;                   /* guards all below */
	uint32_t line_high[IRQ_LINES];          /* how many level irqs hold this line up */
	struct irq_route *msi;                  /* nr_msis of them, grown as they are taken */
	unsigned nr_msis;
	uint64_t unrouted;
};

struct irq {
	struct irqchip *chip;
	uint32_t gsi;
	int efd;                /* irqfd of an edge line or MSI; -1 on a level line */
	bool level, high;       /* level line: wired-or, what this source drives; under chip->lock */
	bool routed;            /* MSI: has a valid route */
};

int  irqchip_init(struct irqchip *c, int vm_fd, struct error *err);     /* after KVM_CREATE_IRQCHIP, before any irq */
void irqchip_done(struct irqchip *c);

/* Claim IOAPIC/PIC line (0-23). Level lines may be shared, and are driven by irq_set(). Main thread. */
int irq_line_init(struct irq *i, struct irqchip *c, unsigned line, bool level, struct error *err);
/* Claim an MSI GSI; mute until irq_msi_route(). Any thread. */
int irq_msi_init(struct irq *i, struct irqchip *c, struct error *err);
/* The guest wrote an MSI or MSI-X entry. Cheap where nothing changed. vCPU threads; 0 or -errno. */
int irq_msi_route(struct irq *i, uint64_t addr, uint32_t data);
void irq_done(struct irq *i);                           /* an all-zero irq is fine */

/* Any thread. */
void irq_set(struct irq *i, bool high);         /* level lines: KVM_IRQ_LINE when the wired-or changes */
void irq_pulse(struct irq *i);                  /* edge lines and MSI: one eventfd write */
#endif
