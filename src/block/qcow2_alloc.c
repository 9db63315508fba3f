/*
 * qcow2: L2 tables that change: writes, discards, compressed clusters, and all metadata on its way to the file. See qcow2.h.
 *
 * How this works. alloc() looks at the L2 entry of the first cluster and takes as many more as are in the same state:
 *
 *      data, refcount 1                write in place
 *      zero flag on space, refcount 1  the same space, all of the cluster is written
 *      nothing                         new clusters
 *      shared with a snapshot,
 *      compressed                      new clusters, all of them written; link() frees the old ones
 *
 * With extended L2 entries the same holds for subclusters of 1/32, and new ones in a cluster that is there need no new cluster.
 *
 * A plan, empty stages left out, so that a flush after writes in place is one fdatasync():
 *
 *      holes of freed clusters, zeroes for new tables, refcounts, a new refcount table |
 *      refcount table entries or the header | L2 slices | L1 entries |
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include "vmm/cleanup.h"
#include "qcow2.h"

#define FREE_RUN 16u            /* clusters with old ones to free, in one alloc(): each may pin a slice of refcounts */
#define ALL_SUBS 0xffffffffull

enum state { IN_PLACE, REUSE, NEW, REPLACE };

/* ---- entries ---- */

static unsigned entry_words(const struct qcow2 *q)
{
	return q->entry_bits == 4 ? 2 : 1;
}

static uint64_t load_entry(const struct qcow2 *q, const struct table *t, unsigned at)
{
	return be64toh(((const uint64_t *)t->data)[at * entry_words(q)]);
}

static uint64_t load_bitmap(const struct qcow2 *q, const struct table *t, unsigned at)
{
	return q->entry_bits == 4 ? be64toh(((const uint64_t *)t->data)[at * 2 + 1]) : 0;
}

static void store_entry(const struct qcow2 *q, struct table *t, unsigned at, uint64_t entry, uint64_t bitmap)
{
	uint64_t *e = (uint64_t *)t->data + (size_t)at * entry_words(q);

	e[0] = htobe64(entry);
	if (q->entry_bits == 4)
		e[1] = htobe64(bitmap);
	table_dirty(t);
}

static bool sane_entry(const struct qcow2 *q, uint64_t entry, uint64_t bitmap)
{
	if (entry & QCOW2_COMPRESSED)
		return true;
	return qcow2_sane(q, entry) && !(bitmap & bitmap >> 32 & ALL_SUBS) &&
		(entry & QCOW2_OFFSET || !(bitmap & ALL_SUBS));
}

static enum state state_of(const struct qcow2 *q, uint64_t entry, uint64_t bitmap, unsigned sub)
{
	if (entry & QCOW2_COMPRESSED)
		return REPLACE;
	if (!(entry & QCOW2_OFFSET))
		return NEW;
	if (!(entry & QCOW2_COPIED))
		return REPLACE;
	if (q->entry_bits == 4)
		return bitmap >> sub & 1 ? IN_PLACE : REUSE;
	return entry & QCOW2_ZERO ? REUSE : IN_PLACE;
}

/* The clusters of the file that an entry uses. */
static void clusters_of(const struct qcow2 *q, uint64_t entry, uint64_t *first, uint32_t *n)
{
	uint64_t off;
	uint32_t len;

	*first = qcow2_index(q, entry & QCOW2_OFFSET);
	*n = entry & QCOW2_OFFSET ? 1 : 0;
	if (!(entry & QCOW2_COMPRESSED))
		return;
	qcow2_compressed_at(q, entry, &off, &len);
	*first = qcow2_index(q, off);
	*n = (uint32_t)(qcow2_index(q, off + len - 1) - *first + 1);
}

/* What an entry uses is to be freed later; that it is metadata must be found out before. */
static int prepare_old(struct image *i, uint64_t entry)
{
	struct qcow2 *q = qcow2_of(i);
	const char *what;
	uint64_t first;
	uint32_t n;

	clusters_of(q, entry, &first, &n);
	for (uint32_t k = 0; k < n; k++) {
		what = qcow2_metadata_at(q, (first + k) << q->cluster_bits);
		if (what)
			return qcow2_corrupt(i, "the L2 entry 0x%llx leads to %s", (unsigned long long)entry, what);
	}
	return qcow2_frees_prepare(i, first, n);
}

