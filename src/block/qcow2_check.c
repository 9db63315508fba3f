/*
 * qcow2: who uses which cluster, counted anew from the file, compared with what the file says.
 *
 * How this works. A scan reads the file itself, not the caches of the open image, and counts:
 *
 *      header, L1 tables, refcount structure, snapshot table, bitmaps     "metadata": one user each, whole clusters
 *      L1 entries                                                       -> L2 tables, once for each entry
 *      L2 tables, each read once, however many L1 entries lead there    -> clusters, so many times
 *
 * and then compares with the refcount blocks. Counters stand in cells of 64 clusters, found by a hash: memory grows
 * with what the file refers to, not with the offsets it names. Every table is read once, holes are skipped. What an
 * entry that makes no sense leads to is not counted.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "qcow2_scan.h"

#define CELLS_LEAST (64u << 10)         /* cells that any file may have, whatever its size */
#define READ_CHUNK  (64u << 10)
#define WORDS_MAX   1000u
#define EXTRA_MAX   1024u
#define BITMAPS_MAX 65535u
#define BITMAP_BYTES (1u << 30)        /* of one bitmap's table */

/* ---- words ---- */

__attribute__((format(printf, 2, 0)))
static void say(struct scan *k, const char *fmt, va_list ap)
{
	char text[200];

	if (k->mending || !k->c->complain || k->c->words >= WORDS_MAX)
		return;
	k->c->words++;
	vsnprintf(text, sizeof(text), fmt, ap);
	k->c->complain(k->c, k->c->words == WORDS_MAX ? "there is more" : text);
}

__attribute__((format(printf, 3, 4)))
static void found(struct scan *k, uint64_t *count, const char *fmt, ...)
{
	va_list ap;

	if (count)
		(*count)++;
	va_start(ap, fmt);
	say(k, fmt, ap);
	va_end(ap);
}

#define wrong(k, ...)  found(k, &(k)->corruptions, __VA_ARGS__)
#define leak(k, ...)   found(k, &(k)->leaks, __VA_ARGS__)
#define cannot(k, ...) found(k, &(k)->errors, __VA_ARGS__)

static unsigned long long ull(uint64_t n)
{
	return n;
}

/* ---- cells ---- */

static uint32_t hash_of(const struct scan *k, uint64_t key)
{
	return (uint32_t)((key * 0x9e3779b97f4a7c15ull) >> 32) & (k->hash_size - 1);
}

static uint32_t *cell_place(const struct scan *k, uint64_t key)
{
	uint32_t at = hash_of(k, key);

	while (k->hash[at] && scan_cell(k, k->hash[at] - 1)->key != key)
		at = (at + 1) & (k->hash_size - 1);
	return &k->hash[at];
}

static int grow_hash(struct scan *k)
{
	uint32_t size = k->hash_size ? k->hash_size * 2 : CELL_CHUNK;
	uint32_t *more = calloc(size, sizeof(*more));

	if (!more)
		return -ENOMEM;
	free(k->hash);
	k->hash = more;
	k->hash_size = size;
	for (uint32_t n = 0; n < k->cells; n++)
		*cell_place(k, scan_cell(k, n)->key) = n + 1;
	return 0;
}

static int grow_cells(struct scan *k)
{
	uint32_t chunks = k->cells / CELL_CHUNK;
	struct cell **more = reallocarray(k->chunk, chunks + 1, sizeof(*more));

	if (!more)
		return -ENOMEM;
	k->chunk = more;
	more[chunks] = calloc(CELL_CHUNK, sizeof(**more));
	return more[chunks] ? 0 : -ENOMEM;
}

/* The cell of a cluster; NULL: nothing was counted there. */
struct cell *scan_look(const struct scan *k, uint64_t cluster)
{
	uint32_t n = k->hash_size ? *cell_place(k, cluster / CELL) : 0;

	return n ? scan_cell(k, n - 1) : NULL;
}

static int cell_of(struct scan *k, uint64_t cluster, struct cell **ret)
{
	int r = 0;

	*ret = scan_look(k, cluster);
	if (*ret)
		return 0;
	if (k->cells >= k->cells_most)
		return -EFBIG;
	if (k->cells % CELL_CHUNK == 0)
		r = grow_cells(k);
	if (!r && k->cells >= k->hash_size / 2)
		r = grow_hash(k);
	if (r)
		return r;
	*ret = scan_cell(k, k->cells);
	(*ret)->key = cluster / CELL;
	*cell_place(k, cluster / CELL) = ++k->cells;
	return 0;
}

static void drop_cells(struct scan *k)
{
	for (uint32_t n = 0; n < k->cells; n += CELL_CHUNK)
		free(k->chunk[n / CELL_CHUNK]);
	free(k->chunk);
	free(k->hash);
	k->chunk = NULL;
	k->hash = NULL;
	k->cells = k->hash_size = 0;
}

static uint64_t bit_of(uint64_t cluster)
{
	return 1ull << cluster % CELL;
}

