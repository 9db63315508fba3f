#ifndef CLI_REPLAY_H
#define CLI_REPLAY_H
/*
 * Inside vmm disk replay.
 *
 *   replay.c        options; which states of the disk are made, and what is done with them
 *   replay_log.c    reading a write log, which is believed nothing
 *   replay_image.c  raw images: clones, and the entries of a log put into them
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct error;

/* argv past "replay"; 0, 1: it could not be done, 2: --exec failed for an image. Main thread. */
int disk_replay(int argc, char **argv);

/* ---- replay_log.c; 0 or -errno with words ---- */

struct replay_log {
	int fd;
	const char *path;
	uint64_t bytes;                 /* of the file */
	uint64_t entries;
	uint32_t block;
};

struct replay_entry {
	uint64_t off, len;              /* bytes of the disk; 0, 0 where it has none */
	uint64_t data;                  /* offset in the log; 0: a discard, or nothing */
	uint32_t flags;                 /* WRITELOG_* */
	uint32_t mark_len;              /* bytes of a mark's text */
};

/* Where reading has come to; starts as LOG_START. */
struct replay_cursor {
	uint64_t index;                 /* entries read so far */
	uint64_t at;
};
#define LOG_START ((struct replay_cursor){ 0, 0 })

int  log_open(struct replay_log *l, const char *path, struct error *err);
void log_close(struct replay_log *l);
/*
 * The next entry: 1, 0 after the last, or -errno with words where it makes no sense, reaches past the end of the file or
 * past size, the disk's (UINT64_MAX: not known yet). mark: NULL, or WRITELOG_MARK_MAX bytes for a mark's text.
 */
#define WRITELOG_MARK_MAX 4096
int  log_next(const struct replay_log *l, struct replay_cursor *c, uint64_t size, struct replay_entry *e, void *mark,
	struct error *err);

/* ---- replay_image.c; descriptors of raw images, 0 or -errno with words ---- */

/* All of from (its first size bytes) into the new empty file to, which gets that size; holes stay holes. from -1: all zeroes. */
int raw_clone(int from, int to, uint64_t size, struct error *err);
int raw_size(int fd, uint64_t *size, struct error *err);        /* of a file or block device; whole sectors */
/* [skip, skip + len) of what an entry writes or discards. */
int raw_apply(int fd, const struct replay_log *l, const struct replay_entry *e, uint64_t skip, uint64_t len,
	struct error *err);
#endif