static void cancel_old(struct image *i, uint64_t entry)
{
	uint64_t first;
	uint32_t n;

	clusters_of(qcow2_of(i), entry, &first, &n);
	qcow2_frees_cancel(i, first, n);
}

static void queue_old(struct image *i, uint64_t entry)
{
	uint64_t first;
	uint32_t n;

	clusters_of(qcow2_of(i), entry, &first, &n);
	qcow2_frees_queue(i, first, n);
}

/* ---- L2 tables ---- */

void qcow2_l1_changed(struct qcow2 *q, uint64_t l1_index)
{
	uint64_t sector = l1_index * 8 / SECTOR;

	q->l1_dirty[sector / 64] |= 1ull << sector % 64;
	q->l1_any = true;
}

static void set_l1(struct qcow2 *q, uint64_t l1_index, uint64_t off)
{
	q->l1[l1_index] = off | QCOW2_COPIED;
	q->l1_checked[l1_index / 64] |= 1ull << l1_index % 64;
	qcow2_l1_changed(q, l1_index);
	qcow2_metadata_add(q, off);
}

static int make_l2(struct image *i, uint64_t l1_index, uint64_t *l2_off)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t first;
	uint32_t n;
	bool blank;
	int r = qcow2_take(i, 1, &first, &n, &blank);

	if (r)
		return r;
	*l2_off = first << q->cluster_bits;
	r = qcow2_fresh_add(i, *l2_off, blank);
	if (r)
		return r;
	set_l1(q, l1_index, *l2_off);
	return 0;
}

/* Slice by slice; what was copied stays so over -EAGAIN. */
static int copy_l2(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *from, *to;
	int r;

	for (; q->cow.slice < q->cluster >> q->slice_bits; q->cow.slice++) {
		r = qcow2_slice(i, q->l2, q->cow.from, q->cow.slice, &from);
		r = r ? r : qcow2_slice(i, q->l2, q->cow.to, q->cow.slice, &to);
		if (r)
			return r;
		memcpy(to->data, from->data, 1u << q->slice_bits);
		table_dirty(to);
	}
	qcow2_forget_last(i);
	set_l1(q, q->cow.l1_index, q->cow.to);
	qcow2_frees_queue(i, qcow2_index(q, q->cow.from), 1);
	q->cow.active = false;
	return 0;
}

static int start_copy(struct image *i, uint64_t l1_index, uint64_t from)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t first;
	uint32_t n;
	bool blank;
	int r = qcow2_frees_prepare(i, qcow2_index(q, from), 1);

	if (r)
		return r;
	r = qcow2_take(i, 1, &first, &n, &blank);
	r = r ? r : qcow2_fresh_add(i, first << q->cluster_bits, blank);
	if (r) {
		qcow2_frees_cancel(i, qcow2_index(q, from), 1);
		return r;
	}
	q->cow.active = true;
	q->cow.l1_index = l1_index;
	q->cow.from = from;
	q->cow.to = first << q->cluster_bits;
	q->cow.slice = 0;
	return copy_l2(i);
}

/* Before a table is changed for the first time: is it ours alone, and no other metadata? */
static int check_l2(struct image *i, uint64_t l1_index, uint64_t off)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t v;
	const char *what;
	int r;

	if (q->l1_checked[l1_index / 64] >> l1_index % 64 & 1)
		return 0;
	r = qcow2_ref_get(i, qcow2_index(q, off), &v);
	if (r)
		return r;
	if (v != 1)
		return qcow2_corrupt(i, "L1 entry %llu is marked as used once but its refcount is %llu",
			(unsigned long long)l1_index, (unsigned long long)v);
	what = qcow2_metadata_at(q, off);
	if (!what || strcmp(what, "an L2 table"))
		return qcow2_corrupt(i, "L1 entry %llu leads to %s", (unsigned long long)l1_index, what ? what : "nothing");
	q->l1_checked[l1_index / 64] |= 1ull << l1_index % 64;
	return 0;
}

int qcow2_l2_writable(struct image *i, uint64_t l1_index, uint64_t *l2_off)
{
	struct qcow2 *q = qcow2_of(i);
	int r = q->cow.active ? copy_l2(i) : 0;

	r = r ? r : qcow2_l2_offset(i, l1_index, l2_off);
	if (r)
		return r;
	if (!*l2_off)
		return make_l2(i, l1_index, l2_off);
	if (q->l1[l1_index] & QCOW2_COPIED)
		return check_l2(i, l1_index, *l2_off);
	r = start_copy(i, l1_index, *l2_off);
	*l2_off = q->l1[l1_index] & QCOW2_OFFSET;
	return r;
}

