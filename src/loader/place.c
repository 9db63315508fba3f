#include "place.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define PAGE     4096ull
#define FOUR_GIB (1ull << 32)

int segments_add(struct segments *s, const struct segment *seg, struct error *err)
{
	if (!seg->memsz && !seg->filesz)
		return 0;
	if (s->nr == PLACE_SEGMENTS)
		return error_set(err, ENOSPC, "more than %u segments", PLACE_SEGMENTS);
	s->seg[s->nr++] = *seg;
	return 0;
}

static int by_offset(const void *a, const void *b)
{
	const struct segment *x = a, *y = b;

	return x->off < y->off ? -1 : x->off > y->off;
}

static int by_gpa(const void *a, const void *b)
{
	const struct segment *x = a, *y = b;

	return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

static int segment_check(const struct segment *g, const struct source *src, struct error *err)
{
	if (g->filesz > g->memsz)
		return error_set(err, EINVAL,
			"a segment has 0x%llx bytes in the file for 0x%llx in memory",
			(unsigned long long)g->filesz, (unsigned long long)g->memsz);
	if (g->filesz && (g->off > src->size || g->filesz > src->size - g->off))
		return error_set(err, EINVAL,
			"a segment wants bytes 0x%llx+0x%llx of an image of 0x%llx: cut short?",
			(unsigned long long)g->off, (unsigned long long)g->filesz,
			(unsigned long long)src->size);
	if (g->memsz > UINT64_MAX - g->gpa)
		return error_set(err, EINVAL, "a segment at 0x%llx+0x%llx wraps around",
			(unsigned long long)g->gpa, (unsigned long long)g->memsz);
	if (g->gpa + g->memsz > FOUR_GIB)
		return error_set(err, EINVAL,
			"a segment at 0x%llx+0x%llx reaches past 4 GiB, where no entry state maps "
			"it",
			(unsigned long long)g->gpa, (unsigned long long)g->memsz);
	if (g->gpa < PLACE_LOW_LIMIT)
		return error_set(err, EINVAL,
			"a segment is at 0x%llx, where boot information goes: link it at 0x%llx or "
			"above "
			"(1 MiB is usual)",
			(unsigned long long)g->gpa, PLACE_LOW_LIMIT);
	if (g->gpa < PLACE_BIOS_END && g->gpa + g->memsz > PLACE_BIOS)
		return error_set(err, EINVAL,
			"a segment at 0x%llx+0x%llx reaches into the firmware area 0x%llx-0x%llx: "
			"link it at "
			"1 MiB or above",
			(unsigned long long)g->gpa, (unsigned long long)g->memsz, PLACE_BIOS,
			PLACE_BIOS_END);
	return 0;
}

int segments_check(struct segments *s, const struct source *src, struct error *err)
{
	if (!s->nr)
		return error_set(err, EINVAL, "nothing in it is to be loaded");
	for (unsigned i = 0; i < s->nr; i++) {
		int r = segment_check(&s->seg[i], src, err);

		if (r < 0)
			return r;
	}
	qsort(s->seg, s->nr, sizeof(s->seg[0]), by_gpa);
	s->start = s->seg[0].gpa;
	for (unsigned i = 0; i < s->nr; i++) {
		const struct segment *g = &s->seg[i];

		if (i && g->gpa < s->end)
			return error_set(err, EINVAL, "segments overlap at 0x%llx",
				(unsigned long long)g->gpa);
		s->end = g->gpa + g->memsz;
	}
	qsort(s->seg, s->nr, sizeof(s->seg[0]), by_offset);
	return 0;
}

int segments_fit(const struct segments *s, const struct gmem *mem, struct error *err)
{
	for (unsigned i = 0; i < s->nr; i++) {
		const struct segment *g = &s->seg[i];

		if (!gmem_at(mem, g->gpa, g->memsz))
			return error_set(err, ENOSPC,
				"a segment at 0x%llx+0x%llx lies outside RAM (--mem is %llu MiB)",
				(unsigned long long)g->gpa, (unsigned long long)g->memsz,
				(unsigned long long)(gmem_total(mem) >> 20));
	}
	return 0;
}

int segments_load(
	const struct segments *s, struct source *src, const struct gmem *mem, struct error *err)
{
	for (unsigned i = 0; i < s->nr; i++) {
		const struct segment *g = &s->seg[i];
		void *dst = gmem_at(mem, g->gpa, g->memsz);
		int r;

		if (!dst)
			return error_set(err, ENOSPC, "a segment lies outside RAM");
		if (!g->filesz)
			continue;
		r = source_read(src, g->off, dst, g->filesz, err);
		if (r < 0)
			return r;
	}
	return 0;
}

bool segments_hold(const struct segments *s, gpa_t gpa)
{
	for (unsigned i = 0; i < s->nr; i++)
		if (gpa >= s->seg[i].gpa && gpa - s->seg[i].gpa < s->seg[i].memsz)
			return true;
	return false;
}

gpa_t place_high(const struct gmem *mem, uint64_t len, gpa_t limit, gpa_t used_end)
{
	gpa_t floor = MAX(used_end, PLACE_BIOS_END), best = UINT64_MAX;

	for (unsigned i = 0; i < mem->nr; i++) {
		const struct gmem_region *g = &mem->region[i];
		gpa_t end = MIN(g->base + g->size, limit), at;

		if (end <= g->base || len > end - g->base)
			continue;
		at = (end - len) & ~(PAGE - 1);
		if (at >= g->base && at >= floor && (best == UINT64_MAX || at > best))
			best = at;
	}
	return best;
}

gpa_t place_low(const struct gmem *mem, uint64_t len, gpa_t from)
{
	gpa_t at = (MAX(from, PLACE_BIOS_END) + PAGE - 1) & ~(PAGE - 1);

	return at < FOUR_GIB && len <= FOUR_GIB - at && gmem_at(mem, at, len) ? at : UINT64_MAX;
}
