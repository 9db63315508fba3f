/*
 * qcow2: mending what a scan found.
 *
 * How this works. One thing is changed at a time, with a scan in between, so that each step sees the truth:
 *
 *      entries that make no sense -> snapshot table -> refcount structure, if unusable, anew at the end of the file
 *      -> refcounts -> COPIED flags -> dirty and corrupt bits
 *
 * After a kill in between the image is as damaged as before or less, and mending can start again.
 */
#include <errno.h>
#include <stdlib.h>
#include "vmm/error.h"
#include "qcow2_scan.h"

#define ALL_ZERO     0xffffffff00000000ull     /* subclusters: all read as zeroes */

/* ---- entries ---- */

/*
 * The cluster that an entry with low bits too many may have meant, 0 if it cannot be: the refcount in the file says
 * that it has one user more than was found, and those found use it for the same thing.
 */
static uint64_t meant(struct scan *k, uint64_t off, bool l2_table)
{
	uint64_t cluster = off >> k->h.cluster_bits, bit = 1ull << cluster % CELL;
	const struct cell *e = scan_look(k, cluster);

	if (cluster >= k->n || scan_stored(k, cluster) <= scan_refs(k, cluster))
		return 0;
	if (e && (e->meta | e->counts) & bit)
		return 0;
	if (scan_refs(k, cluster) && !(e->l2 & bit) == l2_table)
		return 0;
	return scan_use(k, cluster, 1, NULL) ? 0 : cluster << k->h.cluster_bits;
}

static int mend_l1(struct scan *k, uint64_t *e, uint64_t index, void *arg)
{
	enum fault f = scan_judge_l1(k, *e);

	(void)index;
	(void)arg;
	if (f == UNALIGNED)
		*e = meant(k, *e & QCOW2_OFFSET, true);
	else if (f == RESERVED)
		*e &= *e & QCOW2_OFFSET ? ~QCOW2_L1_RESERVED : 0;
	else if (!scan_usable(f))
		*e = 0;
	return 0;
}

/* Zeroes where the format can say so; else what the backing image has. */
static uint64_t lost(const struct scan *k, uint64_t *bits)
{
	*bits = k->ext ? ALL_ZERO : 0;
	return k->h.version >= 3 && !k->ext ? QCOW2_ZERO : 0;
}

static uint64_t mend_entry(struct scan *k, uint64_t e, uint64_t *bits)
{
	enum fault f = scan_judge(k, e, *bits);
	uint64_t place;

	switch (f) {
	case UNALIGNED:
		place = meant(k, e & QCOW2_OFFSET, false);
		return place ? (e & ~QCOW2_OFFSET & ~scan_l2_reserved(k)) | place : lost(k, bits);
	case OUTSIDE:
	case IN_METADATA:
		return lost(k, bits);
	case RESERVED:
		return e & (e & QCOW2_COMPRESSED || !(e & QCOW2_OFFSET) ? ~QCOW2_COPIED : ~0ull) &
			(e & QCOW2_COMPRESSED ? ~0ull : ~scan_l2_reserved(k));
	case BITMAP:
		if (e & QCOW2_COMPRESSED)
			*bits = 0;
		else if (!(e & QCOW2_OFFSET))
			*bits |= *bits << 32, *bits &= ALL_ZERO;
		else
			*bits &= ~(*bits << 32);
		return e;
	case FINE:
	case IN_REFCOUNTS:
		break;
	}
	return e;
}

static int mend_l2(struct scan *k, uint64_t table)
{
	uint64_t off = table << k->h.cluster_bits;
	bool changed = false;

	if (!scan_read(k, k->table, k->cluster, off, "the L2 table"))
		return 0;
	for (uint32_t n = 0; n < scan_l2_entries(k); n++) {
		uint64_t bits, e = scan_l2_get(k, n, &bits), was = bits, now;

		if (!(e | bits))
			continue;
		now = mend_entry(k, e, &bits);
		if (now == e && bits == was)
			continue;
		scan_l2_set(k, n, now, bits);
		changed = true;
	}
	return changed ? meta_write(&k->i->file, k->table, k->cluster, off) : 0;
}

static int mend_entries(struct scan *k)
{
	int r = 0;

	for (uint32_t n = 0; n < k->l2_n && !r; n++)
		r = mend_l2(k, k->l2_list[n]);
	for (uint32_t n = 0; n < k->l1_n && !r; n++)
		r = scan_entries(k, k->l1[n].off, k->l1[n].n, "the L1 table", mend_l1, NULL);
	return r;
}

/* ---- new structures behind everything ---- */