/* ---- writes ---- */

/* A write in the making to guest index g, or NULL; *before: the first such index after g, if less. */
static const struct alloc *in_flight(const struct qcow2 *q, uint64_t g, uint64_t *before)
{
	for (const struct alloc *a = q->allocs; a; a = a->next) {
		uint64_t first = qcow2_index(q, a->off);

		if (g >= first && g < first + a->count)
			return a;
		if (first > g)
			*before = MIN(*before, first);
	}
	return NULL;
}

/* The space of an entry that says COPIED may be written to: its refcount is 1, and it is not metadata. */
static int check_in_place(struct image *i, uint64_t g, uint64_t entry)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t off = entry & QCOW2_OFFSET, v;
	const char *what = qcow2_metadata_at(q, off);
	int r = 0;

	if (!what)
		r = qcow2_ref_get(i, qcow2_index(q, off), &v);
	if (r)
		return r;
	if (what)
		return qcow2_corrupt(i, "the data of guest cluster %llu lies at 0x%llx, which is in %s", (unsigned long long)g,
			(unsigned long long)off, what);
	if (v != 1)
		return qcow2_corrupt(i, "guest cluster %llu is marked as used once but its refcount is %llu",
			(unsigned long long)g, (unsigned long long)v);
	return 0;
}

/* What alloc() works on. */
struct target {
	uint64_t g, off, len;           /* first guest index, guest bytes */
	struct table *t;
	unsigned at, most;              /* entry of g in t; entries that may be used from it on */
	uint64_t entry, bitmap;
	enum state state;
};

static int find_target(struct image *i, uint64_t off, uint64_t len, struct target *w)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t before = UINT64_MAX, last, l2_off;
	unsigned in_slice = 1u << (q->slice_bits - q->entry_bits);
	int r;

	*w = (struct target){ .g = qcow2_index(q, off), .off = off, .len = len };
	if (in_flight(q, w->g, &before))
		return -EBUSY;
	r = qcow2_l2_writable(i, w->g >> q->l2_bits, &l2_off);
	r = r ? r : qcow2_find_slice(i, w->g, &w->t, &w->at);
	if (r)
		return r;
	last = qcow2_index(q, off + len - 1);
	w->most = (unsigned)MIN(in_slice - w->at, MIN(last + 1, before) - w->g);
	w->entry = load_entry(q, w->t, w->at);
	w->bitmap = load_bitmap(q, w->t, w->at);
	if (!sane_entry(q, w->entry, w->bitmap))
		return qcow2_bad_entry(i, w->g, w->entry);
	w->state = state_of(q, w->entry, w->bitmap, (unsigned)((off & (q->cluster - 1)) >> q->sub_bits));
	return 0;
}

/* Clusters from the target on in the state of the first, and for space that is there, behind each other. */
static unsigned same_state(const struct qcow2 *q, const struct target *w)
{
	unsigned n = 1, most = w->state == REPLACE ? MIN(w->most, FREE_RUN) : w->most;

	for (; n < most; n++) {
		uint64_t e = load_entry(q, w->t, w->at + n), b = load_bitmap(q, w->t, w->at + n);

		if (!sane_entry(q, e, b) || state_of(q, e, b, 0) != w->state)
			break;
		if (w->state < NEW && (e & QCOW2_OFFSET) != (w->entry & QCOW2_OFFSET) + ((uint64_t)n << q->cluster_bits))
			break;
	}
	return n;
}

/* Subclusters from the first asked for on that are, or are not, data; in this cluster. End as a guest offset. */
static uint64_t same_subs(const struct qcow2 *q, const struct target *w)
{
	unsigned s = (unsigned)((w->off & (q->cluster - 1)) >> q->sub_bits);
	uint64_t base = w->g << q->cluster_bits, data = w->bitmap >> s & 1;

	while (s < 32 && (w->bitmap >> s & 1) == data)
		s++;
	return base + ((uint64_t)s << q->sub_bits);
}

