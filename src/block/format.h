#ifndef BLOCK_FORMAT_H
#define BLOCK_FORMAT_H
/*
 * Inside src/block.
 *
 *   disk.c     a disk under a guest: keys, ranges, read-only, flush rules, in-flight count
 *   gate.c     what testers put before it: faults, delays, limits, error policy
 *   writelog.c the log of its writes
 *   request.c  one guest request over the images of a chain: extents, copy-on-write, waiting for metadata
 *   image.c    an image for tools: opening, the chain, and the same requests done in place
 *   tables.c   a bounded cache of an image's metadata tables
 *   plan.c     metadata on its way out: writes, barriers, holes, as data
 *   raw.c qcow2*.c vdi.c vmdk.c vhd.c vhdx.c    formats
 *   meta.c     metadata straight from and to a file, in place
 *   file.c     the host file: what may be one, its size, every data path
 *   bounce.c   O_DIRECT transfers that the file system would refuse
 *   lock.c     image locks shared with QEMU
 *
 * How this works. A format is a map from guest offsets to host offsets. It runs on one thread (the disk's
 * home loop, or the tool's only thread), has no lock, and never waits: what it needs and has not in memory it
 * asks for by returning -EAGAIN with image->want set, having changed nothing; whoever called reads the table
 * (or writes the plan) and calls again from the start. Tools set image->blocking, and then tables.c does the
 * waiting in place, so the same code serves both.
 *
 * Data never passes through a format. Writing into space that is not there yet is three steps:
 *
 *      alloc()   reserve space, in memory only: nothing refers to it
 *      data      the caller writes it, with what must surround it (copy-on-write)
 *      link()    the map refers to it, in memory
 *
 * and later a plan carries the metadata out in the order in which a crash can only leak:
 *
 *      refcounts, new tables | barrier (data too) | tables that refer to them | barrier | their roots | barrier
 *
 * Space that a change set free is given back in two plans: the first makes the change durable; when it ran and
 * every transfer that was in flight at its start has ended, reclaim() says so to the format, whose next
 * plan then punches the holes and lowers the refcounts; only when that one ran may the space be used again.
 */
#include <stddef.h>
#include <sys/types.h>
#include "vmm/block.h"
#include "vmm/image.h"
#include "vmm/log.h"

#define SECTOR 512u

enum cache_mode { CACHE_WRITEBACK, CACHE_NONE, CACHE_WRITETHROUGH, CACHE_UNSAFE };

/* One open host file or block device. */
struct host_file {
	/* const after file_open() */
	int fd;
	int meta_fd;                    /* the same file without O_DIRECT, for metadata; fd where that has none */
	int meta_flags;                 /* of preadv2() that must not wait: RWF_NOWAIT, or 0 where memory is the medium */
	bool blockdev, readonly;
	bool in_memory;                 /* tmpfs: never waits for a medium */
	uint64_t size;                  /* bytes as the host said at open, and as file_grow() made it */
	uint32_t align;                 /* O_DIRECT: offsets and lengths; else 1 */
	uint32_t mem_align;             /* O_DIRECT: buffers; else 1 */
	uint32_t physical;              /* block size the host prefers, 512 to 64 KiB */
	struct loop *home;

	/* home loop */
	bool inline_read, inline_write; /* small transfers are tried at once, without the ring */
	int inline_flags;               /* RWF_NOWAIT, or 0 where memory is the medium */
	int write_flags;                /* the same for writes: 0 also where the file system has no RWF_NOWAIT for them */
	unsigned suspect;               /* writes still to look at closely, because one took long */
	unsigned wait_times;            /* how many times as long as the next one waits no more are tried at once */
	uint64_t write_pause;           /* loop_now() before which none is */
	bool no_discard, no_punch, no_zero_range, no_space;     /* the file refused it once */
	void *bounce;                   /* O_DIRECT: BOUNCE_SIZE bytes, aligned */
	struct blk_req *bounce_first, *bounce_last;     /* first owns the buffer, the others wait */
	uint64_t bounce_base;
	size_t bounce_span, bounce_got;
};

#define BOUNCE_SIZE (64u << 10)

