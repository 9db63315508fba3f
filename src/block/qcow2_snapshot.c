/*
 * qcow2: internal snapshots.
 *
 * How this works. A snapshot is a second L1 table; whatever both lead to has a refcount of 2 or more, and none of the
 * entries that lead there says COPIED. A kill at any instant leaves the old state or the new one, and leaks at worst:
 *
 *      create  COPIED flags off | refcounts up, clusters taken | L1 copy, new snapshot table | header | old table freed
 *      apply   COPIED flags off | refcounts up, clusters taken | L1 copy | header            | old L1's users down
 *      delete  new snapshot table | header | refcounts down | COPIED flags on where the refcount is 1 again
 *
 * Each bar is a flush. Before the first change everything that will be counted is looked at: an L1 or L2 table that
 * makes no sense, or a refcount that would not fit, is refused with nothing changed.
 */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "qcow2.h"

#define ENTRY_HEAD 40u          /* bytes of a table entry before the extra data */
#define EXTRA      24u          /* extra data that we write: VM state, disk size, instruction count */
#define EXTRA_MAX  1024u
#define NAME_MOST  255u
#define FREE_BATCH 4096u        /* clusters on their way to be free before a flush */

struct snap {
	size_t at;              /* in the table */
	uint32_t len, extra, id_len, name_len;
	uint64_t l1_off, size, vm_state;
	uint32_t l1_n;
};

/* The snapshot table as it is in the file, and what its entries say. */
struct snaps {
	uint8_t *bytes;
	size_t len, room;
	struct snap *list;
	uint32_t n;
};

static uint32_t get32(const uint8_t *p)
{
	uint32_t n;

	memcpy(&n, p, sizeof(n));
	return be32toh(n);
}

static uint64_t get64(const uint8_t *p)
{
	uint64_t n;

	memcpy(&n, p, sizeof(n));
	return be64toh(n);
}

static void put32(uint8_t *p, uint32_t n)
{
	n = htobe32(n);
	memcpy(p, &n, sizeof(n));
}

static void put64(uint8_t *p, uint64_t n)
{
	n = htobe64(n);
	memcpy(p, &n, sizeof(n));
}

static void snaps_free(struct snaps *t)
{
	free(t->bytes);
	free(t->list);
}

/* ---- the snapshot table ---- */

static int more_room(struct snaps *t, size_t len)
{
	size_t room = MAX(t->room * 2, t->len + len + 4096);
	uint8_t *more;

	if (t->len + len <= t->room)
		return 0;
	more = realloc(t->bytes, room);
	if (!more)
		return -ENOMEM;
	t->bytes = more;
	t->room = room;
	return 0;
}

static void decode(const struct qcow2 *q, const uint8_t *b, struct snap *s)
{
	s->vm_state = s->extra >= 8 ? get64(b + ENTRY_HEAD) : get32(b + 32);
	s->size = s->extra >= 16 ? get64(b + ENTRY_HEAD + 8) : q->h.size;
}

/* The next entry, at the end of what was read so far. */
static int load_one(struct image *i, struct snaps *t, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);
	uint64_t off = q->h.snapshots_offset + t->len;
	struct snap s = { .at = t->len };
	uint8_t b[ENTRY_HEAD];
	size_t padded;
	int r = meta_read_all(&i->file, b, sizeof(b), off);

	if (r)
		return error_errno(err, -r, "cannot read entry %u of its snapshot table", t->n + 1);
	s.l1_off = get64(b);
	s.l1_n = get32(b + 8);
	s.id_len = get32(b + 12) >> 16;
	s.name_len = get32(b + 12) & 0xffff;
	s.extra = get32(b + 36);
	if (s.extra > EXTRA_MAX)
		return error_set(err, EIO, "entry %u of its snapshot table makes no sense ('vmm disk check --repair all')",
			t->n + 1);
	s.len = ENTRY_HEAD + s.extra + s.id_len + s.name_len;
	padded = (s.len + 7) & ~7u;
	if (t->len + padded > QCOW2_SNAPSHOT_BYTES)
		return error_set(err, EIO, "its snapshot table has more than 64 MiB");
	r = more_room(t, padded);
	if (r)
		return error_set(err, ENOMEM, "out of memory");
	memset(t->bytes + t->len, 0, padded);
	r = meta_read_all(&i->file, t->bytes + t->len, s.len, off);
	if (r)
		return error_errno(err, -r, "cannot read entry %u of its snapshot table", t->n + 1);
	decode(q, t->bytes + t->len, &s);
	t->len += padded;
	t->list[t->n++] = s;
	return 0;
}