static int alloc_there(struct image *i, const struct target *w, struct alloc *a)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t skip = w->off & (q->cluster - 1), base = w->entry & QCOW2_OFFSET, sub = 1ull << q->sub_bits, end;
	unsigned n = q->entry_bits == 4 ? 1 : same_state(q, w);
	int r = 0;

	for (unsigned k = 0; k < n && !r; k++) {
		r = check_in_place(i, w->g + k, load_entry(q, w->t, w->at + k));
		if (r == -EAGAIN && k) {        /* as far as we know */
			n = k;
			r = 0;
		}
	}
	if (r)
		return r;
	end = q->entry_bits == 4 ? same_subs(q, w) : (w->g + n) << q->cluster_bits;
	*a = (struct alloc){ .off = w->off, .len = MIN(w->len, end - w->off), .pos = base + skip, .fresh = w->state == REUSE,
		.first = base, .index = w->at, .count = n };
	r = file_grow(&i->file, base + ((uint64_t)n << q->cluster_bits));
	if (r || !a->fresh)
		return r;
	a->fill_off = w->off & ~(sub - 1);
	a->fill_end = (w->off + a->len + sub - 1) & ~(sub - 1);
	return 0;
}

static int alloc_new(struct image *i, const struct target *w, struct alloc *a)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t skip = w->off & (q->cluster - 1), unit = 1ull << (w->state == NEW ? q->sub_bits : q->cluster_bits), first;
	unsigned n = same_state(q, w), k;
	uint32_t got;
	bool blank;
	int r = qcow2_spare(q, 1);      /* for drop() */

	if (r)
		return r;
	for (k = 0; w->state == REPLACE && k < n && !r; k++)
		r = prepare_old(i, load_entry(q, w->t, w->at + k));
	if (r && k > 1 && r != -EIO) {  /* as many as can be had now */
		n = k - 1;
		k = n;
		r = 0;
	} else if (r) {
		k--;
	}
	r = r ? r : qcow2_take(i, n, &first, &got, &blank);
	while (w->state == REPLACE && k > (r ? 0 : got))
		cancel_old(i, load_entry(q, w->t, w->at + --k));
	if (r) {
		qcow2_unspare(q, 1);
		return r;
	}
	*a = (struct alloc){ .off = w->off, .len = MIN(w->len, ((uint64_t)got << q->cluster_bits) - skip), .fresh = true,
		.pos = (first << q->cluster_bits) + skip, .blank = blank, .first = first << q->cluster_bits,
		.index = w->at, .count = got };
	a->fill_off = w->off & ~(unit - 1);
	a->fill_end = (w->off + a->len + unit - 1) & ~(unit - 1);
	return 0;
}

int qcow2_alloc(struct image *i, uint64_t off, uint64_t len, struct alloc *a)
{
	struct qcow2 *q = qcow2_of(i);
	struct target w;
	int r = find_target(i, off, len, &w);

	r = r ? r : w.state < NEW ? alloc_there(i, &w, a) : alloc_new(i, &w, a);
	if (r || !a->fresh)
		return r;
	a->table = w.t;
	table_pin(a->table);
	a->next = q->allocs;
	q->allocs = a;
	return 0;
}

static void end_alloc(struct qcow2 *q, struct alloc *a)
{
	struct alloc **at = &q->allocs;

	while (*at != a)
		at = &(*at)->next;
	*at = a->next;
	table_unpin(a->table);
}

/* The bitmap bits of subclusters of guest index g that [from, to) has. */
static uint64_t sub_mask(const struct qcow2 *q, uint64_t g, uint64_t from, uint64_t to)
{
	uint64_t base = g << q->cluster_bits, mask = 0;

	for (unsigned s = 0; s < 32; s++) {
		uint64_t at = base + ((uint64_t)s << q->sub_bits);

		mask |= at >= from && at < to ? 1ull << s : 0;
	}
	return mask;
}

void qcow2_link(struct image *i, struct alloc *a)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t g = qcow2_index(q, a->off);
	enum state state = NEW;

	for (uint32_t k = 0; k < a->count; k++) {
		uint64_t old = load_entry(q, a->table, a->index + k), bitmap = load_bitmap(q, a->table, a->index + k);
		uint64_t mask = q->entry_bits == 4 ? sub_mask(q, g + k, a->fill_off, a->fill_end) : 0;
		uint64_t pos = a->first + ((uint64_t)k << q->cluster_bits);

		state = (old & QCOW2_OFFSET) == pos && !(old & QCOW2_COMPRESSED) ? REUSE : state_of(q, old, bitmap, 0);
		bitmap = state == REPLACE ? ALL_SUBS : (bitmap | mask) & ~(mask << 32);
		store_entry(q, a->table, a->index + k, pos | QCOW2_COPIED, bitmap);
		if (state == REPLACE)
			queue_old(i, old);
	}
	if (state != REUSE)
		qcow2_unspare(q, 1);
	end_alloc(q, a);
}

