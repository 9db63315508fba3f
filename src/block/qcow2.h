#ifndef BLOCK_QCOW2_H
#define BLOCK_QCOW2_H
/*
 * The qcow2 format, inside src/block.
 *
 *   qcow2.c           open, header, map, decompression
 *   qcow2_refs.c      refcounts, clusters taken and given back, what is metadata
 *   qcow2_alloc.c     L2 tables that change: writes, discards, compressed clusters; metadata on its way out
 *   qcow2_create.c    new images, preallocation
 *   qcow2_check.c     check: everything counted anew; qcow2_scan.h
 *   qcow2_mend.c      repair
 *   qcow2_resize.c    another size, another backing file's name
 *   qcow2_snapshot.c  internal snapshots
 *
 * Source: docs/interop/qcow2.txt of QEMU ("the spec"). All numbers on disk are big-endian.
 *
 *      header -> L1 table -> L2 tables -> clusters of data
 *      header -> refcount table -> refcount blocks: how many L1 and L2 entries use each cluster of the file
 *
 * Words: index: the number of a cluster, host offset / cluster size, or guest offset / cluster size ("guest index").
 * The L1 table and the refcount table are whole in memory, in host order. L2 tables and refcount blocks are cached by
 * slices of at most 4096 bytes, as they are on disk.
 *
 * Everything below runs on the image's thread; "tools" means that image->blocking is needed. Functions that return int
 * without a note: 0, -EAGAIN (never in a tool; nothing was changed that matters; again from the start), -EIO (image_corrupt() was called, or
 * the host's error), -ENOMEM, -ENOSPC, -EFBIG.
 */
#include "format.h"

#define QCOW2_MAGIC          0x514649fbu        /* "QFI\xfb" */
#define QCOW2_V2_LENGTH      72u                /* header bytes in version 2 */
#define QCOW2_V3_LENGTH      104u               /* at least, in version 3 */
#define QCOW2_HEAD           112u               /* what we know of the header, and write */
#define QCOW2_NAME_MAX       1023u              /* bytes of a backing file's name */
#define QCOW2_L1_MAX         (32u << 20)        /* bytes of an L1 table */
#define QCOW2_RT_MAX         (8u << 20)         /* bytes of a refcount table */
#define QCOW2_SNAPSHOTS_MAX  65536u
#define QCOW2_SNAPSHOT_BYTES (64u << 20)        /* of the snapshot table */
#define QCOW2_EXT_MAX        (64u << 10)        /* bytes of all header extensions */

enum qcow2_incompatible {
	QCOW2_DIRTY = 1u << 0, QCOW2_CORRUPT = 1u << 1, QCOW2_DATA_FILE = 1u << 2, QCOW2_COMPRESSION = 1u << 3,
	QCOW2_EXT_L2 = 1u << 4,
};
enum qcow2_compatible { QCOW2_LAZY_REFCOUNTS = 1u << 0 };
enum qcow2_autoclear { QCOW2_BITMAPS = 1u << 0, QCOW2_RAW_DATA = 1u << 1 };
enum qcow2_extension {
	QCOW2_EXT_END = 0, QCOW2_EXT_BACKING_FORMAT = 0xe2792aca, QCOW2_EXT_FEATURES = 0x6803f857,
	QCOW2_EXT_BITMAPS = 0x23852875, QCOW2_EXT_CRYPTO = 0x0537be77, QCOW2_EXT_DATA_FILE = 0x44415441,
};

/* L1, L2 and refcount table entries. */
#define QCOW2_OFFSET         0x00fffffffffffe00ull
#define QCOW2_COPIED         (1ull << 63)       /* refcount is exactly 1: may be written in place */
#define QCOW2_COMPRESSED     (1ull << 62)       /* L2 */
#define QCOW2_ZERO           1ull               /* L2, version 3 without extended L2 */
#define QCOW2_L1_RESERVED    0x7f000000000001ffull
#define QCOW2_L2_RESERVED    0x3f000000000001feull      /* of an entry that is not compressed */

/* The header on disk; from incompatible on: version 3. */
struct qcow2_header {
	uint32_t magic, version;
	uint64_t backing_offset;
	uint32_t backing_length;
	uint32_t cluster_bits;
	uint64_t size;
	uint32_t crypt_method;
	uint32_t l1_size;
	uint64_t l1_offset;
	uint64_t refcount_offset;
	uint32_t refcount_clusters;
	uint32_t snapshots;
	uint64_t snapshots_offset;
	uint64_t incompatible, compatible, autoclear;
	uint32_t refcount_order;
	uint32_t header_length;
	uint8_t  compression_type;      /* 0: zlib, 1: zstd; header_length > 104 */
	uint8_t  padding[7];
} __attribute__((packed));

