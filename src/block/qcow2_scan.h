#ifndef BLOCK_QCOW2_SCAN_H
#define BLOCK_QCOW2_SCAN_H
/*
 * A scan of a qcow2 image: who uses which cluster, counted anew from the file. qcow2_check.c scans and compares,
 * qcow2_mend.c mends what a scan found. Tools: everything waits for the host.
 */
#include <endian.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "qcow2.h"

#define CELL       64u                  /* clusters in a cell */
#define CELL_CHUNK 1024u                /* cells allocated at once */
#define REFS_MAX   UINT16_MAX           /* this often or more */

/* 64 clusters: how often each is used, and by what; a bit each. */
struct cell {
	uint64_t key;                   /* host cluster / CELL */
	uint64_t meta, counts;          /* metadata; the refcount structure */
	uint64_t l2, active;            /* L2 tables; those of the disk as it is now */
	uint64_t once, sole;            /* refcount in the file is 1 (after mending); one user was counted */
	uint16_t refs[CELL];
};

/* An L1 table that can be read: the disk's, which is the first, or a snapshot's. */
struct l1 {
	uint64_t off;
	uint32_t n;
	bool active;
};

/* An entry of the snapshot table. */
struct snap {
	uint64_t at;                    /* in the file */
	uint32_t len, extra;
	bool bad, brief;                /* cannot be kept; lacks what version 3 wants */
};

/* What is wrong with an L1 or L2 entry. */
enum fault { FINE, UNALIGNED, OUTSIDE, IN_METADATA, IN_REFCOUNTS, RESERVED, BITMAP };

struct scan {
	struct image *i;
	struct image_check *c;
	const struct qcow2 *q;          /* the shape of clusters and refcounts; the rest is read again */
	struct qcow2_header h;
	uint32_t cluster;
	bool ext;                       /* extended L2 entries */
	uint64_t bytes, n;              /* of the file; its clusters, the last may be a part */
	uint64_t top;                   /* clusters before this may be in use */
	bool sparse;
	bool mending;                   /* nothing is said and counted in statistics any more */
	bool no_refs;                   /* the refcount structure is not there */
	enum image_repair fix;          /* what this scan mends on its way: refcounts, COPIED */

	struct cell **chunk;
	uint32_t *hash, hash_size, cells, cells_most;

	struct l1 *l1;
	uint32_t l1_n;
	struct snap *snap;
	uint32_t snap_n, snap_room;
	uint64_t *rt;                   /* refcount table; entries that cannot be used are 0 */
	uint64_t rt_n;
	uint64_t *l2_list;              /* host clusters of the L2 tables, in order */
	uint32_t l2_n;
	void *table;                    /* one cluster */

	uint64_t corruptions, leaks, errors;
	uint64_t bad_entries;
	bool unreadable;                /* something could not be read: what looks unused may be used */
	bool bad_refs, bad_snaps, bad_bitmaps;  /* refcount structure, snapshot table, bitmaps cannot be used as they are */
};

/* e may be changed: then it is written back. 0, or -errno to stop. */
typedef int entry_fn(struct scan *k, uint64_t *e, uint64_t index, void *arg);

/* ---- qcow2_check.c ---- */

/*
 * Scan the whole image into k, of which i and c are set and the rest is 0 or from the scan before. With k->fix set,
 * refcounts and COPIED flags are mended on the way. 0, or -errno with words where it could not be finished.
 */
int  qcow2_scan(struct scan *k, struct error *err);
/* The cell of a cluster; NULL: nothing was counted there. */
struct cell *scan_look(const struct scan *k, uint64_t cluster);
/* A cluster has so many users more; *ret (may be NULL): its cell. -ENOMEM, -EFBIG. */
int  scan_use(struct scan *k, uint64_t cluster, unsigned times, struct cell **ret);
/* len bytes at off: 1; 0: all of it is zeroes (buf is not set), or cannot be read, which is counted. what: for words. */
int  scan_read(struct scan *k, void *buf, uint64_t len, uint64_t off, const char *what);
/* fn for each of n 8-byte entries at off that is not 0. */
int  scan_entries(struct scan *k, uint64_t off, uint64_t n, const char *what, entry_fn *fn, void *arg);
/* What is wrong with an L1 entry, or an L2 entry with its subcluster bitmap. Uses k->table. */
enum fault scan_judge_l1(struct scan *k, uint64_t e);
enum fault scan_judge(const struct scan *k, uint64_t e, uint64_t bits);
/* The refcount of one cluster, from the file. */
uint64_t scan_stored(const struct scan *k, uint64_t cluster);

/* ---- qcow2_mend.c ---- */

/* Mend what the scan in k found, as far as repair allows; k is a scan of what is left then. */
int  qcow2_mend(struct scan *k, enum image_repair repair, struct error *err);

/* ---- small ---- */

static inline uint32_t get32(const uint8_t *p)
{
	uint32_t n;

	memcpy(&n, p, sizeof(n));
	return be32toh(n);
}

static inline uint64_t get64(const uint8_t *p)
{
	uint64_t n;

	memcpy(&n, p, sizeof(n));
	return be64toh(n);
}

static inline struct cell *scan_cell(const struct scan *k, uint32_t n)
{
	return &k->chunk[n / CELL_CHUNK][n % CELL_CHUNK];
}

static inline unsigned scan_refs(const struct scan *k, uint64_t cluster)
{
	const struct cell *e = scan_look(k, cluster);

	return e ? e->refs[cluster % CELL] : 0;
}

static inline uint64_t scan_per_block(const struct scan *k)
{
	return (uint64_t)k->cluster * 8 >> k->h.refcount_order;
}

/* Entries of an L2 table, and what is in number n of the table in k->table. */
static inline uint32_t scan_l2_entries(const struct scan *k)
{
	return k->cluster / (k->ext ? 16 : 8);
}

static inline uint64_t scan_l2_get(const struct scan *k, uint32_t n, uint64_t *bits)
{
	const uint8_t *p = (const uint8_t *)k->table + (size_t)n * (k->ext ? 16 : 8);

	*bits = k->ext ? get64(p + 8) : 0;
	return get64(p);
}

static inline void scan_l2_set(const struct scan *k, uint32_t n, uint64_t e, uint64_t bits)
{
	uint8_t *p = (uint8_t *)k->table + (size_t)n * (k->ext ? 16 : 8);
	uint64_t be[2] = { htobe64(e), htobe64(bits) };

	memcpy(p, be, k->ext ? 16 : 8);
}

static inline uint64_t scan_l2_reserved(const struct scan *k)
{
	return QCOW2_L2_RESERVED | (k->h.version < 3 || k->ext ? QCOW2_ZERO : 0);
}

static inline bool scan_usable(enum fault f)
{
	return f == FINE || f == IN_REFCOUNTS || f == RESERVED || f == BITMAP;
}

#endif
