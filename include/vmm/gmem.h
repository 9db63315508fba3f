#ifndef VMM_GMEM_H
#define VMM_GMEM_H
/*
 * Guest RAM. The only code that turns a guest-physical address into a pointer. Regions are const once
 * vCPUs exist, so there is no lock. There is no path from here to MMIO: device re-entrancy by DMA
 * cannot be written.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct error;

typedef uint64_t gpa_t;

#define GMEM_REGIONS 4

struct gmem_region {
	gpa_t base;
	uint64_t size;
	uint8_t *host;
};

struct gmem {
	unsigned nr;
	struct gmem_region region[GMEM_REGIONS];
	/* owned by gmem_init(), gmem_done() */
	int fd;                 /* sealed memfd behind all regions, in order; -1 in tests */
	void *reserve;          /* PROT_NONE reservation with 4 GiB guards around every region */
	size_t reserve_len;
};

/*
 * Back the nr regions of layout (base and size filled, multiples of 4 KiB) with a sealed memfd.
 * Nothing is touched: memory grows with what the guest uses. huge: 2 MiB pages from the host's pool,
 * sizes then rounded up to 2 MiB; fails where the pool is too small. Main thread.
 */
int gmem_init(struct gmem *m, const struct gmem_region *layout, unsigned nr, bool huge,
	struct error *err);
void gmem_done(struct gmem *m);

/* Give every page back to the host: all RAM reads as zero afterwards. No vCPU or device runs. */
int gmem_clear(struct gmem *m, struct error *err);

/* Host address of [gpa, gpa+len), or NULL unless the whole range lies in one RAM region. Any thread. */
void *gmem_at(const struct gmem *m, gpa_t gpa, uint64_t len);

/* Copy; 0, or -EFAULT with nothing copied unless the whole range lies in one RAM region. Any thread. */
int gmem_read(const struct gmem *m, gpa_t gpa, void *dst, size_t len);
int gmem_write(const struct gmem *m, gpa_t gpa, const void *src, size_t len);

/* Bytes of RAM over all regions. */
uint64_t gmem_total(const struct gmem *m);
#endif