void qcow2_drop(struct image *i, struct alloc *a)
{
	struct qcow2 *q = qcow2_of(i);
	struct qcow2_free *d;
	uint64_t old = load_entry(q, a->table, a->index);
	bool reuse = (old & QCOW2_OFFSET) == a->first && !(old & QCOW2_COMPRESSED);

	for (uint32_t k = 0; k < a->count && !reuse; k++) {
		old = load_entry(q, a->table, a->index + k);
		if (state_of(q, old, 0, 0) == REPLACE)
			cancel_old(i, old);
	}
	if (!reuse) {
		d = qcow2_spare_take(q);
		*d = (struct qcow2_free){ .next = q->dropped, .first = qcow2_index(q, a->first), .n = a->count };
		q->dropped = d;
	}
	end_alloc(q, a);
}

/* ---- zeroes and discards ---- */

struct change {
	bool keep;                      /* space stays with the cluster */
	uint64_t from, to;              /* guest bytes that are to read as zeroes, in whole subclusters */
};

/* What an entry becomes. False: it is so already. */
static bool zeroed(const struct qcow2 *q, uint64_t g, const struct change *c, uint64_t *entry, uint64_t *bitmap)
{
	uint64_t old = *entry, old_map = *bitmap, mask = ALL_SUBS;
	bool ext = q->entry_bits == 4, compressed = old & QCOW2_COMPRESSED, space = !compressed && old & QCOW2_OFFSET;
	bool keep = space && c->keep && old & QCOW2_COPIED;

	if (ext)
		mask = sub_mask(q, g, c->from, c->to);
	if (!space && !compressed && !q->has_backing)
		return false;
	if (ext && (mask != ALL_SUBS || keep)) {
		*bitmap = (old_map & ~mask) | (q->has_backing ? mask << 32 : 0);
	} else if (keep && q->h.version >= 3) {
		*entry = old | QCOW2_ZERO;
	} else {
		*entry = q->has_backing && !ext ? QCOW2_ZERO : 0;
		*bitmap = q->has_backing && ext ? ALL_SUBS << 32 : 0;
	}
	return *entry != old || *bitmap != old_map;
}

/* Change the entry of guest index g. 1: it is so already. */
static int punch_one(struct image *i, uint64_t g, const struct change *c, bool look)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t entry = 0, bitmap = 0, old, before = UINT64_MAX;
	struct table *t;
	unsigned at;
	bool frees;
	int r = qcow2_find_slice(i, g, &t, &at);

	if (r)
		return r;
	if (in_flight(q, g, &before))
		return -EBUSY;
	if (t) {
		entry = load_entry(q, t, at);
		bitmap = load_bitmap(q, t, at);
	}
	if (!sane_entry(q, entry, bitmap))
		return qcow2_bad_entry(i, g, entry);
	old = entry;
	if (!zeroed(q, g, c, &entry, &bitmap))
		return 1;
	if (look)
		return 0;
	frees = old & (QCOW2_COMPRESSED | QCOW2_OFFSET) && (old & ~QCOW2_ZERO) != (entry & ~QCOW2_ZERO);
	r = frees ? prepare_old(i, old) : 0;
	if (r)
		return r;
	store_entry(q, t, at, entry, bitmap);
	if (frees)
		queue_old(i, old);
	return 0;
}

/* Guest index g, with the L2 table made ready only where there is something to change. */
static int punch_cluster(struct image *i, uint64_t g, const struct change *c)
{
	uint64_t l2_off;
	int r = punch_one(i, g, c, true);

	if (r)
		return r < 0 ? r : 0;
	r = qcow2_l2_writable(i, g >> qcow2_of(i)->l2_bits, &l2_off);
	return r ? r : punch_one(i, g, c, false);
}

