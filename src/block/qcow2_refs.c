/*
 * qcow2: refcounts: who uses which cluster of the file, taking clusters and giving them back. See qcow2.h.
 *
 * How this works. The refcount table is in memory, its blocks are cached by slices. Clusters are taken from three places:
 * those that a failed write dropped; free ones between cursor and end, a few slices a call, so that a full
 * image costs no scan; else at the end, where the file grows.
 *
 *      0 header ... used, free, used ... cursor -> ... end | never used, reads as zeroes from `blank` on
 *
 * A range of the file that no refcount block describes yet gets one at its first free cluster, which so
 * describes itself. When the refcount table is full, a longer one and the blocks for where it lies are laid out behind each other at the end.
 */
#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "qcow2.h"

#define SCAN_SLICES 4u          /* of refcounts, looked at for free clusters in one call */

/* ---- what is metadata ---- */

static uint64_t bloom_hash(uint64_t index)
{
	return (index + 1) * 0x9e3779b97f4a7c15ull;
}

static void bloom_add(struct qcow2 *q, uint64_t index)
{
	uint64_t h = bloom_hash(index), mask = (1ull << q->bloom_bits) - 1, a = h & mask, b = h >> 32 & mask;

	q->bloom[a / 64] |= 1ull << a % 64;
	q->bloom[b / 64] |= 1ull << b % 64;
}

static bool bloom_has(const struct qcow2 *q, uint64_t index)
{
	uint64_t h = bloom_hash(index), mask = (1ull << q->bloom_bits) - 1, a = h & mask, b = h >> 32 & mask;

	return q->bloom[a / 64] >> a % 64 & 1 && q->bloom[b / 64] >> b % 64 & 1;
}

static const char *in_ranges(const struct qcow2 *q, uint64_t off)
{
	for (unsigned k = 0; k < q->ranges; k++)
		if (off >= q->range[k].off && off - q->range[k].off < q->range[k].len)
			return q->range[k].what;
	return NULL;
}

static bool is_refcount_block(const struct qcow2 *q, uint64_t off)
{
	for (uint32_t k = 0; k < q->rt_n; k++)
		if (q->rt[k] == off)
			return true;
	return false;
}

const char *qcow2_metadata_at(const struct qcow2 *q, uint64_t off)
{
	uint64_t at = off & ~(uint64_t)(q->cluster - 1);
	const char *what = in_ranges(q, at);

	if (what)
		return what;
	if (q->cow.active && q->cow.to == at)
		return "an L2 table";
	if (!bloom_has(q, qcow2_index(q, at)))
		return NULL;
	if (is_refcount_block(q, at))
		return "a refcount block";
	for (uint32_t k = 0; k < q->h.l1_size; k++)
		if ((q->l1[k] & QCOW2_OFFSET) == at)
			return "an L2 table";
	return NULL;
}

static void add_range(struct qcow2 *q, uint64_t off, uint64_t bytes, const char *what)
{
	uint64_t len = qcow2_clusters(q, bytes) << q->cluster_bits;

	if (bytes && q->ranges < QCOW2_RANGES)
		q->range[q->ranges++] = (struct qcow2_range){ off, len, what };
}

static void set_ranges(struct qcow2 *q)
{
	q->ranges = 0;
	add_range(q, 0, q->cluster, "the header");
	add_range(q, q->h.l1_offset, q->h.l1_size * 8ull, "the L1 table");
	add_range(q, q->h.refcount_offset, (uint64_t)q->h.refcount_clusters << q->cluster_bits, "the refcount table");
	add_range(q, q->h.snapshots_offset, q->h.snapshots ? 1 : 0, "the snapshot table");
}

int qcow2_metadata_rebuild(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t n = (uint64_t)q->h.l1_size + q->rt_n, *bloom;
	unsigned bits = 10;

	while (bits < 40 && (1ull << bits) < n * (n < (1u << 20) ? 16 : 8))
		bits++;
	bloom = calloc((1ull << bits) / 64, 8);
	if (!bloom)
		return -ENOMEM;
	free(q->bloom);
	q->bloom = bloom;
	q->bloom_bits = bits;
	for (uint32_t k = 0; k < q->h.l1_size; k++)
		if (q->l1[k])
			bloom_add(q, qcow2_index(q, q->l1[k] & QCOW2_OFFSET));
	for (uint32_t k = 0; k < q->rt_n; k++)
		if (q->rt[k])
			bloom_add(q, qcow2_index(q, q->rt[k]));
	set_ranges(q);
	return 0;
}

