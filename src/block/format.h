#ifndef BLOCK_FORMAT_H
#define BLOCK_FORMAT_H
/*
 * Inside src/block. A disk is a format over one host file:
 *
 *   disk.c    keys, the format table, ranges, read-only, flush rules, in-flight count
 *   raw.c     a format: guest offset = host offset
 *   file.c    the host file: what may be one, its size, every data path
 *   bounce.c  O_DIRECT transfers that the file system would refuse
 *   lock.c    image locks shared with QEMU
 *
 * A request travels down as the blk_req it came as: pos and left say what is still to do in the host
 * file, step() is where the file reports. A format with a map of its own sets pos by it before it
 * hands the request to file_submit().
 */
#include <stddef.h>
#include <sys/types.h>
#include "vmm/block.h"
#include "vmm/log.h"

#define SECTOR 512u

enum cache_mode { CACHE_WRITEBACK, CACHE_NONE, CACHE_WRITETHROUGH, CACHE_UNSAFE };

/* One open host file or block device. */
struct host_file {
	/* const after file_open() */
	int fd;
	bool blockdev, readonly;
	uint64_t size;                  /* bytes as the host says */
	uint32_t align;                 /* O_DIRECT: offsets and lengths; else 1 */
	uint32_t mem_align;             /* O_DIRECT: buffers; else 1 */
	uint32_t physical;              /* block size the host prefers, 512 to 64 KiB */
	struct loop *home;

	/* home loop */
	bool inline_read, inline_write; /* small transfers are tried at once, without the ring */
	int inline_flags;               /* RWF_NOWAIT, or 0 where memory is the medium */
	bool no_discard, no_punch, no_zero_range;       /* the file refused it once */
	void *bounce;                   /* O_DIRECT: BOUNCE_SIZE bytes, aligned */
	struct blk_req *bounce_first, *bounce_last;     /* first owns the buffer, the others wait */
	uint64_t bounce_base;
	size_t bounce_span, bounce_got;
};

#define BOUNCE_SIZE (64u << 10)

struct disk {
	/* const after disk_open() */
	const struct format_ops *fmt;
	char *path;
	enum cache_mode cache;
	bool discard;
	uint64_t size;                  /* what the guest sees */
	struct host_file file;

	/* home loop */
	unsigned inflight;
	bool idle;                      /* inflight == 0 */
	bool writethrough;
	bool flush_failed;
	struct log_limit limit;
};

/* One const table per format, listed in disk.c. */
struct format_ops {
	const char *name;
	/* Fill d->size from the open, locked file. chosen: the user named the format. Main thread. */
	int (*open)(struct disk *d, bool chosen, struct error *err);
};
extern const struct format_ops raw_format;

/* file.c */
int  file_open(struct host_file *f, const char *path, bool readonly, bool direct, struct error *err);
int  file_prepare(struct host_file *f, struct error *err);      /* locked: size and data paths */
void file_close(struct host_file *f);
/* Read [off, off+len) as far as the file goes, O_DIRECT or not. Bytes or -errno. Main thread, at open. */
ssize_t file_peek(const struct host_file *f, void *buf, size_t len, uint64_t off);
/* Do r->op on host bytes [pos, pos+left); step(r, 0 or -errno) when all of it is done. Home loop. */
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