static int load(struct image *i, struct snaps *t, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);
	uint32_t n = q->h.snapshots;
	int r = 0;

	if (n > QCOW2_SNAPSHOTS_MAX || (uint64_t)n * ENTRY_HEAD > i->file.size)
		return error_set(err, EIO, "it says that it has %u snapshots: %u can be", n, QCOW2_SNAPSHOTS_MAX);
	t->list = calloc(n + 1u, sizeof(*t->list));
	if (!t->list)
		return error_set(err, ENOMEM, "out of memory");
	while (t->n < n && !r)
		r = load_one(i, t, err);
	return r;
}

static bool text_is(const struct snaps *t, size_t at, uint32_t len, const char *text)
{
	return strlen(text) == len && !memcmp(t->bytes + at, text, len);
}

/* By id, or else by name; NULL: none. */
static struct snap *find(const struct snaps *t, const char *which)
{
	for (uint32_t n = 0; n < t->n; n++) {
		struct snap *s = &t->list[n];

		if (text_is(t, s->at + ENTRY_HEAD + s->extra, s->id_len, which))
			return s;
	}
	for (uint32_t n = 0; n < t->n; n++) {
		struct snap *s = &t->list[n];

		if (text_is(t, s->at + ENTRY_HEAD + s->extra + s->id_len, s->name_len, which))
			return s;
	}
	return NULL;
}

/* A copy of text for a person, as much of it as fits, ending in 0. */
static void copy_text(char *out, size_t room, const uint8_t *text, size_t len)
{
	len = MIN(len, room - 1);
	memcpy(out, text, len);
	out[len] = 0;
}

int qcow2_snapshots(struct image *i, struct image_snapshot **list, unsigned *n, struct error *err)
{
	struct snaps t = { 0 };
	int r = load(i, &t, err);

	*list = r ? NULL : calloc(t.n + 1u, sizeof(**list));
	if (!r && !*list)
		r = error_set(err, ENOMEM, "out of memory");
	for (uint32_t k = 0; k < t.n && !r; k++) {
		const struct snap *s = &t.list[k];
		const uint8_t *b = t.bytes + s->at, *text = b + ENTRY_HEAD + s->extra;
		struct image_snapshot *out = &(*list)[k];

		copy_text(out->id, sizeof(out->id), text, s->id_len);
		copy_text(out->name, sizeof(out->name), text + s->id_len, s->name_len);
		out->size = s->size;
		out->vm_state = s->vm_state;
		out->at_ns = get32(b + 16) * 1000000000ull + get32(b + 20);
		out->vm_clock_ns = get64(b + 24);
	}
	*n = r ? 0 : t.n;
	snaps_free(&t);
	if (r)
		error_prefix(err, "'%s': ", i->path);
	return r;
}

/* ---- walking over what an L1 table leads to ---- */

/*
 * For each L2 table (entry NULL) and each entry that refers to clusters: [first, first + n) are those. *entry, in
 * host order, may be changed. An L2 table comes after its entries. 0, or -errno to stop.
 */
struct walk {
	int (*fn)(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry);
	uint64_t *l1;                   /* host order */
	uint32_t l1_n;
	bool active;                    /* it is the L1 table of the disk, in memory */
	uint64_t at;                    /* L1 index */
	uint64_t calls;                 /* that fn was called; it stops before call number most, if most is not 0 */
	uint64_t most;
	int delta;
	struct error *err;
};