void qcow2_metadata_add(struct qcow2 *q, uint64_t off)
{
	bloom_add(q, qcow2_index(q, off));
}

int qcow2_corrupt(struct image *i, const char *fmt, ...)
{
	struct qcow2 *q = qcow2_of(i);
	char text[160];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (!i->corrupt && !i->file.readonly && q->h.version >= 3 && !(q->h.incompatible & QCOW2_CORRUPT)) {
		q->h.incompatible |= QCOW2_CORRUPT;
		q->mark = i->marking = true;
	}
	return image_corrupt(i, "%s", text);
}

/* ---- tables of which the file has other bytes yet ---- */

int qcow2_fresh_add(struct image *i, uint64_t off, bool blank)
{
	struct qcow2 *q = qcow2_of(i);
	struct qcow2_fresh *f = calloc(1, sizeof(*f)), **at = &q->fresh[qcow2_index(q, off) % QCOW2_FRESH];

	if (!f)
		return -ENOMEM;
	*f = (struct qcow2_fresh){ .next = *at, .off = off, .blank = blank };
	*at = f;
	q->fresh_n++;
	return 0;
}

static void fresh_remove(struct qcow2 *q, struct qcow2_fresh **at)
{
	struct qcow2_fresh *f = *at;

	*at = f->next;
	free(f);
	q->fresh_n--;
}

void qcow2_fresh_forget(struct qcow2 *q, struct tables *of, uint64_t off)
{
	struct qcow2_fresh **at = &q->fresh[qcow2_index(q, off) % QCOW2_FRESH];

	while (*at && (*at)->off != off)
		at = &(*at)->next;
	if (!*at)
		return;
	for (unsigned n = 0; n < q->cluster >> q->slice_bits; n++)
		if ((*at)->made[n / 64] >> n % 64 & 1)
			tables_forget(of, off + ((uint64_t)n << q->slice_bits));
	fresh_remove(q, at);
}

int qcow2_fresh_gather(struct qcow2 *q, struct plan *p)
{
	int r = 0;

	for (unsigned k = 0; q->fresh_n && k < QCOW2_FRESH; k++)
		for (struct qcow2_fresh *f = q->fresh[k]; f && !r; f = f->next) {
			r = f->blank ? 0 : plan_zero(p, f->off, q->cluster);
			f->sent = !r;
		}
	return r;
}

void qcow2_fresh_gathered(struct qcow2 *q, int err)
{
	for (unsigned k = 0; q->fresh_n && k < QCOW2_FRESH; k++)
		for (struct qcow2_fresh **at = &q->fresh[k]; *at;) {
			bool done = (*at)->sent && !err;

			(*at)->sent = false;
			if (done)
				fresh_remove(q, at);
			else
				at = &(*at)->next;
		}
}

/* ---- single refcounts ---- */

uint64_t qcow2_ref_load(const struct qcow2 *q, const void *block, unsigned n)
{
	unsigned order = q->h.refcount_order;
	const uint8_t *b = block;
	uint64_t v = 0;

	if (order < 3)
		return b[n >> (3 - order)] >> ((n & ((8u >> order) - 1)) << order) & q->refs_max;
	b += (size_t)n << (order - 3);
	for (unsigned k = 0; k < 1u << (order - 3); k++)
		v = v << 8 | b[k];
	return v;
}

void qcow2_ref_store(const struct qcow2 *q, void *block, unsigned n, uint64_t val)
{
	unsigned order = q->h.refcount_order, shift;
	uint8_t *b = block;

	if (order < 3) {
		b += n >> (3 - order);
		shift = (n & ((8u >> order) - 1)) << order;
		*b = (uint8_t)((*b & ~(q->refs_max << shift)) | val << shift);
		return;
	}
	b += (size_t)n << (order - 3);
	for (unsigned k = 1u << (order - 3); k--; val >>= 8)
		b[k] = (uint8_t)val;
}