/* ---- plan.c: metadata on its way out ---- */

enum plan_kind { PLAN_WRITE, PLAN_ZERO, PLAN_BARRIER, PLAN_PUNCH };
struct plan_step {
	enum plan_kind kind;
	uint64_t off, len;
	void *data;                     /* PLAN_WRITE: the plan's own copy */
};
struct plan {
	struct plan_step *step;
	unsigned n, room;
	bool no_barriers;               /* cache=unsafe */
	bool sync_failed;               /* plan_run() failed at a barrier: the host may have lost data, and says so once */
};
/* 0 or -ENOMEM. A barrier after a barrier is one. */
int  plan_write(struct plan *p, uint64_t off, const void *data, size_t len);    /* copies */
int  plan_zero(struct plan *p, uint64_t off, uint64_t len);
int  plan_punch(struct plan *p, uint64_t off, uint64_t len);
int  plan_barrier(struct plan *p);
int  plan_run(struct plan *p, const struct host_file *f);         /* any thread; stops at the first failure */
void plan_clear(struct plan *p);

/* ---- formats ---- */

struct extent {
	enum extent_kind kind;
	uint64_t len;                   /* guest bytes from the offset asked for that this holds for: 1 or more */
	uint64_t pos;                   /* EXT_DATA: host offset of the first of them; EXT_COMPRESSED: of the cluster's bytes */
	struct host_file *file;         /* EXT_DATA, EXT_COMPRESSED: in which file (formats with several) */
	uint32_t csize;                 /* EXT_COMPRESSED: most bytes the compressed cluster takes there */
	uint32_t skip;                  /* EXT_COMPRESSED: bytes of the cluster before the offset asked for */
};

/* A write in the making. The caller embeds it and leaves it alone until link() or drop(). */
struct alloc {
	uint64_t off, len;              /* guest bytes this is for: the first of those asked for, 1 or more */
	uint64_t pos;                   /* host offset for guest offset off, in image->file */
	/*
	 * fresh false: the space is there: write, and that was all, neither link() nor drop().
	 * fresh true: [fill_off, off) and [off + len, fill_end) must be written around it, at the host offsets
	 * before and after, with what the guest reads there now; then link() or drop(). blank: the new space reads as
	 * zeroes already, so zeroes need not be written. Around it may lie outside the disk (its last cluster): zeroes.
	 */
	bool fresh, blank;
	uint64_t fill_off, fill_end;
	/* the format's */
	struct alloc *next;
	struct table *table;
	uint64_t first;                 /* host offset of the first new cluster */
	uint32_t index, count;
};

enum punch_kind {
	PUNCH_ZERO,                     /* must read as zeroes; the space may be kept */
	PUNCH_UNMAP,                    /* must read as zeroes; the space is not wanted */
	PUNCH_DISCARD,                  /* what it reads as is open where there is no backing image; space is not wanted */
};

struct table;

/*
 * One const table per format, listed in image.c. Functions without a note may return -EAGAIN (above), -EIO
 * (metadata makes no sense; the image says once what it found, with image_corrupt()), -ENOSPC, -ENOMEM. NULL where the format cannot do it.
 */
struct format_ops {
	const char *name;
	bool (*looks)(const uint8_t *head, size_t n);   /* pure; for image_guess(); n may be short */
	/*
	 * The file is open, locked and prepared: fill size, cluster, backing_name, backing_format, priv; refuse
	 * with words what is broken or not supported. May read with file_peek() and meta_read(). No -EAGAIN.
	 */
	int  (*open)(struct image *i, const struct image_how *how, struct error *err);
	void (*close)(struct image *i);                 /* frees priv; everything was written before. No I/O */

	int  (*map)(struct image *i, uint64_t off, uint64_t len, struct extent *e);
	/* The cluster at host bytes z[n] into exactly out[cluster]. Pure: any thread. 0 or -EIO. */
	int  (*decompress)(const struct image *i, const void *z, size_t n, void *out);