/* Part of one cluster. With extended L2 its whole subclusters; else *part. */
static int punch_part(struct image *i, uint64_t off, uint64_t len, const struct change *how, uint64_t *done, uint64_t *part)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t sub = 1ull << q->sub_bits, in_cluster = q->cluster - (off & (q->cluster - 1)), entry;
	struct change c = *how;
	struct table *t;
	unsigned at;
	int r;

	len = MIN(len, in_cluster);
	*part = len;
	if (q->entry_bits == 3)
		return 0;
	if (off & (sub - 1) || len < sub) {
		*part = MIN(len, sub - (off & (sub - 1)));
		return 0;
	}
	r = qcow2_find_slice(i, qcow2_index(q, off), &t, &at);
	entry = r || !t ? 0 : load_entry(q, t, at);
	if (r || entry & QCOW2_COMPRESSED)
		return r;
	c.from = off;
	c.to = off + (len & ~(sub - 1));
	r = punch_cluster(i, qcow2_index(q, off), &c);
	if (!r) {
		*done = c.to - c.from;
		*part = 0;
	}
	return r;
}

int qcow2_punch(struct image *i, uint64_t off, uint64_t len, enum punch_kind kind, uint64_t *done, uint64_t *part)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t skip = off & (q->cluster - 1), end = off + len, g = qcow2_index(q, off), n, k, l2_off;
	struct change c = { .keep = kind == PUNCH_ZERO };
	int r = 0;

	*done = *part = 0;
	if (end == i->size)             /* what the last cluster has behind the disk goes too */
		end = (end + q->cluster - 1) & ~(uint64_t)(q->cluster - 1);
	n = qcow2_index(q, end) - g;
	if (q->h.version < 3 && q->has_backing) {
		*part = len;            /* there is no way to say "zeroes" */
		return 0;
	}
	if (skip || !n)
		return punch_part(i, off, len, &c, done, part);
	r = qcow2_l2_offset(i, g >> q->l2_bits, &l2_off);
	if (r)
		return r;
	n = MIN(n, (1ull << q->l2_bits) - (g & ((1ull << q->l2_bits) - 1)));
	for (k = 0; k < n && !r && (l2_off || q->has_backing); k++) {
		c.from = (g + k) << q->cluster_bits;
		c.to = c.from + q->cluster;
		r = punch_cluster(i, g + k, &c);
	}
	if (r && k > 1)
		r = 0, k--;
	if (!r)
		*done = MIN(len, (l2_off || q->has_backing ? k : n) << q->cluster_bits);
	return r;
}

/* ---- metadata on its way out ---- */

/* The sectors of a table in memory whose bits are set; the bits move to sent. */
static int gather_sectors(struct plan *p, const uint64_t *table, uint64_t n, uint64_t off, uint64_t *dirty, uint64_t *sent)
{
	uint64_t sectors = (n * 8 + SECTOR - 1) / SECTOR, be[SECTOR / 8];
	int r = 0;

	for (uint64_t w = 0; w < (sectors + 63) / 64 && !r; w++) {
		while (dirty[w] && !r) {
			unsigned bit = (unsigned)__builtin_ctzll(dirty[w]);
			uint64_t first = (w * 64 + bit) * (SECTOR / 8), count = MIN(n - first, SECTOR / 8);

			for (uint64_t k = 0; k < count; k++)
				be[k] = htobe64(table[first + k]);
			r = plan_write(p, off + first * 8, be, count * 8);
			if (r)
				break;
			dirty[w] &= ~(1ull << bit);
			sent[w] |= 1ull << bit;
		}
	}
	return r;
}

/* The plan failed: what was sent is dirty again. */
static bool sectors_gathered(uint64_t n, uint64_t *dirty, uint64_t *sent, int err)
{
	uint64_t sectors = (n * 8 + SECTOR - 1) / SECTOR;
	bool any = false;

	for (uint64_t w = 0; w < (sectors + 63) / 64; w++) {
		if (err)
			dirty[w] |= sent[w];
		sent[w] = 0;
		any |= dirty[w] != 0;
	}
	return any;
}

