#include "vmm/bus.h"
#include <errno.h>
#include <string.h>
#include "vmm/error.h"

void bus_init(struct bus *b)
{
	*b = (struct bus){ .nr = 0 };
	pthread_rwlock_init(&b->lock, NULL);
}

void bus_done(struct bus *b)
{
	pthread_rwlock_destroy(&b->lock);
}

/* First region whose end lies above addr; b->nr if there is none. */
static unsigned find(const struct bus *b, uint64_t addr)
{
	unsigned lo = 0, hi = b->nr;

	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;
		const struct bus_region *r = b->region[mid];

		if (addr >= r->base && addr - r->base >= r->size)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int bus_add(struct bus *b, struct bus_region *r, struct error *err)
{
	unsigned i;
	int ret = 0;

	if (!r->size || r->base + (r->size - 1) < r->base)
		return error_set(err, EINVAL, "%s: region %#llx+%#llx is empty or wraps", r->name,
			(unsigned long long)r->base, (unsigned long long)r->size);
	pthread_rwlock_wrlock(&b->lock);
	i = find(b, r->base);
	if (b->nr == BUS_REGIONS) {
		ret = error_set(err, ENOSPC, "%s: no room on the bus for one more region", r->name);
	} else if (i < b->nr && b->region[i]->base <= r->base + (r->size - 1)) {
		ret = error_set(err, EBUSY, "%s: %#llx+%#llx overlaps %s", r->name,
			(unsigned long long)r->base, (unsigned long long)r->size,
			b->region[i]->name);
	} else {
		memmove(&b->region[i + 1], &b->region[i], (b->nr - i) * sizeof(b->region[0]));
		b->region[i] = r;
		b->nr++;
	}
	pthread_rwlock_unlock(&b->lock);
	return ret;
}

void bus_del(struct bus *b, struct bus_region *r)
{
	pthread_rwlock_wrlock(&b->lock);
	for (unsigned i = 0; i < b->nr; i++) {
		if (b->region[i] != r)
			continue;
		memmove(&b->region[i], &b->region[i + 1],
			(b->nr - i - 1) * sizeof(b->region[0]));
		b->nr--;
		break;
	}
	pthread_rwlock_unlock(&b->lock);
}

/*
 * The region that takes this access whole, with the offset in it, or NULL. The lock is not held around the device's code: a
 * region stays valid while the machine lives, and taking one off the bus (a BAR that moves) only stops
 * new accesses.
 */
static struct bus_region *lookup(struct bus *b, uint64_t addr, unsigned size, uint64_t *off)
{
	struct bus_region *r = NULL;
	unsigned i;

	pthread_rwlock_rdlock(&b->lock);
	i = find(b, addr);
	if (i < b->nr && addr >= b->region[i]->base)
		r = b->region[i];
	if (r && (size > r->size - (addr - r->base) || size < r->ops->min || size > r->ops->max))
		r = NULL;
	if (r)
		*off = addr - r->base;
	pthread_rwlock_unlock(&b->lock);
	return r;
}

static uint64_t ones(unsigned size)
{
	return size >= 8 ? UINT64_MAX : (1ull << 8 * size) - 1;
}

bool bus_read(struct bus *b, uint64_t addr, unsigned size, uint64_t *val)
{
	uint64_t off;
	struct bus_region *r = lookup(b, addr, size, &off);

	*val = ones(size);
	if (!r)
		return false;
	if (!r->ops->read)
		return true;
	if (r->lock)
		pthread_mutex_lock(r->lock);
	*val = r->ops->read(r->dev, off, size) & ones(size);
	if (r->lock)
		pthread_mutex_unlock(r->lock);
	return true;
}

bool bus_write(struct bus *b, uint64_t addr, unsigned size, uint64_t val)
{
	uint64_t off;
	struct bus_region *r = lookup(b, addr, size, &off);

	if (!r)
		return false;
	if (!r->ops->write)
		return true;
	if (r->lock)
		pthread_mutex_lock(r->lock);
	r->ops->write(r->dev, off, size, val & ones(size));
	if (r->lock)
		pthread_mutex_unlock(r->lock);
	return true;
}