	/* Writable images. alloc(): also -EBUSY: one of the clusters is in another alloc; again after its end. */
	int  (*alloc)(struct image *i, uint64_t off, uint64_t len, struct alloc *a);
	void (*link)(struct image *i, struct alloc *a);         /* the data is written. Cannot fail: alloc() saw to it */
	void (*drop)(struct image *i, struct alloc *a);         /* it could not be written */
	/*
	 * *done: bytes from off that are dealt with, all in metadata; 0: none, because a part of a cluster is
	 * concerned: then *part is the length of it, for the caller to write zeroes (PUNCH_DISCARD: to leave alone). -EBUSY as alloc().
	 */
	int  (*punch)(struct image *i, uint64_t off, uint64_t len, enum punch_kind kind, uint64_t *done,
		uint64_t *part);
	/* Add what is dirty to p, as copies, in order, ending with a barrier if there is anything. One plan at a time. No -EAGAIN. */
	int  (*gather)(struct image *i, struct plan *p);
	void (*gathered)(struct image *i, int err);     /* that plan ran; err: nothing of it may be relied on, it is dirty again */
	bool (*reclaim)(struct image *i);               /* see above; true: another plan would give space back */

	/* Tools; image->blocking is set, so no -EAGAIN. */
	int  (*write_compressed)(struct image *i, const void *cluster, uint64_t off);
	/* The same in two steps: the bytes of a cluster into out[cluster], 0: it is not worth it (pure: any thread); and where they go. */
	size_t (*compress)(const struct image *i, const void *cluster, void *out);
	int  (*write_packed)(struct image *i, void *z, size_t n, uint64_t off);
	/* Just opened, read-only: the disk as it was at an internal snapshot, id or name, from now on. */
	int  (*use_snapshot)(struct image *i, const char *which, struct error *err);
	/* f is an empty, open, locked file. The first bytes that say what it is are written last. */
	int  (*create)(struct host_file *f, const struct image_create *c, struct error *err);
	int  (*resize)(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err);
	int  (*check)(struct image *i, enum image_repair repair, struct image_check *c, struct error *err);
	void (*describe)(const struct image *i, struct facts *f);
	int  (*snapshots)(struct image *i, struct image_snapshot **list, unsigned *n, struct error *err);
	int  (*snapshot_create)(struct image *i, const char *name, struct error *err);
	int  (*snapshot_apply)(struct image *i, const char *which, struct error *err);
	int  (*snapshot_delete)(struct image *i, const char *which, struct error *err);
	int  (*set_backing)(struct image *i, const char *name, const char *format, struct error *err);
};
extern const struct format_ops raw_format, qcow2_format, vdi_format, vmdk_format, vhd_format, vhdx_format;

enum image_want { WANT_NOTHING, WANT_TABLE, WANT_PLAN };

struct image {
	/* const after image_open() */
	const struct format_ops *fmt;
	char *path;
	struct host_file file;
	struct image *backing;          /* NULL: none, or not opened */
	unsigned depth;                 /* images above it in the chain */
	char *backing_name, *backing_format;    /* what the image says; NULL: nothing */
	bool blocking;                  /* a tool: waits in place */
	bool unsafe;                    /* cache=unsafe: plans have no barriers */
	void *priv;                     /* the format's */

	/* its thread */
	uint64_t size;                  /* guest bytes; multiple of 512 */
	uint32_t cluster;               /* bytes allocated as one, a power of two; 0: the map is the identity (raw) */
	bool corrupt;                   /* metadata made no sense once: every change fails with -EIO from then on */
	bool marking;                   /* the next plan only says in the image that it is corrupt: gather() although corrupt */
	bool gathering;                 /* a plan is being made or runs */
	bool reclaimable;               /* another plan would give space back */
	struct plan plan;               /* in a tool; empty in between */
	uint64_t z_pos;                 /* the last cluster that was decompressed in place, and where it came from */
	void *z_data;                   /* NULL: none yet */
	bool z_valid;
	const struct host_file *data_file;      /* in a tool: a stretch of this file that has no hole, as it was last asked */
	uint64_t data_from, data_to;
	enum image_want want;           /* with -EAGAIN: what to do before the next try */
	struct table *want_table;       /* WANT_TABLE: fill its iov from its offset in its file, then table_loaded() */
	struct log_limit limit;
};