/* One more user, or as many as the L1 entries that lead to it. */
int scan_use(struct scan *k, uint64_t cluster, unsigned times, struct cell **ret)
{
	struct cell *e;
	int r = cell_of(k, cluster, &e);

	if (r)
		return r;
	e->refs[cluster % CELL] = (uint16_t)MIN(e->refs[cluster % CELL] + times, REFS_MAX);
	k->top = MAX(k->top, cluster + 1);
	if (ret)
		*ret = e;
	return 0;
}

/* ---- the file ---- */

/* Where data goes on at or after off; end: nowhere before that. */
static uint64_t next_data(const struct scan *k, uint64_t off, uint64_t end)
{
	off_t at = k->sparse && off <= INT64_MAX ? lseek(k->i->file.meta_fd, (off_t)off, SEEK_DATA) : -1;

	if (!k->sparse || (at < 0 && errno != ENXIO))
		return off;
	return at < 0 ? end : MIN((uint64_t)at, end);
}

/* 1; 0: all of it is zeroes (or could not be read, which is counted). */
int scan_read(struct scan *k, void *buf, uint64_t len, uint64_t off, const char *what)
{
	int r;

	if (next_data(k, off, off + len) == off + len)
		return 0;
	r = meta_read(&k->i->file, buf, len, off);
	if (r) {
		cannot(k, "%s at %#llx cannot be read: %s", what, ull(off), strerrordesc_np(-r));
		k->unreadable = true;
	}
	return !r;
}

/* fn for each of n 8-byte entries at off that is not 0. */
int scan_entries(struct scan *k, uint64_t off, uint64_t n, const char *what, entry_fn *fn, void *arg)
{
	auto_free uint64_t *buf = malloc(READ_CHUNK);
	uint64_t end = off + n * 8;
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t at = off; at < end && !r;) {
		uint64_t len;

		at = next_data(k, at, end) & ~7ull;
		len = MIN(end - at, READ_CHUNK);
		if (!len || !scan_read(k, buf, len, at, what)) {
			at += len;
			continue;
		}
		for (uint64_t e = 0; e < len / 8 && !r; e++) {
			uint64_t was = be64toh(buf[e]), now = was;

			if (was)
				r = fn(k, &now, (at - off) / 8 + e, arg);
			if (now == was || r)
				continue;
			now = htobe64(now);
			r = meta_write(&k->i->file, &now, sizeof(now), at + e * 8);
		}
		at += len;
	}
	return r;
}

static int read_head(struct scan *k, struct error *err)
{
	struct qcow2_header *h = &k->h;
	uint8_t b[QCOW2_HEAD];
	struct stat st;
	int r = meta_read(&k->i->file, b, sizeof(b), 0);

	if (r || fstat(k->i->file.fd, &st))
		return error_errno(err, r ? -r : errno, "cannot read the header");
	qcow2_header_from_disk(b, h);
	k->q = qcow2_of(k->i);
	if (h->cluster_bits != k->q->cluster_bits || h->refcount_order != k->q->h.refcount_order)
		return error_set(err, EINVAL, "the header changed while the image was open");
	k->ext = h->incompatible & QCOW2_EXT_L2;
	k->cluster = 1u << h->cluster_bits;
	k->bytes = k->i->file.blockdev ? k->i->file.size : (uint64_t)st.st_size;
	k->n = (k->bytes + k->cluster - 1) >> h->cluster_bits;
	k->sparse = !k->i->file.blockdev && (uint64_t)st.st_blocks * 512 < k->bytes;
	k->cells_most = (uint32_t)MIN(CELLS_LEAST + (k->sparse ? (uint64_t)st.st_blocks * 512 : k->bytes) / 8,
		UINT32_MAX / 4);
	return 0;
}

/* ---- metadata: whole clusters that only one may use ---- */

/* Some cluster of [first, end) that is metadata already; end: none. */
static uint64_t find_overlap(const struct scan *k, uint64_t first, uint64_t end)
{
	for (uint64_t at = first; at < end; at = (at / CELL + 1) * CELL) {
		const struct cell *e = scan_look(k, at);
		uint64_t hit = e ? (e->meta | e->counts) & ~0ull << at % CELL : 0;

		if (hit)
			return MIN(end, e->key * CELL + (unsigned)__builtin_ctzll(hit));
	}
	return end;
}

/* 1; 0: it cannot be there, which is counted; -errno. what and n name it; counts: of the refcount structure. */
static int mark(struct scan *k, uint64_t off, uint64_t len, bool counts, const char *what, uint64_t n)
{
	uint64_t first = off >> k->h.cluster_bits, end, bad;

	if (!len)
		return 1;
	if (off & (k->cluster - 1)) {
		wrong(k, "%s %llu lies at %#llx, where no cluster begins", what, ull(n), ull(off));
		return 0;
	}
	end = first + ((len + k->cluster - 1) >> k->h.cluster_bits);
	if (end > k->n) {
		wrong(k, "%s %llu lies at %#llx, outside of the file", what, ull(n), ull(off));
		return 0;
	}
	bad = find_overlap(k, first, end);
	if (bad < end) {
		wrong(k, "%s %llu at %#llx lies on other metadata (cluster %llu)", what, ull(n), ull(off), ull(bad));
		return 0;
	}
	for (uint64_t at = first; at < end; at++) {
		struct cell *e;
		int r = scan_use(k, at, 1, &e);

		if (r)
			return r;
		*(counts ? &e->counts : &e->meta) |= bit_of(at);
	}
	return 1;
}

