#ifndef VMM_BLOCK_H
#define VMM_BLOCK_H
/*
 * Disks. A format is a map from guest offsets to host offsets; data moves through the loop's ring
 * straight between guest RAM and the file.
 */
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>
#include "vmm/loop.h"
struct disk;
struct error;
struct facts;
struct opts;

enum blk_op { BLK_READ, BLK_WRITE, BLK_FLUSH, BLK_DISCARD, BLK_ZERO };

#define BLK_IOVS 128            /* most iovecs of one request */

/* Embed it, zero-initialised. The requester keeps iov and the buffers behind it until done(). */
struct blk_req {
	enum blk_op op;
	bool unmap;                     /* BLK_ZERO: space may be given back */
	uint64_t off, len;              /* bytes, multiples of 512; the disk checks the range */
	struct iovec *iov;              /* BLK_READ, BLK_WRITE: exactly len bytes; the disk consumes it */
	unsigned cnt;                   /* at most BLK_IOVS */
	void (*done)(struct blk_req *r, int err);       /* home loop; 0 or -errno; whole request, never partial */
	/* src/block */
	struct disk *disk;
	struct host_file *file;         /* that pos is in */
	struct work *work;              /* formats with a map: request.c */
	struct held *held;              /* gate.c */
	struct blk_req *next;
	void (*step)(struct blk_req *r, int err);
	struct loop_op io;
	struct iovec one;
	uint64_t pos, left;             /* host offset and bytes still to do */
	unsigned tries;
};

/*
 * Open an image by the --disk keys file=, format=, ro or readonly, cache=, discard=, and those of gate.h (faults,
 * limits, the write log); the caller asks for its own keys and then calls opts_end(). The image is locked (QEMU's bytes) before a byte of it is
 * read, and its format is what format= says, or raw: never what its bytes look like. Main thread.
 */
int  disk_open(struct disk **ret, struct opts *o, struct error *err);
void disk_close(struct disk *d);                /* main thread, drained; writes out what is not flushed; NULL is fine */
void disk_set_home(struct disk *d, struct loop *home);  /* main thread, before the first request */
/*
 * werror=stop and its like: fn(arg, true) when a request failed and is kept until the host can do it, so that
 * the machine stops; fn(arg, false) when it may go on. Home loop; set by the main thread, before the first request.
 */
void disk_set_hold(struct disk *d, void (*fn)(void *arg, bool on), void *arg);

/* Any thread. */
uint64_t disk_size(const struct disk *d);       /* bytes, multiple of 512; disk_refresh_size() changes it */
bool disk_readonly(const struct disk *d);
bool disk_can_discard(const struct disk *d);
bool disk_can_grow(const struct disk *d);       /* disk_refresh_size() may find it larger: raw images */
bool disk_has_writeback(const struct disk *d);  /* false: cache=writethrough, every write reaches the medium */
uint32_t disk_block_size(const struct disk *d); /* what the host file wants aligned, 512 or more */

/*
 * Home loop only. Errors of done(): -EINVAL outside the disk, -EROFS read-only, -EOPNOTSUPP discard
 * that the host file cannot do, -ENOSPC, -EIO. Once the host could not sync, every later flush fails: the
 * kernel reports lost writes once only.
 */
void disk_submit(struct disk *d, struct blk_req *r);    /* reaches the kernel at turn end; done() may run at once */
void disk_drain(struct disk *d);                        /* returns with nothing in flight */
/* 1: the host file has grown, and disk_size() with it; 0: it has not; -ERANGE: it is smaller than the disk; -errno. */
int  disk_refresh_size(struct disk *d);
void disk_set_writethrough(struct disk *d, bool on);    /* on: a write is done when it is on the medium */

void disk_describe(const struct disk *d, struct facts *f);      /* main thread */
#endif