static int refused(struct walk *w, const char *what, uint64_t entry)
{
	return error_set(w->err, EIO, "%s %#llx makes no sense ('vmm disk check --repair all' mends it)", what,
		(unsigned long long)entry);
}

static bool in_file(const struct image *i, uint64_t off)
{
	const struct qcow2 *q = qcow2_of(i);

	return !(off & (q->cluster - 1)) && off < i->file.size;
}

static int call(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	if (w->most && w->calls == w->most)
		return 0;
	w->calls++;
	return w->fn(i, w, first, n, entry);
}

static int walk_entry(struct image *i, struct walk *w, uint64_t *entry)
{
	const struct qcow2 *q = qcow2_of(i);
	uint64_t off = *entry & QCOW2_OFFSET;
	uint32_t len;

	if (*entry & QCOW2_COMPRESSED) {
		qcow2_compressed_at(q, *entry, &off, &len);
		if (off >= i->file.size)
			return refused(w, "the L2 entry", *entry);
		return call(i, w, qcow2_index(q, off), qcow2_index(q, off + len - 1) - qcow2_index(q, off) + 1, entry);
	}
	if (!off)
		return 0;
	if (!in_file(i, off))
		return refused(w, "the L2 entry", *entry);
	return call(i, w, qcow2_index(q, off), 1, entry);
}

static int walk_slice(struct image *i, struct walk *w, struct table *t)
{
	const struct qcow2 *q = qcow2_of(i);
	unsigned step = 1u << (q->entry_bits - 3), n = 1u << (q->slice_bits - 3);
	uint64_t *e = t->data;
	bool changed = false;
	int r = 0;

	table_pin(t);
	for (unsigned k = 0; k < n && !r; k += step) {
		uint64_t was = be64toh(e[k]), now = was;

		if (was)
			r = walk_entry(i, w, &now);
		if (now != was) {
			e[k] = htobe64(now);
			changed = true;
		}
	}
	if (changed)
		table_dirty(t);
	table_unpin(t);
	return r;
}

static int walk_l2(struct image *i, struct walk *w, uint64_t off)
{
	const struct qcow2 *q = qcow2_of(i);
	int r = 0;

	for (unsigned n = 0; n < 1u << (q->cluster_bits - q->slice_bits) && !r; n++) {
		struct table *t;

		r = qcow2_slice(i, q->l2, off, n, &t);
		if (!r)
			r = walk_slice(i, w, t);
	}
	return r;
}

static int walk(struct image *i, struct walk *w)
{
	const struct qcow2 *q = qcow2_of(i);
	int r = 0;

	for (w->at = 0; w->at < w->l1_n && !r; w->at++) {
		uint64_t off = w->l1[w->at] & QCOW2_OFFSET;

		if (!off)
			continue;
		if (!in_file(i, off) || w->l1[w->at] & QCOW2_L1_RESERVED)
			return refused(w, "the L1 entry", w->l1[w->at]);
		r = walk_l2(i, w, off);
		if (!r)
			r = call(i, w, qcow2_index(q, off), 1, NULL);
	}
	return r;
}

/* Each user is counted, leads to no metadata, and delta more or less of it is possible. */
static int verify_one(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	const struct qcow2 *q = qcow2_of(i);

	if (entry && qcow2_metadata_at(q, first << q->cluster_bits))
		return refused(w, "the L2 entry", *entry);
	for (uint64_t k = first; k < first + n; k++) {
		uint64_t val;
		int r = qcow2_ref_get(i, k, &val);

		if (r)
			return error_errno(w->err, -r, "cannot look at its refcounts");
		if (!val)
			return error_set(w->err, EIO, "cluster %llu is in use, but its refcount is 0 "
				"('vmm disk check --repair all' mends it)", (unsigned long long)k);
		if (w->delta > 0 && val >= q->refs_max)
			return error_set(w->err, EINVAL, "refcount_bits=%u is too small: cluster %llu is used %llu times already",
				1u << q->h.refcount_order, (unsigned long long)k, (unsigned long long)val);
	}
	return 0;
}