static int add_l1(struct scan *k, uint64_t off, uint32_t n, bool active, uint64_t id)
{
	const char *what = active ? "L1 table" : "L1 table of snapshot";
	int r;

	if ((uint64_t)n * 8 > QCOW2_L1_MAX) {
		wrong(k, "%s %llu has %u entries: more than 32 MiB", what, ull(id), n);
		return 0;
	}
	r = mark(k, off, (uint64_t)n * 8, false, what, id);
	if (r > 0)
		k->l1[k->l1_n++] = (struct l1){ .off = off, .n = n, .active = active };
	return r;
}

/* ---- the snapshot table ---- */

static int add_snap(struct scan *k, const struct snap *s)
{
	if (k->snap_n == k->snap_room) {
		uint32_t room = k->snap_room ? k->snap_room * 2 : 16;
		struct snap *more = reallocarray(k->snap, room, sizeof(*more));

		if (!more)
			return -ENOMEM;
		k->snap = more;
		k->snap_room = room;
	}
	k->snap[k->snap_n++] = *s;
	return 0;
}

/* One entry at off: 1; 0: it makes no sense, nor does what follows; -errno. */
static int read_snap(struct scan *k, uint64_t off, uint64_t *l1_off, uint32_t *l1_n, struct snap *s)
{
	uint8_t b[40];
	uint32_t id_len, name_len;

	if (meta_read_all(&k->i->file, b, sizeof(b), off))
		return 0;
	*l1_off = get64(b);
	*l1_n = get32(b + 8);
	id_len = get32(b + 12) >> 16;
	name_len = get32(b + 12) & 0xffff;
	*s = (struct snap){ .at = off, .extra = get32(b + 36) };
	if (s->extra > EXTRA_MAX)
		return 0;
	s->len = (uint32_t)(sizeof(b) + s->extra + id_len + name_len);
	s->brief = k->h.version >= 3 && s->extra < 16;
	return off + s->len <= k->bytes && off + s->len - k->h.snapshots_offset <= QCOW2_SNAPSHOT_BYTES;
}

static int read_snaps(struct scan *k, uint64_t *l1_off, uint32_t *l1_n)
{
	uint64_t at = k->h.snapshots_offset;

	for (uint32_t n = 0; n < MIN(k->h.snapshots, QCOW2_SNAPSHOTS_MAX); n++) {
		struct snap s;
		int r = read_snap(k, at, &l1_off[n], &l1_n[n], &s);

		if (r <= 0) {
			wrong(k, "entry %u of %u of the snapshot table makes no sense", n + 1, k->h.snapshots);
			k->bad_snaps = true;
			return r;
		}
		r = add_snap(k, &s);
		if (r)
			return r;
		at += (s.len + 7) & ~7u;
	}
	if (k->h.snapshots > QCOW2_SNAPSHOTS_MAX) {
		wrong(k, "%u snapshots: %u can be", k->h.snapshots, QCOW2_SNAPSHOTS_MAX);
		k->bad_snaps = true;
	}
	return 0;
}

static int scan_snaps(struct scan *k)
{
	uint32_t most = MIN(k->h.snapshots, QCOW2_SNAPSHOTS_MAX);
	auto_free uint64_t *l1_off = calloc(most + 1, sizeof(*l1_off));
	auto_free uint32_t *l1_n = calloc(most + 1, sizeof(*l1_n));
	int r = l1_off && l1_n ? 0 : -ENOMEM;

	k->snap_n = 0;
	if (!most || r)
		return r;
	if (k->h.snapshots_offset >= k->bytes || k->h.snapshots_offset & (k->cluster - 1)) {
		wrong(k, "the snapshot table lies at %#llx, where it cannot be", ull(k->h.snapshots_offset));
		k->bad_snaps = true;
		return 0;
	}
	r = read_snaps(k, l1_off, l1_n);
	if (r || !k->snap_n)
		return r;
	r = mark(k, k->h.snapshots_offset, k->snap[k->snap_n - 1].at + k->snap[k->snap_n - 1].len - k->h.snapshots_offset,
		false, "snapshot table", 0);
	if (!r) {
		k->bad_snaps = true;
		k->snap_n = 0;
	}
	for (uint32_t n = 0; n < k->snap_n && r >= 0; n++) {
		r = add_l1(k, l1_off[n], l1_n[n], false, n + 1);
		k->snap[n].bad = !r;
		if (k->snap[n].brief)
			wrong(k, "entry %u of the snapshot table lacks what version 3 wants", n + 1);
		k->bad_snaps = k->bad_snaps || !r || k->snap[n].brief;
	}
	return MIN(r, 0);
}