static unsigned slice_refs_bits(const struct qcow2 *q)
{
	return q->slice_bits + 3 - q->h.refcount_order;
}

/* Clusters from index on that the same slice describes. */
static uint64_t slice_left(const struct qcow2 *q, uint64_t index)
{
	uint64_t n = 1ull << slice_refs_bits(q);

	return n - (index & (n - 1));
}

static uint64_t block_of(const struct qcow2 *q, uint64_t index)
{
	return index >> q->refs_bits < q->rt_n ? q->rt[index >> q->refs_bits] : 0;
}

static int slice_in_block(struct image *i, uint64_t block, uint64_t index, struct table **t, unsigned *at)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t in_block = index & ((1ull << q->refs_bits) - 1);
	unsigned bits = slice_refs_bits(q);

	*at = (unsigned)(in_block & ((1ull << bits) - 1));
	return qcow2_slice(i, q->refs, block, (unsigned)(in_block >> bits), t);
}

int qcow2_ref_slice(struct image *i, uint64_t index, struct table **t, unsigned *at)
{
	uint64_t block = block_of(qcow2_of(i), index);

	*t = NULL;
	*at = 0;
	return block ? slice_in_block(i, block, index, t, at) : 0;
}

int qcow2_ref_get(struct image *i, uint64_t index, uint64_t *val)
{
	struct table *t;
	unsigned at;
	int r = qcow2_ref_slice(i, index, &t, &at);

	*val = r || !t ? 0 : qcow2_ref_load(qcow2_of(i), t->data, at);
	return r;
}

/* One step of qcow2_ref_add(): look whether it fits, or do it. */
static int ref_add_pass(struct image *i, uint64_t index, uint64_t n, int delta, bool change)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;

	for (; n; index++, n--) {
		uint64_t v;
		int r = qcow2_ref_slice(i, index, &t, &at);

		if (r)
			return r;
		v = t ? qcow2_ref_load(q, t->data, at) : 0;
		if (!t || (delta < 0 && !v))
			return qcow2_corrupt(i, "cluster %llu of the file is used but has the refcount 0", (unsigned long long)index);
		if (delta > 0 && v >= q->refs_max)
			return -EFBIG;
		if (!change)
			continue;
		qcow2_ref_store(q, t->data, at, delta > 0 ? v + 1 : v - 1);
		table_dirty(t);
	}
	return 0;
}

int qcow2_ref_add(struct image *i, uint64_t index, uint64_t n, int delta)
{
	int r = ref_add_pass(i, index, n, delta, false);

	return r ? r : ref_add_pass(i, index, n, delta, true);
}

/* ---- refcount blocks and the refcount table ---- */

static void rt_changed(struct qcow2 *q, uint64_t n)
{
	uint64_t sector = n * 8 / SECTOR;

	q->rt_dirty[sector / 64] |= 1ull << sector % 64;
	q->rt_any = true;
}

static void used_to(struct qcow2 *q, uint64_t index)
{
	q->end = MAX(q->end, index);
	q->blank = MAX(q->blank, index);
}

static bool is_blank(const struct image *i, uint64_t index)
{
	return !i->file.blockdev && index >= qcow2_of(i)->blank;
}

/* The file has n clusters from index on. */
static int grow(struct image *i, uint64_t index, uint64_t n)
{
	struct qcow2 *q = qcow2_of(i);

	if (index + n > QCOW2_OFFSET >> q->cluster_bits)
		return -EFBIG;
	return file_grow(&i->file, (index + n) << q->cluster_bits);
}

/* A block for range number ri at cluster `at`, which is free and described, or in that range itself. */
static int add_block(struct image *i, uint64_t ri, uint64_t at)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t off = at << q->cluster_bits;
	bool own = at >> q->refs_bits == ri;
	struct table *t;
	unsigned n;
	int r = grow(i, at, 1);

	r = r ? r : qcow2_fresh_add(i, off, is_blank(i, at));
	if (r)
		return r;
	r = slice_in_block(i, own ? off : block_of(q, at), at, &t, &n);
	if (r) {
		qcow2_fresh_forget(q, q->refs, off);
		return r;
	}
	qcow2_ref_store(q, t->data, n, 1);
	table_dirty(t);
	q->rt[ri] = off;
	rt_changed(q, ri);
	bloom_add(q, at);
	used_to(q, at + 1);
	return 0;
}