static int uncopied_one(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	(void)first;
	(void)n;
	if (entry) {
		*entry &= *entry & QCOW2_COMPRESSED ? ~0ull : ~QCOW2_COPIED;
	} else if (w->l1[w->at] & QCOW2_COPIED) {
		w->l1[w->at] &= ~QCOW2_COPIED;
		if (w->active)
			qcow2_l1_changed(qcow2_of(i), w->at);
	}
	return 0;
}

static int add_one(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	int r = qcow2_ref_add(i, first, n, w->delta);

	(void)entry;
	return r;
}

/* One user less; the header that had it is gone already. */
static int free_one(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	int r = qcow2_free_later(i, first, n);

	(void)entry;
	if (!r && w->calls % FREE_BATCH == 0)
		r = image_flush(i);
	return r;
}

static int copied_one(struct image *i, struct walk *w, uint64_t first, uint64_t n, uint64_t *entry)
{
	uint64_t val;
	int r;

	(void)n;
	if (entry ? *entry & (QCOW2_COMPRESSED | QCOW2_COPIED) : w->l1[w->at] & QCOW2_COPIED)
		return 0;
	r = qcow2_ref_get(i, first, &val);
	if (r || val != 1)
		return r;
	if (entry) {
		*entry |= QCOW2_COPIED;
	} else {
		w->l1[w->at] |= QCOW2_COPIED;
		qcow2_l1_changed(qcow2_of(i), w->at);
	}
	return 0;
}

/* The L1 table of a snapshot, in host order. */
static int load_l1(struct image *i, const struct snap *s, uint64_t **ret, struct error *err)
{
	uint64_t len = s->l1_n * 8ull, *l1;
	int r;

	if (len > QCOW2_L1_MAX || !in_file(i, s->l1_off) || len > i->file.size - s->l1_off)
		return error_set(err, EIO, "the snapshot's L1 table makes no sense ('vmm disk check --repair all')");
	l1 = malloc(len + 8);
	if (!l1)
		return error_set(err, ENOMEM, "out of memory");
	r = meta_read_all(&i->file, l1, len, s->l1_off);
	if (r) {
		free(l1);
		return error_errno(err, -r, "cannot read the snapshot's L1 table");
	}
	for (uint32_t n = 0; n < s->l1_n; n++)
		l1[n] = be64toh(l1[n]);
	*ret = l1;
	return 0;
}

/* One user more of everything the walk leads to, on disk; COPIED is off before. Nothing changes where it cannot be. */
static int share(struct image *i, const struct walk *over, struct error *err)
{
	struct walk w = *over;
	int r;

	w.err = err;
	w.delta = 1;
	w.fn = verify_one;
	r = walk(i, &w);
	if (r)
		return r;
	w.fn = uncopied_one;
	w.calls = 0;
	r = walk(i, &w);
	r = r ? r : image_flush(i);
	if (r)
		return error_errno(err, -r, "cannot write the L2 tables");
	w.fn = add_one;
	w.calls = 0;
	r = walk(i, &w);
	if (r) {        /* several compressed clusters in one: together too many */
		struct walk back = w;

		back.most = w.calls - 1;
		back.calls = 0;
		back.delta = -1;
		if (back.most && walk(i, &back))
			return error_errno(err, -r, "cannot change the refcounts");
		return r == -EFBIG ? error_set(err, EINVAL, "refcount_bits=%u is too small for one user more of every cluster",
			1u << qcow2_of(i)->h.refcount_order) : error_errno(err, -r, "cannot change the refcounts");
	}
	r = image_flush(i);
	return r ? error_errno(err, -r, "cannot write the refcounts") : 0;
}