/* ---- bitmaps: kept by others; here only their clusters matter ---- */

static int use_bitmap(struct scan *k, uint64_t *e, uint64_t index, void *arg)
{
	uint64_t off = *e & QCOW2_OFFSET;
	int r;

	if (!off)
		return 0;
	(void)arg;
	r = mark(k, off, k->cluster, false, "bitmap cluster", index);
	k->bad_bitmaps = k->bad_bitmaps || !r;
	return MIN(r, 0);
}

static int scan_bitmap_directory(struct scan *k, const uint8_t *dir, uint64_t len, uint32_t n)
{
	uint64_t at = 0;

	for (uint32_t b = 0; b < n && !k->bad_bitmaps; b++) {
		uint64_t off, size;
		int r;

		if (len - at < 24) {
			wrong(k, "the directory of the bitmaps ends before bitmap %u", b + 1);
			k->bad_bitmaps = true;
			return 0;
		}
		off = get64(dir + at);
		size = get32(dir + at + 8) * 8ull;
		r = size > BITMAP_BYTES ? 0 : mark(k, off, size, false, "bitmap table", b + 1);
		if (r > 0)
			r = scan_entries(k, off, size / 8, "the bitmap table", use_bitmap, NULL);
		else if (!r)
			k->bad_bitmaps = true;
		if (r < 0)
			return r;
		size = 24 + get32(dir + at + 20) + (get32(dir + at + 16) & 0xffffull);
		at += MIN((size + 7) & ~7ull, len - at);
	}
	return 0;
}

/* The data of header extension `type` and its length; NULL: none. first is the first cluster. */
static const uint8_t *find_extension(const struct scan *k, const uint8_t *first, uint32_t type, uint32_t *len)
{
	uint64_t at = k->h.header_length, end = k->h.backing_offset ? MIN(k->h.backing_offset, k->cluster) : k->cluster;

	while (end >= 8 && at <= end - 8) {
		uint32_t t = get32(first + at);

		*len = get32(first + at + 4);
		at += 8;
		if (!t || *len > end - at)
			return NULL;
		if (t == type)
			return first + at;
		at += (*len + 7ull) & ~7ull;
	}
	return NULL;
}

static int scan_bitmaps(struct scan *k)
{
	auto_free uint8_t *dir = NULL;
	const uint8_t *ext;
	uint64_t off, size;
	uint32_t n, len;
	int r;

	if (!(k->h.autoclear & QCOW2_BITMAPS))
		return 0;
	if (!scan_read(k, k->table, k->cluster, 0, "the header"))
		return 0;
	ext = find_extension(k, k->table, QCOW2_EXT_BITMAPS, &len);
	if (!ext || len != 24) {
		wrong(k, "the header says that there are bitmaps, but not where");
		k->bad_bitmaps = true;
		return 0;
	}
	n = get32(ext);
	size = get64(ext + 8);
	off = get64(ext + 16);
	r = size > QCOW2_SNAPSHOT_BYTES || n > BITMAPS_MAX ? 0 : mark(k, off, size, false, "directory of bitmaps", 0);
	if (r <= 0) {
		k->bad_bitmaps = true;
		return r;
	}
	dir = calloc(1, size + 1);
	if (!dir)
		return -ENOMEM;
	return scan_read(k, dir, size, off, "the directory of the bitmaps") ? scan_bitmap_directory(k, dir, size, n) : 0;
}

/* ---- the refcount structure ---- */

static int use_block(struct scan *k, uint64_t *e, uint64_t index, void *arg)
{
	int r = 0;

	(void)arg;
	if (*e & 0x1ff)
		wrong(k, "entry %llu of the refcount table is %#llx: its low bits are not 0", ull(index), ull(*e));
	else
		r = mark(k, *e, k->cluster, true, "refcount block", index);
	if (r < 0)
		return r;
	k->rt[index] = r ? *e : 0;
	k->bad_refs = k->bad_refs || !r;
	return 0;
}

static int scan_refcount_table(struct scan *k)
{
	uint64_t len = (uint64_t)k->h.refcount_clusters << k->h.cluster_bits;
	int r;

	free(k->rt);
	k->rt = NULL;
	k->rt_n = 0;
	if (k->no_refs)
		return 0;
	if (!len || len > QCOW2_RT_MAX) {
		wrong(k, "a refcount table of %u clusters cannot be", k->h.refcount_clusters);
		k->bad_refs = true;
		return 0;
	}
	r = mark(k, k->h.refcount_offset, len, true, "refcount table", 0);
	if (r <= 0) {
		k->bad_refs = true;
		return r;
	}
	k->rt = calloc(len / 8, 8);
	if (!k->rt)
		return -ENOMEM;
	k->rt_n = len / 8;
	return scan_entries(k, k->h.refcount_offset, k->rt_n, "the refcount table", use_block, NULL);
}

