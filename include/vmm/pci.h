#ifndef VMM_PCI_H
#define VMM_PCI_H
/*
 * PCI: one host bridge, bus 0, 32 slots, function 0 each. Configuration space by CF8/CFC and ECAM. There is
 * no firmware: BARs are placed when the device is added, and moved where the guest rewrites them.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "vmm/bus.h"
#include "vmm/gmem.h"
#include "vmm/irq.h"
struct error;
struct pci_bus;
struct pci_device;

#define PCI_BARS     6
#define PCI_CFG_SIZE 4096

struct pci_bar {
	uint64_t size;                  /* power of two; 0: absent */
	bool io, wide, prefetch;        /* wide: 64-bit, uses the next BAR too */
	/*
	 * ops, dev and lock are the device's; base follows the BAR. An access may be under way while the
	 * BAR moves: ops must not trust off to lie within size.
	 */
	struct bus_region region;
	bool mapped;
};

struct pci_device {
	/* the device fills these before pci_add() */
	const char *name;
	uint16_t vendor, device, sub_vendor, sub_device;
	uint32_t class_code;            /* 24 bits: class, subclass, prog-if */
	uint8_t revision;
	bool intx;                      /* wants an interrupt pin */
	struct pci_bar bar[PCI_BARS];
	/* before the guest reads, and after it wrote cfg[]; optional; vCPU thread, under the bus's lock */
	void (*config_reading)(struct pci_device *d, unsigned off, unsigned size);
	void (*config_written)(struct pci_device *d, unsigned off, unsigned size);
	/* a BAR's region was taken off the bus, or put on it at region.base; optional; same */
	void (*bar_moved)(struct pci_device *d, unsigned bar, bool mapped);
	/* pci.c; under the bus's lock */
	struct pci_bus *bus;
	unsigned slot;
	uint8_t cfg[PCI_CFG_SIZE], writable[PCI_CFG_SIZE];      /* the bits a guest may change */
	uint8_t built[64];              /* header as it was after pci_add() */
	uint16_t cap_end;
	/* pci.c; any thread */
	struct irq line;                /* INTx, level */
	_Atomic bool intx_high;         /* what the device drives */
	_Atomic bool intx_off;          /* the command register's disable bit */
};

struct pci_layout {
	gpa_t ecam;                     /* 1 MiB: bus 0 */
	gpa_t mmio, mmio_end;           /* 32-bit BAR window */
	gpa_t mmio64, mmio64_end;       /* above RAM */
	uint16_t io, io_end;            /* I/O BARs; io_end is the last port */
};

/* The GSI that INTx pin (1 = INTA) of a slot is wired to: 16 to 19. ACPI _PRT and the MP table say the same. */
unsigned pci_intx_gsi(unsigned slot, unsigned pin);

/* Main thread, while the VM is built. */
int  pci_bus_new(struct pci_bus **ret, const struct pci_layout *l, struct bus *pio,
	struct bus *mmio, struct irqchip *irqs, const struct gmem *mem, struct error *err);
void pci_bus_free(struct pci_bus *b);
int  pci_add(struct pci_bus *b, struct pci_device *d, struct error *err);      /* next free slot; 0 is the bridge */
void pci_del(struct pci_device *d);
/*
 * Append a capability: len bytes from body, of which the first two (id and next) are filled in here. Its
 * offset, or -ENOSPC. Before or after pci_add(). Nothing of it is writable until the device says so.
 */
int  pci_add_cap(struct pci_device *d, uint8_t id, const void *body, unsigned len);
const struct pci_layout *pci_bus_layout(const struct pci_bus *b);
unsigned pci_slots_used(const struct pci_bus *b);       /* bit per slot */
void pci_reset(struct pci_bus *b);                      /* main thread, no vCPU runs: BARs and command as built */

/* Any thread. */
void pci_intx(struct pci_device *d, bool high);         /* follows the command register's disable bit */

/*
 * MSI-X (PCI 3.0, 6.8.2): table and pending bits in a BAR that the device dedicates to it. Before pci_add():
 * fills d->bar[bar] and adds the capability. Main thread.
 */
struct msix;
int  msix_new(struct msix **ret, struct pci_device *d, unsigned bar, unsigned vectors,
	struct irqchip *irqs, struct error *err);
void msix_free(struct msix *m);                         /* after pci_del(); NULL is fine */
void msix_reset(struct msix *m);                        /* main thread, no vCPU runs */
bool msix_enabled(const struct msix *m);                /* any thread */
void msix_config_written(struct msix *m);               /* call from config_written */
void msix_fire(struct msix *m, unsigned vector);        /* any thread; masked: pending bit; out of range: nothing */
#endif