enum qcow2_stage {
	FREE_NEW,                       /* unlinked in memory */
	FREE_UNLINKING,                 /* that is in the plan that runs */
	FREE_DURABLE,                   /* it ran; transfers may still be in flight */
	FREE_READY,                     /* reclaim(): the next plan lowers the refcount */
	FREE_LOWERING,                  /* that is in the plan that runs */
};

/* Clusters that nothing will refer to once the next plan ran, on their way to be free. One of them: one refcount less. */
struct qcow2_free {
	struct qcow2_free *next;
	uint64_t first;                 /* index */
	uint32_t n;                     /* all in one slice of a refcount block */
	uint8_t  stage;                 /* enum qcow2_stage */
	bool     lowered;               /* the refcounts in memory are */
	struct table *refs;             /* pinned until lowered */
};

/* A table of which the file still has other bytes: it reads as zeroes from now on. */
struct qcow2_fresh {
	struct qcow2_fresh *next;
	uint64_t off;                   /* one cluster */
	bool blank;                     /* but the file has zeroes */
	bool sent;                      /* the plan that runs zeroes it */
	uint64_t made[8];               /* slices that are in the cache: a bit each */
};

/* Host bytes that no data may be written to. */
struct qcow2_range {
	uint64_t off, len;
	const char *what;
};
#define QCOW2_RANGES 8
#define QCOW2_FRESH  64         /* hash */

struct qcow2 {
	/* const after open, but for tools */
	struct qcow2_header h;          /* host order; what is written when header_dirty. l1_*, refcount_*, backing_*, snapshots* too */
	uint8_t *ext;                   /* all header extensions as found, without the end marker */
	uint32_t ext_len;
	uint32_t cluster;
	unsigned cluster_bits;
	unsigned entry_bits;            /* log2 of the bytes of an L2 entry: 3, 4 */
	unsigned l2_bits;               /* log2 of the entries of an L2 table */
	unsigned slice_bits;            /* log2 of the bytes of a slice */
	unsigned refs_bits;             /* log2 of the refcounts of a refcount block */
	unsigned sub_bits;              /* log2 of the bytes of a subcluster; cluster_bits without extended L2 */
	uint64_t refs_max;              /* largest refcount */
	bool refs_bad;                  /* refcount structures make no sense: no change is possible */
	bool has_backing;

	/* its thread */
	uint64_t *l1;                   /* h.l1_size entries */
	uint64_t *l1_dirty;             /* a bit per 512 bytes of the table; l1_any: one is set */
	uint64_t *l1_sent;              /* those in the plan that runs */
	bool l1_any;
	uint64_t *l1_checked;           /* a bit per entry: its table was looked at before it was changed */
	uint64_t *rt;                   /* rt_n entries: all that fit h.refcount_clusters */
	uint32_t rt_n;
	uint64_t *rt_dirty, *rt_sent;
	bool rt_any;
	bool rt_moved;                  /* a larger one: all of it is written, then the header */
	bool rt_moving;                 /* that is in the plan that runs */
	bool header_dirty, header_sent;
	bool mark, mark_sent;           /* the header is to say that the image is corrupt */

	struct tables *l2, *refs;
	struct table *last;             /* pinned: the L2 slice used last, or NULL */
	uint64_t last_first;            /* guest index of its first entry */
	struct alloc *allocs;           /* in flight */
	struct qcow2_fresh *fresh[QCOW2_FRESH];
	unsigned fresh_n;
	struct qcow2_free *frees, *frees_last, *spare;
	unsigned spare_n, spare_reserved;
	unsigned lowering;              /* frees in a plan that lowers refcounts */
	struct qcow2_free *dropped;     /* refcount 1, used by nobody, to be taken first */
	/* The L2 table that is being copied because a snapshot has it too. */
	struct {
		bool active;
		uint64_t l1_index, from, to;
		unsigned slice;         /* copied so far */
	} cow;

	uint64_t cursor;                /* index: free clusters are looked for from here to end */
	uint64_t end;                   /* index: past the last cluster that was ever used, as far as known */
	uint64_t blank;                 /* index: from here on the file reads as zeroes */
	uint64_t packed;                /* where the next compressed cluster may begin; 0: in a new cluster */
	bool failed;                    /* a plan failed once: the file is not cut at close */
	bool warned_end;

	struct qcow2_range range[QCOW2_RANGES];
	unsigned ranges;
	uint64_t *bloom;                /* L2 tables and refcount blocks: may be one, if the bits are set */
	unsigned bloom_bits;            /* log2 of its bits */
};