/* The first cluster that nothing lies in or after; of a block device: that nothing is known to. */
static uint64_t behind(const struct scan *k)
{
	uint64_t entries = k->n / scan_per_block(k) + 1;

	return k->i->file.blockdev || entries * 8 > QCOW2_RT_MAX / 2 ? k->top : MAX(k->n, k->top);
}

/* The file will have clusters from first on: writing them makes it longer. */
static int room_for(struct scan *k, uint64_t first, uint64_t clusters)
{
	struct host_file *f = &k->i->file;
	uint64_t end;

	if (__builtin_mul_overflow(first + clusters, (uint64_t)k->cluster, &end) || end > INT64_MAX)
		return -EFBIG;
	if (f->blockdev && end > f->size)
		return -ENOSPC;
	f->size = MAX(f->size, end);
	return 0;
}

/* n bytes of the header at off, after all that was written before. */
static int switch_head(struct scan *k, const void *bytes, size_t n, uint64_t off)
{
	int r = meta_sync(&k->i->file);

	r = r ? r : meta_write(&k->i->file, bytes, n, off);
	return r ? r : meta_sync(&k->i->file);
}

/* A copy of one entry, with the fields that version 3 wants; bytes of it. */
static int copy_snap(struct scan *k, const struct snap *s, uint8_t *out, uint32_t *len)
{
	uint32_t extra = s->brief ? 16 : s->extra;
	uint64_t vm_state, size = htobe64(k->h.size);
	int r = meta_read_all(&k->i->file, out, 40, s->at);

	if (!r)
		r = meta_read_all(&k->i->file, out + 40, s->extra, s->at + 40);
	if (!r)
		r = meta_read_all(&k->i->file, out + 40 + extra, s->len - 40 - s->extra, s->at + 40 + s->extra);
	if (r)
		return r;
	if (s->brief) {
		uint32_t be = htobe32(extra);

		vm_state = htobe64(get32(out + 32));
		if (s->extra < 8)
			memcpy(out + 40, &vm_state, 8);
		memcpy(out + 48, &size, 8);
		memcpy(out + 36, &be, 4);
	}
	*len = s->len - s->extra + extra;
	return 0;
}

/* The snapshot table with only what can be kept. */
static int mend_snaps(struct scan *k)
{
	uint64_t first = behind(k), at = 0, most = 0;
	auto_free uint8_t *table = NULL;
	uint8_t head[12] = { 0 };
	uint32_t kept = 0;
	int r = 0;

	for (uint32_t n = 0; n < k->snap_n; n++)
		most += k->snap[n].len + 24;
	table = calloc(1, most + k->cluster);
	if (!table)
		return -ENOMEM;
	for (uint32_t n = 0; n < k->snap_n && !r; n++) {
		uint32_t len;

		if (k->snap[n].bad)
			continue;
		r = copy_snap(k, &k->snap[n], table + at, &len);
		at += (len + 7) & ~7u;
		kept++;
	}
	at = (at + k->cluster - 1) & ~(uint64_t)(k->cluster - 1);
	if (!r && kept)
		r = room_for(k, first, at / k->cluster);
	if (!r && kept)
		r = meta_write(&k->i->file, table, at, first << k->h.cluster_bits);
	if (r)
		return r;
	if (kept) {
		uint64_t off = htobe64(first << k->h.cluster_bits);

		kept = htobe32(kept);
		memcpy(head, &kept, 4);
		memcpy(head + 4, &off, 8);
	}
	return switch_head(k, head, sizeof(head), 60);
}

/* A refcount structure in the making: where, and which blocks. */
struct rebuild {
	uint64_t first, blocks, table_clusters, entries;
	uint64_t *rt;                   /* QCOW2_RT_MAX; host offset of each block, 0 none */
};

static int plan_rebuild(struct scan *k, struct rebuild *b)
{
	uint64_t per = scan_per_block(k), before;

	b->first = behind(k);
	b->blocks = b->table_clusters = 1;
	for (uint32_t c = 0; c < k->cells; c++) {
		uint64_t index = scan_cell(k, c)->key * CELL / per;

		if (index >= QCOW2_RT_MAX / 8)
			return -EFBIG;
		b->rt[index] = 1;
	}
	do {                            /* the structure counts itself: until it does not grow any more */
		uint64_t end = b->first + b->blocks + b->table_clusters;

		before = b->blocks + b->table_clusters;
		b->entries = (end - 1) / per + 1;
		if (b->entries > QCOW2_RT_MAX / 8)
			return -EFBIG;
		for (uint64_t n = b->first / per; n < b->entries; n++)
			b->rt[n] = 1;
		b->blocks = 0;
		for (uint64_t n = 0; n < b->entries; n++)
			b->blocks += b->rt[n];
		b->table_clusters = (b->entries * 8 + k->cluster - 1) >> k->h.cluster_bits;
	} while (b->blocks + b->table_clusters > before);
	return 0;
}

