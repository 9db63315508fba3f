#ifndef VMM_BUS_H
#define VMM_BUS_H
/*
 * Port and MMIO dispatch. Values pass, never pointers: a device cannot overrun. Widths a device does
 * not accept, accesses that straddle a region's end, and gaps stop here: reads give all ones, writes
 * are dropped.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
struct error;

struct bus_ops {
	uint64_t (*read)(void *dev, uint64_t off, unsigned size);
	void (*write)(void *dev, uint64_t off, unsigned size, uint64_t val);
	uint8_t min, max;       /* access widths the device accepts, 1 to 8; others never reach it */
};

struct bus_region {
	const char *name;
	uint64_t base, size;
	const struct bus_ops *ops;
	void *dev;
	pthread_mutex_t *lock;  /* held around ops; NULL: the ops lock for themselves */
};

#define BUS_REGIONS 256

/* One for PIO, one for MMIO. The region array is kept sorted by base. */
struct bus {
	pthread_rwlock_t lock;  /* guards nr and region[] */
	unsigned nr;
	struct bus_region *region[BUS_REGIONS];
};

void bus_init(struct bus *b);
void bus_done(struct bus *b);

/* Any thread. The region stays the caller's and must outlive its place on the bus. */
int bus_add(struct bus *b, struct bus_region *r, struct error *err); /* refuses overlap, wrap, size 0 */
void bus_del(struct bus *b, struct bus_region *r);                   /* not on the bus: nothing happens */

/* vCPU threads. False: nobody home (reads: *val is all ones of that width). */
bool bus_read(struct bus *b, uint64_t addr, unsigned size, uint64_t *val);
bool bus_write(struct bus *b, uint64_t addr, unsigned size, uint64_t val);
#endif