static inline struct qcow2 *qcow2_of(const struct image *i)
{
	return i->priv;
}

/* ---- qcow2.c ---- */

/*
 * Set up i->priv from a header in host order that lies in head (its raw bytes, n of them, from offset 0 of the file). open() and
 * create() use it. 0 or -errno with words.
 */
int  qcow2_attach(struct image *i, const struct image_how *how, const uint8_t *head, size_t n, struct error *err);
void qcow2_header_to_disk(const struct qcow2_header *h, uint8_t out[QCOW2_HEAD]);
void qcow2_header_from_disk(const uint8_t in[QCOW2_HEAD], struct qcow2_header *h);
/* Bytes of the header that are the header's own: 72 in version 2, at most QCOW2_HEAD that are written. */
unsigned qcow2_header_written(const struct qcow2_header *h);
/* Slice n (from 0) of the L2 table (of: q->l2) or refcount block (of: q->refs) at table_off; valid as tables_get() says. */
int  qcow2_slice(struct image *i, struct tables *of, uint64_t table_off, unsigned n, struct table **ret);
/* The slice that has the entry of guest index g, *t NULL where there is no L2 table; *at: the entry's number in it. */
int  qcow2_find_slice(struct image *i, uint64_t g, struct table **t, unsigned *at);
/* Does an L2 entry that is not compressed make sense? And what to say of one that does not: -EIO. */
bool qcow2_sane(const struct qcow2 *q, uint64_t entry);
int  qcow2_bad_entry(struct image *i, uint64_t g, uint64_t entry);
/* Where the L2 table of an L1 index is: 0: none. -EIO where the entry makes no sense. */
int  qcow2_l2_offset(struct image *i, uint64_t l1_index, uint64_t *l2_off);
/* Forget the slice that map() remembers: before tables are forgotten, or the L1 table changes. */
void qcow2_forget_last(struct image *i);
/* What a compressed L2 entry refers to: host offset and most bytes. Pure. */
void qcow2_compressed_at(const struct qcow2 *q, uint64_t entry, uint64_t *off, uint32_t *len);

static inline uint64_t qcow2_index(const struct qcow2 *q, uint64_t off)
{
	return off >> q->cluster_bits;
}

static inline unsigned qcow2_l1_shift(const struct qcow2 *q)    /* guest offset >> this: L1 index */
{
	return q->cluster_bits + q->l2_bits;
}

/* Clusters that hold n bytes. */
static inline uint64_t qcow2_clusters(const struct qcow2 *q, uint64_t n)
{
	return (n >> q->cluster_bits) + !!(n & (q->cluster - 1));
}

/* ---- qcow2_refs.c ---- */

/*
 * What refcounts need in a writable image: check the refcount table, find the metadata. -EIO with words where it is refused.
 * how NULL: a tool that looks at an image open read-only; then and with how->repair nothing is refused but refs_bad set.
 */
int  qcow2_refs_open(struct image *i, const struct image_how *how, struct error *err);
void qcow2_refs_close(struct image *i);                 /* cuts the file to what is used */

/* Refcount of a cluster; of one that no refcount block describes: 0. */
int  qcow2_ref_get(struct image *i, uint64_t index, uint64_t *val);
/*
 * Tools: add delta (+1, -1) to n clusters. -EFBIG: a refcount would not fit refcount_bits; -EIO (corrupt): one would be below 0. Nothing
 * was changed then. A -1 reaches the file with the next plan, together with what that plan has else: who frees uses qcow2_free_later().
 */
int  qcow2_ref_add(struct image *i, uint64_t index, uint64_t n, int delta);
/* Read or change entry n of the bytes of a refcount block. Pure. */
uint64_t qcow2_ref_load(const struct qcow2 *q, const void *block, unsigned n);
void qcow2_ref_store(const struct qcow2 *q, void *block, unsigned n, uint64_t val);

/*
 * At most want clusters that follow each other, their refcount 1, the file long enough: *n of them, 1 or more. *blank: they read as zeroes.
 */
int  qcow2_take(struct image *i, uint32_t want, uint64_t *first, uint32_t *n, bool *blank);
/* Tools: exactly n that follow each other, at the end of the file. Their bytes are open unless *blank. */
int  qcow2_take_run(struct image *i, uint64_t n, uint64_t *first, bool *blank);
/*
 * Tools: one user less of each of n clusters. Takes effect when the change that unlinked them is durable: at the second
 * image_write_metadata() from now; where the refcount becomes 0 the space goes back to the host.
 */
int  qcow2_free_later(struct image *i, uint64_t first, uint64_t n);

