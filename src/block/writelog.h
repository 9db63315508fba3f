#ifndef BLOCK_WRITELOG_H
#define BLOCK_WRITELOG_H
/*
 * A log of what a guest wrote, in the format of the kernel's dm-log-writes (drivers/md/dm-log-writes.c), so
 * that its replay-log and `vmm disk replay` both read it. Little-endian:
 *
 *      block 0         struct writelog_super
 *      then, nr_entries times
 *      one block       struct writelog_entry; after it, in the same block, data_len bytes of a mark's text
 *      nr_sectors      the data, unless it is a discard
 *
 * A block is sectorsize bytes, and so is the unit of sector and nr_sectors.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct blk_req;
struct error;
struct loop;

#define WRITELOG_MAGIC   0x6a736677736872ull
#define WRITELOG_VERSION 1
#define WRITELOG_BLOCK   512u           /* sectorsize of what we write */

enum {
	WRITELOG_FLUSH = 1,
	WRITELOG_FUA = 2,
	WRITELOG_DISCARD = 4,
	WRITELOG_MARK = 8,
	WRITELOG_METADATA = 16,
	WRITELOG_FLAGS = 31,
};

struct writelog_super {
	uint64_t magic, version, nr_entries;
	uint32_t sectorsize;
} __attribute__((packed));

struct writelog_entry {
	uint64_t sector, nr_sectors, flags, data_len;
};

#define WRITELOG_DATA_MAX (64u << 20)   /* copies of guest data in memory; also the largest single write */

struct writelog;
struct writelog_item;

/* Main thread. Makes the file, or empties it if it is a log already; anything else is refused. Locked like an image. */
int  writelog_open(struct writelog **ret, const char *path, struct error *err);
void writelog_free(struct writelog *w);         /* settled; NULL is fine */
const char *writelog_path(const struct writelog *w);
uint64_t writelog_entries(const struct writelog *w);    /* in the file; any thread */
int  writelog_error(const struct writelog *w);          /* why logging ended, -errno; 0: it goes on. Any thread */

/*
 * Home loop. room() is called when writelog_room() may have become true. From writelog_begin(), when the request
 * goes to the image, the log has its own copy of the data; writelog_data() is it, for the image to be written
 * from. writelog_end(): it is through; failed requests leave nothing in the log.
 */
void writelog_set_home(struct writelog *w, struct loop *home, void (*room)(void *arg), void *arg);
bool writelog_room(const struct writelog *w, const struct blk_req *r);
/* 0 and *ret (NULL: nothing to log), or -ENOMEM, or -EIO for a write of more than WRITELOG_DATA_MAX. */
int  writelog_begin(struct writelog *w, const struct blk_req *r, struct writelog_item **ret);
void *writelog_data(const struct writelog_item *i);     /* NULL: no data */
void writelog_end(struct writelog *w, struct writelog_item *i, bool ok, bool fua);
void writelog_settle(struct writelog *w);       /* nothing is begun: returns with all of it in the file */
#endif