struct layout {
	uint64_t at;                    /* index of the first block; the table follows the blocks */
	uint64_t range;                 /* of which the first block is */
	uint64_t blocks, clusters;      /* of the table */
};

/* A table that has room for what it and its blocks need, at cluster `at`, and half as much again as before. */
static int lay_out(const struct qcow2 *q, uint64_t at, struct layout *l)
{
	uint64_t per = q->cluster / 8, want = (at >> q->refs_bits) + 1, before = 0;

	*l = (struct layout){ .at = at, .range = at >> q->refs_bits, .blocks = 1 };
	want = MAX(want, q->rt_n + q->rt_n / 2ull);
	while (l->blocks != before) {
		before = l->blocks;
		l->clusters = MAX((want + per - 1) / per, (l->range + l->blocks + per - 1) / per);
		if (l->clusters << q->cluster_bits > QCOW2_RT_MAX) {
			l->clusters = QCOW2_RT_MAX >> q->cluster_bits;
			if (l->range + l->blocks > l->clusters * per)
				return -EFBIG;
		}
		l->blocks = ((at + l->blocks + l->clusters - 1) >> q->refs_bits) - l->range + 1;
	}
	return 0;
}

static uint64_t layout_block(const struct qcow2 *q, const struct layout *l, uint64_t index)
{
	return (l->at + (index >> q->refs_bits) - l->range) << q->cluster_bits;
}

static void forget_layout(struct image *i, const struct layout *l)
{
	struct qcow2 *q = qcow2_of(i);

	for (uint64_t k = 0; k < l->blocks; k++)
		qcow2_fresh_forget(q, q->refs, (l->at + k) << q->cluster_bits);
}

/* The slices of all new blocks in the cache, their refcounts 1: nothing refers to them yet. */
static int make_blocks(struct image *i, const struct layout *l)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t end = l->at + l->blocks + l->clusters;
	struct table *t;
	unsigned n;
	int r = 0;

	for (uint64_t k = 0; k < l->blocks && !r; k++)
		r = qcow2_fresh_add(i, (l->at + k) << q->cluster_bits, is_blank(i, l->at));
	for (uint64_t index = l->at; index < end && !r; index++) {
		r = slice_in_block(i, layout_block(q, l, index), index, &t, &n);
		if (r)
			break;
		qcow2_ref_store(q, t->data, n, 1);
		table_dirty(t);
	}
	return r;
}

/* Index, at the end, lies past what the refcount table describes: a longer one. */
static int grow_table(struct image *i, uint64_t index)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t old = qcow2_index(q, q->h.refcount_offset), old_n = q->h.refcount_clusters, bits;
	auto_free uint64_t *rt = NULL, *dirty = NULL, *sent = NULL;
	struct layout l;
	int r = lay_out(q, index, &l);

	if (r)
		return r;
	bits = ((l.clusters << q->cluster_bits) / SECTOR + 63) / 64;
	rt = calloc(l.clusters, q->cluster);
	dirty = calloc(bits, 8);
	sent = calloc(bits, 8);
	if (!rt || !dirty || !sent)
		return -ENOMEM;
	r = grow(i, l.at, l.blocks + l.clusters);
	r = r ? r : qcow2_frees_prepare(i, old, old_n);
	if (r)
		return r;
	r = make_blocks(i, &l);
	if (r) {
		forget_layout(i, &l);
		qcow2_frees_cancel(i, old, old_n);
		return r;
	}
	memcpy(rt, q->rt, q->rt_n * 8ull);
	free(q->rt);
	free(q->rt_dirty);
	free(q->rt_sent);
	q->rt = TAKE_PTR(rt);
	q->rt_dirty = TAKE_PTR(dirty);
	q->rt_sent = TAKE_PTR(sent);
	q->rt_n = (uint32_t)(l.clusters * (q->cluster / 8));
	q->rt_any = false;
	q->rt_moved = true;
	for (uint64_t k = 0; k < l.blocks; k++) {
		q->rt[l.range + k] = (l.at + k) << q->cluster_bits;
		bloom_add(q, l.at + k);
	}
	q->h.refcount_offset = (l.at + l.blocks) << q->cluster_bits;
	q->h.refcount_clusters = (uint32_t)l.clusters;
	used_to(q, l.at + l.blocks + l.clusters);
	qcow2_frees_queue(i, old, old_n);
	set_ranges(q);
	return 0;
}