/* off is in a metadata cluster: what it is, or NULL. */
const char *qcow2_metadata_at(const struct qcow2 *q, uint64_t off);
void qcow2_metadata_add(struct qcow2 *q, uint64_t off);         /* one more L2 table */
/* Tools: after the L1 table or the refcount table moved or grew, or snapshots changed: build the above anew. */
int  qcow2_metadata_rebuild(struct image *i);
/* Metadata makes no sense: as image_corrupt(), and the next plan says so in the header. */
__attribute__((format(printf, 2, 3)))
int  qcow2_corrupt(struct image *i, const char *fmt, ...);

/* The table in the cluster at off reads as zeroes from now on; blank: in the file too. */
int  qcow2_fresh_add(struct image *i, uint64_t off, bool blank);
void qcow2_fresh_forget(struct qcow2 *q, struct tables *of, uint64_t off);
/* The slice that has the refcount of index, as entry *at of it; NULL where no block describes it. */
int  qcow2_ref_slice(struct image *i, uint64_t index, struct table **t, unsigned *at);

/* Nodes for later: reserve n; no longer; take one of those reserved. */
int  qcow2_spare(struct qcow2 *q, unsigned n);
void qcow2_unspare(struct qcow2 *q, unsigned n);
struct qcow2_free *qcow2_spare_take(struct qcow2 *q);
/* To free clusters later without failing: prepare, then either queue (they are unlinked now) or cancel. */
int  qcow2_frees_prepare(struct image *i, uint64_t first, uint64_t n);
void qcow2_frees_queue(struct image *i, uint64_t first, uint64_t n);
void qcow2_frees_cancel(struct image *i, uint64_t first, uint64_t n);

/* The parts of gather() and gathered() that are here. */
int  qcow2_frees_gather(struct image *i, struct plan *p);
void qcow2_frees_gathered(struct qcow2 *q, int err);
int  qcow2_fresh_gather(struct qcow2 *q, struct plan *p);
void qcow2_fresh_gathered(struct qcow2 *q, int err);
int  qcow2_dropped_gather(struct image *i);     /* tools */
bool qcow2_reclaim(struct image *i);

/* ---- qcow2_alloc.c ---- */

/* Remember an L1 entry that was changed in q->l1: the next plan writes it. */
void qcow2_l1_changed(struct qcow2 *q, uint64_t l1_index);
/* The L2 table of an L1 index, made or copied where it is not there or not ours alone: it may be changed. */
int  qcow2_l2_writable(struct image *i, uint64_t l1_index, uint64_t *l2_off);

int  qcow2_alloc(struct image *i, uint64_t off, uint64_t len, struct alloc *a);
void qcow2_link(struct image *i, struct alloc *a);
void qcow2_drop(struct image *i, struct alloc *a);
int  qcow2_punch(struct image *i, uint64_t off, uint64_t len, enum punch_kind kind, uint64_t *done, uint64_t *part);
int  qcow2_gather(struct image *i, struct plan *p);
void qcow2_gathered(struct image *i, int err);
int  qcow2_write_compressed(struct image *i, const void *cluster, uint64_t off);
size_t qcow2_compress(const struct image *i, const void *cluster, void *out);
int  qcow2_write_packed(struct image *i, void *z, size_t n, uint64_t off);

/* ---- qcow2_create.c ---- */

int  qcow2_create(struct host_file *f, const struct image_create *c, struct error *err);
/* Tools: give every cluster of guest bytes [from, to) that has none one, as prealloc says. */
int  qcow2_preallocate(struct image *i, uint64_t from, uint64_t to, enum image_prealloc prealloc, struct error *err);

/* ---- qcow2_check.c, qcow2_snapshot.c, qcow2_resize.c: see format.h ---- */

int  qcow2_check(struct image *i, enum image_repair repair, struct image_check *c, struct error *err);
int  qcow2_snapshots(struct image *i, struct image_snapshot **list, unsigned *n, struct error *err);
int  qcow2_snapshot_create(struct image *i, const char *name, struct error *err);
int  qcow2_snapshot_apply(struct image *i, const char *which, struct error *err);
int  qcow2_snapshot_delete(struct image *i, const char *which, struct error *err);
int  qcow2_use_snapshot(struct image *i, const char *which, struct error *err);
int  qcow2_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err);
int  qcow2_set_backing(struct image *i, const char *name, const char *format, struct error *err);
/*
 * Tools: all that is in memory anew from the file, of which everything was written. repair as in image_how. Where
 * that fails the image keeps what it had and is not changed any more.
 */
int  qcow2_reopen(struct image *i, bool repair, struct error *err);

#endif
