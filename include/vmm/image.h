#ifndef VMM_IMAGE_H
#define VMM_IMAGE_H
/*
 * Disk images as files: opened, read, written, made, checked, without a VM. Everything here waits for
 * the host; one thread at a time per image and its chain. block.h is the same images under a running guest.
 *
 * All functions return 0 or -errno; with words in err where they take one (err may be NULL).
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct error;
struct facts;
struct host_file;
struct image;

#define IMAGE_SIZE_MAX (64ull << 40)    /* largest guest size of any format: 64 TiB */
#define IMAGE_CHAIN_MAX 8               /* most files in a backing chain, the first included */

/* Where the bytes of a backing image come from: opened by somebody who may (a sandboxed tool asks its parent). */
struct image_opener {
	/* Returns a descriptor (read-only, O_CLOEXEC) or -errno with words. name is as the image spells it,
	 * from: the path of the image that names it. */
	int (*open)(const struct image_opener *o, const char *name, const char *from, struct error *err);
};

struct image_how {
	const char *format;             /* a name of image_formats(); NULL: raw. Never guessed */
	bool readonly;
	bool direct;                    /* O_DIRECT for data */
	bool share;                     /* do not lock: only with readonly, only to look */
	bool alone;                     /* do not open the backing image: holes read as zeroes */
	bool repair;                    /* open for writing although dirty or corrupt: image_check() will mend it */
	const char *snapshot;           /* id or name: the disk as it was then; only with readonly. NULL: as it is */
	const char *backing_dir;        /* "allow": backing files may lie under this directory; NULL: an image with one is refused */
	const struct image_opener *opener;      /* instead of backing_dir; NULL: by backing_dir */
	int fd;                         /* > 0: the file, already open; it is taken over also in failure. path then only names it */
};

enum image_prealloc { PREALLOC_OFF, PREALLOC_METADATA, PREALLOC_FALLOC, PREALLOC_FULL };

struct image_create {
	const char *format;
	uint64_t size;                  /* bytes; rounded up to 512 */
	enum image_prealloc prealloc;
	uint32_t cluster;               /* 0: the format's default */
	const char *backing, *backing_format;   /* both or neither; stored as given */
	unsigned version;               /* qcow2: 2 or 3; 0: 3 */
	unsigned refcount_bits;         /* qcow2: 1 to 64; 0: 16 */
	bool extended_l2;               /* qcow2: subclusters */
	bool zstd;                      /* qcow2: compression_type=zstd */
	bool lazy_refcounts;            /* refused by every format: here to be refused with words */
	bool fixed;                     /* vdi: all blocks there from the start */
	bool overwrite;                 /* an existing file is emptied first (it is locked before) */
	int fd;                         /* > 0: make it in this open file; taken over also in failure */
};

enum extent_kind {
	EXT_DATA,                       /* bytes of the file */
	EXT_ZERO,                       /* zeroes, whatever the backing image has */
	EXT_HOLE,                       /* nothing here: the backing image's bytes, zeroes without one */
	EXT_COMPRESSED,                 /* one cluster, compressed */
};

/* One stretch as image_status() sees it through the chain. */
struct image_status {
	enum extent_kind kind;          /* EXT_HOLE: no image of the chain has it; a hole of a raw file is EXT_ZERO */
	unsigned depth;                 /* which image: 0 the first, 1 its backing … */
	uint64_t len;                   /* bytes from the offset asked for that this holds for */
	uint64_t host;                  /* EXT_DATA, EXT_COMPRESSED: offset in that image's file */
};

/* The same for a thread that fetches the bytes itself: image_piece() says where they are, image_fetch() gets them. */
struct image_piece {
	enum extent_kind kind;          /* a hole of the file is EXT_ZERO, whatever the format */
	unsigned depth;
	uint64_t len, host;             /* as in image_status; EXT_COMPRESSED: to the end of the cluster at most */
	/* image.c's */
	const struct image *owner;
	struct host_file *file;
	uint32_t csize, skip;
};

/* Buffers of a thread that fetches; zero-initialise. */
struct image_scratch {
	void *z, *cluster;
	size_t z_room, cluster_room;
};

/* What a check found. */
struct image_check {
	uint64_t corruptions;           /* wrong: data may be lost or mixed up */
	uint64_t leaks;                 /* clusters in use by nobody: wasted space, no danger */
	uint64_t fixed_corruptions, fixed_leaks;
	uint64_t errors;                /* places the check could not look at */
	uint64_t clusters, allocated, fragmented, compressed;   /* guest clusters: in all, with data, out of order, compressed */
	uint64_t end;                   /* end of the last cluster in use, bytes */
	unsigned words;                 /* complaints printed so far */
	void (*complain)(struct image_check *c, const char *text);      /* each finding in words; may be NULL */
	void *arg;
};
enum image_repair { REPAIR_NONE, REPAIR_LEAKS, REPAIR_ALL };

