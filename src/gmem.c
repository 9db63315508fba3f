#include "vmm/gmem.h"
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. One PROT_NONE reservation holds every region with a 4 GiB guard on each side, so that a
 * 32-bit overrun from any valid address faults instead of reaching our heap. The memfd behind it is sealed
 * in size: nobody can shrink it under a mapping.
 */
#define GUARD (4ull << 30)
#define HUGE  (2ull << 20)

static uint64_t round_up(uint64_t v, uint64_t to)
{
	return (v + to - 1) & ~(to - 1);
}

int gmem_init(struct gmem *m, const struct gmem_region *layout, unsigned nr, bool huge,
	struct error *err)
{
	uint64_t total = 0, span = GUARD, off = 0;
	auto_close int fd = -1;
	uint8_t *at;

	*m = (struct gmem){ .fd = -1 };
	assert(nr <= GMEM_REGIONS);
	for (unsigned i = 0; i < nr; i++) {
		m->region[i] = layout[i];
		if (huge)
			m->region[i].size = round_up(layout[i].size, HUGE);
		total += m->region[i].size;
		span += round_up(m->region[i].size, HUGE) + GUARD;
	}
	fd = memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
	if (fd < 0)
		return error_errno(err, errno, "cannot create %s guest RAM",
			huge ? "huge-page" : "anonymous");
	if (ftruncate(fd, (off_t)total))
		return error_errno(err, errno, "cannot size guest RAM to %llu MiB",
			(unsigned long long)(total >> 20));
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return error_errno(err, errno, "cannot seal guest RAM");
	m->reserve = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (m->reserve == MAP_FAILED) {
		m->reserve = NULL;
		return error_errno(err, errno, "cannot reserve address space for %llu MiB of guest RAM",
			(unsigned long long)(total >> 20));
	}
	m->reserve_len = span;
	at = (uint8_t *)round_up((uintptr_t)m->reserve + GUARD, HUGE);
	for (unsigned i = 0; i < nr; i++) {
		struct gmem_region *r = &m->region[i];

		/* Huge pages are reserved here: a pool that is too small is an error now, not SIGBUS later. */
		if (mmap(at, r->size, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_FIXED | (huge ? 0 : MAP_NORESERVE), fd,
			    (off_t)off) == MAP_FAILED) {
			int e = errno;

			gmem_done(m);
			return error_errno(err, e, "cannot map %llu MiB of guest RAM%s",
				(unsigned long long)(total >> 20),
				huge ? " (not enough free huge pages: see HugePages_Free in /proc/meminfo)" : "");
		}
		madvise(at, r->size, MADV_DONTDUMP);
		madvise(at, r->size, MADV_DONTFORK);
		madvise(at, r->size, MADV_HUGEPAGE);     /* best effort: shmem_enabled decides */
		r->host = at;
		at += round_up(r->size, HUGE) + GUARD;
		off += r->size;
	}
	m->fd = TAKE_FD(fd);
	m->nr = nr;
	return 0;
}

void gmem_done(struct gmem *m)
{
	if (m->reserve)
		munmap(m->reserve, m->reserve_len);
	if (m->fd >= 0)
		close(m->fd);
	*m = (struct gmem){ .fd = -1 };
}

int gmem_clear(struct gmem *m, struct error *err)
{
	if (fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
		    (off_t)gmem_total(m)))
		return error_errno(err, errno, "cannot clear guest RAM");
	return 0;
}

void *gmem_at(const struct gmem *m, gpa_t gpa, uint64_t len)
{
	for (unsigned i = 0; i < m->nr; i++) {
		const struct gmem_region *r = &m->region[i];

		if (gpa >= r->base && gpa - r->base < r->size && len <= r->size - (gpa - r->base))
			return r->host + (gpa - r->base);
	}
	return NULL;
}

int gmem_read(const struct gmem *m, gpa_t gpa, void *dst, size_t len)
{
	const void *p = gmem_at(m, gpa, len);

	if (!p)
		return -EFAULT;
	memcpy(dst, p, len);
	return 0;
}

int gmem_write(const struct gmem *m, gpa_t gpa, const void *src, size_t len)
{
	void *p = gmem_at(m, gpa, len);

	if (!p)
		return -EFAULT;
	memcpy(p, src, len);
	return 0;
}

uint64_t gmem_total(const struct gmem *m)
{
	uint64_t total = 0;

	for (unsigned i = 0; i < m->nr; i++)
		total += m->region[i].size;
	return total;
}