/* len bytes into clusters of their own, on the medium; *off: where, 0 if there are none. */
static int write_new(struct image *i, const void *bytes, size_t len, uint64_t *off)
{
	const struct qcow2 *q = qcow2_of(i);
	uint64_t n = qcow2_clusters(q, len), first;
	bool blank;
	int r;

	*off = 0;
	if (!n)
		return 0;
	r = qcow2_take_run(i, n, &first, &blank);
	r = r ? r : image_flush(i);
	if (r)
		return r;
	*off = first << q->cluster_bits;
	r = meta_write(&i->file, bytes, len, *off);
	if (!r && !blank && len < n << q->cluster_bits)
		r = meta_fill(&i->file, *off + len, (n << q->cluster_bits) - len);
	return r ? r : meta_sync(&i->file);
}

static int write_l1(struct image *i, const uint64_t *l1, uint32_t n, uint32_t room, uint64_t *off)
{
	auto_free uint64_t *be = calloc(MAX(n, room) + 1u, 8);

	if (!be)
		return -ENOMEM;
	for (uint32_t k = 0; k < n; k++)
		be[k] = htobe64(l1[k]);
	return write_new(i, be, MAX(n, room) * 8ull, off);
}

static int write_header(struct image *i)
{
	qcow2_of(i)->header_dirty = true;
	return image_flush(i);
}

/* Another snapshot table, and the header says so; then the old one is free. */
static int switch_table(struct image *i, const uint8_t *bytes, size_t len, uint32_t n, size_t old_len)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t old = q->h.snapshots_offset, off;
	int r = write_new(i, bytes, len, &off);

	if (r)
		return r;
	q->h.snapshots = n;
	q->h.snapshots_offset = off;
	r = write_header(i);
	if (!r && old_len && in_file(i, old))
		r = qcow2_free_later(i, qcow2_index(q, old), qcow2_clusters(q, old_len));
	return r ? r : qcow2_metadata_rebuild(i);
}

/* ---- create ---- */

static int check_name(const struct snaps *t, const char *name, struct error *err)
{
	size_t n = strlen(name);

	if (!n || n > NAME_MOST)
		return error_set(err, EINVAL, "a snapshot's name has 1 to %u bytes, not %zu", NAME_MOST, n);
	if (find(t, name))
		return error_set(err, EEXIST, "there is a snapshot '%s' already", name);
	if (t->n >= QCOW2_SNAPSHOTS_MAX)
		return error_set(err, ENOSPC, "it has %u snapshots: that is the most", t->n);
	return 0;
}

/* One more than the largest id that is a number. */
static uint64_t next_id(const struct snaps *t)
{
	uint64_t most = 0;

	for (uint32_t n = 0; n < t->n; n++) {
		const struct snap *s = &t->list[n];
		char text[20];

		copy_text(text, sizeof(text), t->bytes + s->at + ENTRY_HEAD + s->extra, s->id_len);
		if (s->id_len < sizeof(text) - 1)
			most = MAX(most, strtoull(text, NULL, 10));
	}
	return most + 1;
}

static int append(struct image *i, struct snaps *t, const char *name, uint64_t l1_off, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);
	size_t name_len = strlen(name), len;
	struct timespec now;
	char id[24];
	uint8_t *b;
	int id_len;

	id_len = snprintf(id, sizeof(id), "%llu", (unsigned long long)next_id(t));
	len = (ENTRY_HEAD + EXTRA + (size_t)id_len + name_len + 7) & ~(size_t)7;
	if (t->len + len > QCOW2_SNAPSHOT_BYTES)
		return error_set(err, ENOSPC, "the snapshot table would have more than 64 MiB");
	if (more_room(t, len))
		return error_set(err, ENOMEM, "out of memory");
	b = t->bytes + t->len;
	clock_gettime(CLOCK_REALTIME, &now);
	memset(b, 0, len);
	put64(b, l1_off);
	put32(b + 8, q->h.l1_size);
	put32(b + 12, (uint32_t)id_len << 16 | (uint32_t)name_len);
	put32(b + 16, (uint32_t)now.tv_sec);
	put32(b + 20, (uint32_t)now.tv_nsec);
	put32(b + 36, EXTRA);
	put64(b + ENTRY_HEAD + 8, q->h.size);
	put64(b + ENTRY_HEAD + 16, UINT64_MAX);         /* no instruction count */
	memcpy(b + ENTRY_HEAD + EXTRA, id, (size_t)id_len);
	memcpy(b + ENTRY_HEAD + EXTRA + id_len, name, name_len);
	t->len += len;
	t->n++;
	return 0;
}