/* The refcount of one cluster, from the file. */
uint64_t scan_stored(const struct scan *k, uint64_t cluster)
{
	uint64_t per = scan_per_block(k), n = cluster % per, bit = n << k->h.refcount_order;
	uint8_t b[8];

	if (cluster / per >= k->rt_n || !k->rt[cluster / per] ||
		meta_read(&k->i->file, b, sizeof(b), k->rt[cluster / per] + bit / 64 * 8))
		return 0;
	return qcow2_ref_load(k->q, b, (unsigned)(n & ((64u >> k->h.refcount_order) - 1)));
}

/* ---- L1 and L2 ---- */

static enum fault judge_cluster(const struct scan *k, uint64_t cluster, bool l2_too)
{
	const struct cell *e = scan_look(k, cluster);

	if (e && (e->meta | (l2_too ? e->l2 : 0)) & bit_of(cluster))
		return IN_METADATA;
	return e && e->counts & bit_of(cluster) ? IN_REFCOUNTS : FINE;
}

static enum fault judge_place(const struct scan *k, uint64_t off, bool l2_too)
{
	uint64_t cluster = off >> k->h.cluster_bits;

	if (off & (k->cluster - 1))
		return UNALIGNED;
	if (cluster >= k->n)
		return OUTSIDE;
	return judge_cluster(k, cluster, l2_too);
}

static enum fault judge_l1(const struct scan *k, uint64_t e)
{
	enum fault f = e & QCOW2_OFFSET ? judge_place(k, e & QCOW2_OFFSET, false) : FINE;

	return f ? f : e & QCOW2_L1_RESERVED || e == QCOW2_COPIED ? RESERVED : FINE;
}

/* Where the bytes of a compressed cluster lie, in whole sectors. */
static void compressed_place(const struct scan *k, uint64_t e, uint64_t *off, uint64_t *len)
{
	uint32_t n;

	qcow2_compressed_at(k->q, e, off, &n);
	*len = n + *off % SECTOR;
	*off -= *off % SECTOR;
}

static enum fault judge_compressed(const struct scan *k, uint64_t e, uint64_t bits)
{
	uint64_t off, len;
	enum fault f;

	compressed_place(k, e, &off, &len);
	/* The last sectors may be counted too long, past the end of the file, but by less than a cluster. */
	if (off >= k->bytes || (off + len > k->bytes && off + len - k->bytes >= k->cluster))
		return OUTSIDE;
	for (uint64_t at = off >> k->h.cluster_bits; at <= (off + len - 1) >> k->h.cluster_bits; at++)
		if ((f = judge_cluster(k, at, true)))
			return f;
	return e & QCOW2_COPIED ? RESERVED : k->ext && bits ? BITMAP : FINE;
}

enum fault scan_judge(const struct scan *k, uint64_t e, uint64_t bits)
{
	enum fault f;

	if (e & QCOW2_COMPRESSED)
		return judge_compressed(k, e, bits);
	f = e & QCOW2_OFFSET ? judge_place(k, e & QCOW2_OFFSET, true) : FINE;
	if (f)
		return f;
	if (e & scan_l2_reserved(k) || (e & QCOW2_COPIED && !(e & QCOW2_OFFSET)))
		return RESERVED;
	if (k->ext && (bits >> 32 & bits & UINT32_MAX || (!(e & QCOW2_OFFSET) && bits & UINT32_MAX)))
		return BITMAP;
	return FINE;
}

static const char *fault_words(enum fault f)
{
	static const char *const words[] = {
		[FINE] = "nothing wrong",
		[UNALIGNED] = "leads to where no cluster begins",
		[OUTSIDE] = "leads outside of the file",
		[IN_METADATA] = "leads to metadata",
		[IN_REFCOUNTS] = "and the refcount structure are at the same place",
		[RESERVED] = "has bits that must be 0",
		[BITMAP] = "has a subcluster bitmap that makes no sense",
	};

	return words[f];
}

/* Can that table, which is also called a refcount block, be an L2 table? */
static bool like_l2(struct scan *k, uint64_t cluster)
{
	if (!scan_read(k, k->table, k->cluster, cluster << k->h.cluster_bits, "the L2 table"))
		return false;
	for (uint32_t n = 0; n < scan_l2_entries(k); n++) {
		uint64_t bits, e = scan_l2_get(k, n, &bits);
		enum fault f = e | bits ? scan_judge(k, e, bits) : FINE;

		if (f && f != IN_REFCOUNTS)
			return false;
	}
	return true;
}

/*
 * Where an entry and the refcount structure claim the same place, the refcounts give way: they can be made anew, and
 * what the entry meant cannot. Except if what lies there cannot be an L2 table.
 */
enum fault scan_judge_l1(struct scan *k, uint64_t e)
{
	enum fault f = judge_l1(k, e);

	return f == IN_REFCOUNTS && !like_l2(k, (e & QCOW2_OFFSET) >> k->h.cluster_bits) ? IN_METADATA : f;
}

static void bad_entry(struct scan *k, enum fault f)
{
	if (f == IN_REFCOUNTS)
		k->bad_refs = true;
	else
		k->bad_entries++;
}