/* ---- taking clusters ---- */

/* A free cluster that is metadata all the same: the refcounts lie. */
static int check_free(struct image *i, uint64_t first, uint32_t n)
{
	struct qcow2 *q = qcow2_of(i);
	const char *what;

	for (uint32_t k = 0; k < n; k++) {
		what = qcow2_metadata_at(q, (first + k) << q->cluster_bits);
		if (what)
			return qcow2_corrupt(i, "cluster %llu of the file has the refcount 0 but is in use (%s)",
				(unsigned long long)(first + k), what);
	}
	return 0;
}

struct run {
	struct table *t;
	unsigned at;                    /* in t */
	uint64_t first;
	uint32_t n;                     /* 0: none found */
};

/* Free clusters in the slice that describes `from`, from there to before `to`; at most want. */
static void find_in_slice(const struct qcow2 *q, struct table *t, unsigned at, uint64_t from, uint64_t to, uint32_t want,
	struct run *run)
{
	uint64_t n = MIN(slice_left(q, from), to - from), k = 0;

	while (k < n && qcow2_ref_load(q, t->data, at + (unsigned)k))
		k++;
	*run = (struct run){ .t = t, .at = at + (unsigned)k, .first = from + k };
	while (k < n && run->n < want && !qcow2_ref_load(q, t->data, at + (unsigned)k)) {
		k++;
		run->n++;
	}
}

/* Between cursor and end, in at most so many slices. */
static int scan(struct image *i, uint32_t want, unsigned slices, struct run *run)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;
	int r;

	run->n = 0;
	while (q->cursor < q->end && slices && !run->n) {
		uint64_t from = q->cursor;

		r = qcow2_ref_slice(i, from, &t, &at);
		if (r)
			return r;
		if (q->cursor != from)  /* a plan ran meanwhile, and freed some */
			continue;
		if (!t) {               /* nothing describes it: not ours to use */
			q->cursor = ((from >> q->refs_bits) + 1) << q->refs_bits;
			continue;
		}
		slices--;
		find_in_slice(q, t, at, from, q->end, want, run);
		q->cursor = run->n ? run->first + run->n : from + slice_left(q, from);
	}
	return 0;
}

/* At the end; a block is made where there is none. */
static int find_at_end(struct image *i, uint32_t want, struct run *run)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;
	int r;

	run->n = 0;
	while (!run->n) {
		uint64_t from = q->end;

		r = qcow2_ref_slice(i, from, &t, &at);
		if (!r && !t)
			r = from >> q->refs_bits >= q->rt_n ? grow_table(i, from) : add_block(i, from >> q->refs_bits, from);
		if (r)
			return r;
		if (!t)
			continue;
		find_in_slice(q, t, at, from, UINT64_MAX, want, run);
		if (!run->n)
			q->end = from + slice_left(q, from);
	}
	return 0;
}

static bool take_dropped(struct qcow2 *q, uint32_t want, uint64_t *first, uint32_t *n)
{
	struct qcow2_free *d = q->dropped;

	if (!d)
		return false;
	*first = d->first;
	*n = MIN(want, d->n);
	d->first += *n;
	d->n -= *n;
	if (!d->n) {
		q->dropped = d->next;
		free(d);
	}
	return true;
}

static int find_run(struct image *i, uint32_t want, struct run *run)
{
	struct qcow2 *q = qcow2_of(i);
	int r;

	run->n = 0;
	/* While a plan lowers refcounts, what has 0 in memory may still be in use in the file. */
	r = q->lowering ? 0 : scan(i, want, SCAN_SLICES, run);
	if (r || run->n)
		return r;
	r = find_at_end(i, want, run);
	r = r ? r : grow(i, run->first, run->n);
	if (r != -ENOSPC || q->lowering)
		return r;
	r = scan(i, want, UINT32_MAX, run);
	return r ? r : run->n ? 0 : -ENOSPC;
}