static int write_block(struct scan *k, const struct rebuild *b, uint64_t index, uint64_t off)
{
	uint64_t per = scan_per_block(k), first = index * per, end = b->first + b->blocks + b->table_clusters;

	memset(k->table, 0, k->cluster);
	for (uint64_t n = 0; n < per; n += CELL) {
		const struct cell *cell = scan_look(k, first + n);

		for (uint64_t m = 0; m < CELL; m++) {
			uint64_t refs = cell ? cell->refs[m] : 0;

			if (first + n + m >= b->first && first + n + m < end)
				refs = 1;
			refs = refs == REFS_MAX ? k->q->refs_max : MIN(refs, k->q->refs_max);
			qcow2_ref_store(k->q, k->table, (unsigned)(n + m), refs);
		}
	}
	return meta_write(&k->i->file, k->table, k->cluster, off);
}

static int write_rebuilt(struct scan *k, struct rebuild *b)
{
	uint64_t at = b->first << k->h.cluster_bits, len = b->table_clusters << k->h.cluster_bits;
	uint32_t clusters = htobe32((uint32_t)b->table_clusters);
	uint64_t off;
	uint8_t head[12];
	int r = room_for(k, b->first, b->blocks + b->table_clusters);

	for (uint64_t n = 0; n < b->entries && !r; n++) {
		if (!b->rt[n])
			continue;
		r = write_block(k, b, n, at);
		b->rt[n] = htobe64(at);
		at += k->cluster;
	}
	off = htobe64(at);
	if (!r)
		r = meta_write(&k->i->file, b->rt, len, at);
	if (r)
		return r;
	memcpy(head, &off, 8);
	memcpy(head + 8, &clusters, 4);
	return switch_head(k, head, sizeof(head), 48);
}

/* The scan counted all but the refcount structure. */
static int rebuild_refcounts(struct scan *k)
{
	auto_free uint64_t *rt = calloc(1, QCOW2_RT_MAX + k->cluster);
	struct rebuild b = { .rt = rt };
	int r = rt ? plan_rebuild(k, &b) : -ENOMEM;

	return r ? r : write_rebuilt(k, &b);
}

/* ---- everything ---- */

/* What leads elsewhere or lies elsewhere. */
static int mend_structures(struct scan *k, struct error *err)
{
	int r = 0;

	/* An L2 table that was found again may have bad entries of its own. */
	for (unsigned tries = 0; k->bad_entries && tries < 3 && !r; tries++) {
		r = mend_entries(k);
		r = r ? error_errno(err, -r, "cannot mend the L1 and L2 tables") : qcow2_scan(k, err);
	}
	if (!r && k->bad_snaps) {
		r = mend_snaps(k);
		r = r ? error_errno(err, -r, "cannot mend the snapshot table") : qcow2_scan(k, err);
	}
	if (!r && k->bad_refs) {
		uint64_t top = k->top;

		k->no_refs = true;
		r = qcow2_scan(k, err);
		k->top = MAX(k->top, top);      /* where the old one may lie, until the header leads to the new one */
		if (!r) {
			r = rebuild_refcounts(k);
			r = r ? error_errno(err, -r, "cannot rebuild the refcounts") : 0;
		}
		k->no_refs = false;
	}
	return r;
}

static int clear_marks(struct scan *k)
{
	uint64_t flags = htobe64(k->h.incompatible & ~(uint64_t)(QCOW2_DIRTY | QCOW2_CORRUPT));

	return k->h.incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT) ? switch_head(k, &flags, sizeof(flags), 72) : 0;
}

int qcow2_mend(struct scan *k, enum image_repair repair, struct error *err)
{
	int r = 0;

	k->mending = true;
	if (k->unreadable)
		return 0;
	if (repair == REPAIR_ALL)
		r = mend_structures(k, err);
	if (r)
		return r;
	/* What nobody refers to may still be the data that a broken entry meant. */
	if (repair == REPAIR_ALL || (!k->bad_entries && !k->bad_snaps && !k->bad_bitmaps && !k->bad_refs)) {
		k->fix = repair;
		r = qcow2_scan(k, err);
		k->fix = REPAIR_NONE;
	}
	r = r ? r : qcow2_scan(k, err);
	if (!r && !k->corruptions && !k->errors)
		r = clear_marks(k);
	if (!r)
		r = meta_sync(&k->i->file);
	return r && err && !err->code ? error_errno(err, -r, "cannot mend it") : r;
}