static int use_l2(struct scan *k, uint64_t *e, uint64_t index, void *arg)
{
	const struct l1 *l1 = arg;
	uint64_t cluster = (*e & QCOW2_OFFSET) >> k->h.cluster_bits;
	enum fault f = scan_judge_l1(k, *e);
	struct cell *cell;
	int r;

	if (f) {
		wrong(k, "entry %llu of the L1 table at %#llx is %#llx: it %s", ull(index), ull(l1->off), ull(*e),
			fault_words(f));
		bad_entry(k, f);
	}
	if (!cluster || !scan_usable(f))
		return 0;
	r = scan_use(k, cluster, 1, &cell);
	if (r)
		return r;
	k->l2_n += !(cell->l2 & bit_of(cluster));
	cell->l2 |= bit_of(cluster);
	cell->active |= l1->active ? bit_of(cluster) : 0;
	return 0;
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static int list_l2(struct scan *k)
{
	uint32_t n = 0;

	free(k->l2_list);
	k->l2_list = calloc(k->l2_n + 1u, sizeof(*k->l2_list));
	if (!k->l2_list)
		return -ENOMEM;
	for (uint32_t c = 0; c < k->cells; c++) {
		const struct cell *e = scan_cell(k, c);

		for (uint64_t left = e->l2; left; left &= left - 1)
			k->l2_list[n++] = e->key * CELL + (unsigned)__builtin_ctzll(left);
	}
	qsort(k->l2_list, n, sizeof(*k->l2_list), by_number);
	return 0;
}

static int scan_l1s(struct scan *k)
{
	int r = 0;

	k->l2_n = 0;
	for (uint32_t n = 0; n < k->l1_n && !r; n++)
		r = scan_entries(k, k->l1[n].off, k->l1[n].n, "the L1 table", use_l2, &k->l1[n]);
	return r ? r : list_l2(k);
}

/* Where in the file the last cluster of this L2 table was, for the statistics. */
struct run {
	bool active;
	uint64_t next;
};

static int use_entry(struct scan *k, uint64_t e, unsigned times, struct run *run)
{
	uint64_t off = e & QCOW2_OFFSET, len = k->cluster;
	int r = 0;

	if (e & QCOW2_COMPRESSED)
		compressed_place(k, e, &off, &len);
	else if (!off)
		return 0;
	for (uint64_t at = off >> k->h.cluster_bits; at <= (off + len - 1) >> k->h.cluster_bits && !r; at++)
		r = scan_use(k, at, times, NULL);
	if (!run->active || k->mending)
		return r;
	k->c->allocated++;
	k->c->compressed += !!(e & QCOW2_COMPRESSED);
	k->c->fragmented += e & QCOW2_COMPRESSED || (run->next && run->next != off);
	run->next = e & QCOW2_COMPRESSED ? 0 : off + len;
	return r;
}

static int scan_l2(struct scan *k, uint64_t table)
{
	struct cell *cell = scan_look(k, table);
	struct run run = { .active = cell->active & bit_of(table) };
	unsigned times = cell->refs[table % CELL];

	if (!scan_read(k, k->table, k->cluster, table << k->h.cluster_bits, "the L2 table"))
		return 0;
	for (uint32_t n = 0; n < scan_l2_entries(k); n++) {
		uint64_t bits, e = scan_l2_get(k, n, &bits);
		enum fault f = e | bits ? scan_judge(k, e, bits) : FINE;
		int r = 0;

		if (f) {
			wrong(k, "entry %u of the L2 table at %#llx is %#llx: it %s", n,
				ull(table << k->h.cluster_bits), ull(e), fault_words(f));
			bad_entry(k, f);
		}
		if (scan_usable(f))
			r = use_entry(k, e, times, &run);
		if (r)
			return r;
	}
	return 0;
}

/* ---- counted against stored ---- */

/* One refcount: what it shall be. */
static uint64_t compare(struct scan *k, uint64_t cluster, uint64_t stored, uint64_t refs)
{
	if (stored == refs || (refs == REFS_MAX && stored > refs))
		return stored;
	if (refs > k->q->refs_max) {
		cannot(k, "cluster %llu is used %llu times, which %u-bit refcounts cannot say", ull(cluster), ull(refs),
			1u << k->h.refcount_order);
		refs = k->q->refs_max;
	} else if (stored > refs) {
		leak(k, "cluster %llu: refcount %llu, used %llu times", ull(cluster), ull(stored), ull(refs));
	} else {
		wrong(k, "cluster %llu: refcount %llu, used %llu times", ull(cluster), ull(stored), ull(refs));
	}
	if (refs == REFS_MAX)   /* or more: too high is safe */
		refs = k->q->refs_max;
	return k->fix == REPAIR_ALL || (k->fix == REPAIR_LEAKS && stored > refs) ? refs : stored;
}

static bool compare_cell(struct scan *k, uint8_t *block, uint64_t first, uint64_t index)
{
	struct cell *cell = scan_look(k, first);
	bool changed = false;

	for (uint64_t n = 0; n < CELL && first + n < k->n; n++) {
		uint64_t was = qcow2_ref_load(k->q, block, (unsigned)(index + n)), now;

		now = compare(k, first + n, was, cell ? cell->refs[n] : 0);
		if (now != was)
			qcow2_ref_store(k->q, block, (unsigned)(index + n), now);
		if (now == 1 && cell) {
			cell->once |= 1ull << n;
			cell->sole |= (uint64_t)(cell->refs[n] == 1) << n;
		}
		if (now)
			k->top = MAX(k->top, first + n + 1);
		changed = changed || now != was;
	}
	return changed;
}

static int compare_block(struct scan *k, uint64_t index)
{
	uint64_t per = scan_per_block(k), first = index * per;
	bool changed = false;

	if (first >= k->n)
		return 0;
	if (!scan_read(k, k->table, k->cluster, k->rt[index], "the refcount block"))
		memset(k->table, 0, k->cluster);
	for (uint64_t n = 0; n < per && first + n < k->n; n += CELL)
		changed |= compare_cell(k, k->table, first + n, n);
	return changed ? meta_write(&k->i->file, k->table, k->cluster, k->rt[index]) : 0;
}

/* Clusters in use that no refcount block speaks of. */
static void find_uncovered(struct scan *k)
{
	for (uint32_t c = 0; c < k->cells; c++) {
		struct cell *e = scan_cell(k, c);
		uint64_t first = e->key * CELL, index = first / scan_per_block(k);

		if (index < k->rt_n && k->rt[index])
			continue;
		for (unsigned n = 0; n < CELL && first + n < k->n; n++) {
			if (!e->refs[n])
				continue;
			wrong(k, "cluster %llu: no refcount, used %u times", ull(first + n), e->refs[n]);
			k->bad_refs = true;
		}
	}
}

static int compare_refcounts(struct scan *k)
{
	int r = 0;

	for (uint64_t n = 0; n < k->rt_n && !r; n++)
		if (k->rt[n])
			r = compare_block(k, n);
	if (!r)
		find_uncovered(k);
	return r;
}

/*
 * ---- COPIED: this cluster is ours alone, and may be written in place ----
 *
 * Set where the refcount is not 1 it is dangerous. Not set where it is, it only costs a copy at the next write: no
 * corruption; so it stands where a snapshot was being made or deleted when its program was killed.
 */

static uint64_t check_copied(struct scan *k, uint64_t e, const char *what)
{
	uint64_t cluster = (e & QCOW2_OFFSET) >> k->h.cluster_bits;
	const struct cell *cell = scan_look(k, cluster);
	bool once = cell && cell->once & bit_of(cluster), sole = cell && cell->sole & bit_of(cluster);

	if (once == !!(e & QCOW2_COPIED))
		return e;
	if (once) {
		leak(k, "the %s %#llx is not marked as used once", what, ull(e & QCOW2_OFFSET));
		return k->fix != REPAIR_NONE && sole ? e | QCOW2_COPIED : e;
	}
	wrong(k, "the %s %#llx is marked as used once, but is not", what, ull(e & QCOW2_OFFSET));
	return k->fix == REPAIR_ALL ? e & ~QCOW2_COPIED : e;
}

static int copied_l1(struct scan *k, uint64_t *e, uint64_t index, void *arg)
{
	(void)index;
	(void)arg;
	if (*e & QCOW2_OFFSET && scan_usable(judge_l1(k, *e)))
		*e = check_copied(k, *e, "L2 table at");
	return 0;
}

static int copied_l2(struct scan *k, uint64_t table)
{
	uint64_t off = table << k->h.cluster_bits;
	bool changed = false;

	if (!scan_read(k, k->table, k->cluster, off, "the L2 table"))
		return 0;
	for (uint32_t n = 0; n < scan_l2_entries(k); n++) {
		uint64_t bits, e = scan_l2_get(k, n, &bits), now = e;

		if (!(e & QCOW2_COMPRESSED) && e & QCOW2_OFFSET && scan_usable(scan_judge(k, e, bits)))
			now = check_copied(k, e, "cluster at");
		if (now != e)
			scan_l2_set(k, n, now, bits);
		changed |= now != e;
	}
	return changed ? meta_write(&k->i->file, k->table, k->cluster, off) : 0;
}

static int scan_copied(struct scan *k)
{
	int r = 0;

	for (uint32_t n = 0; n < k->l1_n && !r; n++)
		if (k->l1[n].active)
			r = scan_entries(k, k->l1[n].off, k->l1[n].n, "the L1 table", copied_l1, NULL);
	for (uint32_t n = 0; n < k->l2_n && !r; n++) {
		const struct cell *cell = scan_look(k, k->l2_list[n]);

		if (cell->active & bit_of(k->l2_list[n]))
			r = copied_l2(k, k->l2_list[n]);
	}
	return r;
}

/* ---- one scan ---- */

static int count_users(struct scan *k)
{
	int r = mark(k, 0, k->cluster, false, "header", 0);

	k->l1_n = 0;
	free(k->l1);
	k->l1 = calloc(MIN(k->h.snapshots, QCOW2_SNAPSHOTS_MAX) + 1u, sizeof(*k->l1));
	if (!k->l1)
		return -ENOMEM;
	if (r >= 0)
		r = add_l1(k, k->h.l1_offset, k->h.l1_size, true, 0);
	r = r < 0 ? r : scan_snaps(k);
	r = r ? r : scan_bitmaps(k);
	r = r ? r : scan_refcount_table(k);
	r = r ? r : scan_l1s(k);
	for (uint32_t n = 0; n < k->l2_n && !r; n++)
		r = scan_l2(k, k->l2_list[n]);
	return r;
}

int qcow2_scan(struct scan *k, struct error *err)
{
	int r;

	drop_cells(k);
	k->corruptions = k->leaks = k->errors = k->bad_entries = k->l2_n = 0;
	k->top = 0;
	k->bad_refs = k->bad_snaps = k->bad_bitmaps = k->unreadable = false;
	r = read_head(k, err);
	if (r)
		return r;
	free(k->table);
	k->table = malloc(k->cluster);
	r = k->table ? count_users(k) : -ENOMEM;
	if (!r && k->unreadable && k->mending)  /* what looks unused may be used */
		return error_set(err, EIO, "a part of it cannot be read any more: mending ends here");
	if (!r && !k->no_refs)
		r = compare_refcounts(k);
	if (!r && !k->no_refs)
		r = scan_copied(k);
	if (r == -EFBIG)
		return error_set(err, EFBIG, "it refers to more clusters than a file of its size can");
	return r ? error_errno(err, -r, "the check could not be finished") : 0;
}

/* ---- the whole ---- */

static void scan_free(struct scan *k)
{
	drop_cells(k);
	free(k->l1);
	free(k->snap);
	free(k->rt);
	free(k->l2_list);
	free(k->table);
}

/* The disk has a map: without one, nothing here is worth a change. */
static bool has_map(const struct scan *k)
{
	return k->l1_n && k->l1[0].active;
}

static int run(struct scan *k, enum image_repair repair, struct error *err)
{
	struct image_check *c = k->c;
	uint64_t marks;
	int r;

	c->allocated = c->fragmented = c->compressed = 0;
	r = qcow2_scan(k, err);
	if (r)
		return r;
	c->corruptions = k->corruptions;
	c->leaks = k->leaks;
	c->errors = k->errors;
	c->fixed_corruptions = c->fixed_leaks = 0;
	c->clusters = (k->h.size + k->cluster - 1) >> k->h.cluster_bits;
	marks = k->h.incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT);
	if (marks & QCOW2_DIRTY)
		found(k, NULL, "the image is marked dirty: it was not closed, refcounts may be late");
	if (marks & QCOW2_CORRUPT)
		found(k, NULL, "the image is marked corrupt");
	if (repair != REPAIR_NONE && has_map(k) && (k->corruptions || k->leaks || marks)) {
		r = qcow2_mend(k, repair, err);
		if (!r) {
			c->fixed_corruptions = c->corruptions - MIN(c->corruptions, k->corruptions);
			c->fixed_leaks = c->leaks - MIN(c->leaks, k->leaks);
		}
		qcow2_of(k->i)->failed = true;  /* what it has in memory is late */
		r = r ? r : qcow2_reopen(k->i, k->corruptions || k->errors, err);
	}
	c->end = k->top << k->h.cluster_bits;
	return r;
}