static int refuse_bad_refs(struct image *i)
{
	return qcow2_of(i)->refs_bad ? qcow2_corrupt(i, "its refcounts make no sense") : 0;
}

int qcow2_take(struct image *i, uint32_t want, uint64_t *first, uint32_t *n, bool *blank)
{
	struct qcow2 *q = qcow2_of(i);
	struct run run;
	int r = refuse_bad_refs(i);

	*blank = false;
	if (!r && take_dropped(q, want, first, n))
		return 0;
	r = r ? r : find_run(i, want, &run);
	r = r ? r : check_free(i, run.first, run.n);
	if (r)
		return r;
	for (uint32_t k = 0; k < run.n; k++)
		qcow2_ref_store(q, run.t->data, run.at + k, 1);
	table_dirty(run.t);
	*first = run.first;
	*n = run.n;
	*blank = is_blank(i, run.first);
	used_to(q, run.first + run.n);
	return 0;
}

/* All of [first, first + n) is described and free: 0; 1: look again from q->end. */
static int run_ready(struct image *i, uint64_t first, uint64_t n)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;
	int r;

	for (uint64_t k = first; k < first + n; k++) {
		r = qcow2_ref_slice(i, k, &t, &at);
		if (r)
			return r;
		if (t && qcow2_ref_load(q, t->data, at)) {
			q->end = k + 1;
			return 1;
		}
		if (t)
			continue;
		if (k >> q->refs_bits >= q->rt_n)
			r = grow_table(i, MAX(first, q->rt_n * (1ull << q->refs_bits)));
		else
			r = add_block(i, k >> q->refs_bits, first);
		return r ? r : 1;
	}
	return 0;
}

int qcow2_take_run(struct image *i, uint64_t n, uint64_t *first, bool *blank)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;
	int r = refuse_bad_refs(i);

	while (!r) {
		r = run_ready(i, q->end, n);
		if (r <= 0)
			break;
		r = 0;
	}
	*first = q->end;
	r = r ? r : grow(i, *first, n);
	for (uint64_t k = 0; k < n && !r; k++)
		r = check_free(i, *first + k, 1);
	*blank = is_blank(i, *first);
	for (uint64_t k = 0; k < n && !r; k++) {
		r = qcow2_ref_slice(i, *first + k, &t, &at);
		if (r)
			break;
		qcow2_ref_store(q, t->data, at, 1);
		table_dirty(t);
	}
	if (!r)
		used_to(q, *first + n);
	return r;
}

/* ---- giving clusters back ---- */

int qcow2_spare(struct qcow2 *q, unsigned n)
{
	while (q->spare_n < q->spare_reserved + n) {
		struct qcow2_free *f = calloc(1, sizeof(*f));

		if (!f)
			return -ENOMEM;
		f->next = q->spare;
		q->spare = f;
		q->spare_n++;
	}
	q->spare_reserved += n;
	return 0;
}

void qcow2_unspare(struct qcow2 *q, unsigned n)
{
	q->spare_reserved -= n;
}

struct qcow2_free *qcow2_spare_take(struct qcow2 *q)
{
	struct qcow2_free *f = q->spare;

	q->spare = f->next;
	q->spare_n--;
	q->spare_reserved--;
	return f;
}

void qcow2_frees_cancel(struct image *i, uint64_t first, uint64_t n)
{
	struct qcow2 *q = qcow2_of(i);

	for (uint64_t k = 0; k < n; k++) {
		struct table *t;
		unsigned at;

		if (!qcow2_ref_slice(i, first + k, &t, &at) && t)       /* pinned: it is there */
			table_unpin(t);
	}
	qcow2_unspare(q, (unsigned)n);
}

int qcow2_frees_prepare(struct image *i, uint64_t first, uint64_t n)
{
	struct qcow2 *q = qcow2_of(i);
	int r = qcow2_spare(q, (unsigned)n);

	if (r)
		return r;
	for (uint64_t k = 0; k < n; k++) {
		struct table *t;
		unsigned at;

		r = qcow2_ref_slice(i, first + k, &t, &at);
		if (!r && (!t || !qcow2_ref_load(q, t->data, at)))
			r = qcow2_corrupt(i, "cluster %llu of the file is used but has the refcount 0",
				(unsigned long long)(first + k));
		if (r) {
			qcow2_unspare(q, (unsigned)(n - k));
			qcow2_frees_cancel(i, first, k);
			return r;
		}
		table_pin(t);
	}
	return 0;
}