static int create(struct image *i, struct snaps *t, const char *name, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	struct walk w = { .l1 = q->l1, .l1_n = q->h.l1_size, .active = true };
	size_t old_len = t->len;
	uint64_t l1_off;
	int r = append(i, t, name, 0, err);

	if (r)
		return r;
	qcow2_forget_last(i);
	r = share(i, &w, err);
	if (r)
		return r;
	r = write_l1(i, q->l1, q->h.l1_size, 1, &l1_off);
	if (!r) {
		put64(t->bytes + old_len, l1_off);
		r = switch_table(i, t->bytes, t->len, t->n, old_len);
	}
	return r ? error_errno(err, -r, "cannot write the snapshot") : 0;
}

/* Everything on disk, and the table read. */
static int begin(struct image *i, struct snaps *t, struct error *err)
{
	int r;

	if (qcow2_of(i)->refs_bad)
		return error_set(err, EIO, "its refcounts make no sense ('vmm disk check --repair all' mends them)");
	r = image_flush(i);
	return r ? error_errno(err, -r, "cannot write its metadata") : load(i, t, err);
}

static int end(struct image *i, struct snaps *t, int r, struct error *err)
{
	snaps_free(t);
	if (r)
		error_prefix(err, "'%s': ", i->path);
	return r;
}

int qcow2_snapshot_create(struct image *i, const char *name, struct error *err)
{
	struct snaps t = { 0 };
	int r = begin(i, &t, err);

	r = r ? r : check_name(&t, name, err);
	return end(i, &t, r ? r : create(i, &t, name, err), err);
}

/* ---- apply ---- */

static int check_size(const struct image *i, const struct snap *s, uint64_t *l1_n, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);

	if (s->size > IMAGE_SIZE_MAX || s->size % SECTOR)
		return error_set(err, EIO, "the snapshot's disk has %llu bytes, which cannot be", (unsigned long long)s->size);
	*l1_n = s->size ? ((s->size - 1) >> qcow2_l1_shift(q)) + 1 : 0;
	*l1_n = MAX(*l1_n, s->l1_n);
	if (*l1_n * 8 > QCOW2_L1_MAX)
		return error_set(err, EFBIG, "the snapshot needs an L1 table of more than 32 MiB");
	return 0;
}

/* The old L1 table and one user of all it leads to are free. */
static int free_l1(struct image *i, uint64_t off, uint64_t *l1, uint32_t n)
{
	struct walk w = { .l1 = l1, .l1_n = n, .fn = free_one };
	int r = walk(i, &w);

	if (!r && n)
		r = qcow2_free_later(i, qcow2_index(qcow2_of(i), off), qcow2_clusters(qcow2_of(i), n * 8ull));
	return r ? r : image_flush(i);
}