static int gather_moved_table(struct qcow2 *q, struct plan *p)
{
	uint64_t be[512], n;
	int r = 0;

	for (uint32_t at = 0; at < q->rt_n && !r; at += (uint32_t)n) {
		n = MIN(q->rt_n - at, ARRAY_LEN(be));
		for (uint32_t k = 0; k < n; k++)
			be[k] = htobe64(q->rt[at + k]);
		r = plan_write(p, q->h.refcount_offset + at * 8ull, be, n * 8);
	}
	q->rt_moved = false;
	q->rt_moving = q->header_dirty = true;
	memset(q->rt_dirty, 0, ((q->rt_n * 8ull / SECTOR + 63) / 64) * 8);
	q->rt_any = false;
	return r;
}

static int gather_header(struct qcow2 *q, struct plan *p)
{
	uint8_t head[QCOW2_HEAD];

	qcow2_header_to_disk(&q->h, head);
	q->header_dirty = false;
	q->header_sent = true;
	return plan_write(p, 0, head, qcow2_header_written(&q->h));
}

/* In a corrupt image: only that it is. */
static int gather_mark(struct qcow2 *q, struct plan *p)
{
	uint64_t be = htobe64(q->h.incompatible);
	int r = 0;

	if (q->mark)
		r = plan_write(p, offsetof(struct qcow2_header, incompatible), &be, 8);
	q->mark_sent = q->mark;
	return r || !p->n ? r : plan_barrier(p);
}

static int gather_refcounts(struct image *i, struct plan *p)
{
	struct qcow2 *q = qcow2_of(i);
	int r = i->blocking ? qcow2_dropped_gather(i) : 0;

	r = r ? r : qcow2_frees_gather(i, p);
	r = r ? r : qcow2_fresh_gather(q, p);
	r = r ? r : tables_gather(q->refs, p);
	if (!r && q->rt_moved)
		r = gather_moved_table(q, p);
	if (r || (!q->rt_any && !q->header_dirty))
		return r;
	r = plan_barrier(p);
	if (!r && q->rt_any)
		r = gather_sectors(p, q->rt, q->rt_n, q->h.refcount_offset, q->rt_dirty, q->rt_sent);
	q->rt_any = r && q->rt_any;
	return r || !q->header_dirty ? r : gather_header(q, p);
}

int qcow2_gather(struct image *i, struct plan *p)
{
	struct qcow2 *q = qcow2_of(i);
	int r;

	if (i->corrupt)
		return gather_mark(q, p);
	r = gather_refcounts(i, p);
	if (!r && tables_any_dirty(q->l2)) {
		r = plan_barrier(p);    /* after the refcounts, and after the data */
		r = r ? r : tables_gather(q->l2, p);
	}
	if (!r && q->l1_any) {
		r = plan_barrier(p);
		r = r ? r : gather_sectors(p, q->l1, q->h.l1_size, q->h.l1_offset, q->l1_dirty, q->l1_sent);
		q->l1_any = r;
	}
	return r || !p->n ? r : plan_barrier(p);
}

void qcow2_gathered(struct image *i, int err)
{
	struct qcow2 *q = qcow2_of(i);

	q->failed |= err != 0;
	if (q->mark_sent && !err)
		q->mark = i->marking = false;
	q->mark_sent = false;
	tables_gathered(q->l2, err);
	tables_gathered(q->refs, err);
	qcow2_fresh_gathered(q, err);
	qcow2_frees_gathered(q, err);
	q->l1_any = sectors_gathered(q->h.l1_size, q->l1_dirty, q->l1_sent, err);
	q->rt_any = sectors_gathered(q->rt_n, q->rt_dirty, q->rt_sent, err);
	q->header_dirty |= q->header_sent && err;
	q->rt_moved |= q->rt_moving && err;
	q->header_sent = q->rt_moving = false;
}

/* ---- compressed clusters, written by tools ---- */