static void queue_one(struct qcow2 *q, uint64_t index, struct table *t)
{
	struct qcow2_free *last = q->frees_last, *f;

	if (last && last->stage == FREE_NEW && last->refs == t && last->first + last->n == index) {
		last->n++;
		table_unpin(t);
		qcow2_unspare(q, 1);
		return;
	}
	f = qcow2_spare_take(q);
	*f = (struct qcow2_free){ .first = index, .n = 1, .stage = FREE_NEW, .refs = t };
	*(last ? &last->next : &q->frees) = f;
	q->frees_last = f;
}

void qcow2_frees_queue(struct image *i, uint64_t first, uint64_t n)
{
	for (uint64_t k = 0; k < n; k++) {
		struct table *t;
		unsigned at;

		if (!qcow2_ref_slice(i, first + k, &t, &at) && t)
			queue_one(qcow2_of(i), first + k, t);
	}
}

int qcow2_free_later(struct image *i, uint64_t first, uint64_t n)
{
	while (n) {
		uint64_t some = MIN(n, 1024);
		int r = qcow2_frees_prepare(i, first, some);

		if (r)
			return r;
		qcow2_frees_queue(i, first, some);
		first += some;
		n -= some;
	}
	return 0;
}

static int lower(struct image *i, struct qcow2_free *f, struct plan *p)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned at = (unsigned)(f->first & ((1ull << slice_refs_bits(q)) - 1));
	int r = 0;

	for (uint32_t k = 0; k < f->n; k++) {
		uint64_t v = qcow2_ref_load(q, f->refs->data, at + k);

		if (!v)
			return qcow2_corrupt(i, "the refcount of cluster %llu of the file would be below 0",
				(unsigned long long)(f->first + k));
		qcow2_ref_store(q, f->refs->data, at + k, v - 1);
		if (v > 1)
			continue;
		if (qcow2_index(q, q->packed) == f->first + k)
			q->packed = 0;
		/* Without memory for the hole the space is kept, to be used again. */
		r = r ? r : plan_punch(p, (f->first + k) << q->cluster_bits, q->cluster);
	}
	table_dirty(f->refs);
	table_unpin(f->refs);
	f->refs = NULL;
	f->lowered = true;
	return 0;
}

int qcow2_frees_gather(struct image *i, struct plan *p)
{
	struct qcow2 *q = qcow2_of(i);
	int r = 0;

	for (struct qcow2_free *f = q->frees; f && !r; f = f->next) {
		if (f->stage == FREE_NEW) {
			f->stage = FREE_UNLINKING;
		} else if (f->stage == FREE_READY) {
			r = f->lowered ? 0 : lower(i, f, p);
			f->stage = FREE_LOWERING;
			q->lowering++;
		}
	}
	return r;
}

void qcow2_frees_gathered(struct qcow2 *q, int err)
{
	struct qcow2_free **at = &q->frees;

	q->lowering = 0;
	q->frees_last = NULL;
	while (*at) {
		struct qcow2_free *f = *at;

		if (f->stage == FREE_UNLINKING) {
			f->stage = err ? FREE_NEW : FREE_DURABLE;
		} else if (f->stage == FREE_LOWERING && err) {
			f->stage = FREE_READY;
		} else if (f->stage == FREE_LOWERING) {
			q->cursor = MIN(q->cursor, f->first);
			*at = f->next;
			free(f);
			continue;
		}
		q->frees_last = f;
		at = &f->next;
	}
}

bool qcow2_reclaim(struct image *i)
{
	bool more = false;

	for (struct qcow2_free *f = qcow2_of(i)->frees; f; f = f->next) {
		if (f->stage == FREE_DURABLE)
			f->stage = FREE_READY;
		more |= f->stage == FREE_READY;
	}
	return more;
}