/* An internal snapshot. */
struct image_snapshot {
	char id[64], name[256];
	uint64_t size;                  /* of the disk then */
	uint64_t vm_state;              /* bytes */
	uint64_t at_ns;                 /* when, since 1970 */
	uint64_t vm_clock_ns;
};

const char *const *image_formats(void);         /* names, NULL-terminated */
bool image_can_write(const char *format);       /* read-write, or only converted from */
bool image_can_create(const char *format);
/* What the first bytes look like, "raw" where like nothing: to tell a person, never to choose how to write. */
const char *image_guess(const void *head, size_t n);

/*
 * What opens a backing file where there is no opener; for one that keeps the same rules. dir: "allow": below the directory
 * of first_path, the first image of the chain, or a directory. name: as the image at path from spells it. first: a descriptor
 * of the first image, whose owner could read the file anyway, or everybody may. A descriptor (read-only, O_CLOEXEC) or -errno.
 */
int  image_open_backing_file(const char *dir, const char *name, const char *from, const char *first_path, int first,
	struct error *err);

int  image_open(struct image **ret, const char *path, const struct image_how *how, struct error *err);
/* Writes out all metadata first. -errno where that failed; the image is gone either way. NULL is fine. */
int  image_close(struct image *i);

uint64_t image_size(const struct image *i);             /* guest bytes, multiple of 512 */
const char *image_path(const struct image *i);
const char *image_format(const struct image *i);
bool     image_readonly(const struct image *i);
uint32_t image_cluster(const struct image *i);          /* bytes that are allocated as one; 0: raw */
struct image *image_backing(const struct image *i);     /* NULL: none, or not opened */
/* What the image names as its backing file and format; NULL: none. */
const char *image_backing_name(const struct image *i);
const char *image_backing_format(const struct image *i);

/* Any offset and length inside the disk (-EINVAL else), also not multiples of 512. */
int  image_read(struct image *i, void *buf, size_t len, uint64_t off);
int  image_write(struct image *i, const void *buf, size_t len, uint64_t off);
int  image_zero(struct image *i, uint64_t off, uint64_t len, bool unmap);       /* reads as zeroes then */
int  image_discard(struct image *i, uint64_t off, uint64_t len);                /* whole clusters: space is given back */
int  image_flush(struct image *i);                      /* everything so far is on the medium */
int  image_status(struct image *i, uint64_t off, uint64_t len, struct image_status *s);
int  image_piece(struct image *i, uint64_t off, uint64_t len, struct image_piece *p);
/* The first len bytes of a piece, len <= p->len. Any thread, while the image is open and does not change. 0 or -errno. */
int  image_fetch(const struct image_piece *p, struct image_scratch *s, void *buf, size_t len);
void image_scratch_free(struct image_scratch *s);
/* One whole cluster at off, compressed by the image's method; -EOPNOTSUPP; stored plainly where that is no longer. */
int  image_write_compressed(struct image *i, const void *cluster, uint64_t off);
/* The same for threads that compress: bytes of z[cluster], 0: store it plainly. Any thread, while the image is open. */
size_t image_compress(const struct image *i, const void *cluster, void *z);
bool image_compresses(const struct image *i);           /* image_compress() and image_write_packed() are there */
int  image_write_packed(struct image *i, void *z, size_t n, uint64_t off);      /* what image_compress() gave, 1 or more; z[cluster] is scribbled on */

int  image_create(const char *path, const struct image_create *c, struct error *err);
int  image_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, bool shrink, struct error *err);
int  image_check(struct image *i, enum image_repair repair, struct image_check *c, struct error *err);
void image_describe(const struct image *i, struct facts *f);    /* format's own facts, for info --json */
uint64_t image_disk_usage(const struct image *i);       /* bytes the file takes on the host */

/* Internal snapshots; -EOPNOTSUPP with words where the format has none. which: id or name. */
int  image_snapshots(struct image *i, struct image_snapshot **list, unsigned *n, struct error *err);    /* free(*list) */
int  image_snapshot_create(struct image *i, const char *name, struct error *err);
int  image_snapshot_apply(struct image *i, const char *which, struct error *err);
int  image_snapshot_delete(struct image *i, const char *which, struct error *err);

/* Change what the header names (rebase); contents are the caller's business. NULL, NULL: none. */
int  image_set_backing(struct image *i, const char *name, const char *format, struct error *err);
#endif