static size_t deflate_cluster(const void *in, void *out, size_t size)
{
	z_stream s = { .next_in = (Bytef *)in, .avail_in = (uInt)size, .next_out = out, .avail_out = (uInt)size };
	bool fits;

	if (deflateInit2(&s, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK)
		return 0;
	fits = deflate(&s, Z_FINISH) == Z_STREAM_END;
	deflateEnd(&s);
	return fits ? size - s.avail_out : 0;
}

/* Bytes in out, or 0: it does not get smaller. */
static size_t compress_cluster(const struct qcow2 *q, const void *in, void *out, size_t size)
{
	size_t n;

	if (!q->h.compression_type)
		return deflate_cluster(in, out, size);
	n = ZSTD_compress(out, size, in, size, ZSTD_CLEVEL_DEFAULT);
	return ZSTD_isError(n) ? 0 : n;
}

/* What does not get smaller by a sector is stored as it is. */
static int store_plain(struct image *i, const uint8_t *data, uint64_t off)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t left = MIN(q->cluster, i->size - off);
	int r = 0;

	while (left && !r) {
		struct alloc a = { 0 };

		r = qcow2_alloc(i, off, left, &a);
		if (r)
			return r;
		/* New space is filled to its end, behind the disk too: the caller's cluster is whole. */
		r = meta_write(&i->file, data, a.fresh ? a.fill_end - off : a.len, a.pos);
		if (a.fresh && r)
			qcow2_drop(i, &a);
		else if (a.fresh)
			qcow2_link(i, &a);
		data += a.len;
		off += a.len;
		left -= a.len;
	}
	return r;
}

/* Room for n bytes, n less than a cluster, behind the compressed cluster written last or in a new cluster. */
static int pack(struct image *i, uint32_t n, uint64_t *pos)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t at = (q->packed + SECTOR - 1) & ~(uint64_t)(SECTOR - 1), used = 0, first;
	uint64_t room = at & (q->cluster - 1) ? q->cluster - (at & (q->cluster - 1)) : 0;
	uint32_t got;
	bool blank;
	int r = room ? qcow2_ref_get(i, qcow2_index(q, at), &used) : 0;

	if (r)
		return r;
	if (!used || used >= q->refs_max)
		room = 0;
	if (n > room) {
		r = qcow2_take(i, 1, &first, &got, &blank);
		if (r)
			return r;
		if (!room || first != qcow2_index(q, at) + 1) {
			at = first << q->cluster_bits;
			room = 0;
		}
	}
	r = room ? qcow2_ref_add(i, qcow2_index(q, at), 1, 1) : 0;
	*pos = at;
	q->packed = r ? 0 : at + n;
	return r;
}

static int store_compressed(struct image *i, uint8_t *z, uint32_t n, uint64_t off)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned shift = 62 - (q->cluster_bits - 8), at;
	uint64_t l2_off, pos, old, g = qcow2_index(q, off);
	uint32_t sectors = (n + SECTOR - 1) / SECTOR;
	struct table *t;
	int r = qcow2_l2_writable(i, g >> q->l2_bits, &l2_off);

	r = r ? r : qcow2_find_slice(i, g, &t, &at);
	if (r)
		return r;
	old = load_entry(q, t, at);
	if (!sane_entry(q, old, load_bitmap(q, t, at)))
		return qcow2_bad_entry(i, g, old);
	memset(z + n, 0, (size_t)sectors * SECTOR - n);
	r = pack(i, sectors * SECTOR, &pos);
	if (!r && pos >> shift)
		r = -EFBIG;
	r = r ? r : meta_write(&i->file, z, (size_t)sectors * SECTOR, pos);
	r = r ? r : prepare_old(i, old);
	if (r)
		return r;
	store_entry(q, t, at, QCOW2_COMPRESSED | (uint64_t)(sectors - 1) << shift | pos, 0);
	queue_old(i, old);
	return 0;
}

/* What does not get smaller by a sector is not worth it. */
size_t qcow2_compress(const struct image *i, const void *cluster, void *out)
{
	const struct qcow2 *q = qcow2_of(i);
	size_t n = compress_cluster(q, cluster, out, q->cluster);

	return n > q->cluster - SECTOR ? 0 : n;
}

int qcow2_write_packed(struct image *i, void *z, size_t n, uint64_t off)
{
	const struct qcow2 *q = qcow2_of(i);

	if (off & (q->cluster - 1) || off >= i->size || !n || n > q->cluster - SECTOR)
		return -EINVAL;
	return store_compressed(i, z, (uint32_t)n, off);
}

int qcow2_write_compressed(struct image *i, const void *cluster, uint64_t off)
{
	struct qcow2 *q = qcow2_of(i);
	auto_free uint8_t *z = NULL;
	size_t n;

	if (off & (q->cluster - 1) || off >= i->size)
		return -EINVAL;
	z = malloc(q->cluster);
	if (!z)
		return -ENOMEM;
	n = qcow2_compress(i, cluster, z);
	return n ? store_compressed(i, z, (uint32_t)n, off) : store_plain(i, cluster, off);
}