static int apply(struct image *i, const struct snap *s, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	auto_free uint64_t *l1 = NULL, *old = NULL;
	struct walk w = { .l1_n = s->l1_n }, look = { .fn = verify_one, .l1_n = q->h.l1_size, .err = err };
	uint64_t l1_n = 0, old_off = q->h.l1_offset, off;
	uint32_t old_n = q->h.l1_size;
	int r = check_size(i, s, &l1_n, err);

	r = r ? r : load_l1(i, s, &l1, err);
	if (r)
		return r;
	old = malloc(old_n * 8ull + 8);
	if (!old)
		return error_set(err, ENOMEM, "out of memory");
	memcpy(old, q->l1, old_n * 8ull);
	look.l1 = old;
	r = walk(i, &look);
	w.l1 = l1;
	r = r ? r : share(i, &w, err);
	if (r)
		return r;
	r = write_l1(i, l1, s->l1_n, (uint32_t)l1_n, &off);
	if (!r) {
		q->h.l1_offset = off;
		q->h.l1_size = (uint32_t)l1_n;
		q->h.size = s->size;
		r = write_header(i);
	}
	if (r)
		return error_errno(err, -r, "cannot write the L1 table");
	r = qcow2_reopen(i, false, err);
	if (r)
		return r;
	r = free_l1(i, old_off, old, old_n);
	return r ? error_errno(err, -r, "it is applied, but what the disk was before could not be freed") : 0;
}

int qcow2_snapshot_apply(struct image *i, const char *which, struct error *err)
{
	struct snaps t = { 0 };
	int r = begin(i, &t, err);
	const struct snap *s = r ? NULL : find(&t, which);

	if (!r)
		r = s ? apply(i, s, err) : error_set(err, ENOENT, "there is no snapshot '%s'", which);
	return end(i, &t, r, err);
}

/* ---- look ---- */

/* Nothing is written any more: the L1 table takes the place of the disk's own in memory. */
static int look_at(struct image *i, const struct snap *s, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t *l1 = NULL, *more, l1_n = 0;
	int r = check_size(i, s, &l1_n, err);

	r = r ? r : load_l1(i, s, &l1, err);
	if (r)
		return r;
	more = reallocarray(l1, l1_n + 1, sizeof(*l1));
	if (!more) {
		free(l1);
		return error_set(err, ENOMEM, "out of memory");
	}
	memset(more + s->l1_n, 0, (l1_n + 1 - s->l1_n) * sizeof(*l1));
	free(q->l1);
	q->l1 = more;
	q->h.l1_size = (uint32_t)l1_n;
	i->size = s->size;
	qcow2_forget_last(i);
	return 0;
}

int qcow2_use_snapshot(struct image *i, const char *which, struct error *err)
{
	struct snaps t = { 0 };
	int r = load(i, &t, err);
	const struct snap *s = r ? NULL : find(&t, which);

	if (!r)
		r = s ? look_at(i, s, err) : error_set(err, ENOENT, "there is no snapshot '%s'", which);
	snaps_free(&t);
	return r;
}

/* ---- delete ---- */

static int delete(struct image *i, struct snaps *t, struct snap *s, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	auto_free uint64_t *l1 = NULL;
	struct walk w = { .fn = verify_one, .l1_n = s->l1_n, .err = err };
	size_t old_len = t->len, len = (s->len + 7) & ~7u;
	int r = load_l1(i, s, &l1, err);

	if (r)
		return r;
	w.l1 = l1;
	r = walk(i, &w);
	if (r)
		return r;
	memmove(t->bytes + s->at, t->bytes + s->at + len, t->len - s->at - len);
	r = switch_table(i, t->bytes, t->len - len, t->n - 1, old_len);
	if (r)
		return error_errno(err, -r, "cannot write the snapshot table");
	r = free_l1(i, s->l1_off, l1, s->l1_n);
	if (!r) {
		w = (struct walk){ .fn = copied_one, .l1 = q->l1, .l1_n = q->h.l1_size, .active = true, .err = err };
		qcow2_forget_last(i);
		r = walk(i, &w);
	}
	return r ? error_errno(err, -r, "it is deleted, but its space could not be freed") : 0;
}

int qcow2_snapshot_delete(struct image *i, const char *which, struct error *err)
{
	struct snaps t = { 0 };
	int r = begin(i, &t, err);
	struct snap *s = r ? NULL : find(&t, which);

	if (!r)
		r = s ? delete(i, &t, s, err) : error_set(err, ENOENT, "there is no snapshot '%s'", which);
	return end(i, &t, r, err);
}