/* Metadata makes no sense: said once on stderr with the image's name; no change is made to the image any more. Returns -EIO. */
__attribute__((format(printf, 2, 3)))
int image_corrupt(struct image *i, const char *fmt, ...);

/* map() through the chain: what the guest reads there; *owner: the image it lies in, or that returned the error. */
int image_map(struct image *i, uint64_t off, uint64_t len, struct extent *e, struct image **owner);
/* [off, end) is known to read as zeroes; false also where that would have to be waited for. */
bool image_reads_zero(struct image *i, uint64_t off, uint64_t end);
/* Put an image without a name on top of *image, which must be read-only: it takes all changes, and ends with the process. */
int  image_overlay(struct image **image, struct error *err);
/* Gather, run and finish one plan, in place (tools, open, close). */
int image_write_metadata(struct image *i);

/*
 * Metadata straight from or to the file, in place (open, close, tools): all of it or -errno; past the end
 * reads as zeroes with meta_read(), -EIO with meta_read_all(). Never O_DIRECT; EINTR and short transfers are dealt with.
 */
int  meta_read(const struct host_file *f, void *buf, size_t len, uint64_t off);
int  meta_read_all(const struct host_file *f, void *buf, size_t len, uint64_t off);
int  meta_write(const struct host_file *f, const void *buf, size_t len, uint64_t off);
int  meta_fill(const struct host_file *f, uint64_t off, uint64_t len);          /* write zeroes, whatever it costs */
int  meta_zero(const struct host_file *f, uint64_t off, uint64_t len);          /* reads as zeroes; the space stays */
int  meta_hole(const struct host_file *f, uint64_t off, uint64_t len);          /* reads as zeroes; the space is given back; or -errno */
int  meta_sync(const struct host_file *f);
int  meta_punch(const struct host_file *f, uint64_t off, uint64_t len);         /* gives space back, where it can */

/* ---- tables.c: a bounded cache of tables of one size, of one file ---- */

struct table {
	struct host_file *file;         /* the file it lies in */
	uint64_t off;                   /* host offset in it, a multiple of the size */
	void *data;                     /* size bytes, 4096-aligned where the size allows */
	bool dirty;
	/* tables.c */
	bool loading;
	int err;                        /* the read failed: given to the next who asks */
	unsigned pins;
	struct tables *owner;
	struct table *hash_next, *lru_prev, *lru_next;
	struct iovec iov;               /* what is left to read */
};

struct tables;
struct tables *tables_new(struct image *i, uint32_t size, unsigned most);       /* NULL: no memory. size: power of two, 512 or more */
/* The same for tables that lie in another file of the image. Only read: plans go to image->file. */
struct tables *tables_new_file(struct image *i, struct host_file *f, uint32_t size, unsigned most);
void tables_free(struct tables *t);                     /* dirty ones are lost; NULL is fine */
/*
 * 0 and *ret; -EAGAIN; or the error of the read. Past the end of the file are zeroes. The four tables got or made
 * last stay valid; older ones only while pinned.
 */
int  tables_get(struct tables *t, uint64_t off, struct table **ret);
/* A table that is not read but begins as zeroes, dirty. 0, -EAGAIN (no clean one to give up, or the old one is still being read), -ENOMEM. */
int  tables_make(struct tables *t, uint64_t off, struct table **ret);
void tables_forget(struct tables *t, uint64_t off);     /* not needed any more, dirty or not; not pinned */
void table_pin(struct table *t);                        /* stays where it is until as many unpins */
void table_unpin(struct table *t);
void table_dirty(struct table *t);
void table_loaded(struct table *t, int res);            /* a read of its iov ended: bytes (again if iov is not empty) or -errno */
/* All who waited for the table at off have asked again: an error that none of them took is not for who comes later. */
void tables_settle(struct tables *t, uint64_t off);
/* Add a copy of each dirty table to p, in order of offset; they are clean then. -ENOMEM: nothing was added. */
int  tables_gather(struct tables *t, struct plan *p);
void tables_gathered(struct tables *t, int err);        /* the plan ran; err: what it held is dirty again */
bool tables_any_dirty(const struct tables *t);

/* ---- disk.c, request.c ---- */