int qcow2_dropped_gather(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);

	while (q->dropped) {
		struct qcow2_free *d = q->dropped;
		int r = qcow2_ref_add(i, d->first, d->n, -1);

		if (r)
			return r;
		q->cursor = MIN(q->cursor, d->first);
		q->dropped = d->next;
		free(d);
	}
	return 0;
}

/* ---- open and close ---- */

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* The same block twice: its refcounts would be of two ranges. */
static uint64_t find_twice(const struct qcow2 *q)
{
	auto_free uint64_t *list = malloc(q->rt_n * 8ull);
	uint64_t twice = 0;
	uint32_t n = 0;

	for (uint32_t k = 0; list && k < q->rt_n; k++)
		if (q->rt[k])
			list[n++] = q->rt[k];
	if (n)
		qsort(list, n, 8, by_value);
	for (uint32_t k = 1; k < n && !twice; k++)
		if (list[k] == list[k - 1])
			twice = list[k];
	return twice;
}

static int check_table(struct image *i, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t twice;

	for (uint32_t k = 0; k < q->rt_n; k++) {
		uint64_t off = q->rt[k];

		if (off && (off & (q->cluster - 1) || off >= i->file.size || in_ranges(q, off)))
			return error_set(err, EIO, "entry %u of its refcount table is 0x%llx", k, (unsigned long long)off);
	}
	twice = find_twice(q);
	if (twice)
		return error_set(err, EIO, "its refcount table has the block at 0x%llx twice", (unsigned long long)twice);
	/* The header is in use: where that is not known, what else is not? */
	if (!q->rt_n || !q->rt[0])
		return error_set(err, EIO, "its first refcount block is missing");
	return 0;
}

static int load_table(struct image *i, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t bytes = q->refs_bad ? 0 : (uint64_t)q->h.refcount_clusters << q->cluster_bits;
	uint64_t bits = (bytes / SECTOR + 63) / 64;
	int r;

	q->rt = calloc(1, bytes + 8);
	q->rt_dirty = calloc(bits + 1, 8);
	q->rt_sent = calloc(bits + 1, 8);
	if (!q->rt || !q->rt_dirty || !q->rt_sent)
		return error_set(err, ENOMEM, "no memory for its refcount table");
	r = bytes ? meta_read_all(&i->file, q->rt, bytes, q->h.refcount_offset) : 0;
	if (r)
		return error_errno(err, -r, "its refcount table cannot be read");
	q->rt_n = (uint32_t)(bytes / 8);
	for (uint32_t k = 0; k < q->rt_n; k++)
		q->rt[k] = be64toh(q->rt[k]);
	return 0;
}

int qcow2_refs_open(struct image *i, const struct image_how *how, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	int r = load_table(i, err);

	if (r)
		return r;
	set_ranges(q);
	r = q->refs_bad ? 0 : check_table(i, err);
	if (r) {
		q->refs_bad = true;
		if (how && !how->repair) {
			error_prefix(err, "its refcounts make no sense ('vmm disk check --repair all' mends it): ");
			return r;
		}
	}
	q->end = i->file.blockdev ? 0 : qcow2_clusters(q, i->file.size);
	q->blank = q->end;
	return qcow2_metadata_rebuild(i) ? error_set(err, ENOMEM, "out of memory") : 0;
}

/* The file was grown in large steps. Only what was never used is cut off. */
static void cut(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t end = q->end << q->cluster_bits;

	if (i->file.readonly || i->file.blockdev || i->corrupt || q->failed || !q->end || end >= i->file.size)
		return;
	if (!tables_any_dirty(q->l2) && !tables_any_dirty(q->refs) && !ftruncate(i->file.meta_fd, (off_t)end))
		i->file.size = end;
}

static void free_list(struct qcow2_free *f)
{
	while (f) {
		struct qcow2_free *next = f->next;

		free(f);
		f = next;
	}
}

void qcow2_refs_close(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);

	if (q->rt && q->l2 && q->refs)
		cut(i);
	for (unsigned k = 0; k < QCOW2_FRESH; k++)
		while (q->fresh[k])
			fresh_remove(q, &q->fresh[k]);
	free_list(q->frees);
	free_list(q->spare);
	free_list(q->dropped);
	free(q->rt);
	free(q->rt_dirty);
	free(q->rt_sent);
	free(q->bloom);
}