int qcow2_check(struct image *i, enum image_repair repair, struct image_check *c, struct error *err)
{
	struct scan k = { .i = i, .c = c };
	struct error own = { 0 };
	int r = 0;

	err = err ? err : &own;
	err->code = 0;
	if (!i->file.readonly && !i->corrupt)
		r = image_flush(i);
	if (r)
		return error_errno(err, -r, "'%s': cannot write its metadata", i->path);
	r = run(&k, repair, err);
	if (r)
		error_prefix(err, "'%s': ", i->path);
	scan_free(&k);
	return r;
}

int qcow2_reopen(struct image *i, bool repair, struct error *err)
{
	struct image_how how = { .format = i->fmt->name, .readonly = i->file.readonly, .repair = repair };
	char *name = i->backing_name, *format = i->backing_format;
	struct qcow2 *old = i->priv, *fresh;
	uint64_t size = i->size;
	int r;

	i->backing_name = i->backing_format = NULL;
	i->priv = NULL;
	i->corrupt = i->marking = i->z_valid = false;
	r = i->fmt->open(i, &how, err);
	fresh = i->priv;
	if (r) {
		free(i->backing_name);
		free(i->backing_format);
		i->backing_name = name;
		i->backing_format = format;
		i->priv = old;
		i->size = size;
		i->corrupt = true;
		old = fresh;
	} else {
		free(name);
		free(format);
		if (!old->failed) {
			fresh->end = old->end;
			fresh->blank = old->blank;
		}
	}
	if (old) {
		void *keep = i->priv;

		old->failed = true;
		i->priv = old;
		i->fmt->close(i);
		i->priv = r ? keep : fresh;
	}
	return r;
}