#define DISK_LOADS 8            /* tables read from the file at once */

/* A table on its way in. */
struct table_load {
	struct disk *disk;
	struct table *table;            /* NULL: free */
	unsigned tries;                 /* fruitless results in a row */
	struct loop_op op;
};

struct disk {
	/* const after disk_open() */
	struct image *image;
	const struct image *shown;      /* what the user named: image, or what lies below its overlay */
	enum cache_mode cache;
	bool discard;
	struct gate *gate;              /* NULL: no faults, limits, policy, log */
	struct loop *home;

	/* home loop */
	unsigned inflight;              /* requests, tables on their way in, and plans that run */
	bool idle;                      /* inflight == 0 */
	bool writethrough;
	bool flush_failed;
	struct log_limit limit;

	/* home loop; formats with a map: request.c */
	struct work *free, *stalled;    /* not in use; to be tried again when a table or a plan is through */
	struct blk_req *flushing, *flush_next;  /* answered by the plan that runs; by the one after it */
	bool planning, plan_wanted, draining;   /* draining: waiting for transfers of before the plan */
	struct plan plan;
	int plan_err;                   /* it could not be gathered; when it ran: how it ended */
	struct loop_op plan_op;
	struct loop_timer tidy;         /* a plan for its own sake: space that was set free */
	struct table_load load[DISK_LOADS];
	unsigned epoch, moving[2];      /* transfers by the epoch (its lowest bit) they were started in */
	size_t fill_bytes;              /* buffers of copy-on-write in use */
	size_t z_bytes;                 /* buffers of clusters that are being unpacked; these wait for nobody */
	const struct image *z_image;    /* whose cluster z_data is; NULL: nobody's */
	uint64_t z_pos;
	void *z_data;
};

/* disk.c; home loop. The host could not sync: no flush succeeds from now on. */
void disk_sync_failed(struct disk *d, int err);
/* request.c; home loop. r is checked; moved(r, err) when all of it is done. */
void map_submit(struct disk *d, struct blk_req *r, void (*moved)(struct blk_req *r, int err));
/* Everything so far to the medium, metadata too; done(r, err) in r->step. */
void map_flush(struct disk *d, struct blk_req *r);
void map_free(struct disk *d);          /* drained; any thread */

/* ---- file.c ---- */

int  file_open(struct host_file *f, const char *path, bool readonly, bool direct, struct error *err);
/* The same of a file that is open already, taken over also in failure. */
int  file_adopt(struct host_file *f, int fd, const char *path, bool readonly, struct error *err);
/* Open name under the directory dir, read-only: no symbolic links, nothing outside. Descriptor or -errno. */
int  confined_open(const char *dir, const char *name);
int  file_prepare(struct host_file *f, struct error *err);      /* locked: size and data paths */
void file_close(struct host_file *f);
/* The file has end bytes or more from now on (more, so that the next calls are free). 0 or -errno. Any one thread. */
int  file_grow(struct host_file *f, uint64_t end);
/* Read [off, off+len) as far as the file goes, O_DIRECT or not. Bytes or -errno. Any thread that may wait. */
ssize_t file_peek(const struct host_file *f, void *buf, size_t len, uint64_t off);
/* Do r->op on host bytes [pos, pos+left) of f; step(r, 0 or -errno) when all of it is done. Home loop. */
void file_submit(struct host_file *f, struct blk_req *r);
void file_sync(struct host_file *f, struct blk_req *r);         /* fdatasync, whatever r->op */

/* file.c, for bounce.c */
struct host_file *file_of(const struct blk_req *r);
bool file_retry(struct blk_req *r, int res);    /* a result that only means "try again", and may still be tried */
int  file_at_end(struct blk_req *r);            /* a read met the end of the file: 0 zero-fill, or -EIO */

/* bounce.c; home loop. */
bool bounce_wanted(const struct host_file *f, const struct blk_req *r);
void bounce_submit(struct host_file *f, struct blk_req *r);

/* lock.c: 0, or -EBUSY with words. Held until the descriptor is closed. Main thread. */
int lock_image(int fd, const char *path, bool readonly, struct error *err);
#endif
